import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from graphopt.histogram import BINS, Extremes, Histogram, NonFiniteError

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def histogram_of(*parts):
    histogram = Histogram()
    for part in parts:
        histogram.add(part)
    return histogram


def state(histogram):
    """Everything a histogram knows."""
    return (
        histogram.minimum,
        histogram.maximum,
        histogram.count,
        histogram.zeros,
        histogram.width_exponent,
        tuple(histogram.counts.tolist()),
    )


def counts_by_definition(values, width):
    counts = np.zeros(2 * BINS - 1, np.int64)
    for value in values.ravel().tolist():
        counts[math.trunc(value / width) + BINS - 1] += 1
    return counts


@given(arrays(np.float32, st.integers(1, 50), elements=FINITE))
def test_bins_are_those_of_the_definition(values):
    histogram = histogram_of(values)
    largest = float(abs(values).max())
    assert BINS * histogram.width > largest
    assert BINS * histogram.width <= 2 * largest or histogram.width == 2.0**-120
    assert np.array_equal(histogram.counts, counts_by_definition(values, histogram.width))
    assert (histogram.minimum, histogram.maximum) == (values.min(), values.max())
    assert (histogram.count, histogram.zeros) == (values.size, (values == 0).sum())


@given(st.lists(FINITE, min_size=1, max_size=40), st.data())
def test_neither_the_order_nor_the_batches_matter(values, data):
    shuffled = data.draw(st.permutations(values))
    cut = data.draw(st.integers(0, len(values)))
    parts = np.array(shuffled[:cut], np.float32), np.array(shuffled[cut:], np.float32)
    assert state(histogram_of(*parts)) == state(histogram_of(np.array(values, np.float32)))


@given(st.lists(FINITE, max_size=40), st.lists(FINITE, max_size=40))
def test_merged_shards_are_the_histogram_of_all(first, second):
    first, second = np.array(first, np.float32), np.array(second, np.float32)
    merged = histogram_of(first)
    merged.merge(histogram_of(second))
    assert state(merged) == state(histogram_of(first, second))


def test_zeros_first_do_not_set_the_width():
    zeros, small = np.zeros(2, np.float32), np.array([1e-6], np.float32)
    assert state(histogram_of(zeros, small)) == state(histogram_of(small, zeros))


def test_merging_leaves_the_other_histogram_alone():
    small, large = histogram_of(np.ones(3, np.float32)), histogram_of(np.full(3, 100, np.float32))
    before = state(small)
    large.merge(small)
    assert state(small) == before
    assert large.count == 6


def test_extremes_cannot_join_a_histogram():
    with pytest.raises(TypeError, match="bare extremes have no bins"):
        Histogram().merge(Extremes())


def test_extremes_merge():
    first, second = Extremes(), Extremes()
    first.add(np.array([-1, 0], np.float32))
    second.add(np.array([3, 0, 0], np.float32))
    first.merge(second)
    assert (first.minimum, first.maximum, first.count, first.zeros) == (-1, 3, 5, 3)


def test_tensors_larger_than_a_chunk_are_counted_whole():
    values = np.random.default_rng(0).standard_normal((3, 100_001)).astype(np.float32)
    histogram = histogram_of(values)
    expected = np.bincount(np.trunc(values / histogram.width).astype(int).ravel() + BINS - 1, minlength=2 * BINS - 1)
    assert np.array_equal(histogram.counts, expected)


@pytest.mark.parametrize("view", [lambda a: a.T, lambda a: a[:, ::2], lambda a: a[::-1], lambda a: a.reshape(2, 6, 5)])
def test_the_layout_in_memory_does_not_matter(view):
    values = view(np.arange(60, dtype=np.float32).reshape(6, 10))
    assert state(histogram_of(values)) == state(histogram_of(np.ascontiguousarray(values)))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.dtype(">f4")])
def test_other_float_types_are_counted_like_float32(dtype):
    values = np.array([-2.5, 0, 0.125, 1, 96], np.float32)  # exact in each
    assert state(histogram_of(values.astype(dtype))) == state(histogram_of(values))


def test_values_beyond_float32_are_counted():
    histogram = histogram_of(np.array([-1e300, 1e300, 1e-300, 3.0], np.float64))
    assert histogram.maximum == 1e300
    assert histogram.counts[0] == histogram.counts[-1] == 0  # 1e300 is not a whole power of two
    assert histogram.counts.sum() == 4
    assert histogram.counts[BINS - 1] == 2


def test_the_largest_and_the_smallest_float32_are_counted():
    limits = np.finfo(np.float32)
    histogram = histogram_of(np.array([limits.smallest_subnormal, -limits.tiny], np.float32))
    assert histogram.counts[BINS - 1] == 2
    histogram.add(np.array([limits.max, limits.min], np.float32))
    assert histogram.counts[[0, BINS - 1, -1]].tolist() == [1, 2, 1]


def test_an_empty_tensor_changes_nothing():
    histogram = histogram_of(np.zeros((0, 3), np.float32))
    assert state(histogram) == state(Histogram())
    assert histogram.minimum > histogram.maximum
    assert math.isnan(histogram.mean)


def test_zeros_alone_are_counted():
    histogram = histogram_of(np.array([0.0, -0.0], np.float32))
    assert (histogram.count, histogram.zeros, histogram.minimum, histogram.maximum) == (2, 2, 0, 0)
    assert histogram.mean == 0


def test_a_scalar_is_counted():
    assert histogram_of(np.array(-7.0, np.float32)).minimum == -7


@pytest.mark.parametrize(("bad", "name"), [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")])
@pytest.mark.parametrize("kind", [Extremes, Histogram])
def test_values_that_are_not_finite_are_refused(kind, bad, name):
    with pytest.raises(NonFiniteError, match=name):
        kind().add(np.array([1.0, bad, 2.0], np.float32))


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.bool_, np.complex64, object])
def test_types_that_are_not_floating_point_are_refused(dtype):
    with pytest.raises(TypeError, match="a histogram takes float16, bfloat16, float32, float64 values, not"):
        Histogram().add(np.zeros(3, dtype))


@given(arrays(np.float32, st.integers(1, 50), elements=st.floats(-8, 8, width=32)))
def test_the_mean_is_within_one_bin_of_the_true_mean(values):
    histogram = histogram_of(values)
    assert abs(histogram.mean - values.astype(np.float64).mean()) <= histogram.width


def test_magnitudes_fold_the_negative_side_over():
    histogram = histogram_of(np.array([-3, -2, 0, 2, 2], np.float32))
    counts = histogram.magnitudes()
    assert len(counts) == BINS
    assert {k * histogram.width: counts[k] for k in np.flatnonzero(counts)} == {0: 1, 2: 3, 3: 1}
