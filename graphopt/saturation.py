"""Which weights x86 kernels without VNNI multiply and add in 16 bits, where the sums may saturate.

Their instruction (vpmaddubsw) takes two products of a uint8 and an int8 at a time: of the weights 2j and 2j + 1 of an
output channel, in the order in which the kernel sums: for a Conv the channels of one place of the kernel side by side,
for a product the rows of its matrix. Found by setting two weights to 127 and all activations to 255 (onnxruntime 1.32,
AVX2; each pair of places, Convs of 1 to 16 channels and products of 1 to 64 rows). Depthwise Convs have kernels of
their own, which do not saturate.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graphopt.conv_kernels import is_depthwise
from graphopt.quantization import Array

LARGEST_PAIR = 128
"""The largest sum of two stored weights that fits: 255 * 128 < 2**15."""

_PADDED_TO = 4  # channels, by `graphopt.padded_channels`


def largest_pairs(node: gs.Node, weight: Array) -> NDArray[np.float64]:
    """The largest magnitude that two weights of one sign add up to, of those that `node` adds in 16 bits.

    Two of other signs add up to less than one of them, which always fits.

    Args:
        node: an operator; those other than Conv, Gemm and MatMul have no such kernels.
        weight: its second input, [O, C, k...] of a Conv, else the matrix or a stack of them.

    Returns:
        one value for each output channel, and each matrix of a stack; or one for all.
    """
    if node.op not in ("Conv", "Gemm", "MatMul") or weight.ndim < 2 or is_depthwise(node, weight.shape):
        return np.zeros(1)
    found = [_of_rows(rows.astype(np.float64)) for rows in _rows(node, weight)]
    return np.asarray(np.max(found, axis=0))


def _rows(node: gs.Node, weight: Array) -> Iterator[Array]:
    """The weights of each output channel, [O, K], in the order of the sum; of a Conv also with channels of zeros."""
    if node.op == "Conv":
        rows = np.moveaxis(weight, 1, -1)
        yield rows.reshape(len(rows), -1)
        if missing := -rows.shape[-1] % _PADDED_TO:
            widths = [(0, 0)] * (rows.ndim - 1) + [(0, missing)]
            yield np.pad(rows, widths).reshape(len(rows), -1)
    elif node.op == "Gemm" and node.attrs.get("transB", 0):
        yield weight
    else:
        yield np.swapaxes(weight, -1, -2).reshape(-1, weight.shape[-2])


def _of_rows(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    if rows.shape[1] % 2:
        rows = np.pad(rows, [(0, 0), (0, 1)])
    first, second = rows[:, ::2], rows[:, 1::2]
    above = np.maximum(first, 0) + np.maximum(second, 0)
    below = np.minimum(first, 0) + np.minimum(second, 0)
    return np.asarray(np.maximum(above, -below).max(axis=1, initial=0.0))
