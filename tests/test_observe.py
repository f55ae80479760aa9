import threading

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper

from graphopt.errors import DataError, ModelError
from graphopt.feeds import Samples, SourcedFeed
from graphopt.histogram import Extremes, Histogram, MovingAverage
from graphopt.model_io import load_model
from graphopt.observe import observe
from graphopt.runtime import Session

CHAIN = """
    <ir_version: 8, opset_import: ["" : 17]>
    chain (float[N, 3] x) => (float[N, 3] y) <float[1] two = {2}>
    { doubled = Mul (x, two)  positive = Relu (doubled)  y = Add (positive, two) }
"""


def model_of(text):
    return load_model(onnx.parser.parse_model(text))


def samples_of(*feeds, name="x"):
    arrays = [feed if isinstance(feed, dict) else {name: np.asarray(feed, np.float32)} for feed in feeds]
    return Samples(lambda: iter(arrays), "test data", len(arrays))


def test_inputs_intermediate_tensors_and_outputs_are_observed():
    samples = samples_of([[-1, 0, 1]], [[2, 3, -4]])
    observation = observe(model_of(CHAIN), ["x", "doubled", "positive", "y"], samples, Histogram)
    extremes = {name: (seen.minimum, seen.maximum) for name, seen in observation.statistics.items()}
    assert extremes == {"x": (-4, 3), "doubled": (-8, 6), "positive": (0, 6), "y": (2, 8)}
    assert all(seen.count == 6 for seen in observation.statistics.values())
    assert observation.statistics["positive"].zeros == 3
    assert observation.samples == 2
    assert observation.skipped == ()


def test_the_histogram_is_that_of_the_values_in_any_order_and_batch():
    values = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    direct = Histogram()
    direct.add(np.maximum(2 * values, 0))
    for feeds in (values[::-1, None], [values[:4], values[4:]]):
        seen = observe(model_of(CHAIN), ["positive"], samples_of(*feeds), Histogram).statistics["positive"]
        assert np.array_equal(seen.counts, direct.counts)
        assert vars(seen).keys() == vars(direct).keys()
        assert (seen.width, seen.zeros, seen.maximum) == (direct.width, direct.zeros, direct.maximum)


def test_extremes_alone_can_be_asked_for():
    seen = observe(model_of(CHAIN), ["y"], samples_of([[0, 1, 2]]), Extremes).statistics["y"]
    assert type(seen) is Extremes
    assert (seen.minimum, seen.maximum) == (2, 6)


def test_the_model_is_left_as_it_was():
    model = model_of(CHAIN)
    before = model.to_proto().SerializeToString()
    observe(model, ["doubled"], samples_of([[0, 1, 2]]), Extremes)
    assert model.to_proto().SerializeToString() == before


def test_progress_is_told_after_every_sample():
    told = []
    observe(
        model_of(CHAIN),
        ["y"],
        samples_of([[0, 1, 2]], [[0, 1, 2]]),
        Extremes,
        progress=lambda what, done, total: told.append((what, done, total)),
    )
    assert told == [("calibrate 1 tensors", done, 2) for done in range(3)]


@pytest.mark.parametrize("statistics", [Histogram, Extremes])
def test_samples_are_read_one_at_a_time_and_no_thread_is_left(statistics):
    alive = []

    def feeds():
        for _ in range(20):
            alive.append(threading.active_count())
            yield {"x": np.ones((1, 3), np.float32)}

    before = threading.active_count()
    observation = observe(model_of(CHAIN), ["y"], Samples(feeds, "endless", None), statistics)
    assert observation.samples == 20
    assert max(alive) <= before + 2
    assert threading.active_count() == before


def test_a_source_may_use_the_same_array_for_every_sample():
    def feeds():
        array = np.empty((1, 300_000, 3), np.float32)
        for value in range(6):
            array.fill(value)
            yield {"x": array}

    model = model_of(CHAIN.replace("float[N, 3]", "float[N, M, 3]"))
    seen = observe(model, ["x"], Samples(feeds, "one array", 6), Histogram).statistics["x"]
    assert seen.magnitudes()[seen.magnitudes() > 0].tolist() == [900_000] * 6
    average = observe(model, ["x"], Samples(feeds, "one array", 6), MovingAverage).statistics["x"]
    assert average.average_maximum == pytest.approx(0.1480149401)  # 0.01 * (1 * 0.99**4 + 2 * 0.99**3 + ...)


