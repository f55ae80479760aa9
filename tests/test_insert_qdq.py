"""Q/DQ pairs as they stand in the file, and that the result computes what the float graph does."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from texts import model_of

import graphopt
from graphopt.errors import PipelineError
from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.passes import Fold, InsertQdq
from graphopt.passes.insert_qdq import ActivationType, Switch
from graphopt.placement import place
from graphopt.quantization import INT8_WEIGHT
from graphopt.ranges import Ranges, TensorRange
from graphopt.runtime import open_session, optimized_ops
from graphopt.shapes import infer_shapes
from graphopt.targets import target_named, targets
from graphopt.targets.ort_cpu import ORT_ARM, ORT_CPU
from graphopt.targets.tensorrt import TENSORRT

MODELS = Path(__file__).resolve().parent.parent / "models"

CONV_RELU_CONV = """
    <ir_version: 8, opset_import: ["" : 17]>
    example (float[N,16,8,8] x) => (float[N,16,8,8] y)
    <float[16,16,3,3] w, float[16] b>
    { c = Conv<pads=[1,1,1,1]>(x, w, b)  r = Relu(c)  y = Conv<pads=[1,1,1,1]>(r, w, b) }
"""


def range_of(minimum, maximum):
    return TensorRange(
        minimum=minimum,
        maximum=maximum,
        method="minmax",
        observed_minimum=minimum,
        observed_maximum=maximum,
        mean=None,
        zeros=0,
        count=1,
    )


def ranges_of(**bounds):
    tensors = {name: range_of(*pair) for name, pair in bounds.items()}
    return Ranges(tensors=tensors, source="test", samples=1, synthetic=False)


RANGES = ranges_of(x=(-3, 3), r=(0, 4), y=(-3, 3), c=(-4, 4))


ANY_CPU = {"reduce_range": Switch.ON}
"""For what is run here: without VNNI the sums of int8 weights saturate."""


def quantized(model, target=ORT_CPU, ranges=RANGES, *, small_islands=True, **options):
    loaded = load_model(model)
    chosen = InsertQdq(small_islands=small_islands, **options)
    result = chosen.apply(loaded.graph, Context(target=target, ranges=ranges))
    proto = loaded.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    return proto, result


def initializers(proto):
    return {each.name: numpy_helper.to_array(each) for each in proto.graph.initializer}


def test_ort_stores_weights_as_int8_behind_a_dq_with_a_scale_for_each_channel():
    proto, result = quantized(model_of(CONV_RELU_CONV))
    (reading,) = [node for node in proto.graph.node if node.input[0] == "w_quantized"]
    assert reading.op_type == "DequantizeLinear"
    assert next(attribute.i for attribute in reading.attribute if attribute.name == "axis") == 0
    stored = initializers(proto)
    assert stored["w_quantized"].dtype == np.int8
    assert stored["w_scale"].shape == (16,)
    assert "w" not in stored
    assert result.parts == {"operators": 2, "activations": 3, "weights": 2}


def test_biases_stay_float():
    proto, _ = quantized(model_of(CONV_RELU_CONV))
    assert initializers(proto)["b"].dtype == np.float32
    assert all("b" not in node.input for node in proto.graph.node if node.op_type != "Conv")


def test_tensorrt_keeps_float_weights_behind_q_and_dq_with_zero_point_zero():
    proto, _ = quantized(model_of(CONV_RELU_CONV), TENSORRT)
    stored = initializers(proto)
    assert stored["w"].dtype == np.float32
    pairs = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    assert {node.input[0] for node in pairs} == {"x", "r", "w"}
    assert all(stored[node.input[2]].dtype == np.int8 and not stored[node.input[2]].any() for node in pairs)


def test_tensorrt_can_store_int8_weights_when_asked():
    proto, _ = quantized(model_of(CONV_RELU_CONV), TENSORRT, int8_weights=Switch.ON)
    assert "w" not in initializers(proto)


LINEAR = {
    "Conv": ("float[1,16,8,8]", "y = Conv<pads=[1,1,1,1]>(x, w, b)", (16, 16, 3, 3)),
    "Gemm": ("float[16,16]", "y = Gemm<transB=1>(x, w, b)", (16, 16)),
    "MatMul": ("float[16,16]", "m = MatMul(x, w) y = Add(b, m)", (16, 16)),
}


@pytest.mark.parametrize("largest_input", [3.0, 1e-30, 0.0])
@pytest.mark.parametrize("op", LINEAR)
def test_biases_far_above_their_products_are_added_all_the_same(op, largest_input):
    """As behind a BatchNormalization that training has all but switched off: as integers they need over 32 bits."""
    shape, text, weight_shape = LINEAR[op]
    rng = np.random.default_rng(3)
    weight = rng.normal(0, 0.2, weight_shape).astype(np.float32)
    (weight if op != "MatMul" else weight.T)[2:5] *= np.float32(1e-12)
    model = model_of(f'<ir_version: 8, opset_import: ["" : 17]> g ({shape} x) => ({shape} y) {{ {text} }}')
    bias = rng.uniform(0.1, 1, 16).astype(np.float32)
    model.graph.initializer.extend(numpy_helper.from_array(each, name) for name, each in (("w", weight), ("b", bias)))
    dims = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    feed = {"x": rng.uniform(-largest_input, largest_input, dims).astype(np.float32)}
    expected = open_session(model).run(feed)["y"]
    bounds = ranges_of(x=(-largest_input, largest_input), y=(float(expected.min()), float(expected.max())))
    proto, _ = quantized(model, ranges=bounds, **ANY_CPU)
    assert not {"Conv", "Gemm", "MatMul"} & set(optimized_ops(proto))
    error = np.abs(open_session(proto).run(feed)["y"] - expected)
    assert error.max() < 0.02 * np.abs(expected).max()


def prelu_net(slopes, behind="y = Conv<pads=[1,1,1,1]>(r, w)"):
    model = model_of(
        f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1,16,8,8] x) => (float[1,16,8,8] y)
        <float[16,16,3,3] w, float[16,1,1] slopes = {{{", ".join(map(str, slopes))}}}>
        {{ c = Conv<pads=[1,1,1,1]>(x, w) r = PRelu(c, slopes) {behind} }}
        """
    )
    weight = np.random.default_rng(0).normal(0, 0.1, (16, 16, 3, 3)).astype(np.float32)
    next(each for each in model.graph.initializer if each.name == "w").CopyFrom(numpy_helper.from_array(weight, "w"))
    return model


