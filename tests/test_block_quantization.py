"""Matrices in blocks of 4 bits: the error of each block, and what is stored."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.block_quantization import quantize_in_blocks
from graphopt.quantization import INT4_WEIGHT, UINT4_WEIGHT

TYPES = pytest.mark.parametrize("quant_type", [INT4_WEIGHT, UINT4_WEIGHT], ids=["int4", "uint4"])


def matrix(rows, columns, seed, offset=0.0, scale=1.0):
    values = np.random.default_rng(seed).standard_t(4, (rows, columns)) + offset
    return (values * scale).astype(np.float32)


def by_block(values, size):
    """[blocks, size, N], the last block filled up with zeros."""
    count = -(-len(values) // size)
    padded = np.zeros((count * size, values.shape[1]))
    padded[: len(values)] = values
    return padded.reshape(count, size, -1)


def covering(blocks, quant_type):
    """The blocks as the scale and zero point that just cover them make them: the usual way."""
    low, high = (getattr(blocks, end)(axis=1, keepdims=True) for end in ("min", "max"))
    low, high = low.clip(max=0), high.clip(min=0)
    if quant_type.symmetric:
        scale, zero_point = np.maximum(-low / -quant_type.minimum, high / quant_type.maximum), 0.0
    else:
        scale = (high - low) / quant_type.levels
        zero_point = np.rint(-low / np.where(scale > 0, scale, 1))
    scale = np.where(scale > 0, scale, 1)
    steps = np.clip(np.rint(blocks / scale) + zero_point, quant_type.minimum, quant_type.maximum)
    return (steps - zero_point) * scale


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 100),
    columns=st.integers(1, 5),
    size=st.sampled_from([16, 32, 64]),
    offset=st.sampled_from([-3.0, 0.0, 0.5, 3.0]),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e10]),
    seed=st.integers(0, 9),
    quant_type=st.sampled_from([INT4_WEIGHT, UINT4_WEIGHT]),
)
def test_no_block_is_further_off_than_with_the_scale_that_covers_it(
    rows, columns, size, offset, scale, seed, quant_type
):
    weight = matrix(rows, columns, seed, offset, scale)
    found = quantize_in_blocks(weight, size, quant_type)
    blocks = by_block(weight, size) / scale
    error = ((blocks - by_block(found.dequantize(), size) / scale) ** 2).sum(axis=1)
    usual = ((blocks - covering(blocks, quant_type)) ** 2).sum(axis=1)
    assert np.all(error <= usual * (1 + 1e-4) + 1e-10)


@TYPES
def test_what_is_stored_has_the_shapes_and_types_of_a_dequantize_linear(quant_type):
    found = quantize_in_blocks(matrix(70, 5, 0), 32, quant_type)
    assert (found.stored.shape, found.stored.dtype) == ((70, 5), quant_type.dtype)
    assert (found.scale.shape, found.scale.dtype) == ((3, 5), np.float32)
    assert (found.scale > 0).all()
    if quant_type.symmetric:
        assert found.zero_point is None
    else:
        assert (found.zero_point.shape, found.zero_point.dtype) == ((3, 5), quant_type.dtype)


@TYPES
def test_values_on_a_grid_are_exact(quant_type):
    steps = np.random.default_rng(0).integers(quant_type.minimum, quant_type.maximum + 1, (64, 3))
    steps[[0, 1, 32, 33]] = np.array([quant_type.minimum, quant_type.maximum] * 2)[:, None]  # each block has both ends
    weight = ((steps - (0 if quant_type.symmetric else 6)) * np.float32(0.25)).astype(np.float32)
    np.testing.assert_allclose(quantize_in_blocks(weight, 32, quant_type).dequantize(), weight, rtol=1e-6)


@TYPES
def test_zeros_stay_zeros(quant_type):
    found = quantize_in_blocks(np.zeros((40, 2), np.float32), 32, quant_type)
    assert not found.dequantize().any()
    assert (found.scale > 0).all()


def test_smaller_blocks_and_a_zero_point_are_more_exact():
    weight = matrix(256, 64, 1)

    def error(size, quant_type):
        return float(((weight - quantize_in_blocks(weight, size, quant_type).dequantize()) ** 2).mean())

    errors = [error(size, UINT4_WEIGHT) for size in (16, 32, 64, 128)]
    assert errors == sorted(errors)
    assert error(32, UINT4_WEIGHT) < error(32, INT4_WEIGHT)


def test_clipping_pays():
    weight = np.random.default_rng(2).normal(size=(1024, 16)).astype(np.float32)
    blocks = by_block(weight, 128)
    found = quantize_in_blocks(weight, 128, UINT4_WEIGHT).dequantize()
    usual = ((blocks - covering(blocks, UINT4_WEIGHT)) ** 2).sum()
    assert ((weight - found) ** 2).sum() < 0.93 * usual
