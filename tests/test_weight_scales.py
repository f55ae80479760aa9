"""The scales of weights: what they gain, and what they keep to."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.quantization import FLOAT8_E4M3, INT8_WEIGHT, SMALLEST_SCALE, params_of_weight
from graphopt.weight_scales import WeightScales, best_params


def noise(weight, params, mean_share):
    """What each index of axis 0 adds to a sum, by the formula."""
    change = (params.dequantize(params.quantize(weight)).astype(np.float64) - weight).reshape(len(weight), -1)
    return (1 - mean_share) * (change**2).sum(axis=1) + mean_share * change.sum(axis=1) ** 2


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=4), st.floats(0, 1), st.integers(-30, 30), st.integers(0, 2**32)
)
def test_no_channel_has_more_noise_than_with_the_scale_that_covers_it(shape, mean_share, exponent, seed):
    weight = normal(shape, seed) * np.float32(10.0**exponent)
    params = best_params(weight, 0, INT8_WEIGHT, mean_share=mean_share)
    plain = noise(weight, params_of_weight(weight, 0, INT8_WEIGHT), mean_share)
    largest = np.square(np.abs(weight.astype(np.float64)).reshape(len(weight), -1).sum(axis=1))
    assert (noise(weight, params, mean_share) <= plain * (1 + 1e-3) + 1e-9 * largest).all()


@pytest.mark.parametrize(
    ("count", "mean_share", "most"), [(9, 0, 0.75), (64, 0, 0.93), (576, 0, 0.99), (9, 0.5, 0.55), (4608, 0.5, 0.65)]
)
def test_normal_weights_have_less_noise(count, mean_share, most):
    weight = normal((200, count))
    found = noise(weight, best_params(weight, 0, INT8_WEIGHT, mean_share=mean_share), mean_share)
    assert found.mean() < most * noise(weight, params_of_weight(weight, 0, INT8_WEIGHT), mean_share).mean()


@pytest.mark.parametrize("axis", [None, 0, 1, 3])
def test_there_is_a_scale_for_each_index_of_the_axis(axis):
    weight = normal((4, 3, 2, 5))
    params = best_params(weight, axis, INT8_WEIGHT, mean_share=0.5)
    assert params.scale.shape == (() if axis is None else (weight.shape[axis],))
    assert params.axis == axis
    assert (np.abs(params.quantize(weight)).max() <= 127).all()


def test_one_scale_for_all_does_not_add_up_the_weights_of_several_sums():
    weight = normal((8, 9))
    scales = [best_params(weight, None, INT8_WEIGHT, mean_share=share).scale for share in (0, 0.9)]
    assert scales[0] == scales[1]


def test_no_scale_is_below_the_least():
    weight = normal((16, 9))
    least = np.linspace(0, 0.05, 16)
    params = best_params(weight, 0, INT8_WEIGHT, least=least)
    assert (params.scale >= least.astype(np.float32)).all()
    assert not np.array_equal(params.scale, best_params(weight, 0, INT8_WEIGHT).scale)


def test_weights_that_are_all_but_zero_divide_by_no_denormal():
    weight = np.full((1, 4), 1e-38, np.float32)
    assert best_params(weight, 0, INT8_WEIGHT).scale >= np.float32(SMALLEST_SCALE)


def test_a_channel_of_zeros_and_an_empty_weight_have_parameters():
    weight = normal((2, 3))
    weight[0] = 0
    assert best_params(weight, 0, INT8_WEIGHT, mean_share=0.5).scale[0] == 1
    assert best_params(np.zeros((0, 3), np.float32), None, INT8_WEIGHT).scale == 1


def test_floats_are_scaled_to_their_largest():
    weight = normal((4, 9))
    expected = params_of_weight(weight, 0, FLOAT8_E4M3).scale
    np.testing.assert_array_equal(best_params(weight, 0, FLOAT8_E4M3).scale, expected)


def test_the_scales_of_equal_weights_are_found_once():
    scales, weight, least = WeightScales(), normal((4, 9)), np.zeros(1)
    first = scales.params(weight, 0, INT8_WEIGHT, least=least, mean_share=0.0)
    assert scales.params(weight.copy(), 0, INT8_WEIGHT, least=least, mean_share=0.0) is first
    others = (
        scales.params(weight + 1, 0, INT8_WEIGHT, least=least, mean_share=0.0),
        scales.params(weight, 1, INT8_WEIGHT, least=least, mean_share=0.0),
        scales.params(weight, 0, INT8_WEIGHT, least=np.ones(1), mean_share=0.0),
        scales.params(weight, 0, INT8_WEIGHT, least=least, mean_share=0.5),
        scales.params(weight.reshape(4, 3, 3), 0, INT8_WEIGHT, least=least, mean_share=0.0),
    )
    assert all(other is not first for other in others)