@pytest.mark.parametrize("target", [ORT_CPU, ORT_ARM])
@pytest.mark.parametrize("behind", ["y = Conv<pads=[1,1,1,1]>(r, w)", "y = Relu(r)", "y = Identity(r)"])
def test_a_prelu_runs_on_integers_and_stays_what_it_is(behind, target):
    model = prelu_net(np.linspace(-1, 1, 16), behind)
    feed = {"x": np.random.default_rng(1).uniform(-1, 1, (1, 16, 8, 8)).astype(np.float32)}
    found = open_session(model, extra_outputs=["c", "r"]).run(feed)
    bounds = ranges_of(x=(-1, 1), **{name: (float(array.min()), float(array.max())) for name, array in found.items()})
    proto, result = quantized(model, target, bounds, **ANY_CPU)
    assert "PRelu in int8 needs onnxruntime 1.24" in result.notes[0]
    if behind.startswith("y = Conv"):
        assert optimized_ops(proto)["Max"] == 1
        assert not {"PRelu", "Mul", "LeakyRelu"} & set(optimized_ops(proto))
        assert not unread_nodes(proto)
    error = open_session(proto).run(feed)["y"] - found["y"]
    assert np.abs(error).max() < 0.05 * np.abs(found["y"]).max()


@pytest.mark.parametrize(("slopes", "options"), [([0.5] * 15 + [1.1], {}), ([0.5] * 16, {"activations": "uint16"})])
def test_a_prelu_that_is_no_maximum_or_of_other_integers_stays_float(slopes, options):
    options = {name: ActivationType(value) for name, value in options.items()}
    proto, result = quantized(
        prelu_net(slopes), ranges=ranges_of(x=(-1, 1), c=(-2, 2), r=(-1, 2), y=(-3, 3)), **options
    )
    assert not result.notes or "PRelu" not in result.notes[0]
    assert "PRelu" in optimized_ops(proto)
    assert "Max" not in optimized_ops(proto)


