"""The arithmetic of QuantizeLinear and DequantizeLinear."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.quantization import (
    INT8,
    INT8_SYMMETRIC,
    INT8_WEIGHT,
    UINT8,
    params_of_range,
    params_of_weight,
)

BOUNDS = st.floats(-1e30, 1e30)


@given(BOUNDS, BOUNDS, st.sampled_from([UINT8, INT8, INT8_SYMMETRIC]))
def test_values_in_the_range_come_back_within_half_a_step(first, second, quant_type):
    low, high = min(first, second), max(first, second)
    params = params_of_range(low, high, quant_type)
    values = np.linspace(low, high, 33, dtype=np.float64).astype(np.float32)
    error = np.abs(params.dequantize(params.quantize(values)).astype(np.float64) - values)
    # the zero point is rounded, which moves the ends of an asymmetric range by up to half a step more
    assert error.max() <= float(params.scale) * (0.501 if quant_type.symmetric else 1.001)


@given(BOUNDS, BOUNDS, st.sampled_from([UINT8, INT8, INT8_SYMMETRIC]))
def test_zero_is_exact(first, second, quant_type):
    params = params_of_range(min(first, second), max(first, second), quant_type)
    assert params.dequantize(params.quantize(np.zeros(1, np.float32)))[0] == 0


@pytest.mark.parametrize(
    ("low", "high", "quant_type", "scale", "zero_point"),
    [
        (0.0, 6.0, UINT8, 6 / 255, 0),
        (-2.0, 1.0, UINT8, 3 / 255, 170),
        (-6.0, 0.0, UINT8, 6 / 255, 255),
        (1.0, 5.1, UINT8, 0.02, 0),  # widened to contain 0
        (0.0, 6.0, INT8, 6 / 255, -128),
        (-1.0, 5.0, INT8_SYMMETRIC, 5 / 127, 0),
    ],
)
def test_parameters_of_a_range(low, high, quant_type, scale, zero_point):
    params = params_of_range(low, high, quant_type)
    assert float(params.scale) == pytest.approx(scale, rel=1e-6)
    assert int(params.zero_point) == zero_point


@pytest.mark.parametrize("quant_type", [UINT8, INT8_SYMMETRIC])
def test_a_range_of_zeros_gives_a_usable_scale(quant_type):
    params = params_of_range(0.0, 0.0, quant_type)
    assert 1e-3 < params.scale < 1e-2
    assert params.dequantize(params.quantize(np.zeros(3, np.float32))).tolist() == [0, 0, 0]


def test_ties_round_to_even():
    params = params_of_range(-127, 127, INT8_SYMMETRIC)
    assert params.quantize(np.array([0.5, 1.5, 2.5, -0.5], np.float32)).tolist() == [0, 2, 2, 0]


def test_values_outside_the_range_are_clamped():
    params = params_of_range(-1, 1, INT8_SYMMETRIC)
    assert params.quantize(np.array([9, -9], np.float32)).tolist() == [127, -128]


@pytest.mark.parametrize("axis", [None, 0, 1, 3])
def test_a_weight_has_one_scale_for_each_index_of_its_axis(axis):
    weight = np.random.default_rng(0).standard_normal((4, 3, 2, 5)).astype(np.float32)
    params = params_of_weight(weight, axis, INT8_WEIGHT)
    assert params.scale.shape == (() if axis is None else (weight.shape[axis],))
    stored = params.quantize(weight)
    assert stored.dtype == np.int8
    others = None if axis is None else tuple(other for other in range(4) if other != axis)
    assert (np.abs(stored).max(axis=others) == 127).all()


def test_a_channel_of_zeros_divides_by_nothing():
    weight = np.zeros((2, 3), np.float32)
    weight[1] = 1
    params = params_of_weight(weight, 0, INT8_WEIGHT)
    assert params.scale[0] == 1
    assert params.dequantize(params.quantize(weight)) == pytest.approx(weight)


def test_an_empty_weight_has_parameters():
    assert params_of_weight(np.zeros((0, 3), np.float32), None, INT8_WEIGHT).scale == 1


def test_a_scalar_stays_an_array():
    params = params_of_range(-1, 1, UINT8)
    stored = params.quantize(np.float32(0.5).reshape(()))
    assert isinstance(stored, np.ndarray)
    assert isinstance(params.dequantize(stored), np.ndarray)
