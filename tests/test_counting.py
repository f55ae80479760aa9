import importlib
import sys

import numpy as np
import pytest

from graphopt import counting
from graphopt.counting import BINS, CHUNK, count_with_numpy


@pytest.fixture
def compiled():
    return pytest.importorskip("graphopt._counting", reason="the installation had no C compiler").count


def counts():
    return np.zeros(2 * BINS - 1, np.int64)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [0, 1, 3, 4, 7, 1 << 14, (1 << 14) - 1, CHUNK - 1, CHUNK])
@pytest.mark.parametrize("spread", [0, 0.3, 7])  # of values of which most are small: all in a bin, in a few, in many
def test_both_ways_count_by_the_definition(compiled, dtype, size, spread):
    values = (np.random.default_rng(size).standard_normal(size) ** 3 * spread / 100).clip(-15.99, 15.99).astype(dtype)
    values[:2] = [-15.99, 15.99][: len(values)]  # of the outermost bins
    expected = counts()
    np.add.at(expected, np.trunc(values * 128).astype(int) + BINS - 1, 1)
    for count in (count_with_numpy, compiled):
        found = counts()
        count(values, 128.0, found)
        count(values, 128.0, found)
        np.testing.assert_array_equal(found, 2 * expected)


@pytest.mark.parametrize("value", [16, -16, 1e30, -np.inf])
@pytest.mark.parametrize("place", [0, 5])
def test_a_value_beyond_the_bins_is_refused(compiled, value, place):
    values = np.zeros(6, np.float32)
    values[place] = value
    with pytest.raises(ValueError, match="beyond the bins"):
        compiled(values, 128.0, counts())


def test_what_is_no_row_of_numbers_is_refused(compiled):
    ones = np.ones(6, np.float32)
    with pytest.raises(ValueError, match="another type"):
        compiled(ones.astype(np.float16), 1.0, counts())
    with pytest.raises(ValueError, match="too many bins"):
        compiled(ones, 1.0, np.zeros(2 * BINS, np.int64))
    with pytest.raises(ValueError, match="contiguous"):
        compiled(ones[::2], 1.0, counts())
    with pytest.raises(TypeError):
        compiled(ones, 1.0, b"read only")


def test_without_a_compiler_numpy_counts(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "graphopt._counting", None)
        importlib.reload(counting)
        assert counting.count is counting.count_with_numpy
    importlib.reload(counting)