def unread_nodes(proto):
    read = {name for node in proto.graph.node for name in node.input} | {each.name for each in proto.graph.output}
    return [node for node in proto.graph.node if not set(node.output) & read]


def test_a_graph_output_keeps_its_name():
    proto, _ = quantized(model_of(CONV_RELU_CONV))
    assert [output.name for output in proto.graph.output] == ["y"]
    assert proto.graph.node[-1].op_type == "DequantizeLinear"


@pytest.mark.parametrize("target", [ORT_CPU, TENSORRT], ids=lambda target: target.name)
def test_the_result_is_close_to_the_float_graph(target):
    model = model_of(CONV_RELU_CONV)
    feed = {"x": np.random.default_rng(1).uniform(-3, 3, (2, 16, 8, 8)).astype(np.float32)}
    seen = open_session(model, extra_outputs=["r"]).run(feed) | feed
    ranges = ranges_of(**{name: (float(array.min()), float(array.max())) for name, array in seen.items()})
    expected = seen["y"]
    found = open_session(quantized(model, target, ranges)[0], optimize=False).run(feed)["y"]
    noise = ((expected - found) ** 2).sum() / (expected**2).sum()
    assert 10 * np.log10(1 / noise) > 30


def test_onnxruntime_runs_every_conv_in_int8():
    operators = optimized_ops(quantized(model_of(CONV_RELU_CONV))[0])
    assert operators["QLinearConv"] == 2
    assert not {"Conv", "FusedConv", "Relu"} & set(operators)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ("strides=[2,2]", {"QLinearConv": 3}),
        ("pads=[1,1,1,1], count_include_pad=1", {"QLinearConv": 3}),
        ("pads=[1,1,1,1]", {"QLinearConv": 3, "QLinearMul": 1}),
        ("strides=[2,2], ceil_mode=1", {"QLinearConv": 2, "QLinearAveragePool": 1}),
    ],
)
def test_onnxruntime_averages_by_a_conv_where_one_stands_for_it(attributes, expected):
    text = CONV_RELU_CONV.replace("r = Relu(c)", f"r = AveragePool<kernel_shape=[3,3], {attributes}>(c)")
    model = model_of(text.replace("float[N,16,8,8] y", "float[N,16,H,W] y"))
    x = {"x": np.random.default_rng(0).uniform(-1, 1, (2, 16, 8, 8)).astype(np.float32)}
    before = open_session(model, extra_outputs=["c", "r"]).run(x)
    ends = {name: (float(values.min()), float(values.max())) for name, values in (before | x).items()}
    proto, _ = quantized(model, ranges=ranges_of(**ends), **ANY_CPU)
    found = optimized_ops(proto)
    kernels = ("QLinearConv", "QLinearMul", "QLinearAveragePool", "AveragePool")
    assert {op: found[op] for op in kernels if found[op]} == expected
    noise = open_session(proto).run(x)["y"] - before["y"]
    assert 10 * np.log10((before["y"] ** 2).sum() / (noise**2).sum()) > 30


def test_depthwise_weights_keep_their_bits_on_a_cpu_that_saturates():
    depthwise = CONV_RELU_CONV.replace("pads=[1,1,1,1]", "pads=[1,1,1,1], group=16").replace("16,16,3,3", "16,1,3,3")
    proto, _ = quantized(model_of(depthwise), reduce_range=Switch.ON)
    assert (np.abs(initializers(proto)["w_quantized"].astype(int)).reshape(16, -1).max(axis=1) > 127 / 1.11).all()


