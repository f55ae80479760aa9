import numpy as np
import onnx.parser
import pytest

import graphopt.api
from graphopt.errors import DataError, PipelineError
from graphopt.feeds import Samples
from graphopt.graph import all_graphs
from graphopt.model_io import load_model
from graphopt.pass_base import Context, Effect
from graphopt.passes.calibrate import Calibrate
from graphopt.placement import place
from graphopt.targets import target_named
from graphopt.thresholds import Method

GEMMS = """
    <ir_version: 8, opset_import: ["" : 17]>
    gemms (float[N, 2] x) => (float[N, 2] y)
    <float[2, 2] w = {2, 0, 0, -1}, float[2, 2] v = {1, 1, 0, 1}>
    { hidden = Gemm (x, w)  positive = Relu (hidden)  y = Gemm (positive, v) }
"""
DATA = [[1.0, 2.0], [-3.0, 0.5], [0.0, -4.0]]


def graph_of(text=GEMMS):
    return load_model(onnx.parser.parse_model(text)).graph


def context_with(rows=DATA, target="tensorrt", **fields):
    feeds = [{"x": np.array([row], np.float32)} for row in rows]
    samples = Samples(lambda: iter(feeds), "rows.npz", len(feeds))
    return Context(target=target_named(target), samples=samples, **fields)


def many_rows():
    return np.random.default_rng(0).standard_normal((500, 2))


def test_the_ranges_of_what_the_target_quantizes_go_into_the_context():
    graph, context = graph_of(), context_with(target="ort-cpu")
    result = Calibrate(method=Method.MINMAX).apply(graph, context)
    assert set(context.ranges.tensors) == set(place(graph, context.target).observed) == {"x", "positive", "y"}
    assert result.parts == {"tensors": 3}
    positive = context.ranges.tensors["positive"]
    assert (positive.minimum, positive.maximum, positive.method) == (0, 4, "minmax")
    assert (positive.count, positive.zeros) == (6, None)
    assert (context.ranges.source, context.ranges.samples, context.ranges.synthetic) == ("rows.npz", 3, False)


def test_the_graph_stays_as_it_is():
    model = load_model(onnx.parser.parse_model(GEMMS))
    nodes = [id(node) for graph in all_graphs(model.graph) for node in graph.nodes]
    before = model.copy().to_proto().graph
    assert Calibrate.effect is Effect.EXACT
    assert Calibrate().apply(model.graph, context_with(target="ort-cpu")).rewrites == 0
    assert [id(node) for graph in all_graphs(model.graph) for node in graph.nodes] == nodes
    after = model.to_proto().graph
    assert (after.node, after.initializer, after.input, after.output) == (
        before.node,
        before.initializer,
        before.input,
        before.output,
    )


@pytest.mark.parametrize("method", [method for method in Method if method is not Method.SEARCH])
def test_each_method_is_recorded_with_what_was_observed(method):
    context = context_with(many_rows(), target="ort-cpu")
    Calibrate(method=method).apply(graph_of(), context)
    found = context.ranges.tensors["positive"]
    assert found.method in {Method.AUTO: ["mse", "minmax"], Method.DATA_FREE: ["made-up"]}.get(method, [method.value])
    assert found.observed_minimum == 0
    margin = 1.5 if method is Method.DATA_FREE else 1
    assert 0 <= found.minimum < found.maximum <= margin * found.observed_maximum
    assert (found.mean is None) == (not method.statistics.needs_values)
    assert (context.ranges.method, context.ranges.target) == (method, "ort-cpu")


def test_the_share_that_percentile_keeps_is_an_option():
    maxima = []
    for percent in (50.0, 90.0, 100.0):
        context = context_with(many_rows(), target="ort-cpu")
        Calibrate(method=Method.PERCENTILE, percent=percent).apply(graph_of(), context)
        maxima.append(context.ranges.tensors["x"].maximum)
    assert maxima == sorted(set(maxima))
    assert maxima[-1] == context.ranges.tensors["x"].observed_maximum


@pytest.mark.parametrize("percent", [0.0, -1.0, 100.5, float("nan")])
def test_a_share_that_is_none_is_refused(percent):
    with pytest.raises(PipelineError, match="calibrate:percent must be above 0 and at most 100"):
        Calibrate(method=Method.PERCENTILE, percent=percent)


def test_without_data_made_up_inputs_are_used_and_a_note_says_so():
    context = Context(target=target_named("ort-cpu"))
    result = Calibrate().apply(graph_of(), context)
    assert context.ranges.synthetic
    assert context.ranges.samples == 32
    assert result.notes[0].startswith("data-free: the ranges of 0 tensors come from statistics stored in")


