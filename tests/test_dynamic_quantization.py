"""Dynamic quantization taken back by strip-qdq: what onnxruntime's tool writes, and what must stay."""

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.passes import Fold, StripQdq
from graphopt.runtime import open_session

HEADER = '<ir_version: 8, opset_import: ["" : 17]>'
RNG = np.random.default_rng(0)
PRODUCT = """
    q, s, z = DynamicQuantizeLinear(x)
    p = MatMulInteger(q, w, z, v)
    f = Cast<to = 1>(p)
    t = Mul(s, u)
"""


def parsed(text, **weights):
    model = onnx.parser.parse_model(f"{HEADER} {text}")
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return model


def product(end="y = Mul(f, t)", *, outputs="float[3,5] y", body=PRODUCT, without=()):
    weights = {
        "w": RNG.integers(0, 255, (4, 5)).astype(np.uint8),
        "v": np.array(120, np.uint8),
        "u": np.array(0.01, np.float32),
    }
    kept = {name: value for name, value in weights.items() if name not in without}
    inputs = "".join(f", {kind} {name}" for name, kind in (("w", "uint8[4,5]"), ("u", "float")) if name in without)
    return parsed(f"g (float[3,4] x{inputs}) => ({outputs}) {{ {body} {end} }}", **kept), weights


def stripped(model):
    loaded = load_model(model)
    return loaded, StripQdq().apply(loaded.graph, Context(frame=loaded.frame))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("weight_type", [QuantType.QInt8, QuantType.QUInt8])
def test_what_onnxruntimes_tool_writes_comes_back_as_float(tmp_path, per_channel, weight_type):
    text = """g (float[1,4,6,6] x) => (float[1,7] y) {
        c = Conv<pads = [1,1,1,1]>(x, k, b) r = Relu(c) f = Flatten(r) m = MatMul(f, w)
        s = Sigmoid(m) y = Add(m, s) }"""
    shapes = {"k": (5, 4, 3, 3), "b": (5,), "w": (180, 7)}
    model = parsed(text, **{name: RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})
    onnx.save(model, tmp_path / "float.onnx")
    quantize_dynamic(
        tmp_path / "float.onnx",
        tmp_path / "dynamic.onnx",
        op_types_to_quantize=["Conv", "MatMul"],
        per_channel=per_channel,
        weight_type=weight_type,
    )
    dynamic = load_model(tmp_path / "dynamic.onnx")
    assert Counter(node.op for node in dynamic.graph.nodes)["DynamicQuantizeLinear"] == 2
    found, result = stripped(tmp_path / "dynamic.onnx")
    assert not result.skipped
    Fold().apply(found.graph, Context(frame=found.frame))
    assert {"Conv", "MatMul"} <= {node.op for node in found.graph.nodes}
    assert not {node.op for node in found.graph.nodes} & {"Cast", "DynamicQuantizeLinear", "MatMulInteger"}
    feed = {"x": RNG.standard_normal((1, 4, 6, 6)).astype(np.float32)}
    expected, returned = open_session(model).run(feed)["y"], open_session(found).run(feed)["y"]
    np.testing.assert_allclose(returned, expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("end", ["y = Mul(f, t)", "y = Mul(t, f)"])
def test_a_product_computes_what_its_integers_stand_for(end):
    model, weights = product(end)
    found, result = stripped(model)
    assert not result.skipped
    x = RNG.standard_normal((3, 4)).astype(np.float32)
    exact = x @ ((weights["w"].astype(np.float32) - 120) * weights["u"])
    np.testing.assert_allclose(open_session(found).run({"x": x})["y"], exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (product(outputs="float[3,5] y, uint8[3,4] q")[0], "what it stores is an output"),
        (product("y = Mul(f, t) n = Shape(q)", outputs="float[3,5] y, int64[2] n")[0], "Shape n computes with what"),
        (product(body=PRODUCT.replace("z, v", "v, v"))[0], "another zero point"),
        (product(without=("w",))[0], "weight of MatMulInteger p is computed at run time"),
        (product(without=("u",))[0], "not multiplied by its scale alone"),
        (product("y = Add(f, t)")[0], "not multiplied by its scale alone"),
        (product("y = Mul(f, t) n = Neg(p)", outputs="float[3,5] y, int32[3,5] n")[0], "not multiplied by its scale"),
        (product("y = Mul(f, t) n = Neg(t)", outputs="float[3,5] y, float n")[0], "not multiplied by its scale"),
        (product("y = Mul(f, t) n = Neg(s)", outputs="float[3,5] y, float n")[0], "read by others than the products"),
    ],
)
def test_what_cannot_be_told_in_float_stays(model, reason):
    before = [node.op_type for node in model.graph.node]
    found, result = stripped(model)
    assert sorted(node.op for node in found.graph.nodes) == sorted(before)
    assert reason in result.skipped[0].reason
