from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

import graphopt
from graphopt.cli import main
from graphopt.data_free import BOTH, MADE_UP, STORED, ranges_without_data, with_stored_statistics
from graphopt.feeds import Samples
from graphopt.model_io import load_model
from graphopt.passes import Calibrate, Fold
from graphopt.runtime import open_session
from graphopt.thresholds import Method

MODELS = Path(__file__).parents[1] / "models"

NET = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 2, 16, 16] x) => (float[N, 2, 1, 1] y)
    <float[2, 2, 1, 1] w = {1, 2, 3, 4}, float[2] gamma = {0.5, -2}, float[2] beta = {3, 10},
     float[2] mean = {0, 0}, float[2] var = {1, 1}, float[1] half = {0.5}>
    {
        a = Conv (x, w)
        b = BatchNormalization (a, gamma, beta, mean, var)
        c = Relu (b)
        d = Mul (c, half)
        e = Conv (d, w)
        y = GlobalAveragePool (e)
    }
"""


def model_of(text=NET):
    return load_model(onnx.parser.parse_model(text))


def made_up(scale=1.0, count=8):
    rng = np.random.default_rng(0)
    feeds = [{"x": (scale * rng.standard_normal((1, 2, 16, 16))).astype(np.float32)} for _ in range(count)]
    return Samples(lambda: iter(feeds), "made up", count, synthetic=True)


def ranges(text=NET, scale=1.0):
    model = model_of(text)
    return ranges_without_data(model, model, ["x", "a", "b", "c", "d", "e", "y"], made_up(scale))[0]


@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
def test_stored_statistics_give_the_range_whatever_the_inputs(scale):
    found = ranges(scale=scale)
    assert {name: each.method for name, each in found.items()} == {
        **dict.fromkeys("xa", MADE_UP),
        **dict.fromkeys("bcd", STORED),
        **dict.fromkeys("ey", BOTH),
    }
    assert 10 + 2.5 * 2 < found["b"].maximum < 10 + 6 * 2  # 2048 values of N(10, 2)
    assert found["c"].minimum >= 0
    assert found["d"].maximum == pytest.approx(found["c"].maximum / 2)
    assert found["x"].maximum == pytest.approx(3.5 * scale, rel=0.5)


def test_mean_and_deviation_of_each_channel_are_the_stored_ones():
    normalized, told = with_stored_statistics(model_of())
    assert told == {"b": True, "c": True, "d": True, "e": False, "y": False}
    session = open_session(normalized, extra_outputs=["b"])
    b = np.concatenate([session.run(feed, ["b"])["b"] for feed in made_up()])
    assert b.mean(axis=(0, 2, 3)) == pytest.approx([3, 10], abs=1e-4)
    assert b.std(axis=(0, 2, 3)) == pytest.approx([0.5, 2], rel=1e-3)


def test_a_sum_of_two_normalized_tensors_is_told_and_one_with_something_else_is_not():
    text = NET.replace("c = Relu (b)", "c = Add (b, x)")
    _, told = with_stored_statistics(model_of(text))
    assert (told["b"], told["c"]) == (True, False)
    _, told = with_stored_statistics(model_of(NET.replace("c = Relu (b)", "c = Add (b, b)")))
    assert told["c"]


@pytest.mark.parametrize(
    "change",
    [
        ("BatchNormalization (a", "BatchNormalization <training_mode = 1> (a"),
        ("16, 16", "3, 5"),
        ("16, 16] x", "16, 16] x, float[2] mean"),
    ],
    ids=["training", "few places", "computed mean"],
)
def test_a_batch_norm_that_cannot_be_judged_stays(change):
    text = NET.replace(*change)
    if "float[2] mean" in change[1]:
        text = text.replace("float[2] mean = {0, 0}, ", "")
    normalized, told = with_stored_statistics(model_of(text))
    assert told == {}
    assert "BatchNormalization" in {node.op for node in normalized.graph.nodes}


def test_a_model_without_batch_norm_has_made_up_ranges():
    text = NET.replace("BatchNormalization (a, gamma, beta, mean, var)", "Relu (a)")
    assert {each.method for each in ranges(text).values()} == {MADE_UP}


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
    assert "data-free: 15 ranges come from statistics stored in BatchNormalization" in " ".join(printed.out.split())
    assert "no data were used for the ranges" in printed.err


def test_data_beside_the_method_data_free_are_for_the_check_alone():
    data = MODELS / "fashion_mnist_calibration.npz"
    pipeline = [Fold(), Calibrate(method=Method.DATA_FREE)]
    result = graphopt.optimize(MODELS / "fmnist_resnet.onnx", pipeline, data=data, samples=8)
    assert result.report.passes[-1].parts[STORED] == 15
    assert any("no data were used for the ranges" in each for each in result.report.warnings)
