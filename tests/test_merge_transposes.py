import re
from collections import Counter

import numpy as np
import pytest
from comparing import apply_and_compare, build, constant, ops

from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.passes.merge_transposes import MergeTransposes

TO_NHWC, TO_NCHW = "Transpose <perm = [0, 2, 3, 1]>", "Transpose <perm = [0, 3, 1, 2]>"
CONSTANTS = {
    "bias": np.array([1, 2, 3], np.float32),
    "scalar": np.float32(2),
    "grid": np.arange(15, dtype=np.float32).reshape(5, 3),
    "low": np.float32(-0.5),
    "two": np.array([2], np.int64),
    "axis1": np.array([1], np.int64),
    "ends": np.array([2, 3, 4], np.int64),
    "starts": np.array([0, 1, 1], np.int64),
    "axes": np.array([-1, 1], np.int64),
    "pads": np.array([0, 1, 0, 2, 0, 3, 0, 0], np.int64),
    "repeats": np.array([1, 2, 1, 3], np.int64),
    "scales": np.array([0.5, 0.25, 0.125], np.float32),
    "zeros": np.array([1, 2, 3], np.int8),
    "k": np.array([2], np.int64),
}


def _apply(body, opset=17, x="float[N,3,4,5] x", y="float[A,B,C,D] y", feed=None, **constants):
    constants = {name: value for name, value in (CONSTANTS | constants).items() if re.search(rf"\b{name}\b", body)}
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> g ({x}) => ({y}) {{ {body} }}'
    result, model = apply_and_compare(text, MergeTransposes(), constants=constants, feed=feed)
    again = MergeTransposes().apply(load_model(model).graph, Context())
    assert again.rewrites == 0
    return result, model


def _between(step, opset=17, **constants):
    """Operators that are left of a step in NHWC of a model in NCHW."""
    inputs = "float[N,3,4,5] x, int64[1] q"
    result, model = _apply(f"a = {TO_NHWC} (x) {step} y = {TO_NCHW} (b)", opset, inputs, **constants)
    return ops(model), [skip.reason for skip in result.skipped]


def test_merges_two_into_one():
    result, model = _apply("a = Transpose <perm = [0, 2, 3, 1]> (x) y = Transpose <perm = [1, 0, 3, 2]> (a)")
    assert result.parts == {"pairs": 1}
    (node,) = model.graph.node
    assert list(node.attribute[0].ints) == [2, 0, 1, 3]


def test_removes_two_that_cancel():
    assert _apply(f"c = Abs (x) a = {TO_NHWC} (c) b = {TO_NCHW} (a) y = Neg (b)")[0].parts == {"pairs": 1}
    _, model = _apply(f"c = Abs (x) a = {TO_NHWC} (c) b = {TO_NCHW} (a) y = Neg (b)")
    assert ops(model) == {"Abs": 1, "Neg": 1}


def test_two_that_cancel_into_a_graph_output_become_an_identity():
    _, model = _apply("a = Transpose (x) y = Transpose (a)")
    assert ops(model) == {"Identity": 1}


def test_keeps_the_first_for_another_reader():
    _, model = _apply(f"a = {TO_NHWC} (x) b = Neg (a) y = {TO_NCHW} (a)", y="float[A,B,C,D] y, float[N,4,5,3] b")
    assert ops(model) == {"Transpose": 1, "Neg": 1, "Identity": 1}


def test_merges_a_long_chain():
    body = " ".join(f"t{i + 1} = Transpose <perm = [1, 2, 3, 0]> (t{i})" for i in range(101))
    _, model = _apply(f"t0 = Abs (x) {body} y = Neg (t101)")
    assert ops(model) == {"Abs": 1, "Transpose": 1, "Neg": 1}


