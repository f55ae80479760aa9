import numpy as np
import pytest
from comparing import apply_and_compare, build, constant, ops

from graphopt.passes.remove_dead_nodes import RemoveDeadNodes
from graphopt.passes.replace_concat import ReplaceConcat

FILL = "s = Constant <value = int64[4] {2, 3, 5, 5}> () f = ConstantOfShape <value = float[1] {%s}> (s) "


def _replace(steps, opset=17, kind="float", inputs=None, outputs=None, **constants):
    text = (
        f'<ir_version: 8, opset_import: ["" : {opset}]> g ({inputs or kind + "[2,2,5,5] x"}) => '
        f"({outputs or kind + '[A,B,C,D] y'}) {{ {steps} }}"
    )
    result, _ = apply_and_compare(text, ReplaceConcat(), constants=constants)
    again, model = apply_and_compare(text, ReplaceConcat(), RemoveDeadNodes(), ReplaceConcat(), constants=constants)
    assert again.rewrites == 0
    return ops(model), [skip.reason for skip in result.skipped], model


@pytest.mark.parametrize("opset", [9, 10, 11, 13, 17, 18, 21, 23])
@pytest.mark.parametrize("value", [0, -1.5])
@pytest.mark.parametrize("order", ["f, x", "x, f", "f, x, f"])
def test_replaces_what_constant_of_shape_fills(order, value, opset):
    left, skipped, _ = _replace(f"{FILL % value} y = Concat <axis = 1> ({order})", opset)
    assert (left, skipped) == ({"Pad": 1}, [])


@pytest.mark.parametrize("kind", ["float", "float16", "double", "int32", "int64", "int8", "uint8"])
@pytest.mark.parametrize("axis", [0, 2, -1])
def test_replaces_an_initializer_of_any_type_along_any_axis(axis, kind):
    names = {"float": "f4", "float16": "f2", "double": "f8", "int32": "i4", "int64": "i8", "int8": "i1", "uint8": "u1"}
    shape = [2, 2, 5, 5]
    shape[axis] = 4
    fill = np.full(shape, 3, names[kind])
    left, _, model = _replace(f"y = Concat <axis = {axis}> (x, f)", kind=kind, f=fill)
    assert left == {"Pad": 1}
    assert constant(model, "y/pads")[4 + axis % 4] == 4
    assert "f" not in [each.name for each in model.graph.initializer]


def test_replaces_a_fill_for_any_batch_size():
    steps = (
        "q = Shape (x) z = Constant <value = int64[1] {0}> () n = Gather (q, z) "
        "r = Constant <value = int64[3] {3, 5, 5}> () s = Concat <axis = 0> (n, r) f = ConstantOfShape (s) "
        "y = Concat <axis = 1> (x, f)"
    )
    assert _replace(steps, inputs="float[N,2,5,5] x")[0] == {"Pad": 1}


def test_replaces_all_that_share_a_fill():
    left, _, _ = _replace(f"{FILL % 1} a = Concat <axis = 1> (x, f) b = Concat <axis = 1> (f, x) y = Add (a, b)")
    assert left == {"Pad": 2, "Add": 1}


ONES = np.ones((2, 3, 5, 5), np.float32)


@pytest.mark.parametrize(
    ("steps", "more", "words"),
    [
        ("y = Concat <axis = 1> (f, x, h)", {"f": ONES, "h": 2 * ONES}, "more than one value"),
        (
            "q = Shape (x) f = ConstantOfShape (q) y = Concat <axis = 1> (f, x)",
            {"inputs": "float[2,N,5,5] x"},
            "at run time",
        ),
        (
            "y = Concat <axis = 1> (x, f)",
            {"f": ONES.astype(np.int32), "kind": "int32", "opset": 10},
            "no Pad for int32",
        ),
        ("y = Concat <axis = 1> (x, f)", {"f": ONES.astype(np.int16), "kind": "int16"}, "no Pad for int16"),
        ("y = Concat <axis = 1> (x, f)", {"f": 0.1 * ONES.astype("f8"), "kind": "double", "opset": 10}, "cannot hold"),
        ("t = Concat <axis = 1> (x, f) u = ReduceMax (f) y = Add (t, u)", {"f": ONES}, "nothing would go"),
        (
            f"{FILL % 0} y = Concat <axis = 1> (x, f)",
            {"outputs": "float[A,B,C,D] y, float[E,F,G,H] f"},
            "nothing would go",
        ),
    ],
)
def test_refuses_with_a_reason(steps, more, words):
    left, skipped, _ = _replace(steps, **more)
    assert left["Concat"] == 1
    assert words in skipped[0]


@pytest.mark.parametrize(
    ("steps", "more"),
    [
        ("y = Concat <axis = 1> (x, f)", {"f": np.arange(150).reshape(2, 3, 5, 5).astype(np.float32)}),
        ("y = Concat <axis = 1> (x, x, f)", {"f": ONES}),
        (
            "q = Shape (x) s = Slice (q, z, e) r = Concat <axis = 0> (s, m) y = Reshape (x, r)",
            {"z": np.array([0]), "e": np.array([3]), "m": np.array([-1])},
        ),
    ],
)
def test_leaves_others_alone(steps, more):
    left, skipped, _ = _replace(steps, **more)
    assert (left["Concat"], skipped) == (1, [])


def test_leaves_a_default_that_a_caller_may_override_alone():
    model = build(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[2,2,5,5] x, float[2,3,5,5] f) => (float[A,B,C,D] y) '
        "{ y = Concat <axis = 1> (x, f) }",
        {"f": ONES},
    )
    result, _ = apply_and_compare(model, ReplaceConcat())
    assert (result.rewrites, result.skipped) == (0, ())


def test_works_inside_branches():
    steps = (
        "y = If (c) <then_branch = h1 () => (float[A,B,C,D] p) { p = Concat <axis = 1> (x, f) }, "
        "else_branch = h2 () => (float[A,B,C,D] q) { q = Neg (x) }>"
    )
    assert _replace(steps, inputs="bool c, float[2,2,5,5] x", f=ONES)[0]["Pad"] == 1
