"""Operators that compute with integers, written out as Q/DQ around float ones: the same to a step of rounding."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.graph import Names
from graphopt.graph_copy import copy_graph
from graphopt.model_io import Model, load_model
from graphopt.pass_base import Context
from graphopt.passes import StripQdq
from graphopt.qlinear import why_not_written_out, write_out
from graphopt.runtime import open_session

RNG = np.random.default_rng(0)
IMAGE = (1, 4, 6, 6)
OUT = (0.05, 120)  # scale and zero point


def uint8(*shape):
    return RNG.integers(0, 255, shape).astype(np.uint8)


def int8(*shape):
    return RNG.integers(-63, 63, shape).astype(np.int8)  # of more bits, sums saturate without VNNI


def quantizer(scale, zero_point, dtype=np.uint8):
    return [np.asarray(scale, np.float32), np.asarray(zero_point, dtype)]


X, Z = quantizer(0.02, 110), quantizer(0.03, 130)
EACH = [np.array([0.01, 0.02, 0.005, 0.03, 0.01], np.float32), np.zeros(5, np.int8)]
ONE = quantizer(0.01, 3, np.int8)
BIAS = RNG.integers(-2000, 2000, 5).astype(np.int32)
X2 = uint8(*IMAGE)
CONV = [*X, int8(5, 4, 3, 3), *EACH, *quantizer(*OUT)]

# operator, shape of its first operand, further inputs, attributes; a name stands for the graph input
CASES = [
    ("QLinearConv", IMAGE, ["x", *CONV, BIAS], {"pads": [1, 1, 1, 1]}),
    ("QLinearConv", IMAGE, ["x", *X, int8(5, 4, 3, 3), *ONE, *quantizer(*OUT)], {"strides": [2, 2]}),
    ("QLinearMatMul", (3, 4), ["x", *X, int8(4, 5), *EACH, *quantizer(*OUT)], {}),
    ("QLinearMatMul", (3, 4), ["x", *X, uint8(4, 5), *Z, *quantizer(*OUT)], {}),
    ("QGemm", (3, 4), ["x", *X, int8(4, 5), *EACH, BIAS, *quantizer(*OUT)], {"alpha": 0.5}),
    ("QGemm", (3, 4), ["x", *X, int8(5, 4), *EACH, None, *quantizer(*OUT)], {"transB": 1}),
    ("QLinearAdd", IMAGE, ["x", *X, X2, *Z, *quantizer(*OUT)], {}),
    ("QLinearMul", IMAGE, ["x", *X, X2, *Z, *quantizer(*OUT)], {}),
    ("QLinearSigmoid", IMAGE, ["x", *X, *quantizer(1 / 256, 0)], {}),
    ("QLinearLeakyRelu", IMAGE, ["x", *X, *quantizer(*OUT)], {"alpha": 0.3}),
    ("QLinearSoftmax", (3, 5), ["x", *X, *quantizer(1 / 256, 0)], {"axis": 1, "opset": 17}),
    ("QLinearAveragePool", IMAGE, ["x", *X, *quantizer(*OUT)], {"kernel_shape": [2, 2]}),
    ("QLinearGlobalAveragePool", IMAGE, ["x", *X, *quantizer(*OUT)], {"channels_last": 0}),
    ("QLinearWhere", IMAGE, [X2 > 99, "x", *X, X2, *Z, *quantizer(*OUT)], {}),
    ("QLinearConcat", IMAGE, [*quantizer(*OUT), "x", *X, X2, *Z], {"axis": 1}),
]


def model_of(op, shape, inputs, attributes, *, opset=17, overridden=()):
    """One operator; the inputs at the places `overridden` are graph inputs too."""
    names = [each if isinstance(each, str) else "" if each is None else f"i{at}" for at, each in enumerate(inputs)]
    arrays = {name: each for name, each in zip(names, inputs, strict=True) if isinstance(each, np.ndarray)}
    domain = "" if op in ("QLinearConv", "QLinearMatMul") else "com.microsoft"
    node = helper.make_node(op, names, ["y"], domain=domain, **attributes)
    fed = [f"i{at}" for at in overridden]
    kinds = {name: helper.np_dtype_to_tensor_dtype(arrays[name].dtype) for name in fed}
    values = [helper.make_tensor_value_info(name, kind, arrays[name].shape) for name, kind in kinds.items()]
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, shape), *values],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items() if name not in fed],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return load_model(helper.make_model(graph, opset_imports=opsets, ir_version=8))


def written_out(model):
    graph = copy_graph(model.graph)
    graph.nodes[:] = [new for node in list(graph.nodes) for new in write_out(node, graph.opset, Names(graph))]
    return Model(graph, model.frame)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_computes_the_same_integers(case):
    model = model_of(*case)
    assert why_not_written_out(model.graph.nodes[0], 17) is None
    feed = {"x": uint8(*case[1])}
    expected = open_session(model).run(feed)["y"].astype(int)
    found = open_session(written_out(model), exact=True).run(feed)["y"].astype(int)
    assert expected.std() > 3
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1
    assert np.mean(found != expected) < 0.1  # kernels round halves in other ways


def test_a_product_that_returns_floats_has_no_pair_behind_it():
    model = model_of("QGemm", (3, 4), ["x", *X, int8(4, 5), *EACH, BIAS], {})
    model.graph.outputs[0].dtype = np.dtype(np.float32)
    found, feed = written_out(model), {"x": uint8(3, 4)}
    assert [node.op for node in found.graph.nodes] == ["DequantizeLinear", "Gemm"]
    np.testing.assert_allclose(open_session(found).run(feed)["y"], open_session(model).run(feed)["y"], rtol=1e-4)


@pytest.mark.parametrize("opset", [17, 18])
def test_axes_of_a_mean_are_where_its_opset_has_them(opset):
    case = ("QLinearReduceMean", IMAGE, ["x", *X, *quantizer(*OUT)], {"axes": [2, 3], "keepdims": 1})
    model = written_out(model_of(*case, opset=opset))
    values = uint8(*IMAGE)
    mean = ((values.astype(float) - 110) * 0.02).mean(axis=(2, 3), keepdims=True)
    found = open_session(model, exact=True).run({"x": values})["y"]
    np.testing.assert_array_equal(found, np.rint(mean / OUT[0]) + OUT[1])


@pytest.mark.parametrize(
    ("case", "options", "reason"),
    [
        (("QLinearConv", IMAGE, ["x", *CONV, BIAS], {}), {"overridden": [1]}, "scale or zero point of QLinearConv is"),
        (("QLinearConv", IMAGE, ["x", *CONV, BIAS], {}), {"overridden": [8]}, "the bias of QLinearConv is computed"),
        (("QLinearConv", IMAGE, ["x", *CONV, BIAS], {}), {"overridden": [3]}, "a scale for each channel of an act"),
        (("QLinearGlobalAveragePool", IMAGE, ["x", *X, *X], {"channels_last": 1}), {}, "has its channels last"),
        (("QLinearSoftmax", (3, 5), ["x", *X, *X], {"opset": 11}), {}, "where Softmax is another"),
        (("MatMulInteger", (3, 4), ["x", uint8(4, 5)], {}), {}, "computes with integers itself"),
    ],
)
def test_what_cannot_be_written_out_is_refused(case, options, reason):
    model = model_of(*case, **options)
    assert reason in why_not_written_out(model.graph.nodes[0], 17)
    result = StripQdq().apply(model.graph, Context(frame=model.frame))
    assert [node.op for node in model.graph.nodes] == [case[0]]
    assert reason in result.skipped[0].reason


def test_a_net_that_onnxruntime_has_put_into_integers_comes_back_as_float():
    float_net = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[1,4,6,6] x) => (float[1,5,6,6] y) { c = Conv<pads = [1,1,1,1]>(x, w, b) r = Relu(c) y = Add(r, r) }"""
    )
    weight, bias = RNG.standard_normal((5, 4, 3, 3)).astype(np.float32), RNG.standard_normal(5).astype(np.float32)
    float_net.graph.initializer.extend([numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")])
    scales = {"x": 0.01, "r": 0.06, "y": 0.12}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_s", "x_z"], ["x_q"]),
        helper.make_node("QLinearConv", ["x_q", "x_s", "x_z", "w_q", "w_s", "w_z", "r_s", "r_z", "b_q"], ["r_q"]),
        helper.make_node(
            "QLinearAdd",
            ["r_q", "r_s", "r_z", "r_q", "r_s", "r_z", "y_s", "y_z"],
            ["y_q"],
            domain="com.microsoft",
        ),
        helper.make_node("DequantizeLinear", ["y_q", "y_s", "y_z"], ["y"]),
    ]
    nodes[1].attribute.append(helper.make_attribute("pads", [1, 1, 1, 1]))
    w_scale = np.abs(weight).max(axis=(1, 2, 3)) / 127
    arrays = {
        "w_q": np.rint(weight / w_scale.reshape(-1, 1, 1, 1)).astype(np.int8),
        "w_s": w_scale,
        "w_z": np.zeros(5, np.int8),
        "b_q": np.rint(bias / (scales["x"] * w_scale)).astype(np.int32),
        **{f"{name}_s": np.float32(scale) for name, scale in scales.items()},
        **{f"{name}_z": np.uint8(128 if name == "x" else 0) for name in scales},
    }
    quantized = onnx.ModelProto.FromString(float_net.SerializeToString())
    del quantized.graph.node[:], quantized.graph.initializer[:]
    quantized.graph.node.extend(nodes)
    quantized.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items())
    quantized.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model = load_model(quantized)
    result = StripQdq().apply(model.graph, Context(frame=model.frame))
    assert not result.skipped
    assert result.parts["operators written out"] == 2
    assert sorted(node.op for node in model.graph.nodes) == ["Add", "Clip", "Conv"]
    feed = {"x": RNG.uniform(-1, 1, (1, 4, 6, 6)).astype(np.float32)}
    expected, found = open_session(float_net).run(feed)["y"], open_session(model).run(feed)["y"]
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())
