import numpy as np
import onnx.parser
import pytest
from zoo import zoo_feeds, zoo_model

from graphopt.branch_tensors import branch_label, branch_tensors, with_branch_outputs, with_branches
from graphopt.data import load_samples
from graphopt.errors import DataError
from graphopt.feeds import Samples
from graphopt.histogram import Extremes, Histogram
from graphopt.model_io import load_model
from graphopt.observe import observe
from graphopt.runtime import open_session

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
        "same": "more than one branch has a tensor of that name: say which, as If/then_branch/name",
        "size": "its values are int64: only floating-point tensors are quantized",
    }


@pytest.mark.parametrize("statistics", [Histogram, Extremes])
def test_a_value_that_is_not_finite_names_the_tensor_in_the_branch_and_the_sample(statistics):
    with pytest.raises(DataError, match=r"tensor doubled \(in a branch\) is infinite in sample 1"):
        observe(nested(), ["doubled"], samples_of(FEEDS[1], ([3e38], True, True)), statistics)


def test_the_model_with_more_outputs_of_its_ifs_gives_what_it_gave():
    model = nested()
    before = model.to_proto().SerializeToString()
    copy, outer = with_branch_outputs(model, dict.fromkeys(["deep", "doubled"], np.dtype(np.float32)))
    assert model.to_proto().SerializeToString() == before
    assert list(outer) == ["deep", "doubled"]
    for feed in samples_of(*FEEDS):
        assert np.array_equal(open_session(model).run(feed)["y"], open_session(copy).run(feed)["y"])


def test_a_copy_has_the_same_names():
    model = nested()
    assert list(branch_tensors(model.graph)) == list(branch_tensors(model.copy().graph))
    assert {"c/then_branch/same", "c/else_branch/same", "deep", "a"} <= set(branch_tensors(model.graph))


def test_the_branches_are_those_of_ifs_and_not_in_loops():
    loop = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N] x, bool go, int64 turns) => (float[N] y) {
            y = Loop (turns, go, x) <body = b (int64 i, bool on, float[N] z) => (bool out, float[N] u) {
                out = Identity (on)
                u = If (on) <then_branch = t () => (float[N] a) { a = Neg (z) },
                             else_branch = e () => (float[N] c) { c = Abs (z) }> }>
        }
    """)
    assert [branch_label(holders) for _, holders in with_branches(load_model(loop).graph)] == [""]
    assert [branch_label(holders) for _, holders in with_branches(nested().graph)] == [
        *("", "c/then_branch", "c/then_branch/d/then_branch", "c/then_branch/d/else_branch", "c/else_branch"),
    ]


@pytest.mark.zoo
@pytest.mark.parametrize("statistics", [Histogram, Extremes])
def test_a_net_that_is_all_inside_an_if_is_observed(statistics):
    model = load_model(zoo_model("silero_vad_v6"))
    samples = load_samples(zoo_feeds("silero_vad_v6", "calibration"), open_session(model).inputs, limit=4)
    found = branch_tensors(model.graph)
    convolved = [name for name, each in found.items() if each.tensor.inputs[0].op == "Conv"]
    observation = observe(model, convolved, samples, statistics)
    assert observation.statistics
    taken = {found[name].holders[0][1] for name in observation.statistics}
    assert len(taken) == 1  # all samples have one rate