def test_refuses_a_reversal_of_unknown_rank():
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[3,4] x, int64[R] s) => (y, float[4,3] z)'
    model = build(
        text + "{ a = Reshape (x, s) b = Transpose (a) c = Transpose <perm = [1, 0]> (x) y = Neg (b) z = Neg (c) }"
    )
    result = MergeTransposes().apply(load_model(model).graph, Context())
    assert (result.rewrites, [skip.reason for skip in result.skipped]) == (
        0,
        ["it reverses the axes of a tensor whose rank is not known"],
    )


STEPS = {
    "b = Relu (a)": 9,
    "b = Clip (a, low)": 11,
    "c = Cast <to = 10> (a) d = Abs (c) b = Cast <to = 1> (d)": 9,
    "b = Add (a, bias)": 9,
    "b = Add (bias, a)": 9,
    "b = Mul (a, scalar)": 9,
    "b = Add (a, grid)": 9,
    "b = PRelu (a, bias)": 9,
    "c = Less (a, bias) b = Where (c, a, scalar)": 9,
    "b = Max (a, a, bias)": 9,
    "b = Mul (a, a)": 9,
    "c = ReduceMean <axes = [1, -2]> (a) b = Sub (a, c)": 9,
    "c = ReduceMax <keepdims = 1> (a) b = Sub (a, c)": 9,
    "b = ReduceSum <axes = [1, 2]> (a)": 9,
    "b = ReduceSum (a, axes)": 13,
    "b = ReduceMean (a, axes)": 18,
    "b = Softmax (a)": 13,
    "b = LogSoftmax <axis = 1> (a)": 13,
    "c = ArgMax <axis = 3> (a) b = Cast <to = 1> (c)": 9,
    "c, i = TopK <axis = -1> (a, k) b = Relu (c)": 11,
    "c, i = TopK (a, k) j = Cast <to = 1> (i) b = Add (c, j)": 11,
    "b = Concat <axis = 3> (a, a)": 9,
    "b = Concat <axis = -1> (a, a)": 11,
    "c, d = Split <axis = 1> (a) b = Sub (c, d)": 9,
    "c, d = Split <axis = 1> (a, halves) b = Concat <axis = 3> (d, c)": 13,
    "b = Slice <axes = [1, 3], starts = [0, 1], ends = [3, 3]> (a)": 9,
    "b = Slice <starts = [0, 1, 1], ends = [2, 3, 4]> (a)": 9,
    "b = Slice (a, starts, ends)": 11,
    "b = Slice (a, axis1, two, axis1)": 11,
    "b = Slice (a, starts, ends, , steps)": 11,
    "b = Pad <pads = [0, 1, 0, 2, 0, 3, 0, 0]> (a)": 9,
    "b = Pad (a, pads)": 11,
    'b = Pad <mode = "reflect"> (a, pads)': 11,
    "b = Pad (a, starts4, , axes)": 18,
    "b = Tile (a, repeats)": 9,
    "b = Identity (a)": 9,
    "c = QuantizeLinear (a, scalar) b = DequantizeLinear (c, scalar)": 10,
    "c = QuantizeLinear <axis = 3> (a, scales, zeros) b = DequantizeLinear <axis = -1> (c, scales, zeros)": 13,
    "b = LpNormalization (a)": 9,
    "k2 = Constant <value = float[3] {1.0, 2.0, 4.0}> () b = Mul (a, k2)": 9,
}
MORE = {
    "halves": np.array([2, 2], np.int64),
    "steps": np.array([1, 2, 3], np.int64),
    "starts4": np.array([1, 2, 3, 0], np.int64),
}
LAST = {
    "ReduceSum <": 11,
    "ReduceMean <": 17,
    "ReduceMax": 17,
    "Slice <": 9,
    "Pad <pads": 10,
    "Split <axis = 1> (a)": 12,
}


@pytest.mark.parametrize(
    ("step", "opset"),
    [
        (step, opset)
        for step, since in STEPS.items()
        for opset in (9, 10, 11, 13, 17, 18, 21, 23)
        if since <= opset <= min([last for words, last in LAST.items() if words in step], default=23)
    ],
)
def test_moves_through(step, opset):
    assert _between(step, opset, **MORE) == (_between_nothing(step), [])


