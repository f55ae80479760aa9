"""A linear operator as a matrix product: which rows of its input, and which of its output, belong together.

    Conv            row of x: the window that one output position sees, [Cin/g * taps]; row of y: its channels [Cout/g]
    ConvTranspose   the same, on the input with stride - 1 zeros between its elements and the kernel turned round:
                    y[q] = sum_j W[j] x[(q + begin - j * dilation) / stride], where that is a whole number
    Gemm, MatMul    row of x: [K]; row of y: [N]; every axis but the last counts rows

Windows are views (numpy's sliding_window_view); only the chosen positions are copied. Pads follow the pages of Conv and
ConvTranspose (https://onnx.ai/onnx/operators/): those of `auto_pad` from the sizes of input and output, so that one
place serves both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from graphopt.least_squares import Affinity

Array = NDArray[Any]

_BLOCK_NBYTES = 2**23  # of rows in float64, copied at a time


class Patches:
    """The rows of one operator; the node's attributes and the shape of its weight say all about them.

    Attributes:
        groups: groups of channels, each a matrix product of its own.
        features: how many numbers one row of x has in a group.
        outputs: how many one row of y has in a group.
    """

    def __init__(self, node: gs.Node, weight_shape: tuple[int, ...]) -> None:
        self._node, self._shape = node, weight_shape
        self._is_convolution = node.op in ("Conv", "ConvTranspose")
        self.groups = int(node.attrs.get("group", 1)) if self._is_convolution else 1
        taps = math.prod(weight_shape[2:])
        if node.op == "Conv":
            self.features, self.outputs = weight_shape[1] * taps, weight_shape[0] // self.groups
        elif node.op == "ConvTranspose":
            self.features, self.outputs = weight_shape[0] // self.groups * taps, weight_shape[1]
        else:
            rows_first = not node.attrs.get("transB", 0)
            self.features, self.outputs = weight_shape if rows_first else weight_shape[::-1]

    def rows(
        self, x: Array, y: Array, most: int, random: np.random.Generator, *, block_nbytes: int = _BLOCK_NBYTES
    ) -> Iterator[tuple[Array, Array]]:
        """Yield blocks of rows (x [groups, rows, features], y [groups, rows, outputs]) of one call of the operator.

        Args:
            x: the operator's first input.
            y: what it should return.
            most: how many rows to choose; where there are more, they are drawn without repetition.
            random: draws them.
            block_nbytes: how many bytes a block may have in float64; it has one row at least.
        """
        windows, flat = self._windows(x, y.shape), self._flat(y)
        positions = len(flat)
        chosen = np.arange(positions)
        if positions > most:
            chosen = np.sort(random.choice(positions, most, replace=False))
        size = max(1, block_nbytes // (8 * self.groups * (self.features + self.outputs)))
        for start in range(0, len(chosen), size):
            block = chosen[start : start + size]
            picked = windows[np.unravel_index(block, windows.shape[: windows.ndim - self._window_axes])]
            yield (
                picked.reshape(len(block), self.groups, self.features).swapaxes(0, 1),
                flat[block].reshape(len(block), self.groups, self.outputs).swapaxes(0, 1),
            )

    def affinity(self, weight: Array, bias: Array | None, alpha: float = 1.0) -> Affinity:
        """Return what a weight of the operator, in ONNX's layout, and a bias per channel do to rows."""
        values = weight.astype(np.float64)
        if self._node.op == "Conv":
            matrix = values.reshape(self.groups, self.outputs, self.features).swapaxes(1, 2)
        elif self._node.op == "ConvTranspose":
            turned = np.flip(values, axis=tuple(range(2, values.ndim)))
            turned = turned.reshape(self.groups, -1, *turned.shape[1:])  # [groups, Cin/g, Cout/g, taps ...]
            matrix = np.moveaxis(turned, 2, -1).reshape(self.groups, self.features, self.outputs)
        else:
            matrix = (values.T if self._node.attrs.get("transB", 0) else values)[np.newaxis] * alpha
        channels = np.zeros(self.groups * self.outputs)
        if bias is not None:
            channels += bias.astype(np.float64).reshape(-1)
        return Affinity(np.ascontiguousarray(matrix), channels.reshape(self.groups, self.outputs))

    def weight(self, fitted: Affinity, alpha: float = 1.0) -> Array:
        """Return the weight, in ONNX's layout and in float64, that does what `fitted` does: `affinity`'s inverse."""
        if self._node.op == "Conv":
            matrix: Array = fitted.weight.swapaxes(1, 2)
            return matrix.reshape(self._shape)
        if self._node.op == "ConvTranspose":
            per_group, taps = self._shape[0] // self.groups, self._shape[2:]
            turned = fitted.weight.reshape(self.groups, per_group, *taps, self.outputs)
            values = np.moveaxis(turned, -1, 2).reshape(self._shape)
            return np.flip(values, axis=tuple(range(2, values.ndim)))
        matrix = fitted.weight[0] / alpha
        return matrix.T if self._node.attrs.get("transB", 0) else matrix

    @property
    def _window_axes(self) -> int:
        """The last axes of `_windows`, which together are one row."""
        return len(self._shape) - 1 if self._is_convolution else 1

    def _flat(self, y: Array) -> Array:
        """Y as [positions, channels]."""
        channels_last = np.moveaxis(y, 1, -1) if self._is_convolution else y
        return channels_last.reshape(-1, channels_last.shape[-1])

    def _windows(self, x: Array, y_shape: tuple[int, ...]) -> Array:
        """A view of x as [positions ..., channels, taps ...]."""
        if not self._is_convolution:
            return x.T if self._node.attrs.get("transA", 0) else x
        axes = len(self._shape) - 2
        sizes = self._shape[2:]
        dilations = self._node.attrs.get("dilations") or [1] * axes
        strides = self._node.attrs.get("strides") or [1] * axes
        reaches = [(size - 1) * dilation for size, dilation in zip(sizes, dilations, strict=True)]
        places = y_shape[2:]
        if self._node.op == "Conv":
            needed = [(o - 1) * s + reach + 1 for o, s, reach in zip(places, strides, reaches, strict=True)]
            begins = self._begins([n - i for n, i in zip(needed, x.shape[2:], strict=True)])
        else:
            x, strides = _spread(x, strides), [1] * axes
            needed = [o + reach for o, reach in zip(places, reaches, strict=True)]
            added = self._node.attrs.get("output_padding") or [0] * axes
            cropped = [
                i + a + reach - o for i, a, reach, o in zip(x.shape[2:], added, reaches, places, strict=True)
            ]  # how much smaller the output is than all that the kernel reaches
            begins = [reach - begin for reach, begin in zip(reaches, self._begins(cropped), strict=True)]
        windows = sliding_window_view(
            _padded(x, begins, needed), [reach + 1 for reach in reaches], axis=tuple(range(2, axes + 2))
        )
        steps = [slice(None, None, stride) for stride in strides]
        taps = [slice(None, None, dilation) for dilation in dilations]
        return np.moveaxis(windows[(slice(None), slice(None), *steps, *taps)], 1, axes + 1)

    def _begins(self, totals: list[int]) -> list[int]:
        """The pads at the beginning of each axis, where both together are `totals`."""
        auto_pad = self._node.attrs.get("auto_pad", "NOTSET")
        stated = self._node.attrs.get("pads")
        if auto_pad in ("SAME_UPPER", "SAME_LOWER") or (self._node.attrs.get("output_shape") and not stated):
            smaller = [max(total, 0) // 2 for total in totals]
            larger = [max(total, 0) - half for total, half in zip(totals, smaller, strict=True)]
            # ConvTranspose without SAME_UPPER puts the odd one first, Conv only with SAME_LOWER
            return smaller if auto_pad == "SAME_UPPER" else larger
        return list(stated[: len(totals)]) if stated and auto_pad == "NOTSET" else [0] * len(totals)


def _spread(x: Array, strides: list[int]) -> Array:
    """X with stride - 1 zeros between its elements."""
    sizes = [(size - 1) * stride + 1 for size, stride in zip(x.shape[2:], strides, strict=True)]
    spread = np.zeros((*x.shape[:2], *sizes), x.dtype)
    spread[(slice(None), slice(None), *(slice(None, None, stride) for stride in strides))] = x
    return spread


def _padded(x: Array, begins: list[int], sizes: list[int]) -> Array:
    """X moved by `begins` into zeros of the given spatial sizes; what does not fit is cut off."""
    result = np.zeros((*x.shape[:2], *sizes), x.dtype)
    to, of = [slice(None)] * 2, [slice(None)] * 2
    for begin, size, own in zip(begins, sizes, x.shape[2:], strict=True):
        first, last = max(begin, 0), min(begin + own, size)
        to.append(slice(first, last))
        of.append(slice(first - begin, last - begin))
    result[tuple(to)] = x[tuple(of)]
    return result