def test_no_samples_are_refused():
    with pytest.raises(DataError, match="test data: there are no samples to calibrate with"):
        observe(model_of(CHAIN), ["y"], samples_of(), Histogram)


@pytest.mark.parametrize(("bad", "name"), [(np.nan, "NaN"), (np.inf, "infinite")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_value_that_is_not_finite_names_the_tensor_and_the_sample(bad, name, place):
    feeds = [np.ones((1, 3)) for _ in range(3)]
    feeds[place][0, 1] = bad
    with pytest.raises(DataError, match=rf"tensor doubled is {name} in sample {place} \(counted from 0\)"):
        observe(model_of(CHAIN), ["doubled", "positive", "x", "y"], samples_of(*feeds), Histogram)


def test_a_sample_that_the_model_does_not_take_is_named():
    good, bad = np.ones((1, 3)), np.ones((1, 4))
    with pytest.raises(DataError, match=r"the model does not run on sample 1 \(counted from 0\): .*4.*3"):
        observe(model_of(CHAIN), ["y"], samples_of(good, bad), Histogram)


def test_a_model_that_onnxruntime_refuses_is_an_error():
    model = model_of('<ir_version: 8, opset_import: ["" : 17]> g (float[1] x) => (float[1] y) { y = Relu (x) }')
    model.graph.nodes[0].op = "NoSuchOperator"
    with pytest.raises(ModelError, match="NoSuchOperator"):
        observe(model, ["y"], samples_of([1]), Histogram)


def test_tensors_that_cannot_be_observed_are_skipped_with_a_reason():
    model = model_of("""
        <ir_version: 8, opset_import: ["" : 17]>
        loops (float[3] x) => (float[3] y, int64[1] shape)
        <float[1] two = {2}, bool yes = {1}, int64 times = {3}, int64 first = {0}> {
            shape = Shape (x)
            c = Loop (times, yes, x) <
                body = b (int64 i, bool on, float[3] a) => (bool same, float[3] d)
                { same = Identity (on)  inner = Mul (a, two)  d = Relu (inner) }
            >
            z = SequenceEmpty ()
            s = SequenceInsert (z, c)
            t = SequenceMap (s) <body = m (float[3] e) => (float[3] f) { mapped = Mul (e, two)  f = Relu (mapped) }>
            u = SequenceAt (t, first)
            y = Add (u, two)
        }
    """)
    names = ["y", "shape", "mapped", "two", "nowhere"]
    observation = observe(model, names, samples_of([1, 2, 3]), Histogram)
    assert list(observation.statistics) == ["y"]
    assert {skip.where: skip.reason for skip in observation.skipped} == {
        "shape": "its values are int64: only floating-point tensors are quantized",
        "mapped": "it is in a graph of another operator than If, Loop and Scan, where nothing is observed",
        "two": "it is constant: its range is known without samples",
        "nowhere": "the graph has no tensor of that name",
    }


def test_a_tensor_that_is_empty_in_every_sample_is_skipped_and_one_that_is_only_sometimes_is_not():
    model = model_of("""
        <ir_version: 8, opset_import: ["" : 17]>
        slices (float[N] x) => (float[M] first, float[K] rest)
        <int64[1] zero = {0}, int64[1] two = {2}, int64[1] end = {99}>
        { first = Slice (x, zero, two)  rest = Slice (x, two, end) }
    """)
    always = observe(model, ["first", "rest"], samples_of([1, 2], [3]), Histogram)
    assert list(always.statistics) == ["first"]
    assert [(skip.where, skip.reason) for skip in always.skipped] == [("rest", "it has no values in any sample")]
    sometimes = observe(model, ["rest"], samples_of([1, 2], [3, 4, 5]), Histogram)
    assert (sometimes.statistics["rest"].count, sometimes.statistics["rest"].maximum) == (1, 5)


def test_an_optional_tensor_without_a_value_counts_nothing():
    tensor = helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, ["N"])
    optional = helper.make_optional_type_proto(tensor)
    some = helper.make_graph(
        [helper.make_node("Optional", ["x"], ["a"])], "some", [], [helper.make_value_info("a", optional)]
    )
    none = helper.make_graph(
        [helper.make_node("Optional", [], ["b"], type=tensor)],
        "none",
        [],
        [helper.make_value_info("b", optional)],
    )
    there = helper.make_tensor_value_info("there", onnx.TensorProto.BOOL, [])
    graph = helper.make_graph(
        [helper.make_node("If", ["there"], ["o"], then_branch=some, else_branch=none)],
        "maybe",
        [helper.make_value_info("x", tensor), there],
        [helper.make_value_info("o", optional)],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)])
    x = np.array([1, 2], np.float32)
    feeds = [{"x": x, "there": np.array(False)}, {"x": x, "there": np.array(True)}]
    assert observe(load_model(model), ["o"], samples_of(*feeds), Histogram).statistics["o"].count == 2