def _between_nothing(step):
    return Counter(re.findall(r"(\w+) (?=[(<])", step)) - Counter({"Transpose": 2})


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("rank", [2, 3, 5])
def test_moves_through_any_rank(rank, dtype):
    kind, order = {np.float32: "float", np.float16: "float16"}[dtype], [*range(1, rank), 0]
    sizes, back = [2, 3, 4, 5, 6][:rank], np.argsort(order).tolist()
    body = f"a = Transpose <perm = {order}> (x) c = Add (a, bias) d = Relu (c) y = Transpose <perm = {back}> (d)"
    shape = [sizes[axis] for axis in order]
    bias = np.random.default_rng(0).standard_normal(shape[1:]).astype(dtype)
    _, model = _apply(body, x=f"{kind}{sizes} x", y=f"{kind}{sizes} y", bias=bias)
    assert ops(model) == {"Add": 1, "Relu": 1}
    assert constant(model, "bias_transposed").shape == tuple([1, *shape[1:]][axis] for axis in back)


@pytest.mark.parametrize("second", [TO_NHWC, "Transpose <perm = [3, 2, 1, 0]>", "Transpose"])
def test_merges_across_a_region_where_the_orders_do_not_cancel(second):
    _, model = _apply(f"a = {TO_NHWC} (x) b = Add (a, bias) y = {second} (b)")
    assert ops(model) == {"Add": 1, "Transpose": 1}


def test_moves_several_inputs_to_one_output():
    _, model = _apply(f"c = Neg (x) a = {TO_NHWC} (x) b = {TO_NHWC} (c) d = Mul (a, b) y = Add (d, bias)")
    assert ops(model)["Transpose"] == 1


def test_a_residual_block_loses_all_its_transposes():
    body = f"""a = {TO_NHWC} (x) b = Add (a, bias) c = {TO_NCHW} (b) d = Conv (c, w) e = {TO_NHWC} (d) f = Add (e, bias)
        g = Add (f, b) h = Relu (g) i = {TO_NCHW} (h) y = Conv (i, w)"""
    _, model = _apply(body, w=np.random.default_rng(0).standard_normal((3, 3, 1, 1)).astype(np.float32))
    assert "Transpose" not in ops(model)
    assert [each.name for each in model.graph.initializer if "bias" in each.name] == ["bias_transposed"]


def test_chains_of_an_order_that_is_its_own_inverse():
    swap = "Transpose <perm = [0, 2, 1]>"
    body = f"a = {swap} (x) b = Relu (a) c = {swap} (b) d = Neg (c) e = {swap} (d) f = Exp (e) y = {swap} (f)"
    _, model = _apply(body, x="float[N,3,4] x", y="float[A,B,C] y")
    assert "Transpose" not in ops(model)


def test_a_loop_of_transposes_in_one_region():
    swap = "Transpose <perm = [0, 2, 1]>"
    body = f"""a = {swap} (x) b = Relu (a) c = {swap} (b) d = Neg (x) e = Add (c, d) f = {swap} (e) g = Mul (f, b)
        y = {swap} (g)"""
    _, model = _apply(body, x="float[N,3,4] x", y="float[A,B,C] y")
    assert ops(model)["Transpose"] <= 1


@pytest.mark.parametrize("opset", [9, 17])
def test_keeps_what_others_read(opset):
    body = f"a = {TO_NHWC} (x) b = Relu (a) c = {TO_NCHW} (b) y = Neg (c) z = Neg (b)"
    _, model = _apply(body, opset, y="float[A,B,C,D] y, float[E,F,G,H] z, float[P,Q,R,S] b")
    assert ops(model)["Transpose"] == 1


