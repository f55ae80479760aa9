import re

import numpy as np
import pytest
from comparing import apply_and_compare, build, constant, ops

from graphopt.passes.merge_parallel_convs import MergeParallelConvs
from graphopt.passes.remove_dead_nodes import RemoveDeadNodes

KINDS = {"float": np.float32, "float16": np.float16}
CHANNELS = 4


def _weight(*sizes, out=CHANNELS, group=1, seed=0):
    shape = (out, CHANNELS // group, *sizes)
    return np.random.default_rng([seed, *sizes]).standard_normal(shape) / np.sqrt(np.prod(shape[1:]))


def _merge(steps, opset=17, kind="float", axes=2, inputs=None, outputs=None, **constants):
    sizes = ",".join(["N", str(CHANNELS), "9", "8", "7"][: axes + 2])
    dtype = KINDS[kind]
    text = (
        f'<ir_version: 8, opset_import: ["" : {opset}]> g ({inputs or f"{kind}[{sizes}] x"}) => '
        f"({outputs or kind + '[' + ','.join('ABCDE'[: axes + 2]) + '] y'}) {{ {steps} }}"
    )
    constants = {name: np.asarray(value).astype(dtype) for name, value in constants.items()}
    result, model = apply_and_compare(text, MergeParallelConvs(), constants=constants)
    assert apply_and_compare(model, MergeParallelConvs())[0].rewrites == 0
    assert apply_and_compare(model, RemoveDeadNodes())[0].rewrites == 0
    return ops(model), [skip.reason for skip in result.skipped], model


PAIR = "a = Conv <pads = [1, 1, 1, 1]> (x, v) c = Conv (x, w) y = Add (a, c)"


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 21, 23])
def test_merges_in_every_opset(opset):
    assert _merge(PAIR, opset, v=_weight(3, 3), w=_weight(1, 1))[0] == {"Conv": 1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_merges_a_small_kernel_into_a_large_one(axes, group, kind):
    pads = ", ".join(["1"] * (2 * axes))
    left, skipped, model = _merge(
        f"a = Conv <pads = [{pads}], group = {group}> (x, v, b) c = Conv <group = {group}> (x, w) y = Add (a, c)",
        kind=kind,
        axes=axes,
        v=_weight(*[3] * axes, group=group),
        w=_weight(*[1] * axes, group=group),
        b=np.arange(CHANNELS),
    )
    assert (left, skipped) == ({"Conv": 1}, [])
    assert len(model.graph.initializer) == 2


@pytest.mark.parametrize("scale", ["c4 = Mul (x, k)", "c4 = Mul (k, x)"])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize(
    "add",
    [
        "d = Add (a, c) e = Add (c4, s) y = Add (d, e)",
        "d = Add (a, c4) e = Add (c, d) y = Add (s, e)",
        "e = Add (s, c4) y = Sum (a, e, c)",
        "y = Sum (s, c, c4, a)",
    ],
)
def test_merges_a_block_of_repvgg_with_what_is_left_of_its_batch_norm(add, group, scale):
    left, skipped, _ = _merge(
        f"a = Conv <pads = [1, 1, 1, 1], group = {group}> (x, v, b) c = Conv <group = {group}> (x, w, b) {scale} {add}",
        v=_weight(3, 3, group=group),
        w=_weight(1, 1, group=group),
        b=np.arange(CHANNELS),
        k=np.arange(1, 5).reshape(1, 4, 1, 1),
        s=np.arange(4).reshape(4, 1, 1),
    )
    assert (left, skipped) == ({"Conv": 1}, [])


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("order", ["a, x", "x, a"])
def test_merges_the_input_itself(size, order):
    conv = f"a = Conv <pads = [{', '.join([str(size // 2)] * 4)}]> (x, w)"
    assert _merge(f"{conv} y = Add ({order})", w=_weight(size, size))[0] == {"Conv": 1}
    assert _merge(f"{conv} y = Sum ({order}, x)", w=_weight(size, size))[0] == {"Conv": 1}


@pytest.mark.parametrize(
    ("one", "other", "sizes"),
    [
        ("strides = [2, 2], pads = [1, 1, 1, 1]", "strides = [2, 2]", ((3, 3), (1, 1))),
        ("dilations = [2, 3], pads = [2, 3, 2, 3]", "dilations = [1, 5]", ((3, 3), (1, 1))),
        ("dilations = [2, 2], pads = [4, 4, 4, 4]", "dilations = [2, 2], pads = [2, 2, 2, 2]", ((5, 5), (3, 3))),
        ("pads = [0, 1, 2, 1]", "pads = [0, 0, 0, 0]", ((3, 3), (1, 1))),
        ("pads = [2, 1, 0, 1]", "", ((3, 3), (1, 1))),
        ('auto_pad = "SAME_UPPER"', 'auto_pad = "SAME_UPPER"', ((4, 3), (1, 1))),
        ('auto_pad = "SAME_LOWER"', 'auto_pad = "VALID"', ((4, 3), (1, 1))),
        ("pads = [1, 1, 1, 1]", "pads = [1, 0, 1, 0]", ((3, 3), (3, 1))),
        ("pads = [1, 0, 1, 0]", "pads = [0, 1, 0, 1]", ((3, 1), (1, 3))),  # small enough to grow
        ("", "", ((3, 3), (3, 3))),
    ],
)
def test_lays_kernels_on_a_common_grid(one, other, sizes):
    steps = f"a = Conv <{one}> (x, v) c = Conv <{other}> (x, w) y = Add (c, a)".replace("<>", "")
    left, skipped, _ = _merge(steps, v=_weight(*sizes[0]), w=_weight(*sizes[1], seed=1))
    assert (left, skipped) == ({"Conv": 1}, [])


def test_merges_what_stands_beside_a_term_of_another_input():
    conv = "a = Conv <pads = [1, 1, 1, 1]> (x, v) z = Sin (x) c = Conv (x, w) "
    for add in ("d = Add (a, z) y = Add (d, c)", "d = Add (a, c) y = Add (z, d)", "y = Sum (c, z, a)"):
        left, _, _ = _merge(conv + add, v=_weight(3, 3), w=_weight(1, 1))
        assert left["Conv"] == left["Add"] + left["Sum"] == 1


def test_merges_each_of_two_inputs_apart():
    steps = (
        "z = Sin (x) a = Conv <pads = [1, 1, 1, 1]> (x, v) b = Conv <pads = [1, 1, 1, 1]> (z, v) c = Conv (x, w) "
        "d = Conv (z, w) e = Add (a, b) f = Add (c, d) g = Add (e, f) h = Add (g, z) y = Add (h, x)"
    )
    left, _, _ = _merge(steps, v=_weight(3, 3), w=_weight(1, 1))
    assert left == {"Sin": 1, "Conv": 2, "Add": 1}


def test_tries_the_largest_kernel_first():
    steps = (
        "a = Conv <pads = [1, 0, 1, 0]> (x, u) b = Conv <pads = [0, 1, 0, 1]> (x, v) "
        "c = Conv <pads = [1, 1, 1, 1]> (x, w) d = Add (a, b) y = Add (d, c)"
    )
    many = 40
    inputs, weights = f"float[N,{CHANNELS},9,8] x", {"u": (3, 1), "v": (1, 3), "w": (3, 3)}
    constants = {name: _weight(*sizes, out=many) for name, sizes in weights.items()}
    assert _merge(steps, inputs=inputs, **constants)[0] == {"Conv": 1}


def test_rounds_once():
    steps = "a = Conv (x, u) b = Conv (x, v) c = Conv (x, w) d = Add (a, b) y = Add (d, c)"
    weights = {name: _weight(1, 1, seed=seed).astype(np.float16) for seed, name in enumerate("uvw")}
    _, _, model = _merge(steps, kind="float16", **weights)
    expected = sum(weight.astype(np.float64) for weight in weights.values()).astype(np.float16)
    stored = [constant(model, each.name) for each in model.graph.initializer if len(each.dims) == 4]
    np.testing.assert_array_equal(stored[0], expected)


SAME = 'auto_pad = "SAME_UPPER"'
DILATED = "a = Conv <dilations = [2, 2], pads = [2, 2, 2, 2]> (x, v)"


@pytest.mark.parametrize(
    ("steps", "more", "words"),
    [
        (f"{PAIR} z = Relu (c)", {"outputs": "float[A,B,C,D] y, float[E,F,G,H] z"}, "something else reads c"),
        (PAIR, {"outputs": "float[A,B,C,D] y, float[E,F,G,H] a"}, "something else reads a"),
        ("n = Sin (w) " + PAIR.replace("(x, w)", "(x, n)"), {}, "not constant"),
        ("a = Conv <pads = [1, 1, 1, 1], group = 2> (x, g) c = Conv (x, w) y = Add (a, c)", {}, "groups"),
        (
            "a = Conv <pads = [2, 0, 0, 2]> (x, v) c = Conv (x, o) y = Add (a, c)",
            {"o": _weight(1, 1, out=1)},
            "channels",
        ),
        (
            f"{DILATED} c = Conv <pads = [1, 1, 1, 1]> (x, v) y = Add (a, c)",
            {},
            "dilations differ",
        ),
        (
            f"{DILATED} c = Conv <pads = [1, 1, 0, 0]> (x, t) y = Add (a, c)",
            {"t": _weight(2, 2)},
            "dilations differ",
        ),
        (
            "a = Conv <dilations = [2, 1], pads = [3, 1, 1, 1]> (x, v) c = Conv (x, w) y = Add (a, c)",
            {},
            "less than the dilation",
        ),
        (
            "a = Conv <strides = [2, 2], pads = [1, 1, 0, 0]> (x, v) c = Conv <strides = [2, 2]> (x, w) y = Add (a, c)",
            {"inputs": "float[N,4,8,8] x"},
            "do not make up",
        ),
        (
            f"a = Conv <{SAME}, strides = [2, 2]> (x, v) c = Conv <{SAME}, strides = [2, 2]> (x, w) y = Add (a, c)",
            {},
            "depend on the size",
        ),
        (
            "a = Conv <pads = [1, 0, 1, 0]> (x, u) c = Conv <pads = [0, 1, 0, 1]> (x, t) y = Add (a, c)",
            {"u": _weight(3, 1, out=100), "t": _weight(1, 3, out=100)},
            "would grow the model by 4800 bytes",
        ),
        ("a = Conv <pads = [1, 1, 1, 1]> (x, v) c = Mul (x, k) y = Add (a, c)", {"k": np.ones((8,))}, "not those"),
        (
            "z = Mul (x, q) a = Conv (z, h) c = Mul (z, k) y = Add (a, c)",
            {"q": 1e-5, "h": np.full((4, 4, 1, 1), 4e4), "k": 4e4, "kind": "float16"},
            "not be finite in float16",
        ),
    ],
)
def test_refuses_with_a_reason(steps, more, words):
    weights = {"v": _weight(3, 3), "w": _weight(1, 1), "g": _weight(3, 3, group=2)}
    constants = {name: value for name, value in weights.items() if re.search(rf"\b{name}\)", steps)}
    left, skipped, _ = _merge(steps, **{**constants, **more})
    assert left["Add"] == 1
    assert words in skipped[0]


@pytest.mark.parametrize(
    "steps",
    [
        "z = Sin (x) a = Conv (x, w) b = Conv (z, w) y = Add (a, b)",
        "a = Conv (x, w) y = Add (a, b)",
        "a = Conv (x, w) b = Conv (x, w) y = Mul (a, b)",
        "a = Conv (x, w) y = Concat <axis = 1> (a, x)",
    ],
)
def test_leaves_others_alone(steps):
    constants = {"b": np.arange(4).reshape(4, 1, 1)} if " b)" in steps and "b =" not in steps else {}
    left, skipped, _ = _merge(steps, w=_weight(1, 1), **constants)
    assert skipped == []
    assert left["Add"] + left["Mul"] + left["Concat"] == 1


def test_does_not_take_a_scale_along_the_width_for_one_along_the_channels():
    steps = "a = Conv <pads = [1, 1, 1, 1]> (x, v) c = Mul (x, k) y = Add (a, c)"
    left, skipped, _ = _merge(steps, inputs="float[N,4,4,4] x", v=_weight(3, 3), k=np.arange(4))
    assert left["Conv"] == left["Mul"] == 1
    assert "not those of the Conv" in skipped[0]


def test_keeps_a_weight_that_another_conv_reads():
    steps = f"{PAIR} z = Conv (y, v)"
    left, _, model = _merge(steps, outputs="float[A,B,C,D] y, float[E,F,G,H] z", v=_weight(3, 3), w=_weight(1, 1))
    assert left == {"Conv": 2}
    assert "v" in [each.name for each in model.graph.initializer]


def test_leaves_a_weight_that_a_caller_may_override_alone():
    model = build(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,4,9,8] x, float[4,4,1,1] w) => (float[A,B,C,D] y) '
        f"{{ {PAIR} }}",
        {"v": _weight(3, 3).astype(np.float32), "w": _weight(1, 1).astype(np.float32)},
    )
    result, _ = apply_and_compare(model, MergeParallelConvs())
    assert result.rewrites == 0
    assert "not constant" in result.skipped[0].reason


def test_works_inside_a_branch_but_not_across_its_border():
    steps = (
        "o = Conv (x, w) y = If (c) <then_branch = h1 () => (float[A,B,C,D] p) { a = Conv (x, w) p = Add (a, x) }, "
        "else_branch = h2 () => (float[A,B,C,D] q) { b = Conv (x, w) q = Add (b, o) }>"
    )
    left, _, _ = _merge(steps, inputs="bool c, float[N,4,9,8] x", w=_weight(1, 1))
    assert left == {"If": 1, "Conv": 3, "Add": 1}