@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_other_float_types_are_observed(dtype):
    model = model_of(f"""
        <ir_version: 8, opset_import: ["" : 17]> g ({dtype}[N] x) => ({dtype}[N] y) {{ y = Relu (x) }}
    """)
    numpy_type = {"float16": np.float16, "double": np.float64}[dtype]
    feed = {"x": np.array([-1, 0.5, 3], numpy_type)}
    assert observe(model, ["y"], samples_of(feed), Histogram).statistics["y"].maximum == 3


def test_nothing_to_observe_still_counts_the_samples():
    observation = observe(model_of(CHAIN), [], samples_of([[1, 2, 3]]), Histogram)
    assert (observation.samples, observation.statistics) == (1, {})


@pytest.mark.parametrize("dtype", ["float16", "float", "double"])
def test_extremes_reduced_inside_the_graph_are_those_of_the_values(dtype):
    model = model_of(f"""
        <ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => ({dtype}[N] y)
        {{ y = Cast <to = {onnx.TensorProto.DataType.Value(dtype.upper())}> (x) }}
    """)
    feeds = [np.random.default_rng(number).standard_normal(50).astype(np.float32) for number in range(3)]
    reduced = observe(model, ["x", "y"], samples_of(*feeds), Extremes).statistics
    taken_in = observe(model, ["x", "y"], samples_of(*feeds), Histogram).statistics
    for name in ("x", "y"):
        one, other = reduced[name], taken_in[name]
        assert (one.minimum, one.maximum, one.count) == (other.minimum, other.maximum, other.count)


