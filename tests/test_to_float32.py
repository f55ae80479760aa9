"""Half precision -> float32: what is widened, what keeps its type, and what `optimize` does of itself."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

import graphopt
from graphopt import verification
from graphopt.api import calibrate
from graphopt.errors import PipelineError
from graphopt.half_precision import computes_in_half
from graphopt.model_io import load_model
from graphopt.pass_base import Context, Effect
from graphopt.passes import ToFloat32
from graphopt.runtime import open_session

HEADER = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1, "other" : 1]>'
RNG = np.random.default_rng(0)


def parsed(text, **weights):
    model = onnx.parser.parse_model(f"{HEADER} {text}")
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return model


def half(*shape):
    return RNG.standard_normal(shape).astype(np.float16)


def widened(model):
    loaded = load_model(model)
    result = ToFloat32().apply(loaded.graph, Context(frame=loaded.frame))
    return loaded, result


def element_types(model):
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    return {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}


def outputs_of(model, feed):
    return open_session(model).run(feed)


def assert_same_to_half(model, feed):
    """The widened model returns what the model returns, of the same types, and computes nothing in half."""
    loaded, result = widened(model)
    expected, found = outputs_of(model, feed), outputs_of(loaded, feed)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_allclose(found[name].astype(float), value.astype(float), rtol=1e-2, atol=1e-2)
    assert not computes_in_half(loaded.graph)
    return loaded, result


CONV = "g (float16[1,3,8,8] x) => (float16[1,4,8,8] y) { c = Conv<pads = [1,1,1,1]>(x, w) y = Relu(c) }"


def test_inputs_and_outputs_keep_their_types():
    model = parsed(CONV, w=half(4, 3, 3, 3))
    loaded, result = assert_same_to_half(model, {"x": half(1, 3, 8, 8)})
    assert [node.op for node in loaded.graph.nodes] == ["Cast", "Conv", "Relu", "Cast"]
    assert result.rewrites == result.parts["tensors"] == 4  # w, c, and what stands for x and y beside their Casts
    proto = loaded.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert {each.data_type for each in proto.graph.initializer} == {TensorProto.FLOAT}


def test_casts_amid_the_model_cast_to_float32():
    text = "g (float[4] x) => (float[4] y) { h = Cast<to = 10>(x) s = Sqrt(h) b = Add(s, k) y = Cast<to = 1>(b) }"
    model = parsed(text, k=half(4))
    loaded, _ = assert_same_to_half(model, {"x": np.array([1, 4, 2, 9], np.float32)})
    assert TensorProto.FLOAT16 not in element_types(loaded.to_proto()).values()


def test_branches_that_return_outer_tensors_return_the_wide_ones():
    text = """g (float16[4] x, bool c) => (float16[4] y) {
        z = Mul(x, k)
        y = If(c) <then_branch = t () => (float16[4] a) { a = Add(z, x) },
                   else_branch = e () => (float16[4] b) { b = Identity(x) }>
    }"""
    model = parsed(text, k=half(4))
    for taken in (True, False):
        assert_same_to_half(model, {"x": half(4), "c": np.array(taken)})


def test_a_branch_may_return_an_input_itself():
    then = helper.make_graph([], "t", [], [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [4])])
    add = helper.make_node("Add", ["x", "k"], ["b"])
    other = helper.make_graph([add], "e", [], [helper.make_tensor_value_info("b", TensorProto.FLOAT16, [4])])
    model = parsed("g (float16[4] x, bool c) => (float16[4] y) { y = Identity(x) }", k=half(4))
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other))
    loaded, _ = widened(model)
    branches = loaded.to_proto().graph.node[1].attribute
    assert {branch.name: branch.g.output[0].name for branch in branches} == {
        "then_branch": "x_float32",
        "else_branch": "b",
    }


def test_states_of_loops_are_widened():
    body = onnx.parser.parse_graph(
        "b (int64 i, bool on, float16[2] s) => (bool more, float16[2] t, float16[2] out)"
        "{ more = Identity(on) t = Mul(s, k) out = Identity(t) }"
    )
    model = parsed("g (float16[2] x) => (float16[2] y, float16[3,2] all) { y = Identity(x) all = Identity(x) }")
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("Loop", ["n", "", "x"], ["y", "all"], body=body))
    weights = {"n": np.array(3), "k": np.array([0.5, 2], np.float16)}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    assert_same_to_half(model, {"x": half(2)})


def test_constants_in_nodes_and_made_ones_are_widened():
    value = numpy_helper.from_array(half(2, 2), "v")
    filled = numpy_helper.from_array(np.array([2.5], np.float16))
    nodes = [
        helper.make_node("Constant", [], ["v"], value=value),
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("ConstantOfShape", ["s"], ["f"], value=filled),
        helper.make_node("CastLike", ["x", "v"], ["l"]),
        helper.make_node("Sum", ["v", "f", "l"], ["y"]),
    ]
    model = parsed("g (float[2,2] x) => (float16[2,2] y) { y = Identity(x) }")
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    assert_same_to_half(model, {"x": np.ones((2, 2), np.float32)})


def test_types_that_operators_are_told_are_widened():
    text = "g (int64[2,2] x) => (float16[2,2] y) { e = EyeLike<dtype = 10>(x) y = Relu(e) }"
    loaded, _ = widened(parsed(text))
    assert loaded.graph.nodes[0].attrs["dtype"] == TensorProto.FLOAT
    np.testing.assert_array_equal(outputs_of(loaded, {"x": np.zeros((2, 2), np.int64)})["y"], np.eye(2))


def test_bfloat16_is_widened_too():
    model = parsed("g (bfloat16[2] x) => (bfloat16[2] y) { y = Mul(x, w) }")
    model.graph.initializer.append(helper.make_tensor("w", TensorProto.BFLOAT16, [2], [1.5, -2]))
    loaded, _ = widened(model)
    proto = loaded.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert {each.data_type for each in proto.graph.initializer} == {TensorProto.FLOAT}
    assert [node.op_type for node in proto.graph.node] == ["Cast", "Mul", "Cast"]
    assert proto.graph.node[2].attribute[0].i == TensorProto.BFLOAT16


def test_functions_are_inlined_first():
    model = onnx.parser.parse_model(f"""{HEADER}
        g (float16[4] x) => (float16[4] y) {{ y = other.twice(x) }}
        <domain: "other", opset_import: ["" : 17]> twice (a) => (b)
        {{ two = Constant<value = float16 {{2}}>() b = Mul(a, two) }}""")
    assert_same_to_half(model, {"x": half(4)})


def test_an_input_that_is_an_output_stays():
    model = parsed("g (float16[4] x) => (float16[4] y, float16[4] x) { y = Add(x, k) }", k=half(4))
    loaded, _ = widened(model)
    assert [tensor.name for tensor in loaded.graph.outputs] == ["y", "x"]
    assert loaded.graph.outputs[1] is loaded.graph.inputs[0]


def test_an_operator_of_another_domain_is_refused():
    loaded, result = widened(parsed("g (float16[4] x) => (float16[4] y) { y = other.Odd(x) }"))
    assert [node.op for node in loaded.graph.nodes] == ["Odd"]
    assert not result.rewrites
    assert "another domain" in result.skipped[0].reason


@pytest.mark.parametrize(
    "text",
    [
        "g (float[4] x) => (float[4] y) { y = Relu(x) }",
        "g (float16[4] x) => (float16[4] y) { a = Cast<to = 1>(x) b = Relu(a) y = Cast<to = 10>(b) }",
    ],
)
def test_what_computes_in_float32_stays_as_it_is(text):
    loaded, result = widened(parsed(text))
    assert not result.rewrites
    assert loaded.to_proto().graph.node == load_model(parsed(text)).to_proto().graph.node


@pytest.fixture
def conv(tmp_path):
    """A Conv in half precision that pays in int8, and samples of float32."""
    text = "g (float16[1,16,32,32] x) => (float16[1,32,32,32] y) { c = Conv<pads = [1,1,1,1]>(x, w) y = Relu(c) }"
    onnx.save(parsed(text, w=half(32, 16, 3, 3)), tmp_path / "half.onnx")
    np.savez(tmp_path / "x.npz", x=RNG.standard_normal((8, 16, 32, 32)).astype(np.float32))
    return tmp_path / "half.onnx", str(tmp_path / "x.npz")


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt"])
@pytest.mark.parametrize("passes", ["calibrate,qdq", "freeze-inputs,fold,calibrate,qdq", "to-float32,calibrate,qdq"])
def test_optimize_quantizes_a_model_in_half_precision(conv, passes, target):
    model, samples = conv
    result = graphopt.optimize(model, passes, data=samples, target=target)
    assert [each.text for each in result.report.passes].count("to-float32") == 1
    assert result.report.pipeline.index("to-float32") < result.report.pipeline.index("calibrate")
    assert result.report.passes[-1].rewrites >= 2
    assert result.report.check.comparison.outputs[0].sqnr_db > 30
    assert result.model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16


def test_ranges_of_calibrate_fit_what_optimize_makes(conv):
    model, samples = conv
    ranges, report = calibrate(model, samples, passes="to-float32,fold")
    again, _ = calibrate(model, samples)
    assert ranges.to_text() == again.to_text()
    assert report.passes[0].text == "to-float32"
    result = graphopt.optimize(model, "fold,qdq", ranges=ranges, data=samples)
    assert result.report.passes[-1].rewrites >= 2


def test_calibrate_still_refuses_other_lossy_passes(conv):
    model, samples = conv
    with pytest.raises(PipelineError, match="come before it"):
        calibrate(model, samples, passes="to-float32,qdq")


@pytest.mark.parametrize("passes", ["fold", "strip-qdq"])
def test_a_pipeline_that_does_not_quantize_leaves_half_precision_alone(conv, passes):
    model, _ = conv
    assert "to-float32" not in graphopt.optimize(model, passes).report.pipeline


def test_a_model_in_float32_is_left_alone():
    samples = {"x": RNG.standard_normal((8, 4, 4)).astype(np.float32)}
    text = "g (float[N,4,4] x) => (float[N,4,8] y) { y = MatMul(x, w) }"
    result = graphopt.optimize(parsed(text, w=half(4, 8).astype(np.float32)), "calibrate,qdq", data=samples)
    assert "to-float32" not in result.report.pipeline


def test_rounding_of_half_precision_is_no_failure():
    """What folds in half precision may round otherwise, though the output is float32."""
    text = "g (float[16] x) => (float[16] y) { h = Cast<to = 10>(x) a = Mul(h, k) b = Add(a, k) y = Cast<to = 1>(b) }"
    model = load_model(parsed(text, k=half(16)))
    before = verification.examine(model, [{"x": RNG.standard_normal(16).astype(np.float32)}])
    (name,), (value,) = before.outputs[0], before.outputs[0].values()
    rounded = replace(before, outputs=[{name: value + np.abs(value).max() * np.float32(2e-3)}])
    broken = replace(before, outputs=[{name: value * 2}])
    assert verification.judge(before, rounded, Effect.EXACT) is None
    assert verification.judge(before, broken, Effect.EXACT) is not None
    assert verification.judge(replace(before, in_half=False), rounded, Effect.EXACT) is not None


def test_analyses_ask_the_model_in_float32(conv):
    model, _ = conv
    loaded, context = load_model(model), Context()
    context.original = loaded
    graph = loaded.copy().graph
    ToFloat32().apply(graph, context)
    assert context.original is not loaded
    assert not computes_in_half(context.original.graph)
    graph.nodes.clear()
    assert [node.op for node in context.original.graph.nodes] == ["Cast", "Conv", "Relu", "Cast"]
    assert computes_in_half(loaded.graph)


def test_an_output_rounded_to_float16_may_round_otherwise():
    model = load_model(parsed("g (float[16] x) => (float16[16] y) { a = Exp(x) y = Cast<to = 10>(a) }"))
    before = verification.examine(model, [{"x": RNG.standard_normal(16).astype(np.float32)}])
    assert not before.in_half
    after = replace(before, outputs=[{"y": np.nextafter(before.outputs[0]["y"], np.float16(0))}])
    assert verification.judge(before, after, Effect.EXACT) is None


MODELS = Path(__file__).parents[1] / "models"


@pytest.mark.parametrize("keep_io_types", [True, False])
def test_a_trained_net_in_half_precision_is_as_exact_in_int8(keep_io_types, tmp_path):
    float_model, data = MODELS / "fmnist_resnet.onnx", str(MODELS / "fashion_mnist_calibration.npz")
    converted = tmp_path / "half.onnx"
    onnx.save(convert_float_to_float16(onnx.load(float_model), keep_io_types=keep_io_types), converted)
    options = {"data": data, "samples": 32, "target": "tensorrt"}  # in exact arithmetic, whatever machine this is
    quantized = [
        graphopt.optimize(each, "fold,calibrate:method=mse,qdq", **options) for each in (float_model, converted)
    ]
    counts = [Counter(node.op for node in each.optimized.graph.nodes) for each in quantized]
    assert counts[0] - counts[1] == Counter()
    assert set(counts[1] - counts[0]) <= {"Cast"}
    ours, theirs = (each.report.check.comparison.outputs[0].sqnr_db for each in quantized)
    assert ours == pytest.approx(theirs, abs=1)
