import math
from dataclasses import replace

import numpy as np
import onnx.parser
import pytest

from graphopt import method_search, weight_scales
from graphopt.api import optimize
from graphopt.feeds import Samples
from graphopt.held_out import noise_to_signal
from graphopt.method_search import CANDIDATES
from graphopt.model_io import Model, load_model
from graphopt.pass_base import Context
from graphopt.passes import InsertQdq, insert_qdq
from graphopt.passes.calibrate import Calibrate
from graphopt.quantization import params_of_weight
from graphopt.runtime import open_session
from graphopt.targets import target_named
from graphopt.thresholds import Method

NET = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 4] x) => (float[N, 2] y)
    <float[4, 4] w = {1, 0, 1, 0,  0, 1, 0, 1,  1, 1, 0, 0,  0, 0, 1, 1}, float[4, 2] v = {1, 0, 0, 1, 1, 1, 0, 1}>
    { hidden = MatMul (x, w)  positive = Relu (hidden)  y = MatMul (positive, v) }
"""
TWO_PATHS = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 4] x, float[N, 4] z) => (float[N, 4] y, float[N, 4] u)
    <float[4, 4] w = {1, 0, 1, 0,  0, 1, 0, 1,  1, 1, 0, 0,  0, 0, 1, 1}, float low = {-2}, float high = {2}>
    { y = MatMul (x, w)  product = MatMul (z, w)  u = Clip (product, low, high) }
"""
"""Outliers of x are most of y, and those of z are cut off in u."""
WHOLE_NUMBERS = NET.replace("(float[N, 2] y)", "(int64[N] y)").replace(
    "y = MatMul (positive, v)", "scores = MatMul (positive, v)  y = ArgMax <axis = 1, keepdims = 0> (scores)"
)


def samples_of(feeds, **fields):
    return Samples(lambda: iter(feeds), "rows.npz", len(feeds), **fields)


def feeds_with(outliers, count=40):
    """Normal values, and as many outliers of 400 times the size in all samples together."""
    random = np.random.default_rng(0)
    values = random.standard_normal((count, 64, 4)).astype(np.float32)
    values.reshape(-1)[random.choice(values.size, outliers, replace=False)] *= 400
    return [{"x": each} for each in values]


def calibrated(feeds, text=NET, target="ort-cpu", **options):
    model = load_model(onnx.parser.parse_model(text))
    context = Context(target=target_named(target), samples=feeds if isinstance(feeds, Samples) else samples_of(feeds))
    result = Calibrate(**options).apply(model.graph, context)
    return context.ranges, result


def error_of(ranges, feeds, target="ort-cpu"):
    model = load_model(onnx.parser.parse_model(NET))
    context = Context(target=target_named(target), ranges=ranges)
    InsertQdq().apply(model.graph, context)
    reference = open_session(Model(context.unquantized, model.frame))
    session = open_session(model, optimize=context.target.runs_here)
    return noise_to_signal(reference, session, samples_of(feeds))


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt"])
@pytest.mark.parametrize("outliers", [0, 3, 300])
def test_no_other_method_brings_the_outputs_closer(outliers, target):
    feeds = feeds_with(outliers, count=32)
    ranges, _ = calibrated(feeds, target=target)
    others = [calibrated(feeds, target=target, method=method)[0] for method in CANDIDATES]
    assert error_of(ranges, feeds, target) == min(error_of(each, feeds, target) for each in others)


@pytest.mark.parametrize("best", CANDIDATES)
@pytest.mark.parametrize("others", [0.5, math.nan])
def test_takes_whichever_has_the_least_error(best, others, monkeypatch):
    errors = iter([0.25 if method is best else others for method in CANDIDATES])
    monkeypatch.setattr(method_search, "noise_to_signal", lambda *_: next(errors, 1.0))
    assert calibrated(feeds_with(3))[0].method is best


