from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

import graphopt
from graphopt.cli import main
from graphopt.data_free import MADE_UP, ranges_without_data
from graphopt.feeds import Samples
from graphopt.model_io import load_model
from graphopt.normalization_ranges import BOUNDS, STORED
from graphopt.passes import Calibrate, Fold
from graphopt.thresholds import Method

MODELS = Path(__file__).parents[1] / "models"

NET = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 2, 16, 16] x) => (float[N, 2, 1, 1] y)
    <float[2, 2, 1, 1] w = {1, 2, 3, 4}, float[2] gamma = {0.5, -2}, float[2] beta = {3, 10},
     float[2] mean = {0, 0}, float[2] var = {1, 1}, float[1] half = {0.5}>
    {
        u = Relu (x)
        a = Conv (u, w)
        b = BatchNormalization (a, gamma, beta, mean, var)
        c = Relu (b)
        d = Mul (c, half)
        e = Conv (d, w)
        g = Sigmoid (e)
        y = GlobalAveragePool (e)
    }
"""
NAMES = ["x", "a", "b", "c", "d", "e", "g", "y"]


def model_of(text=NET):
    return load_model(onnx.parser.parse_model(text))


def made_up(scale=1.0, count=8):
    rng = np.random.default_rng(0)
    feeds = [{"x": (scale * rng.standard_normal((1, 2, 16, 16))).astype(np.float32)} for _ in range(count)]
    return Samples(lambda: iter(feeds), "made up", count, synthetic=True)


def ranges(text=NET, scale=1.0):
    model = model_of(text)
    return ranges_without_data(model, model, NAMES, made_up(scale)).tensors


@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
def test_what_is_stored_gives_the_range_whatever_the_inputs(scale):
    found = ranges(scale=scale)
    assert {name: each.method for name, each in found.items()} == {
        **dict.fromkeys("xaey", MADE_UP),
        **dict.fromkeys("bcd", STORED),
        "g": BOUNDS,
    }
    assert found["b"].maximum == pytest.approx(10 + 5.5 * 2, rel=1e-4)
    assert (found["c"].minimum, found["c"].maximum) == pytest.approx((0, 21), rel=1e-4)
    assert found["d"].maximum == pytest.approx(10.5, rel=1e-4)
    assert (found["g"].minimum, found["g"].maximum) == pytest.approx((0, 1))
    assert found["x"].maximum == found["x"].observed_maximum == pytest.approx(3.5 * scale, rel=0.5)


def test_what_is_computed_from_made_up_inputs_gets_a_margin():
    found = ranges()["e"]
    assert found.maximum == 1.5 * found.observed_maximum > 0
    assert found.minimum == min(found.observed_minimum, 1.5 * found.observed_minimum)


def test_a_model_without_batch_norm_has_made_up_ranges_and_bounds():
    text = NET.replace("BatchNormalization (a, gamma, beta, mean, var)", "Relu (a)")
    assert {name: each.method for name, each in ranges(text).items()} == {**dict.fromkeys(NAMES, MADE_UP), "g": BOUNDS}


@pytest.mark.parametrize(("half", "method"), [("1", STORED), ("0.5", MADE_UP)])
def test_the_original_tells_of_a_folded_tensor_that_holds_the_same_values_under_its_name(half, method):
    original = model_of(NET.replace("half = {0.5}", f"half = {{{half}}}"))
    folded = original.copy()
    Fold().apply(folded.graph, graphopt.Context(frame=folded.frame))
    assert "BatchNormalization" not in {node.op for node in folded.graph.nodes}  # half went into the Conv, too
    assert ranges_without_data(original, folded, ["b"], made_up()).tensors["b"].method == method


def test_the_model_is_left_as_it_was():
    model = model_of()
    before = model.to_proto().SerializeToString()
    ranges_without_data(model, model, ["b"], made_up())
    assert model.to_proto().SerializeToString() == before


def test_without_data_the_pipeline_reads_batch_norm_before_it_is_folded_and_says_so(tmp_path, capsys):
    model = str(MODELS / "fmnist_resnet.onnx")
    out = str(tmp_path / "out.onnx")
    assert main(["optimize", model, "--passes", "fold,calibrate,qdq", "-o", out]) == 0
    printed = capsys.readouterr()
    assert (
        "data-free: the ranges of 15 tensors come from statistics stored in BatchNormalization, 0 from operators with "
        "bounds, 3 from made-up inputs" in " ".join(printed.out.split())
    )
    assert "no data were used for the ranges" in printed.err


def test_data_beside_the_method_data_free_are_for_the_check_alone():
    data = MODELS / "fashion_mnist_calibration.npz"
    pipeline = [Fold(), Calibrate(method=Method.DATA_FREE)]
    result = graphopt.optimize(MODELS / "fmnist_resnet.onnx", pipeline, data=data, samples=8)
    assert result.report.passes[-1].parts[STORED] == 15
    assert any("no data were used for the ranges" in each for each in result.report.warnings)


@pytest.mark.parametrize(("model", "least"), [("fmnist_resnet", 30), ("fmnist_mbv2", 27)])
def test_ranges_without_data_come_close_to_those_with_data(model, least):
    data = MODELS / "fashion_mnist_evaluation.npz"
    result = graphopt.optimize(MODELS / f"{model}.onnx", "fold,calibrate,qdq")
    check = graphopt.check(MODELS / f"{model}.onnx", result.model, data=data, samples=64, exact=True)
    assert check.comparison.outputs[0].sqnr_db > least