def test_errors_of_weights_cancel_where_what_they_are_multiplied_with_has_a_mean():
    model = model_of(CONV_RELU_CONV)
    weight = numpy_helper.to_array(next(each for each in model.graph.initializer if each.name == "w"))
    sums = []
    for second_moment in (100.0, 1.0):  # of the mean square 1
        seen = {name: replace(each, mean=1.0, second_moment=second_moment) for name, each in RANGES.tensors.items()}
        proto, _ = quantized(model, ranges=replace(RANGES, tensors=seen), **ANY_CPU)
        stored, scale = (initializers(proto)[name] for name in ("w_quantized", "w_scale"))
        change = stored * scale.reshape(-1, 1, 1, 1) - weight
        sums.append(np.square(change.sum(axis=(1, 2, 3))).mean())
    assert sums[1] < 0.2 * sums[0]


def test_scales_cover_the_weights_where_the_ranges_say_so():
    stored = [
        initializers(quantized(model_of(CONV_RELU_CONV), ranges=ranges, reduce_range=Switch.OFF)[0])["w_quantized"]
        for ranges in (RANGES, replace(RANGES, covering_weights=True))
    ]
    largest = [np.abs(each.astype(int)).reshape(16, -1).max(axis=1) for each in stored]
    assert (largest[0] < 127).any()
    assert (largest[1] == 127).all()


def test_excluded_nodes_stay_float():
    model = model_of(CONV_RELU_CONV)
    model.graph.node[0].name = "block1/conv"
    _, result = quantized(model, exclude=("block1/*",))
    assert result.parts["operators"] == 1
    assert [skip.where for skip in result.skipped] == ["block1/conv"]
    _, result = quantized(model, exclude_ops=("Conv",))
    assert not result.rewrites


@pytest.mark.parametrize("options", [{"exclude": ("none*",)}, {"exclude_ops": ("Gemm",)}])
def test_an_exclusion_that_fits_nothing_is_an_error(options):
    with pytest.raises(PipelineError, match="exclude"):
        quantized(model_of(CONV_RELU_CONV), **options)


def test_without_ranges_it_says_what_to_do():
    with pytest.raises(PipelineError, match="put calibrate before it"):
        quantized(model_of(CONV_RELU_CONV), ranges=None)


def test_ranges_of_another_model_are_refused():
    with pytest.raises(PipelineError, match="another model"):
        quantized(model_of(CONV_RELU_CONV), ranges=ranges_of(other=(0, 1)))


def test_an_operator_without_a_range_stays_float_with_the_reason():
    _, result = quantized(model_of(CONV_RELU_CONV), ranges=ranges_of(x=(-3, 3), r=(0, 4)))
    assert result.parts["operators"] == 1
    assert "no range is known for y" in result.skipped[0].reason