def test_takes_the_first_where_nothing_compares(monkeypatch):
    monkeypatch.setattr(method_search, "noise_to_signal", lambda *_: math.nan)
    assert calibrated(feeds_with(3))[0].method is CANDIDATES[0]


@pytest.fixture
def no_halves(monkeypatch):
    monkeypatch.setattr(method_search, "_halved", lambda _: iter(()))


@pytest.mark.usefixtures("no_halves")
def test_the_ranges_are_those_of_the_method_that_it_names():
    feeds = feeds_with(3)
    ranges, result = calibrated(feeds)
    asked, _ = calibrated(feeds, method=ranges.method)
    assert replace(ranges, covering_weights=False).to_text() == asked.to_text()
    assert result.notes[-1].startswith(f"search took {ranges.method.value}: SQNR of the outputs, quantized by mse ")
    assert all(method.value in result.notes[-1] for method in CANDIDATES)


def outlying_on_both_paths():
    return [{"x": one["x"], "z": other["x"]} for one, other in zip(feeds_with(99), feeds_with(98), strict=True)]


def test_half_of_a_range_is_taken_where_the_outputs_are_closer_with_it():
    ranges, result = calibrated(outlying_on_both_paths(), text=TWO_PATHS)
    found = ranges.tensors["z"]
    assert found.method == f"half of {ranges.method.value}"
    asked, _ = calibrated(outlying_on_both_paths(), text=TWO_PATHS, method=ranges.method)
    assert (found.minimum, found.maximum) == (asked.tensors["z"].minimum / 2, asked.tensors["z"].maximum / 2)
    assert "with other ranges for 2 tensors" in result.notes[-1]


def test_scales_that_cover_the_weights_are_taken_where_the_outputs_are_closer_with_them(monkeypatch):
    def too_large(weight, axis, quant_type, *, least, mean_share):
        return params_of_weight(weight, axis, quant_type).scaled(8)

    assert not calibrated(feeds_with(3))[0].covering_weights
    monkeypatch.setattr(weight_scales, "best_params", too_large)
    ranges, result = calibrated(feeds_with(3))
    assert ranges.covering_weights
    assert "with scales that cover the weights" in result.notes[-1]


@pytest.mark.usefixtures("no_halves")
def test_tensors_that_want_different_methods_get_them():
    ranges, result = calibrated(outlying_on_both_paths(), text=TWO_PATHS)
    assert ranges.tensors["x"].maximum > 10 * ranges.tensors["z"].maximum
    assert (ranges.tensors["x"].method, ranges.tensors["z"].method) == ("minmax", ranges.method.value)
    assert "with other ranges for 1 tensors" in result.notes[-1]


def test_what_does_not_pay_is_found_once_for_all_copies(monkeypatch):
    asked = []
    monkeypatch.setattr(insert_qdq, "too_small", lambda *_: asked.append(1) or {})
    calibrated(feeds_with(3))
    assert len(asked) == 1


def test_gains_that_may_be_chance_are_none():
    before = [[1.0]] * 8
    sure, lucky = [0.9, 0.91, 0.89, 0.9, 0.92, 0.88, 0.9, 0.9], [0.1, 1.2, 0.9, 1.1, 0.2, 1.1, 0.8, 1.0]
    assert method_search._if_smaller(([error] for error in sure), before) is not None
    assert method_search._if_smaller(([error] for error in lucky), before) is None


def test_outputs_count_alike_whatever_their_errors():
    before, others_lose = [[1.0, 1e-3, 1e-3]] * 4, [[0.8, 1.2e-3, 1.2e-3]] * 4
    assert method_search._if_smaller(iter(others_lose), before) is None


@pytest.mark.parametrize("error", [0.0, math.nan, math.inf])
def test_errors_that_do_not_compare_are_no_gain(error):
    assert method_search._if_smaller(iter([[0.5], [error], [0.5], [0.5]]), [[1.0]] * 4) is None