@pytest.mark.parametrize(
    ("step", "opset", "words"),
    [
        ("b = Softmax (a)", 11, "before opset 13 it flattens"),
        ("s = ReduceMax <keepdims = 0, axes = [0, 1, 2]> (a) b = Add (a, s)", 17, "fewer axes than its result"),
        ("r = Shape (a) b = Tile (a, r)", 17, "input r is computed at run time"),
        ("b = Slice (a, axis1, two, q)", 17, "input q is computed at run time"),
    ],
)
def test_refuses_with_a_reason(step, opset, words):
    left, reasons = _between(step, opset)
    assert left["Transpose"] == 2
    assert any(words in reason for reason in reasons), reasons


def test_refuses_scales_of_blocks():
    step = "q = QuantizeLinear <axis = 1, block_size = 2> (a, s) b = DequantizeLinear <axis = 1, block_size = 2> (q, s)"
    body = f"a = {TO_NHWC} (x) {step} y = {TO_NCHW} (b)"
    s = np.full((2, 2, 5, 3), 0.5, np.float32)
    result, _ = _apply(body, 21, x="float[2,3,4,5] x", s=s)
    assert result.rewrites == 0
    assert "its scales are those of blocks" in result.skipped[0].reason


def test_refuses_when_it_saves_nothing():
    body = f"a = {TO_NHWC} (x) b = Add (a, z) c = {TO_NCHW} (b) y = Neg (c) r = Neg (b)"
    result, _ = _apply(
        body, x="float[N,3,4,5] x, float[N,4,5,3] z", y="float[A,B,C,D] y, float[E,F,G,H] r, float[N,4,5,3] b"
    )
    assert result.rewrites == 0
    assert "takes as many new Transposes as it saves" in result.skipped[0].reason


def test_an_overridable_bias_is_no_constant():
    model = build(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[N,3,4,5] x, float[3] k) => (float[A,B,C,D] y)'
        f"{{ a = {TO_NHWC} (x) b = Add (a, k) y = {TO_NCHW} (b) }}",
        {"k": np.ones(3, np.float32)},
    )
    result, _ = apply_and_compare(model, MergeTransposes())
    assert result.rewrites == 0
    assert "input k has fewer axes" in result.skipped[0].reason


@pytest.mark.parametrize("opset", [9, 13, 21])
def test_merges_into_gemm(opset):
    body = "a = Transpose <perm = [1, 0]> (x) b = Transpose (z) y = Gemm <alpha = 2.0, transB = 1> (a, b, k)"
    result, model = _apply(body, opset, x="float[3,4] x, float[3,5] z", y="float[4,5] y", k=np.ones(5, np.float32))
    assert result.parts == {"Gemm": 2}
    attributes = {each.name: each.i for each in model.graph.node[0].attribute}
    assert (attributes["transA"], attributes["transB"]) == (1, 0)


def test_one_for_both_inputs_of_a_gemm():
    _, model = _apply("a = Transpose (x) y = Gemm <transB = 1> (a, a)", x="float[3,4] x", y="float[4,4] y")
    assert ops(model) == {"Gemm": 1}


def test_stays_before_gemm_for_another_reader():
    body = "a = Transpose (x) y = Gemm (a, x) z = Neg (a)"
    result, _ = _apply(body, x="float[3,4] x", y="float[4,4] y, float[4,3] z")
    assert result.rewrites == 0
    assert "something else uses" in result.skipped[0].reason


def test_a_transposed_weight_of_a_gemm_is_for_folding():
    result, _ = _apply(
        "a = Transpose (k) y = Gemm (x, a)", x="float[3,4] x", y="float[3,2] y", k=np.ones((2, 4), np.float32)
    )
    assert (result.rewrites, result.skipped) == (0, ())


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("flatten", ["Flatten (a)", "Reshape (a, rows)", "Reshape (a, batched)"])
@pytest.mark.parametrize("product", ["MatMul (f, w)", "Gemm (f, w)", "Gemm <transB = 1, alpha = 0.5> (f, w)"])
def test_merges_into_the_weight_behind_a_flatten(product, flatten, dtype):
    kind = {np.float32: "float", np.float16: "float16"}[dtype]
    weight = np.random.default_rng(0).standard_normal((7, 60) if "transB" in product else (60, 7)).astype(dtype)
    body = f"a = {TO_NHWC} (x) f = {flatten} y = {product}"
    constants = {"rows": np.array([0, -1], np.int64), "batched": np.array([-1, 60], np.int64)}
    result, model = _apply(body, x=f"{kind}[N,3,4,5] x", y=f"{kind}[A,B] y", w=weight, **constants)
    assert (result.parts, ops(model)["Transpose"]) == ({"weights": 1}, 0)