@pytest.mark.parametrize(
    ("moved", "known"),
    [
        ("m = MaxPool<kernel_shape=[2,2]>(c)", True),
        ("p = Transpose<perm=[0,1,3,2]>(c) m = Pad(p, pads)", True),
        ("m = Concat<axis=1>(inside, c)", True),
        ("m = Concat<axis=1>(outside, c)", False),
        ("m = Concat<axis=2>(x, c)", False),
        ("m = Neg(c)", False),
    ],
)
def test_what_moves_the_values_of_a_float_operator_has_its_range(moved, known):
    text = f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N,16,8,8] x) => (float[N,M,A,B] y)
        <float[16,16,3,3] w, float[4,16,1,1] v, float[4,17,1,1] u, int64[8] pads = {{0,0,1,0,0,0,0,1}},
         float[1,1,8,8] inside, float[1,1,8,8] outside>
        {{ c = Conv<pads=[1,1,1,1]>(x, w) {moved} y = Conv(m, {"u" if "side" in moved else "v"}) }}
    """
    model = model_of(text)
    for name, value in (("inside", 2.0), ("outside", 5.0)):
        (tensor,) = [each for each in model.graph.initializer if each.name == name]
        tensor.CopyFrom(numpy_helper.from_array(np.full((1, 1, 8, 8), value, np.float32), name))
    model.graph.node[0].name = "first"
    proto, result = quantized(model, ranges=ranges_of(x=(-3, 3), c=(-4, 4), y=(-3, 3)), exclude=("first",))
    assert bool(result.rewrites) == known
    if known:
        (scale,) = [value for name, value in initializers(proto).items() if name == "m_scale"]
        np.testing.assert_allclose(scale, 8 / 255, rtol=1e-6)
    else:
        assert result.skipped[-1].reason == "no range is known for m"


@pytest.mark.parametrize("target", targets())
@pytest.mark.parametrize("name", ["fmnist_resnet", "fmnist_mbv2", "fmnist_srunet"])
def test_whatever_range_is_missing_the_rest_is_quantized(name, target):
    folded = load_model(MODELS / f"{name}.onnx")
    Fold().apply(folded.graph, Context(frame=folded.frame))
    infer_shapes(folded.graph)
    observed = place(folded.graph, target_named(target)).observed
    for missing in observed:
        known = ranges_of(**{tensor: (-1.0, 1.0) for tensor in observed if tensor != missing})
        result = InsertQdq().apply(folded.copy().graph, Context(target=target_named(target), ranges=known))
        assert result.parts["operators"] > 0
        assert result.parts["activations"] > 0


def test_a_missing_range_behind_an_activation_keeps_both_its_sides_float():
    _, result = quantized(model_of(CONV_RELU_CONV), ranges=ranges_of(x=(-3, 3), y=(-3, 3)))
    assert result.rewrites == 0
    assert [skip.reason for skip in result.skipped] == ["no range is known for r"] * 2


def test_a_quantized_model_is_refused():
    with pytest.raises(PipelineError, match="quantized already"):
        quantized(quantized(model_of(CONV_RELU_CONV))[0])


def test_a_low_opset_is_raised_and_said():
    proto, result = quantized(model_of(CONV_RELU_CONV.replace("17", "11")))
    assert proto.opset_import[0].version == 13
    assert "13" in result.notes[0]


def test_a_graph_without_anything_to_quantize_stays_as_it_is():
    text = '<ir_version: 7, opset_import: ["" : 11]> g (float[N] x) => (float[N] y) { y = Relu(x) }'
    proto, result = quantized(model_of(text))
    assert (result.rewrites, result.notes) == (0, ())
    assert proto.opset_import[0].version == 11


def test_a_weight_of_two_readers_is_stored_once():
    proto, _ = quantized(model_of(CONV_RELU_CONV))
    assert sum(name.startswith("w_quantized") for name in initializers(proto)) == 1


def test_weights_use_the_whole_symmetric_range():
    stored = initializers(quantized(model_of(CONV_RELU_CONV), reduce_range=Switch.OFF)[0])["w_quantized"]
    assert stored.min() >= INT8_WEIGHT.minimum


def test_activations_of_another_type_raise_the_opset_where_it_must():
    sixteen = {"activations": ActivationType.INT16}
    proto, _ = quantized(model_of(CONV_RELU_CONV), **sixteen)
    assert proto.opset_import[0].version == 21
    assert initializers(proto)["x_zero_point"].dtype == np.int16
    assert initializers(proto)["w_quantized"].dtype == np.int8


def test_a_target_refuses_activations_that_it_has_not():
    with pytest.raises(PipelineError, match="tensorrt has int8, float8e4m3, not uint8"):
        quantized(model_of(CONV_RELU_CONV), target=TENSORRT, activations=ActivationType.UINT8)


def test_weights_have_one_scale_where_channels_are_not_wanted():
    proto, _ = quantized(model_of(CONV_RELU_CONV), per_channel=False)
    assert initializers(proto)["w_scale"].shape == ()


def test_sixteen_bits_are_more_exact_than_eight():
    data = str(MODELS / "fashion_mnist_calibration.npz")
    found = {}
    for kind in ("uint8", "uint16"):
        passes = f"fold,calibrate:method=minmax,qdq:activations={kind}"
        result = graphopt.optimize(MODELS / "fmnist_resnet.onnx", passes, data=data)
        found[kind] = min(output.sqnr_db for output in result.report.check.comparison.outputs)
    assert found["uint16"] > found["uint8"] + 3  # the weights keep 8 bits


@pytest.mark.parametrize("target", targets())
def test_a_model_whose_output_sizes_follow_from_values_is_quantized_and_says_where_they_differ(target):
    """As a detector's do, which finds one box more."""
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1,16,16,16] x) => (float[1,16,16,16] y, int64[4,N] places)
        <float[16,16,3,3] w, float limit = {0}>
        { y = Conv<pads=[1,1,1,1]>(x, w) g = Greater(y, limit) places = NonZero(g) }
    """
    values = np.random.default_rng(0).standard_normal((4, 1, 16, 16, 16)).astype(np.float32)
    result = graphopt.optimize(
        model_of(text), "calibrate,qdq:small_islands=true", data=[{"x": each} for each in values], target=target
    )
    assert [record.failure for record in result.report.passes] == [None, None]
    (told,) = [warning for warning in result.report.warnings if "other sizes" in warning]
    assert told.startswith("output 'places' has other sizes than in the reference in ")


def test_what_reads_a_float_operator_in_float_reads_its_own_values():
    """As the residual Add of a transformer reads its LayerNormalization: no integers are behind that tensor."""
    proto, _ = quantized(
        model_of("""
            <ir_version: 8, opset_import: ["" : 17]>
            example (float[N,16,8,8] x) => (float[N,16,8,8] y, float[N,16,8,8] s, float[N,16,8,8] t)
            <float[16,16,3,3] w, float[16] b>
            { s = Sin(x)  t = Tan(s)  c = Conv<pads=[1,1,1,1]>(s, w, b)  y = Cos(c) }
        """),
        ranges=ranges_of(s=(-1, 1), c=(-4, 4)),
    )
    readers = [node.op_type for node in proto.graph.node if "s" in node.input]
    assert sorted(readers) == ["QuantizeLinear", "Tan"]
    assert next(node for node in proto.graph.node if "s" in node.output).op_type == "Sin"
    assert next(node for node in proto.graph.node if node.op_type == "Conv").input[0] == "s_dequantized"


@pytest.mark.parametrize("target", [ORT_CPU, TENSORRT], ids=lambda target: target.name)
def test_the_transpose_of_a_tied_embedding_is_a_weight(target):
    """Exporters store the matrix once: a Gather reads its rows, the last product its transpose."""
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        example (int64[N,4] i, float[N,4,32] x) => (float[N,4,48] y, float[N,4,32] e)
        <float[48,32] table>
        { e = Gather (table, i)  w = Transpose<perm=[1,0]>(table)  y = MatMul (x, w) }
    """
    proto = model_of(text)
    placement_graph = load_model(proto).graph
    infer_shapes(placement_graph)
    placed = place(placement_graph, target)
    assert [(edge.tensor.name, axis) for edge, axis in placed.weights] == [("w", 1)]
    assert set(placed.activations) == {"x"}
    result, _ = quantized(proto, target, ranges_of(x=(-3, 3)))
    random = np.random.default_rng(0)
    feed = {"i": random.integers(0, 48, (2, 4)), "x": random.standard_normal((2, 4, 32)).astype(np.float32)}
    expected, found = open_session(proto).run(feed), open_session(result, exact=True).run(feed)
    np.testing.assert_array_equal(found["e"], expected["e"])
    error = np.square(found["y"] - expected["y"]).mean() / np.square(expected["y"]).mean()
    assert error < 1e-3
    if target is ORT_CPU:
        stored = initializers(result)
        assert stored["w_quantized"].dtype == np.int8
        assert "Transpose" not in {node.op_type for node in result.graph.node}