@pytest.mark.parametrize(("samples", "read"), [(8, 2), (32, 2), (64, 4)])
def test_a_range_without_gain_is_given_up_early(samples, read):
    errors = [[1.0]] * samples
    found = iter(errors)
    assert method_search._if_smaller(found, errors) is None
    assert len(list(found)) == samples - read


def test_a_range_that_may_yet_gain_is_not_given_up():
    errors = [[0.8], [1.01], *[[0.8]] * 14]
    assert method_search._if_smaller(iter(errors), [[1.0]] * 16) == errors


@pytest.mark.parametrize(("values", "samples"), [(0, 256), (1e4, 256), (2**22, 128), (2e7, 32), (1e9, 32)])
def test_small_nets_are_compared_on_more_samples(values, samples):
    assert method_search.samples_worth(values) == samples


def test_models_are_compared_on_as_many_samples_as_are_worth_it(monkeypatch):
    compared = []
    compare = method_search.noise_to_signal
    monkeypatch.setattr(
        method_search, "noise_to_signal", lambda *args: compared.append(args[2].count) or compare(*args)
    )
    monkeypatch.setattr(method_search, "MOST_SAMPLES", 40)
    calibrated(feeds_with(3, count=96))
    assert set(compared) == {40}


def test_few_samples_leave_the_ranges_of_one_method():
    ranges, result = calibrated(outlying_on_both_paths()[:3], text=TWO_PATHS)
    assert {found.method for found in ranges.tensors.values()} == {ranges.method.value}
    assert "search took" in result.notes[-1]


def test_histograms_stay_where_they_are_asked_for():
    ranges, _ = calibrated(feeds_with(0), histograms=True)
    assert all(found.histogram is not None for found in ranges.tensors.values())


def test_the_order_of_the_samples_does_not_matter():
    feeds = feeds_with(20, count=96)
    shuffled = [feeds[place] for place in np.random.default_rng(1).permutation(len(feeds))]
    (ranges, result), (again, same) = calibrated(feeds), calibrated(shuffled)
    assert ranges.to_text() == again.to_text()
    assert result.notes == same.notes


def test_made_up_inputs_are_not_searched_on():
    ranges, result = calibrated(samples_of(feeds_with(3), synthetic=True))
    assert ranges.method is Method.MSE
    assert not any("search" in note for note in result.notes)


def test_outputs_of_whole_numbers_are_compared_by_how_often_they_agree():
    ranges, result = calibrated(feeds_with(3), text=WHOLE_NUMBERS)
    assert ranges.method in CANDIDATES
    assert "search took" in result.notes[-1]


def test_nothing_quantized_is_nothing_to_search():
    ranges, result = calibrated(
        feeds_with(0),
        text=NET.replace("MatMul (x, w)", "Sin (x)")
        .replace("MatMul (positive, v)", "Cos (positive)")
        .replace("float[N, 2] y", "float[N, 4] y"),
    )
    assert not ranges.tensors
    assert not result.notes


def test_optimize_searches_unless_told_otherwise():
    feeds = feeds_with(3)
    searched = optimize(onnx.parser.parse_model(NET), "calibrate,qdq", data=feeds)
    told = optimize(onnx.parser.parse_model(NET), "calibrate:method=entropy,qdq", data=feeds)
    assert "search took" in str(searched.report.passes)
    assert "search took" not in str(told.report.passes)


@pytest.mark.parametrize(("kept", "runs"), [(1 << 20, 2), (0, 4)])
def test_outputs_of_the_float_graph_are_kept_as_far_as_there_is_room(kept, runs, monkeypatch):
    monkeypatch.setattr(method_search, "_KEPT", kept)

    class Counting:
        outputs = ("y",)
        count = 0

        def run(self, feed, outputs=None):
            self.count += 1
            return {"y": feed["x"] + 1}

    session = Counting()
    once = method_search._Once(session)
    feeds = [{"x": np.full(3, value, np.float32)} for value in (1, 2)]
    for _ in range(2):
        assert [once.run(feed)["y"][0] for feed in feeds] == [2, 3]
    assert session.count == runs