@pytest.mark.parametrize(("bad", "name"), [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_extremes_of_values_that_are_not_finite_are_refused(bad, name, place):
    feeds = [np.ones((1, 3)) for _ in range(3)]
    feeds[place][0, 1] = bad
    with pytest.raises(DataError, match=rf"tensor doubled is {name} in sample {place} \(counted from 0\)"):
        observe(model_of(CHAIN), ["doubled", "x"], samples_of(*feeds), Extremes)


@pytest.mark.parametrize("statistics", [Histogram, Extremes])
def test_where_inputs_were_made_up_data_are_the_advice(statistics):
    samples = Samples(lambda: iter([{"x": np.full((1, 3), np.nan, np.float32)}]), "made up", 1, synthetic=True)
    with pytest.raises(DataError, match=r"NaN in sample 0 .*: the inputs were made up, so give real ones \(--data\)"):
        observe(model_of(CHAIN), ["doubled"], samples, statistics)


def test_extremes_need_values_and_a_floating_point_type():
    model = model_of("""
        <ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[M] y, int64[1] shape)
        <int64[1] zero = {0}, int64[1] two = {2}> { shape = Shape (x)  y = Slice (x, two, shape) }
    """)
    observation = observe(model, ["y", "shape"], samples_of([1, 2]), Extremes)
    assert {skip.where: skip.reason for skip in observation.skipped} == {
        "y": "it has no values in any sample",
        "shape": "its values are int64: only floating-point tensors are quantized",
    }
    assert observe(model, ["y"], samples_of([1, 2], [3, 4, 5]), Extremes).statistics["y"].count == 1


def test_a_memory_budget_divides_the_tensors_into_groups_and_changes_nothing_else():
    rng = np.random.default_rng(0)
    feeds = [rng.standard_normal((1, 3)).astype(np.float32) for _ in range(5)]
    names = ["x", "doubled", "positive", "y"]
    whole = observe(model_of(CHAIN), names, samples_of(*feeds), Histogram)
    told = set()
    divided = observe(
        model_of(CHAIN),
        names,
        samples_of(*feeds),
        Histogram,
        memory_budget=48,  # two samples of two tensors of three floats
        progress=lambda what, done, total: told.add(what),
    )
    assert whole.notes == ()
    assert "ran 2 times, for a group of tensors each, to keep to 0 MiB of activations" in divided.notes[0]
    assert {what.partition(",")[2].partition(", ")[2] for what in told} == {"run 1 of 2", "run 2 of 2"}
    for name in names:
        assert np.array_equal(whole.statistics[name].counts, divided.statistics[name].counts)
    tiny = observe(model_of(CHAIN), names, samples_of(*feeds), Histogram, memory_budget=1)
    assert "ran 4 times" in tiny.notes[0] and "the largest tensor alone took" in tiny.notes[0]


def test_a_tensor_whose_size_only_a_run_shows_counts_in_the_budget():
    model = model_of("""
        <ir_version: 8, opset_import: ["" : 17]> g (float[N] x, int64[1] end) => (float[M] y)
        <int64[1] zero = {0}> { some = Slice (x, zero, end)  y = Relu (some) }
    """)
    feed = {"x": np.ones(10, np.float32), "end": np.array([6])}
    observation = observe(model, ["some", "y"], samples_of(feed), Histogram, memory_budget=48)
    assert "ran 2 times" in observation.notes[0]
    assert observation.statistics["y"].count == 6


BATCHED = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[N, 3] x) => (float[N, 3] y) <float[3, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9}>
    { a = MatMul (x, w)  y = Relu (a) }
"""
MIXED = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[N, 3] x) => (float[N, 3] y) { a = ReduceMean <axes = [0], keepdims = 1> (x)  y = Sub (x, a) }
"""


@pytest.mark.parametrize(("text", "joined"), [(BATCHED, True), (MIXED, False), (CHAIN.replace("[N", "[1"), False)])
def test_samples_are_joined_only_where_that_gives_the_same_bits(text, joined, monkeypatch):
    calls = []
    run = Session.run_without_copies
    monkeypatch.setattr(Session, "run_without_copies", lambda *given: calls.append(given[1]) or run(*given))
    feeds = [np.full((1, 3), value, np.float32) for value in range(20)]
    seen = observe(model_of(text), ["y"], samples_of(*feeds), Histogram).statistics["y"]
    assert seen.count == 60
    assert (len(calls) < 20) == joined


def test_samples_of_other_shapes_are_not_joined_with_their_neighbours():
    feeds = [np.ones((1, 3)), np.ones((1, 3)), np.ones((2, 3)), np.ones((1, 3))]
    observation = observe(model_of(BATCHED), ["x", "y"], samples_of(*feeds), Histogram)
    assert observation.samples == 4
    assert observation.statistics["y"].count == 15


def test_a_wrong_value_in_a_batch_names_its_sample():
    feeds = [SourcedFeed({"x": np.full((1, 3), 1.0, np.float32)}, f"feeds/{number}.npz") for number in range(9)]
    feeds[6]["x"][0, 2] = 3e38
    with pytest.raises(DataError, match=r"tensor a is infinite in feeds/6\.npz: leave that sample out"):
        observe(model_of(BATCHED), ["a"], samples_of(*feeds), Histogram)


@pytest.mark.parametrize("statistics", [Histogram, Extremes])
def test_an_error_of_the_source_ends_the_threads(statistics):
    def feeds():
        yield {"x": np.ones((1, 3), np.float32)}
        yield {"x": np.ones((1, 3), np.float32)}
        raise DataError("the disk is gone")

    before = threading.active_count()
    with pytest.raises(DataError, match="the disk is gone"):
        observe(model_of(CHAIN), ["y"], Samples(feeds, "endless", None), statistics)
    assert threading.active_count() == before


def test_extremes_of_bfloat16_are_observed_though_its_values_cannot_leave_onnxruntime():
    model = model_of("""
        <ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[N] y)
        { half = Cast <to = 16> (x)  y = Cast <to = 1> (half) }
    """)
    seen = observe(model, ["half"], samples_of([-1.5, 0.25, 3]), Extremes).statistics["half"]
    assert (seen.minimum, seen.maximum, seen.count) == (-1.5, 3, 3)
