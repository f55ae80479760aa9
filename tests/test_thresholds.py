import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.histogram import Extremes, Histogram, MovingAverage
from graphopt.quantization import INT8_SYMMETRIC, UINT8, QuantType, params_of_range
from graphopt.thresholds import Method, choose_range, entropy, mse, percentile

OF_ONE_TENSOR = [method for method in Method if method is not Method.SEARCH]


def histogram_of(values):
    histogram = Histogram()
    histogram.add(np.asarray(values, np.float32))
    return histogram


def plain_entropy(counts):
    """The candidate that the algorithm of 2017 chooses, step by step as it is described."""
    bins = counts.astype(np.float64)
    bins[0] = bins[1]
    divergences = []
    for i in range(128, len(bins) + 1):
        p = bins[:i].copy()
        p[-1] += bins[i:].sum()
        level_of_bin = 128 * np.arange(i) // i
        mass = np.bincount(level_of_bin, bins[:i])
        filled = np.bincount(level_of_bin, bins[:i] > 0)
        q = np.where(bins[:i] > 0, (mass / np.maximum(filled, 1))[level_of_bin], 0)
        divergences.append(divergence(p / p.sum(), q / q.sum()) if q.any() else math.inf)
    # equal divergences differ by rounding, in the tenth digit at most
    return 128 + max(k for k, value in enumerate(divergences) if value <= min(divergences) + 1e-9)


def divergence(p, q):
    if (q[p > 0] == 0).any():
        return math.inf
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


def shaped_counts(shape, size):
    """Counts of |x| in `size` bins up to the largest |x|."""
    rng = np.random.default_rng(0)
    values = {
        "gaussian": lambda: rng.standard_normal(200_000),
        "laplace": lambda: rng.laplace(size=200_000),
        "uniform": lambda: rng.random(200_000),
        "outliers": lambda: np.append(rng.standard_normal(200_000), [30, 31, 40]),
        "relu": lambda: np.maximum(rng.standard_normal(200_000), 0),
        "relu6": lambda: rng.standard_normal(200_000).clip(0, 1),
        "sparse": lambda: rng.choice([0.1, 0.2, 0.5, 3.0, 8.0], 1000),
        "far": lambda: 5 + 0.01 * rng.standard_normal(1000),
        "few": lambda: rng.standard_normal(7),
        "one": lambda: np.array([1.0]),
        "heavy": lambda: rng.standard_t(2, 200_000),
    }[shape]()
    magnitudes = np.abs(values)
    return np.histogram(magnitudes, size, (0, magnitudes.max()))[0]


SHAPES = [
    "gaussian",
    "laplace",
    "uniform",
    "outliers",
    "relu",
    "relu6",
    "sparse",
    "far",
    "few",
    "one",
    "heavy",
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [128, 129, 333, 2048])
def test_entropy_is_the_plain_algorithm(shape, size):
    counts = shaped_counts(shape, size)
    assert entropy(counts, 0.5) == plain_entropy(counts) * 0.5


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.just(0), st.integers(0, 3), st.integers(0, 10**9)), min_size=128, max_size=180),
    st.integers(0, 180),
)
def test_entropy_is_the_plain_algorithm_on_any_counts(counts, first_empty):
    counts = np.array([*counts, 1])
    counts[first_empty:-1] = 0
    assert entropy(counts, 1.0) == plain_entropy(counts)


@pytest.mark.slow
def test_entropy_is_the_plain_algorithm_on_a_thousand_generated_histograms():
    rng = np.random.default_rng(1)
    for number in range(1000):
        size = 2048 if number % 200 == 0 else int(rng.integers(129, 400))
        draws = [rng.standard_normal, rng.standard_exponential, rng.random, lambda n: rng.standard_t(1.5, n)]
        values = np.abs(draws[number % 4](int(10 ** rng.uniform(0.5, 5)))) * 10.0 ** rng.uniform(-3, 3)
        values[rng.random(len(values)) < rng.choice([0, 0.3, 0.9])] = 0
        counts = np.histogram(values, size, (0, max(values.max(), 1e-9)))[0]
        assert entropy(counts, 1.0) == plain_entropy(counts), number


def test_entropy_leaves_the_counts_alone():
    counts = shaped_counts("relu", 200)
    before = counts.copy()
    entropy(counts, 1.0)
    assert np.array_equal(counts, before)


def test_entropy_ignores_how_many_zeros_there_are():
    counts = shaped_counts("relu", 500)
    more = counts.copy()
    more[0] *= 1000
    assert entropy(more, 1.0) == entropy(counts, 1.0)


def test_entropy_never_ends_on_an_empty_bin_below_outliers():
    counts = shaped_counts("gaussian", 300)
    counts[200:] = 0
    counts[-1] = 1
    assert entropy(counts, 1.0) <= 200


@pytest.mark.parametrize("counts", [[5], [5] + 299 * [0], 100 * [3], 128 * [3]])
def test_entropy_keeps_the_full_range_where_there_is_nothing_to_choose(counts):
    assert entropy(np.array(counts), 0.25) == len(counts) * 0.25


def test_entropy_clips_rare_outliers_of_a_gaussian():
    values = np.append(np.random.default_rng(0).standard_normal(1_000_000), [30, -30])
    low, high, _ = choose_range(histogram_of(values), Method.ENTROPY, UINT8)
    assert 4 < high < 7
    assert low == max(-high, values.min())


def test_minmax_clips_nothing():
    extremes = Extremes()
    extremes.add(np.array([-1, 0, 30], np.float32))
    assert choose_range(extremes, Method.MINMAX, UINT8) == (-1, 30, Method.MINMAX)