@pytest.mark.parametrize("least", [20, 1000])
def test_made_up_inputs_are_made_large_enough_for_the_model(least):
    ones = ", ".join(["1"] * least)
    graph = graph_of(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        long (float[1, 1, L] x) => (float[1, 1, M] y) <float[1, 1, {least}] w = {{ {ones} }}>
        {{ y = Conv (x, w) }}
    """)
    context = Context(target=target_named("ort-cpu"))
    Calibrate().apply(graph, context)
    assert "y" in context.ranges.tensors


def test_made_up_inputs_get_sizes_that_the_model_takes():
    graph = graph_of(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        fixed (float[N, L] x) => (float[N, 2] y) <int64[2] pairs = {-1, 128}, float[128, 2] w>
        { rows = Reshape (x, pairs)  y = Gemm (rows, w) }
    """.replace("float[128, 2] w", "float[128, 2] w = {" + ", ".join(["1"] * 256) + "}")
    )
    context = Context(target=target_named("ort-cpu"))
    Calibrate().apply(graph, context)
    assert context.ranges.samples == 32


def test_the_seed_decides_what_is_made_up():
    ranges = []
    for seed in (0, 0, 1):
        context = Context(target=target_named("ort-cpu"), seed=seed)
        Calibrate().apply(graph_of(), context)
        ranges.append(context.ranges.tensors)
    assert ranges[0] == ranges[1] != ranges[2]


def test_few_samples_are_noted_and_enough_are_not():
    assert "3 samples" in Calibrate().apply(graph_of(), context_with()).warnings[0]
    assert Calibrate().apply(graph_of(), context_with(many_rows()[:32])).warnings == ()


def test_tensors_that_have_one_value_in_all_samples_are_named():
    rows = many_rows()[:32] * [-1, 1]
    rows[:, 0], rows[:, 1] = -abs(rows[:, 0]), abs(rows[:, 1])  # nothing passes the Relu
    (warning,) = Calibrate().apply(graph_of(), context_with(rows, target="ort-cpu")).warnings
    assert warning == (
        "2 tensors (first: positive) have one value in all samples: their ranges are guesses; "
        "add samples in which they vary"
    )


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(DataError, match=r"input x has NaN in sample 1 \(counted from 0\)"):
        Calibrate().apply(graph_of(), context_with([[0, 1], [np.nan, 1]], target="ort-cpu"))


def test_a_tensor_without_values_is_skipped():
    result = Calibrate().apply(graph_of(), _empty_batches())
    assert {skip.reason for skip in result.skipped} == {"it has no values in any sample"}


def _empty_batches():
    feeds = [{"x": np.zeros((0, 2), np.float32)}]
    return Context(target=target_named("ort-cpu"), samples=Samples(lambda: iter(feeds), "empty", 1))


def test_a_graph_with_nothing_to_quantize_gets_empty_ranges():
    context = context_with()
    graph = graph_of('<ir_version: 8, opset_import: ["" : 17]> g (float[N, 2] x) => (float[N, 2] y) { y = Relu (x) }')
    Calibrate().apply(graph, context)
    assert (context.ranges.tensors, context.ranges.source, context.ranges.samples) == ({}, "rows.npz", 3)


def test_inputs_with_a_default_value_need_no_sample():
    model = load_model(
        onnx.parser.parse_model("""
            <ir_version: 8, opset_import: ["" : 17]>
            defaults (float[N, 2] x, float[1] shift = {100}) => (float[N, 2] y) <float[2, 2] w = {1, 0, 0, 1}>
            { shifted = Add (x, shift)  y = Gemm (shifted, w) }
        """)
    )
    context = context_with(target="ort-cpu", frame=model.frame)
    Calibrate(method=Method.MINMAX).apply(model.graph, context)
    assert context.ranges.tensors["shifted"].maximum == 102


def test_what_graphsurgeon_cannot_hold_is_there_when_the_model_runs():
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 2] x) => (float[N, 2] y) { a = MatMul (x, w)  y = Relu (a) }"""
    )
    values = onnx.helper.make_tensor("", onnx.TensorProto.FLOAT, [2], [1.0, 3.0])
    places = onnx.helper.make_tensor("", onnx.TensorProto.INT64, [2], [0, 3])
    sparse = onnx.helper.make_sparse_tensor(values, places, [2, 2])
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["w"], sparse_value=sparse))
    proto.graph.node.append(onnx.parser.parse_node("z = Gemm (y, k)"))
    proto.graph.output[0].name = "z"
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(2, dtype=np.float32), "k"))
    model = load_model(proto)
    context = context_with(target="ort-cpu", frame=model.frame)
    Calibrate(method=Method.MINMAX).apply(model.graph, context)
    assert context.ranges.tensors["y"].maximum == 6  # relu of [1, 2] by diag(1, 3)


def test_a_tensor_whose_axis_1_differs_between_samples_has_no_channels():
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]> g (float[1, T, 4] x) => (float[1, T, 4] y)
        <float[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}> { y = MatMul (x, w) }
    """)
    feeds = [{"x": np.full((1, size, 4), size, np.float32)} for size in (2, 3)]
    ranges, report = graphopt.api.calibrate(model, feeds, channels=True)
    assert ranges.tensors and all(found.channels is None for found in ranges.tensors.values())
    reasons = {skip.reason for skip in report.passes[-1].skipped}
    assert "its axis 1 has another size in another sample: it has no statistics by channel" in reasons
