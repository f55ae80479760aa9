import numpy as np
import pytest

from graphopt.least_squares import Affinity, Moments

RANDOM = np.random.default_rng(3)


def rows(groups=2, count=300, features=5, outputs=3, noise=0.0):
    """Rows of a map, and the map."""
    made = Affinity(RANDOM.standard_normal((groups, features, outputs)), RANDOM.standard_normal((groups, outputs)))
    x = RANDOM.standard_normal((groups, count, features)) + 2
    y = x @ made.weight + made.bias[:, np.newaxis] + noise * RANDOM.standard_normal((groups, count, outputs))
    return x, y, made


def moments_of(x, y, blocks=1):
    moments = Moments(x.shape[0], x.shape[2], y.shape[2])
    for part in np.array_split(np.arange(x.shape[1]), blocks):
        moments.add(x[:, part], y[:, part])
    return moments


def nothing_like(made):
    return Affinity(np.zeros_like(made.weight), np.zeros_like(made.bias))


def error_of(x, y, fitted):
    return np.square(y - x @ fitted.weight - fitted.bias[:, np.newaxis]).mean(axis=1).sum()


def test_a_map_without_noise_is_found_again():
    x, y, made = rows()
    found = moments_of(x, y, blocks=7).ridge(nothing_like(made), 1e-12)
    np.testing.assert_allclose(found.weight, made.weight, atol=1e-8)
    np.testing.assert_allclose(found.bias, made.bias, atol=1e-8)


def test_the_fit_is_that_of_numpy():
    x, y, made = rows(groups=1, noise=1.0)
    found = moments_of(x, y).ridge(nothing_like(made), 1e-12)
    design = np.concatenate([x[0], np.ones((300, 1))], axis=1)
    expected = np.linalg.lstsq(design, y[0], rcond=None)[0]
    np.testing.assert_allclose(found.weight[0], expected[:-1], atol=1e-7)
    np.testing.assert_allclose(found.bias[0], expected[-1], atol=1e-7)


def test_a_ridge_without_end_keeps_the_weight_and_matches_the_means():
    x, y, made = rows(noise=1.0)
    start = Affinity(RANDOM.standard_normal(made.weight.shape), made.bias)
    found = moments_of(x, y).ridge(start, 1e12)
    np.testing.assert_allclose(found.weight, start.weight, atol=1e-9)
    predicted = x @ found.weight + found.bias[:, np.newaxis]
    np.testing.assert_allclose(predicted.mean(axis=1), y.mean(axis=1), atol=1e-9)


def test_what_the_rows_do_not_show_stays_as_it_was():
    x, y, made = rows()
    x[:, :, -1] = x[:, :, -2]  # only the sum of two features is seen
    y = x @ made.weight + made.bias[:, np.newaxis]
    found = moments_of(x, y).ridge(made, 1e-3)
    np.testing.assert_allclose(found.weight, made.weight, atol=1e-9)


def test_features_that_never_change_leave_the_weight_alone():
    x, y, made = rows()
    x[1] = 4
    found = moments_of(x, y).ridge(made, 1e-3)
    np.testing.assert_array_equal(found.weight[1], made.weight[1])
    assert found.finite


@pytest.mark.parametrize("blocks", [1, 5])
def test_the_error_is_that_of_the_rows(blocks):
    x, y, made = rows(noise=0.5)
    other = Affinity(made.weight + 0.1, made.bias - 0.2)
    moments = moments_of(x, y, blocks)
    assert moments.error(other) == pytest.approx(error_of(x, y, other))
    assert moments.error(made) == pytest.approx(error_of(x, y, made))
    assert moments.power() == pytest.approx(y.var(axis=1).sum())


def test_matching_the_means_gives_the_least_error_that_a_bias_can():
    x, y, made = rows(noise=0.5)
    start = Affinity(made.weight + 0.1, made.bias)
    moments = moments_of(x, y)
    matched = moments.means_matched(start)
    assert matched.weight is start.weight
    for shift in (-0.01, 0.01):
        assert moments.error(matched) < moments.error(Affinity(matched.weight, matched.bias + shift))


def test_matching_the_variances_gives_each_output_the_mean_and_the_variance_of_its_target():
    x, y, made = rows(noise=0.5)
    shrunk = Affinity(made.weight * 0.8, made.bias)
    matched = moments_of(x, y).variances_matched(shrunk, most=2.0)
    predicted = x @ matched.weight + matched.bias[:, np.newaxis]
    np.testing.assert_allclose(predicted.var(axis=1), y.var(axis=1))
    np.testing.assert_allclose(predicted.mean(axis=1), y.mean(axis=1))


def test_no_output_is_scaled_by_more_than_asked_for_and_a_constant_one_not_at_all():
    x, y, made = rows()
    weight = made.weight * 0.01
    weight[0, :, 0] = 0
    y[1, :, 1] = 3
    matched = moments_of(x, y).variances_matched(Affinity(weight, made.bias), most=1.5)
    np.testing.assert_allclose(matched.weight[0], weight[0] * 1.5)
    np.testing.assert_allclose(matched.weight[1, :, 1], weight[1, :, 1])


def test_rows_that_are_not_finite_are_noticed():
    x, y, _ = rows()
    assert moments_of(x, y).finite
    for array in (x, y):
        old, array[0, 0, 0] = array[0, 0, 0], np.nan
        assert not moments_of(x, y).finite
        array[0, 0, 0] = old


def test_memory_does_not_grow_with_the_rows():
    for count in (10, 5000):
        moments = moments_of(*rows(count=count)[:2], blocks=3)
        assert moments.rows == count
        held = sum(value.nbytes for value in vars(moments).values() if isinstance(value, np.ndarray))
        held += sum(x.nbytes + y.nbytes for x, y in moments._waiting)
        assert held <= Moments.nbytes(2, 5, 3)
