import numpy as np
import onnx.parser
import pytest
from zoo import zoo_feeds, zoo_model

from graphopt.data import load_samples
from graphopt.errors import DataError
from graphopt.feeds import Samples
from graphopt.histogram import Extremes, Histogram
from graphopt.model_io import load_model
from graphopt.nested_tensors import nested_graphs, nested_label, nested_tensors, with_nested_outputs
from graphopt.observe import observe
from graphopt.runtime import open_session
from graphopt.shapes import infer_shapes

NESTED = """
    <ir_version: 8, opset_import: ["" : 17]>
    nested (float[N] x, bool outer, bool inner) => (float[M] y) <float[1] two = {2}> {
        c = If (outer) <
            then_branch = t () => (float[M] a) {
                doubled = Mul (x, two)
                same = Relu (doubled)
                d = If (inner) <
                    then_branch = tt () => (float[N] e) { deep = Neg (doubled)  e = Exp (deep) },
                    else_branch = te () => (float[N] f) { f = Identity (x) }
                >
                a = Add (d, same)
            },
            else_branch = e () => (float[M] b) { same = Abs (x)  size = Shape (x)  b = Tanh (same) }
        >
        y = Add (c, two)
    }
"""


def nested():
    return load_model(onnx.parser.parse_model(NESTED))


def samples_of(*feeds):
    arrays = [
        {"x": np.array(x, np.float32), "outer": np.array(outer), "inner": np.array(inner)} for x, outer, inner in feeds
    ]
    return Samples(lambda: iter(arrays), "test data", len(arrays))


FEEDS = (([1, -2], True, True), ([3], True, False), ([-5, 4, 1], False, True))


@pytest.mark.parametrize("statistics", [Histogram, Extremes])
def test_tensors_of_branches_are_observed_where_their_branch_is_taken(statistics):
    names = ["doubled", "deep", "c/then_branch/same", "c/else_branch/same", "b", "f", "y"]
    observation = observe(nested(), names, samples_of(*FEEDS), statistics)
    assert observation.skipped == ()
    assert list(observation.statistics) == names
    found = {name: (seen.minimum, seen.maximum, seen.count) for name, seen in observation.statistics.items()}
    assert found["doubled"] == (-4, 6, 3)
    assert found["deep"] == (-2, 4, 2)
    assert found["c/then_branch/same"] == (0, 6, 3)
    assert found["c/else_branch/same"] == (1, 5, 3)
    assert found["b"][2] == 3
    assert found["f"] == (3, 3, 1)
    assert found["y"][2] == 6


@pytest.mark.parametrize("statistics", [Histogram, Extremes])
def test_a_branch_that_no_sample_takes_has_no_values(statistics):
    observation = observe(nested(), ["deep", "doubled"], samples_of(FEEDS[1]), statistics)
    assert list(observation.statistics) == ["doubled"]
    assert [(skip.where, skip.reason) for skip in observation.skipped] == [("deep", "it has no values in any sample")]


def test_what_is_no_single_float_tensor_is_skipped_with_a_reason():
    observation = observe(nested(), ["same", "size"], samples_of(*FEEDS), Histogram)
    assert {skip.where: skip.reason for skip in observation.skipped} == {
        "same": "more than one nested graph has a tensor of that name: say which, as If/then_branch/name",
        "size": "its values are int64: only floating-point tensors are quantized",
    }


@pytest.mark.parametrize("statistics", [Histogram, Extremes])
def test_a_value_that_is_not_finite_names_the_tensor_in_the_branch_and_the_sample(statistics):
    with pytest.raises(DataError, match=r"tensor doubled \(in a branch\) is infinite in sample 1"):
        observe(nested(), ["doubled"], samples_of(FEEDS[1], ([3e38], True, True)), statistics)


def test_the_model_with_more_outputs_of_its_ifs_gives_what_it_gave():
    model = nested()
    before = model.to_proto().SerializeToString()
    copy, outer = with_nested_outputs(model, dict.fromkeys(["deep", "doubled"], np.dtype(np.float32)))
    assert model.to_proto().SerializeToString() == before
    assert list(outer) == ["deep", "doubled"]
    for feed in samples_of(*FEEDS):
        assert np.array_equal(open_session(model).run(feed)["y"], open_session(copy).run(feed)["y"])


def test_a_copy_has_the_same_names():
    model = nested()
    assert list(nested_tensors(model.graph)) == list(nested_tensors(model.copy().graph))
    assert {"c/then_branch/same", "c/else_branch/same", "deep", "a"} <= set(nested_tensors(model.graph))


def test_labels_name_the_nodes_around_a_graph():
    assert [nested_label(holders) for _, holders in nested_graphs(nested().graph)] == [
        *("", "c/then_branch", "c/then_branch/d/then_branch", "c/then_branch/d/else_branch", "c/else_branch"),
    ]
    assert [nested_label(holders) for _, holders in nested_graphs(loops().graph)] == [
        *("", "last/body", "last/body/inner/body", "last/body/g/then_branch", "last/body/g/else_branch", "_s/body"),
    ]


