"""Matrices in blocks of 4 bits: a scale, and where the type has one a zero point, for each block of a column.

A block w [size] of a matrix [K, N], consecutive along K, is stored as q = clamp(rint(w / s) + z, qmin, qmax), as
DequantizeLinear with `block_size` reads it (opset 21). With 16 steps the range that covers all of a block is rarely the
best: it is cheaper to clip a few weights and store the others more finely. So s and z are those of the least squared
error among candidates. For given steps d = q - z the best scale and its error have a closed form,

    s = <d, w> / <d, d>        |w - s d|^2 = |w|^2 - <d, w>^2 / <d, d>

so each candidate (z, and a scale from which to round) costs one rounding and two sums; the winner is rounded and fitted
a few times more. Zero is exact for any integer z, so a last block that is shorter is filled up with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt.quantization import SMALLEST_SCALE, Array, QuantType

_SHARES = np.linspace(1.0, 0.5, 13, dtype=np.float32)  # of the scale that covers the whole block
_REFITS = 3
_CHUNK = 2**18  # weights at a time: what stays in a processor's cache


@dataclass(frozen=True)
class BlockedWeight:
    """A matrix in blocks along its axis 0.

    Attributes:
        stored: [K, N], of the quantized dtype.
        scale: [ceil(K / size), N], float32, > 0.
        zero_point: of the scale's shape and the quantized dtype; None: 0.
        size: of a block.
    """

    stored: Array
    scale: Array
    zero_point: Array | None
    size: int

    def dequantize(self) -> Array:
        """The matrix as it is read, [K, N] float32."""
        stored = self.stored.astype(np.float32)
        rows = len(stored)
        if self.zero_point is not None:
            stored = stored - np.repeat(self.zero_point.astype(np.float32), self.size, axis=0)[:rows]
        return np.asarray(stored * np.repeat(self.scale, self.size, axis=0)[:rows])


def quantize_in_blocks(weight: Array, size: int, quant_type: QuantType) -> BlockedWeight:
    """Quantize a matrix with the scales and zero points of the least squared error that is found.

    The error of a block is never larger than the usual one: that of the scale and zero point that just cover it.

    Args:
        weight: [K, N] float32, finite.
        size: of a block along K; the last may be shorter.
        quant_type: of the stored weight; asymmetric types get a zero point for each block.
    """
    rows, columns = weight.shape
    count = -(-rows // size)
    padded = np.zeros((count * size, columns), np.float32)
    padded[:rows] = weight
    blocks = padded.reshape(count, size, columns).transpose(0, 2, 1).reshape(-1, size)
    stored = np.empty(blocks.shape, np.float32)
    scale, zero_point = (np.empty((len(blocks), 1), np.float32) for _ in range(2))
    step = max(1, _CHUNK // size)
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        stored[part], scale[part], zero_point[part] = _quantize(blocks[part], quant_type)
    matrix = stored.reshape(count, columns, size).transpose(0, 2, 1).reshape(-1, columns)[:rows]
    return BlockedWeight(
        stored=matrix.astype(quant_type.dtype),
        scale=scale.reshape(count, columns),
        zero_point=None if quant_type.symmetric else zero_point.reshape(count, columns).astype(quant_type.dtype),
        size=size,
    )


def _quantize(blocks: Array, quant_type: QuantType) -> tuple[Array, Array, Array]:
    """Stored values [R, size], scales [R, 1] and zero points [R, 1] of blocks [R, size], all float32."""
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    unit = np.where(largest > 0, largest, 1)
    blocks = blocks / unit  # squares of small weights would be lost in float32
    low, high = blocks.min(axis=1, keepdims=True).clip(max=0), blocks.max(axis=1, keepdims=True).clip(min=0)
    best_gain = np.full(low.shape, -1.0, np.float32)
    scale, zero_point = np.ones_like(low), np.zeros_like(low)
    for candidate in _zero_points(low, high, quant_type):
        below, above = candidate - quant_type.minimum, quant_type.maximum - candidate
        # an end of the range with no steps towards it is clipped, whatever the scale
        covering = np.maximum(-low / np.where(below > 0, below, np.inf), high / np.where(above > 0, above, np.inf))
        for tried in ((high - low) / quant_type.levels, *(covering * share for share in _SHARES)):
            steps = _steps(blocks, tried, candidate, quant_type)
            fitted, gain = _fit(steps, blocks)
            better = gain > best_gain
            best_gain = np.where(better, gain, best_gain)
            scale, zero_point = np.where(better, fitted, scale), np.where(better, candidate, zero_point)
    for _ in range(_REFITS):
        fitted, gain = _fit(_steps(blocks, scale, zero_point, quant_type), blocks)
        scale = np.where(gain > 0, fitted, scale)
    stored = _steps(blocks, scale, zero_point, quant_type) + zero_point
    return stored, np.maximum(scale * unit, SMALLEST_SCALE), zero_point


def _zero_points(low: Array, high: Array, quant_type: QuantType) -> list[Array]:
    """Zero points to try: of asymmetric types the one that covers the block, its neighbours, and the middle."""
    if quant_type.symmetric:
        return [np.zeros_like(low)]
    span = np.where(high > low, high - low, 1)
    covering = quant_type.minimum + np.rint(-low / span * quant_type.levels)
    tried = [
        covering,
        covering - 1,
        covering + 1,
        np.full_like(low, (quant_type.minimum + quant_type.maximum + 1) // 2),
    ]
    return [each.clip(quant_type.minimum, quant_type.maximum) for each in tried]


def _steps(blocks: Array, scale: Array, zero_point: Array, quant_type: QuantType) -> Array:
    """The steps q - z of blocks, as floats."""
    steps = blocks / np.maximum(scale, SMALLEST_SCALE)
    np.rint(steps, out=steps)
    return steps.clip(quant_type.minimum - zero_point, quant_type.maximum - zero_point, out=steps)


def _fit(steps: Array, blocks: Array) -> tuple[Array, Array]:
    """The best scale for given steps, and by how much it makes the squared error less than |w|^2; both [R, 1]."""
    product = np.einsum("rs,rs->r", steps, blocks)[:, None]
    square = np.einsum("rs,rs->r", steps, steps)[:, None]
    scale = product / np.maximum(square, 1)  # steps are whole: a square below 1 is 0
    return scale, product * scale
