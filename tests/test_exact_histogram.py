from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from graphopt.api import calibrate
from graphopt.data import Shard
from graphopt.exact_histogram import ExactHistogram
from graphopt.histogram import Histogram
from graphopt.merging import merged
from graphopt.ranges import Ranges

MODELS = Path(__file__).parents[1] / "models"
FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)


def exact(values):
    fractions = [Fraction(float(value)) for value in np.ravel(values)]
    return float(sum(fractions) / len(fractions)), float(sum(each**2 for each in fractions) / len(fractions))


def seen(*parts):
    histogram = ExactHistogram()
    for part in parts:
        histogram.add(part)
    return histogram


@settings(deadline=None)
@given(arrays(np.float32, st.integers(1, 60), elements=FLOATS))
def test_moments_are_exact_for_any_values(values):
    histogram = seen(values)
    assert (histogram.mean, histogram.second_moment) == exact(values)


@settings(deadline=None)
@given(arrays(np.float64, st.integers(1, 20), elements=st.floats(-1e60, 1e60)))
def test_moments_of_float64_are_exact_too(values):
    histogram = seen(values)
    assert (histogram.mean, histogram.second_moment) == exact(values)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_moments_of_many_values_of_all_magnitudes_are_exact(dtype):
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(100_000) * np.exp(rng.uniform(-8, 8, 100_000))).astype(dtype)
    values[::3] = 0
    histogram = seen(values)
    assert (histogram.mean, histogram.second_moment) == exact(values)


@given(st.permutations(range(7)), st.lists(st.integers(0, 700), max_size=4).map(sorted))
@settings(deadline=None, max_examples=30)
def test_order_and_parts_change_nothing(order, cuts):
    values = (np.random.default_rng(3).standard_normal((7, 100)) * 10.0 ** np.arange(-3, 4)[:, None]).astype(np.float32)
    whole = seen(values)
    shuffled = seen(*np.split(values[list(order)].ravel(), cuts))
    assert vars(whole).keys() == vars(shuffled).keys()
    for name, value in vars(whole).items():
        assert np.array_equal(value, vars(shuffled)[name]), name
    one, other = seen(values[:3]), seen(values[3:])
    one.merge(other)
    assert (one._total, one._squares) == (whole._total, whole._squares)


def test_it_does_not_merge_with_one_that_has_no_sums():
    with pytest.raises(TypeError, match="merge with exact histograms only"):
        seen(np.ones(3, np.float32)).merge(Histogram())


def test_the_file_keeps_the_sums_and_shards_merge_to_the_byte(tmp_path):
    model, data = MODELS / "fmnist_resnet.onnx", MODELS / "fashion_mnist_calibration.npz"
    whole, _ = calibrate(model, data, samples=30, histograms=True, moments=True)
    coarse, _ = calibrate(model, data, samples=30, histograms=True)
    parts = [calibrate(model, data, samples=30, shard=Shard(number, 2), moments=True)[0] for number in (1, 2)]
    for number, part in enumerate(parts):
        part.save(tmp_path / f"{number}.json")
    loaded = [Ranges.load(tmp_path / f"{number}.json") for number in range(2)]
    assert merged(loaded).to_text() == whole.to_text()
    for name, found in whole.tensors.items():
        histogram = found.histogram
        assert abs(found.mean - coarse.tensors[name].mean) <= histogram.width
        assert (found.minimum, found.maximum) == (coarse.tensors[name].minimum, coarse.tensors[name].maximum)


def test_damaged_sums_are_an_error():
    histogram = seen(np.ones(3, np.float32))
    with pytest.raises(ValueError, match="its sums are damaged"):
        ExactHistogram.from_json(histogram.to_json() | {"squares": "?"}, histogram)
