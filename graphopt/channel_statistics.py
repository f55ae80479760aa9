"""What each channel of a tensor looked like over all samples: for equalization, bias correction and channel removal.

    observe(model, tensors, samples, ChannelStatistics)

Sums are kept in float64, so means and variances of two orders of the samples agree to rounding, not bit for bit.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from graphopt.graph import Array
from graphopt.histogram import FLOAT_TYPES, Extremes, NonFiniteError

Channels = NDArray[np.float64]


class ChannelStatistics(Extremes):
    """Minimum, maximum, mean and variance of each index of axis 1, where ONNX has the channels.

    A tensor of rank 1 or 0 has one channel. All arrays are float64 of shape [C].

    Attributes:
        minima, maxima: of each channel; infinite while there are no values.
        counts: of values in each channel.
    """

    needs_values: ClassVar[bool] = True
    takes_pieces: ClassVar[bool] = False
    axis: ClassVar[int] = 1

    def __init__(self) -> None:
        super().__init__()
        self.zeros = None
        self.minima: Channels = np.full(1, math.inf)
        self.maxima: Channels = np.full(1, -math.inf)
        self.counts: NDArray[np.int64] = np.zeros(1, np.int64)
        self._sums: Channels = np.zeros(1)
        self._squares: Channels = np.zeros(1)

    @property
    def mean(self) -> Channels:
        """Of each channel; NaN without values."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self._sums / self.counts)

    @property
    def variance(self) -> Channels:
        """Of each channel, over its values (not an estimate for more of them); NaN without values."""
        with np.errstate(invalid="ignore"):
            return np.asarray(np.maximum(self._squares / self.counts - self.mean**2, 0.0))

    def add(self, values: Array) -> None:
        """Take in a whole tensor.

        Raises:
            NonFiniteError: a value is NaN or infinite.
            TypeError: it is not of a floating-point type.
            ValueError: it has another number of channels than the tensors before it.
        """
        if values.dtype.name not in FLOAT_TYPES:
            raise TypeError(f"statistics take {', '.join(FLOAT_TYPES)} values, not {values.dtype.name}")
        if not values.size:
            return
        rows = _rows(values, self.axis)
        minima, maxima = rows.min(axis=1), rows.max(axis=1)
        if not (np.isfinite(minima).all() and np.isfinite(maxima).all()):
            raise NonFiniteError("NaN" if np.isnan(minima).any() else "infinite")
        self.add_extremes(float(minima.min()), float(maxima.max()), values.size)
        counts = np.full(len(rows), rows.shape[1])
        self._add(minima, maxima, counts, rows.sum(axis=1), np.einsum("ij,ij->i", rows, rows))

    def merge(self, other: Extremes) -> None:
        """Take in all that `other` has seen.

        Raises:
            TypeError: `other` has no channels.
            ValueError: it has another number of them.
        """
        if not isinstance(other, ChannelStatistics):
            raise TypeError("channel statistics merge with channel statistics only")
        super().merge(other)
        if other.count:
            self._add(other.minima, other.maxima, other.counts, other._sums, other._squares)

    def _add(self, minima: Channels, maxima: Channels, counts: NDArray[Any], sums: Channels, squares: Channels) -> None:
        if self.counts.any() and len(counts) != len(self.counts):
            raise ValueError(f"a tensor has {len(counts)} channels, and had {len(self.counts)} before")
        self.minima, self.maxima = np.minimum(self.minima, minima), np.maximum(self.maxima, maxima)
        self.counts = self.counts + counts
        self._sums, self._squares = self._sums + sums, self._squares + squares


class LastAxisStatistics(ChannelStatistics):
    """The same of each index of the last axis, where MatMul has the channels."""

    axis: ClassVar[int] = -1


def _rows(values: Array, axis: int) -> Channels:
    """float64 [C, values of each]."""
    if values.ndim < 2:
        return values.reshape(1, -1).astype(np.float64)
    return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1).astype(np.float64)