@pytest.mark.parametrize("method", OF_ONE_TENSOR)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "values",
    [np.zeros(9), np.full(9, 3.0), np.full(9, -3.0), [1e-30, 2e-30], [-1, 5], [0.1], [-3e38, 3e38, 1]],
)
def test_no_method_goes_beyond_the_values_observed(method, symmetric, values):
    histogram = histogram_of(values)
    low, high, _ = choose_range(histogram, method, INT8_SYMMETRIC if symmetric else UINT8)
    assert histogram.minimum <= low <= high <= histogram.maximum


@pytest.mark.parametrize("method", [Method.ENTROPY, Method.PERCENTILE, Method.MSE])
def test_a_relu_keeps_zero_as_its_lower_end(method):
    values = np.maximum(np.random.default_rng(0).standard_normal(10_000), 0)
    low, high, _ = choose_range(histogram_of(values), method, UINT8)
    assert low == 0
    assert 2 < high <= values.max()


@pytest.mark.parametrize("method", OF_ONE_TENSOR)
def test_no_values_have_no_range(method):
    with pytest.raises(ValueError, match="no range of no values"):
        choose_range(Histogram(), method, UINT8)


def test_search_is_no_rule_for_one_tensor():
    with pytest.raises(ValueError, match="search chooses among methods"):
        choose_range(histogram_of([1, 2]), Method.SEARCH, UINT8)


@pytest.mark.parametrize("method", [method for method in OF_ONE_TENSOR if method.statistics is not Extremes])
def test_bare_extremes_suffice_for_few_methods(method):
    assert issubclass(method.statistics, Histogram | MovingAverage)
    extremes = Extremes()
    extremes.add(np.ones(3, np.float32))
    with pytest.raises(TypeError, match=f"{method.value} needs {method.statistics.__name__}"):
        choose_range(extremes, method, UINT8)


@pytest.mark.parametrize(("percent", "edge"), [(0.1, 1), (50, 1), (50.1, 2), (75, 2), (99, 4), (100, 4)])
def test_percentile_is_the_first_edge_with_enough_values_below(percent, edge):
    assert percentile(np.array([2, 1, 0, 1]), 0.5, percent) == edge * 0.5


def test_percentile_clips_the_share_that_it_is_given():
    values = np.random.default_rng(0).standard_normal(100_000)
    low, high, _ = choose_range(histogram_of(values), Method.PERCENTILE, UINT8, percent=99.0)
    assert np.mean((values < low) | (values > high)) == pytest.approx(0.01, abs=5e-4)


def squared_error(values, low, high, quant_type):
    params = params_of_range(low, high, quant_type)
    return float(((params.dequantize(params.quantize(values)) - values) ** 2).mean())


@pytest.mark.parametrize("quant_type", [UINT8, INT8_SYMMETRIC], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("shape", ["gaussian", "laplace", "skewed", "outliers", "relu"])
def test_mse_finds_a_range_with_nearly_the_least_error(shape, quant_type):
    rng = np.random.default_rng(0)
    values = {
        "gaussian": rng.standard_normal(20_000),
        "laplace": rng.laplace(size=20_000),
        "skewed": rng.exponential(size=20_000) - 0.3,
        "outliers": np.append(rng.standard_normal(20_000), [9, -12]),
        "relu": np.maximum(rng.standard_normal(20_000), 0),
    }[shape].astype(np.float32)
    low, high, _ = choose_range(histogram_of(values), Method.MSE, quant_type)
    fractions = np.linspace(0.2, 1, 25)
    best = min(
        squared_error(values, a * values.min(), b * values.max(), quant_type) for a in fractions for b in fractions
    )
    assert squared_error(values, low, high, quant_type) <= 1.06 * best
    assert squared_error(values, low, high, quant_type) <= squared_error(values, values.min(), values.max(), quant_type)


def test_mse_clips_one_side_alone_where_only_that_side_has_outliers():
    values = np.append(np.random.default_rng(0).random(1_000_000) - 0.5, 5)
    histogram = histogram_of(values)
    low, high = mse(histogram, UINT8)
    assert low == pytest.approx(-0.5, abs=0.02)
    assert 0.5 <= high < 2


def test_auto_clips_less_than_mse_and_says_which_of_the_two_ends_it_came_to():
    values = np.concatenate((np.random.default_rng(0).standard_normal(20_000), [9.0]))
    mse_low, mse_high, _ = choose_range(histogram_of(values), Method.MSE, UINT8)
    low, high, method = choose_range(histogram_of(values), Method.AUTO, UINT8)
    assert method is Method.MSE
    assert low <= mse_low and mse_high < high < 9
    uniform = histogram_of(np.linspace(-1, 1, 1001))
    assert choose_range(uniform, Method.AUTO, UINT8) == (-1, 1, Method.MINMAX)


def test_a_type_of_more_steps_clips_less():
    values = np.random.default_rng(0).standard_normal(20_000)
    fine = QuantType(np.dtype(np.uint16), 0, 65535, symmetric=False)
    low, high, _ = choose_range(histogram_of(values), Method.MSE, UINT8)
    fine_low, fine_high, _ = choose_range(histogram_of(values), Method.MSE, fine)
    assert fine_low < low and high < fine_high


def test_a_moving_average_favours_the_last_samples():
    seen = MovingAverage()
    for sample in range(3):
        seen.add_extremes(-float(sample), float(10 * sample), 5)
    assert (seen.minimum, seen.maximum, seen.count) == (-2, 20, 15)
    low, high, method = choose_range(seen, Method.MOVING_AVERAGE, UINT8)
    assert (low, high) == pytest.approx((-0.0299, 0.299))
    assert method is Method.MOVING_AVERAGE
    with pytest.raises(TypeError, match="do not merge"):
        seen.merge(MovingAverage())
