import numpy as np
import pytest
from comparing import apply_and_compare, build, ops

from graphopt.passes.fuse_gemm import FuseGemm

RNG = np.random.default_rng(0)


def _fuse(steps, opset=17, kind="float", inputs=None, outputs=None, weight=(4, 3), **constants):
    dtype = {"float": np.float32, "float16": np.float16, "double": np.float64, "int32": np.int32}[kind]
    values = {"w": RNG.standard_normal(weight).astype(dtype)}
    values |= {name: np.asarray(value).astype(dtype) for name, value in constants.items()}
    text = (
        f'<ir_version: 8, opset_import: ["" : {opset}]> g ({inputs or kind + "[N,4] x"}) => '
        f"({outputs or kind + '[A,B] y'}) {{ {steps} }}"
    )
    result, model = apply_and_compare(text, FuseGemm(), constants=values)
    assert apply_and_compare(model, FuseGemm())[0].rewrites == 0
    return ops(model), [skip.reason for skip in result.skipped], model


@pytest.mark.parametrize("opset", [8, 9, 11, 13, 17, 21, 23])
@pytest.mark.parametrize("kind", ["float", "float16", "double"])
def test_fuses_a_product_and_its_bias(opset, kind):
    left, skipped, _ = _fuse("t = MatMul (x, w) y = Add (t, b)", opset, kind, b=[1, 2, 3])
    assert (left, skipped) == ({"Gemm": 1}, [])


@pytest.mark.parametrize("bias", [[1, 2, 3], [[1, 2, 3]], 2.0, [2.0], [[2.0]]])
def test_stores_one_value_per_column(bias):
    left, _, model = _fuse("t = MatMul (x, w) y = Add (b, t)", b=bias)
    assert left == {"Gemm": 1}
    assert [each.dims for each in model.graph.initializer if each.name != "w"] == [[3]]


@pytest.mark.parametrize("transposed", [0, 1])
def test_gives_a_gemm_its_first_bias(transposed):
    steps = f"t = Gemm <alpha = 0.5, beta = 3.0, transB = {transposed}> (x, w) y = Add (t, b)"
    assert _fuse(steps, weight=(3, 4) if transposed else (4, 3), b=[1, 2, 3])[0] == {"Gemm": 1}


def test_reads_a_bias_of_a_constant_node_that_comes_later():
    left, _, _ = _fuse("t = MatMul (x, w) b = Constant <value = float[3] {1, 2, 3}> () y = Add (t, b)")
    assert left == {"Gemm": 1, "Constant": 1}


@pytest.mark.parametrize(
    ("steps", "more", "words"),
    [
        ("t = MatMul (x, w) y = Add (t, b)", {"b": [[[1, 2, 3]]], "outputs": "float[A,B,C] y"}, "shape [1, 1, 3]"),
        ("t = MatMul (x, w) y = Add (t, b)", {"b": [[1], [2]]}, "shape [2, 1]"),
        ("t = MatMul (x, w) y = Add (t, b)", {"weight": (4, 1)}, "shape [3]"),
        ("t = MatMul (x, w) y = Add (t, b)", {"kind": "int32"}, "no Gemm of int32"),
        ("t = MatMul (x, w) y = Add (t, b)", {"outputs": "float[A,B] y, float[C,D] t"}, "an output too"),
        ("t = MatMul (x, w) u = Add (t, b) y = Mul (u, t)", {}, "1 other nodes"),
    ],
)
def test_refuses_with_a_reason(steps, more, words):
    left, skipped, _ = _fuse(steps, **{"b": [1, 2, 3], **more})
    assert "Gemm" not in left
    assert words in skipped[0]


def test_refuses_an_input_of_unknown_rank():
    model = build(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x, int64[R] s) => (float[A,B] y) '
        "{ r = Reshape (x, s) t = MatMul (r, w) y = Add (t, b) }",
        {"w": np.ones((4, 3), np.float32), "b": np.zeros(3, np.float32)},
    )
    result, _ = apply_and_compare(model, FuseGemm(), feed={"s": np.array([2, 4])})
    assert result.rewrites == 0
    assert "rank of r is not known" in result.skipped[0].reason


@pytest.mark.parametrize(
    "steps",
    [
        "t = MatMul (x, w) y = Relu (t)",
        "t = MatMul (w2, x) y = Add (t, b)",
        "t = Gemm (x, w, b) y = Add (t, b)",
        "c = Abs (b) t = MatMul (x, w) y = Add (t, c)",
    ],
)
def test_leaves_others_alone(steps):
    more = {"w2": np.ones((3, 2)), "inputs": "float[2,3] x"} if "w2" in steps else {}
    left, skipped, _ = _fuse(steps, b=[1, 2, 3], **more)
    assert skipped == []
    assert left["Add"] + left["Relu"] == 1


def test_leaves_a_product_of_more_axes_alone():
    more = {"inputs": "float[N,2,4] x", "outputs": "float[A,B,C] y"}
    left, skipped, _ = _fuse("t = MatMul (x, w) y = Add (t, b)", b=[1, 2, 3], **more)
    assert (left, skipped) == ({"MatMul": 1, "Add": 1}, [])


def test_leaves_a_bias_that_a_caller_may_override_alone():
    model = build(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x, float[3] b) => (float[A,B] y) '
        "{ t = MatMul (x, w) y = Add (t, b) }",
        {"w": np.ones((4, 3), np.float32), "b": np.zeros(3, np.float32)},
    )
    assert apply_and_compare(model, FuseGemm())[0].rewrites == 0


def test_fuses_inside_a_branch_only_what_it_computes_itself():
    steps = (
        "o = MatMul (x, w) y = If (c) <then_branch = h1 () => (float[A,B] p) { t = MatMul (x, w) p = Add (t, b) }, "
        "else_branch = h2 () => (float[A,B] q) { q = Add (o, b) }>"
    )
    left, _, _ = _fuse(steps, inputs="bool c, float[N,4] x", b=[1, 2, 3])
    assert left == {"If": 1, "MatMul": 1, "Gemm": 1, "Add": 1}