@pytest.mark.parametrize(
    ("body", "x", "words"),
    [
        (
            f"a = {TO_NHWC} (x) f = Flatten (a) y = MatMul (f, w)",
            "float[N,M,2,1] x",
            "a size of its input is not known",
        ),
        ("a = Transpose <perm = [2, 1, 0]> (x) f = Flatten (a) y = MatMul (f, w)", "float[2,2,3] x", "moves the batch"),
        (
            f"a = {TO_NHWC} (x) f = Flatten <axis = 2> (a) y = MatMul (f, w)",
            "float[N,3,2,2] x",
            "does not keep the batch",
        ),
        (
            f"a = {TO_NHWC} (x) f = Flatten (a) m = MatMul (f, w) n = Neg (w) y = Add (m, n)",
            "float[1,1,2,2] x",
            "weight too",
        ),
        (f"a = {TO_NHWC} (x) f = Flatten (a) y = Gemm <transA = 1> (f, w)", "float[4,1,2,1] x", "transposes it again"),
    ],
)
def test_refuses_to_merge_into_a_weight_with_a_reason(body, x, words):
    rows = 6 if "[2,2,3]" in x or "axis = 2" in body else 4
    feed = {"x": np.ones((2, 2, 2, 1), np.float32)} if "M" in x else None
    if "[2,2,3]" in x:
        rows = 4
    result, _ = _apply(body, x=x, y="float[A,B] y", feed=feed, w=np.ones((rows, 1), np.float32))
    assert result.rewrites == 0
    assert any(words in skip.reason for skip in result.skipped), result.skipped


def test_a_flattened_result_that_is_an_output_keeps_its_order():
    body = f"a = {TO_NHWC} (x) f = Flatten (a) y = MatMul (f, w)"
    result, _ = _apply(body, y="float[A,B] y, float[C,D] f", w=np.ones((60, 2), np.float32))
    assert result.rewrites == 0
    assert "something else uses its result" in result.skipped[0].reason


def test_stays_before_a_gemm_that_adds_it_too():
    result, _ = _apply("a = Transpose (x) y = Gemm (a, x, a)", x="float[3,3] x", y="float[3,3] y")
    assert result.rewrites == 0


def test_a_reduction_that_drops_axes_stays_in_its_layout():
    body = f"a = {TO_NHWC} (x) b = ReduceMax <keepdims = 0, axes = [1]> (a) y = Transpose (b)"
    result, _ = _apply(body, y="float[A,B,C] y")
    assert result.rewrites == 0
    assert "another rank" in result.skipped[0].reason


def test_works_in_branches_and_keeps_what_they_return():
    body = f"""s = ReduceMax <keepdims = 0> (x) c = Greater (s, scalar) o = {TO_NHWC} (x) y = If (c) <
        then_branch = t () => (float[A,B,C,D] p) {{ a = {TO_NHWC} (x) b = Add (a, bias) p = {TO_NCHW} (b) }},
        else_branch = e () => (float[E,F,G,H] q) {{ d = Relu (o) q = {TO_NCHW} (d) }} >"""
    result, model = _apply(body)
    assert (result.parts, ops(model)["Transpose"]) == ({"regions": 1}, 2)


def test_an_operator_of_another_domain_stays():
    text = '<ir_version: 8, opset_import: ["" : 17, "mine" : 1]> g (float[3,4] x) => (float[3,4] y)'
    model = build(text + "{ a = Transpose (x) b = mine.Relu (a) y = Transpose (b) }")
    assert MergeTransposes().apply(load_model(model).graph, Context()).rewrites == 0