@pytest.mark.parametrize("middle", ["", "e = Relu(d)", "e = Tanh(d)"])
@pytest.mark.parametrize("excluded", [False, True])
def test_a_conv_that_is_excluded_between_int8_convs_runs_in_float(middle, excluded):
    """onnxruntime would quantize the weight of such a Conv itself, with one scale for all channels."""
    conv, last = "Conv<pads=[1,1,1,1]>", "e" if middle else "d"
    model = model_of(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        example (float[N,16,8,8] x) => (float[N,16,8,8] y) <float[16,16,3,3] w, float[16] b>
        {{ c = {conv}(x, w, b) d = {conv}(c, w, b) {middle} y = {conv}({last}, w, b) }}
    """)
    for node in model.graph.node:
        node.name = node.output[0]
    ranges = ranges_of(x=(-3, 3), c=(-4, 4), d=(-5, 5), e=(0, 5), y=(-6, 6))
    proto, result = quantized(model, ranges=ranges, exclude=("d",) if excluded else ())
    assert result.parts.get("weights kept float", 0) == int(excluded and "Tanh" not in middle)
    ran = optimized_ops(proto)
    assert (ran["QLinearConv"], ran["Conv"] + ran["FusedConv"]) == ((2, 1) if excluded else (3, 0))
    assert ran["DequantizeLinear"] == (2 if excluded or "Tanh" in middle else 1)


@pytest.mark.parametrize("function", ["Relu(a)", "Clip(a, zero, six)"])
@pytest.mark.parametrize(("sizes", "pairs"), [("28,32", 3), ("2,28,32", 4), ("N,28,32", 2)])
def test_a_bias_and_an_activation_behind_a_product_become_part_of_it(function, sizes, pairs):
    """As in the feed-forward part of a transformer; of open sizes onnxruntime fuses no bias into a stack."""
    open_sizes = sizes.replace("32", "16")
    text = f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[{sizes}] x) => (float[{open_sizes}] y)
        <float[32,64] w, float[64] b, float[64,16] v, float[16] c, float zero = {{0}}, float six = {{6}}>
        {{ m = MatMul(x, w)  a = Add(m, b)  r = {function}  n = MatMul(r, v)  y = Add(n, c) }}
    """
    values = np.random.default_rng(0).standard_normal((4, 2, 28, 32)).astype(np.float32)
    feeds = [{"x": each[0] if sizes == "28,32" else each} for each in values]
    result = graphopt.optimize(model_of(text), "calibrate:method=minmax,qdq:small_islands=true", data=feeds)
    written = Counter(node.op_type for node in result.model.graph.node)
    ran = optimized_ops(result.model)
    assert written["QuantizeLinear"] == pairs
    assert not ran["Gemm"] and not ran["MatMul"]
    assert ran["QGemm"] == (0 if "N" in sizes else 2)
    stripped = graphopt.optimize(result.model, "strip-qdq", verify=False).model
    assert Counter(node.op_type for node in stripped.graph.node) == Counter(
        node.op_type for node in model_of(text).graph.node
    )


def test_between_integers_of_16_bits_an_activation_has_one_pair():
    """No kernel takes them, so each pair would run."""
    text = """
        <ir_version: 8, opset_import: ["" : 17]> g (float[2,28,32] x) => (float[2,28,64] y)
        <float[32,64] w, float[64] b> { m = MatMul(x, w)  a = Add(m, b)  y = Relu(a) }
    """
    feeds = [{"x": np.random.default_rng(0).standard_normal((2, 28, 32)).astype(np.float32)}]
    for bits, pairs in (("uint8", 3), ("uint16", 2)):
        passes = f"calibrate:method=minmax,qdq:small_islands=true:activations={bits}"
        model = graphopt.optimize(model_of(text), passes, data=feeds).model
        assert Counter(node.op_type for node in model.graph.node)["QuantizeLinear"] == pairs
