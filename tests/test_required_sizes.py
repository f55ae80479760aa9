"""Sizes that weights ask of inputs: where they are found the model runs, and else nothing is asked."""

from __future__ import annotations

import numpy as np
import pytest
from texts import model_of

import graphopt
from graphopt.feeds import InputSpec
from graphopt.model_io import load_model
from graphopt.required_sizes import with_required_sizes
from graphopt.runtime import open_session

CONSTANTS = (
    "float[7,5] m, float[5,7] n, float[7] v, float[6,7] t, float[4,1] column, float[8,7,3,3] w, float[8,2,3,3] g, "
    "float[7,8,3,3] d, float[1,24,7] wx, float[1,24,6] wh, float[1,1,7] deep, float s, int64[1] one = {1}, "
    "int64[1] last = {-1}, int64[2] twice = {0,0}"
)


def shape_of(body, declared):
    sizes = ",".join(declared)
    text = (
        f"""<ir_version: 8, opset_import: ["" : 17]> g (float[{sizes}] x) => (float[?] y) <{CONSTANTS}> {{ {body} }}"""
    )
    model = load_model(model_of(text))
    spec = InputSpec("x", np.dtype(np.float32), tuple(int(size) if size.isdigit() else size for size in declared))
    (found,) = with_required_sizes([spec], model.graph)
    return found.shape


@pytest.mark.parametrize(
    ("body", "declared", "shape"),
    [
        ("y = MatMul(x, m)", "NF", ("N", 7)),
        ("y = MatMul(x, v)", "NF", ("N", 7)),
        ("y = MatMul(n, x)", "FN", (7, "N")),
        ("y = Gemm(x, m)", "NF", ("N", 7)),
        ("y = Gemm<transA=1, transB=1>(x, n)", "FN", (7, "N")),
        ("y = Add(x, v)", "NF", ("N", 7)),
        ("y = Add(x, t)", "NF", (6, 7)),
        ("y = Mul(column, x)", "NF", (4, "F")),
        ("y = Sub(x, deep)", "F", (7,)),
        ("y = Conv(x, w)", "NCHW", ("N", 7, "H", "W")),
        ("y = Conv<group=4>(x, g)", "NCHW", ("N", 8, "H", "W")),
        ("y = ConvTranspose(x, d)", "NCHW", ("N", 7, "H", "W")),
        ("y = LSTM<hidden_size=6>(x, wx, wh)", "TNI", ("T", "N", 7)),
        ("y = BatchNormalization(x, v, v, v, v)", "NCT", ("N", 7, "T")),
        ("y = LayerNormalization(x, v)", "NTC", ("N", "T", 7)),
        ("u = Unsqueeze(x, one) s = Squeeze(u, one) r = Relu(s) p = Transpose(r) y = MatMul(n, p)", "NF", ("N", 7)),
        ("u = Unsqueeze(x, last) y = Conv(u, w)", "NCH", ("N", 7, "H")),
        ("p = Transpose<perm=[0,3,1,2]>(x) y = Conv(p, w)", "NHWC", ("N", "H", "W", 7)),
        ("a = Add(x, v) y = MatMul(a, n)", "NF", ("N", 7)),  # of two the first counts
        ("y = MatMul(x, m)", ("N", "9"), ("N", 9)),
        ("q = QuantizeLinear(x, s) r = DequantizeLinear(q, s) y = Gemm(r, m)", "NF", ("N", 7)),
        ("q = QuantizeLinear(m, s) r = DequantizeLinear(q, s) y = Gemm(x, r)", "NF", ("N", 7)),
    ],
)
def test_weights_ask_for_sizes(body, declared, shape):
    assert shape_of(body, declared) == shape


@pytest.mark.parametrize(
    "body",
    [
        "y = Relu(x)",
        "y = MatMul(x, x)",
        "y = Gemm(x, x)",
        "y = Add(x, x)",
        "r = Reshape(x, one) y = MatMul(r, m)",
        "f = ReduceMean(x) y = MatMul(f, m)",
        "y = mine.Product(x, m)",
    ],
)
def test_what_is_not_followed_asks_for_nothing(body):
    assert shape_of(body, "NF") == ("N", "F")


@pytest.mark.parametrize(
    "body", ["y = Conv(x, w)", "y = Gemm(x, m)", "y = Transpose<perm=[2,1,0]>(x)", "y = LSTM(x, wx, wh)"]
)
def test_an_invalid_model_asks_for_nothing(body):
    text = f"""<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[?] y) <{CONSTANTS}> {{ {body} }}"""
    inputs = [InputSpec("x", np.dtype(np.float32), ("N",))]
    assert with_required_sizes(inputs, load_model(model_of(text)).graph) == inputs


def test_unknown_sizes_are_no_names():
    text = f"""<ir_version: 8, opset_import: ["" : 17]> g (float[A,B] x) => (float[?] y) <{CONSTANTS}>
        {{ y = MatMul(x, m) }}"""
    inputs = [InputSpec("x", np.dtype(np.float32), ("?", "?")), InputSpec("k", np.dtype(np.float32), ("?",))]
    found = with_required_sizes(inputs, load_model(model_of(text)).graph)
    assert [spec.shape for spec in found] == [("?", 7), ("?",)]


def test_a_name_says_the_same_size_everywhere():
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[N,F] x, float[F] k) => (float[?] y) <float[7,5] m>
        { p = MatMul(x, m) s = ReduceSum(k) y = Mul(p, s) }"""
    model = load_model(model_of(text))
    assert [spec.shape for spec in with_required_sizes(open_session(model).inputs, model.graph)] == [("N", 7), (7,)]


def test_a_net_of_open_features_is_quantized_without_data():
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[T,F] x) => (float[T,5] y)
        <float[300,64] m, float[64,5] n> { h = MatMul(x, m) r = Relu(h) y = MatMul(r, n) }"""
    result = graphopt.optimize(model_of(text), "calibrate,qdq:small_islands=true")
    assert result.report.check is not None
    assert result.report.passes[-1].rewrites