LOOPS = """
    <ir_version: 8, opset_import: ["" : 17]>
    loops (float[N] x, int64 turns) => (float[P] last, float[T,Q] all, float[3,2] sum)
    <bool yes = {1}, float[1] one = {1}, int64 three = {3}, float[2] zeros = {0, 0},
     float[3,2] rows = {1, 2, 3, 4, 5, -6}>
    {
        last, all = Loop (turns, yes, x) <body = b (int64 i, bool on, float[M] z)
            => (bool on_, float[L] z_, float[1] w) {
            on_ = Identity (on)
            z_ = Concat<axis=0> (z, one)
            doubled = Add (z_, z_)
            inner = Loop (three, yes, one) <body = d (int64 j, bool go, float[1] v) => (bool go_, float[1] v_) {
                go_ = Identity (go)
                v_ = Add (v, one)
                tripled = Mul (v_, one)
            }>
            g = If (on) <
                then_branch = t () => (float[1] e) { e = Neg (inner) },
                else_branch = f () => (float[1] h) { h = Identity (inner) }
            >
            w = Abs (g)
        }>
        _s, sum = Scan<num_scan_inputs = 1, scan_output_axes = [0], body = s (float[2] state, float[2] row)
            => (float[2] next, float[2] seen) { next = Add (state, row)  seen = Neg (next) }> (zeros, rows)
    }
"""


def loops(opset=17):
    model = onnx.parser.parse_model(LOOPS.replace(": 17]", f": {opset}]"))
    model.graph.node[-1].name = "_s"
    return load_model(model)


def turns(*numbers):
    arrays = [{"x": np.array([3, -4], np.float32), "turns": np.array(number)} for number in numbers]
    return Samples(lambda: iter(arrays), "test data", len(arrays))


@pytest.mark.parametrize("opset", [11, 13, 17, 21])
@pytest.mark.parametrize("statistics", [Histogram, Extremes])
def test_tensors_of_loops_are_observed_in_every_turn(statistics, opset):
    names = ["z", "doubled", "v", "tripled", "e", "w", "state", "row", "seen"]
    observation = observe(loops(opset), names, turns(2, 3, 0), statistics)
    assert observation.skipped == ()
    found = {name: (seen.minimum, seen.maximum, seen.count) for name, seen in observation.statistics.items()}
    assert found == {
        "z": (-4, 3, 2 + 3 + 2 + 3 + 4),  # it grows by one in each turn
        "doubled": (-8, 6, 3 + 4 + 3 + 4 + 5),
        "v": (1, 3, 3 * 5),
        "tripled": (2, 4, 3 * 5),
        "e": (-4, -4, 5),
        "w": (4, 4, 5),
        "state": (0, 6, 3 * 3 * 2),
        "row": (-6, 5, 3 * 3 * 2),
        "seen": (-9, 0, 3 * 3 * 2),
    }


def test_a_loop_that_never_turns_has_no_values():
    observation = observe(loops(), ["doubled", "seen"], turns(0), Histogram)
    assert list(observation.statistics) == ["seen"]
    assert [(skip.where, skip.reason) for skip in observation.skipped] == [
        ("doubled", "it has no values in any sample")
    ]


def test_a_value_of_a_loop_that_is_not_finite_names_the_tensor_and_the_sample():
    model = loops()
    model.graph.nodes[0].attrs["body"].nodes[1].inputs[1].values = np.array([3e38], np.float32)
    with pytest.raises(DataError, match=r"tensor doubled \(in a loop\) is infinite in sample 1"):
        observe(model, ["doubled"], turns(0, 1), Histogram)


def test_the_model_with_more_outputs_of_its_loops_gives_what_it_gave():
    model = loops()
    before = model.to_proto().SerializeToString()
    typed = model.copy()
    infer_shapes(typed.graph)
    tensors = {
        name: each.tensor for name, each in nested_tensors(typed.graph).items() if each.tensor.dtype == np.float32
    }
    copy, outer = with_nested_outputs(model, tensors)
    assert model.to_proto().SerializeToString() == before
    assert {"z", "doubled", "v", "tripled", "e", "h", "state", "seen"} <= outer.keys()
    for feed in turns(0, 1, 4):
        ours, again = open_session(model).run(feed), open_session(copy).run(feed)
        assert all(np.array_equal(ours[name], again[name]) for name in ours)


def test_what_a_scan_holds_in_an_if_is_skipped_with_a_reason():
    model = load_model(
        onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        scans (float[T,2] x, bool flag) => (float[2] y) <float[2] zeros = {0, 0}> {
            y = Scan<num_scan_inputs = 1, body = s (float[2] state, float[2] row) => (float[2] next) {
                step = If (flag) <then_branch = t () => (float[2] a) { a = Neg (row) },
                                  else_branch = e () => (float[2] b) { b = Abs (row) }>
                next = Add (state, step)
            }> (zeros, x)
        }
    """)
    )
    feed = {"x": np.ones((3, 2), np.float32), "flag": np.array(True)}
    observation = observe(model, ["a", "step"], Samples(lambda: iter([feed]), "test data", 1), Histogram)
    assert list(observation.statistics) == ["step"]
    assert [(skip.where, skip.reason) for skip in observation.skipped] == [
        (
            "a",
            "it is in a graph inside the body of a Scan: how many values it has may change",
        )
    ]


@pytest.mark.zoo
@pytest.mark.parametrize("statistics", [Histogram, Extremes])
def test_a_net_that_is_all_inside_an_if_is_observed(statistics):
    model = load_model(zoo_model("silero_vad_v6"))
    samples = load_samples(zoo_feeds("silero_vad_v6", "calibration"), open_session(model).inputs, limit=4)
    found = nested_tensors(model.graph)
    convolved = [name for name, each in found.items() if each.tensor.inputs[0].op == "Conv"]
    observation = observe(model, convolved, samples, statistics)
    assert observation.statistics
    taken = {found[name].holders[0][1] for name in observation.statistics}
    assert len(taken) == 1  # all samples have one rate
