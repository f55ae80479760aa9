"""Calibration on every real model: what a user relies on, whatever the exporter, the shapes and the kind of data."""

from __future__ import annotations

import json

import numpy as np
import pytest
from zoo import NAMES, zoo_feeds, zoo_model

from graphopt.api import calibrate
from graphopt.data import Shard, load_samples
from graphopt.data_free import STORED
from graphopt.feeds import Samples
from graphopt.input_checks import input_warnings
from graphopt.merging import merged
from graphopt.model_io import load_model
from graphopt.runtime import open_session
from graphopt.thresholds import Method

pytestmark = pytest.mark.zoo

PASSES = "freeze-inputs,fold"
SAMPLES = 3
NORMALIZED = ("efficientnet_lite0_bn", "ppocr_cls_mobile_v2", "ppocrv4_det", "ppocrv4_rec")  # right behind the input


@pytest.mark.parametrize("name", NAMES)
def test_shards_merge_to_the_byte_and_order_changes_nothing(name):
    model, data = zoo_model(name), zoo_feeds(name, "calibration")
    whole, _ = calibrate(model, data, passes=PASSES, samples=SAMPLES, histograms=True)
    parts = [calibrate(model, data, passes=PASSES, samples=SAMPLES, shard=Shard(part, 2))[0] for part in (2, 1)]
    assert merged(parts).to_text() == whole.to_text()
    feeds = list(load_samples(data, open_session(model, optimize=False).inputs, limit=SAMPLES))[::-1]
    backwards, _ = calibrate(model, feeds, passes=PASSES, histograms=True)
    assert _tensors(backwards) == _tensors(whole)


def _tensors(ranges):
    return json.loads(ranges.to_text())["tensors"]


@pytest.mark.parametrize("name", NAMES)
def test_extremes_inside_the_graph_are_those_of_the_values(name):
    model, data = zoo_model(name), zoo_feeds(name, "calibration")
    counted, _ = calibrate(model, data, passes=PASSES, samples=2, histograms=True)
    reduced = calibrate(model, data, passes=PASSES, samples=2, method=Method.MINMAX)[0]
    assert reduced.tensors.keys() == counted.tensors.keys()
    for tensor, found in counted.tensors.items():
        other = reduced.tensors[tensor]
        scale = max(abs(found.observed_minimum), abs(found.observed_maximum))
        assert other.count == found.count
        assert other.minimum == pytest.approx(found.observed_minimum, abs=1e-4 * scale), tensor
        assert other.maximum == pytest.approx(found.observed_maximum, abs=1e-4 * scale), tensor


@pytest.mark.parametrize("name", NAMES)
def test_the_right_inputs_are_not_warned_about(name):
    model = load_model(zoo_model(name))
    samples = load_samples(zoo_feeds(name, "calibration"), open_session(model, optimize=False).inputs)
    assert input_warnings(model, samples) == ()


@pytest.mark.parametrize("name", NORMALIZED)
@pytest.mark.parametrize(("factor", "repair"), [(255, "divided by 255"), (1 / 255, "times 255")])
def test_inputs_of_another_scale_are_warned_about(name, factor, repair):
    model = load_model(zoo_model(name))
    right = load_samples(zoo_feeds(name, "calibration"), open_session(model, optimize=False).inputs)
    feeds = [{key: np.asarray(array * factor, array.dtype) for key, array in feed.items()} for feed in right.first(6)]
    (warning,) = input_warnings(model, Samples(lambda: iter(feeds), "scaled", len(feeds)))
    assert repair in warning or name == "ppocrv4_det"  # where it is only said that something is wrong


def test_stored_statistics_reach_most_tensors_of_a_net_that_has_them():
    ranges, _ = calibrate(zoo_model("efficientnet_lite0_bn"))
    methods = [found.method for found in ranges.tensors.values()]
    assert methods.count(STORED) > 0.9 * len(methods)
