"""A histogram that also holds the exact sums of the values and of their squares, for up to twice the time.

Sums in floating point depend on the order in which they are added. Here they are Python integers, in units of
2**-1074 and its square, so they are the same, bit for bit, whatever the order, and those of two histograms add up.

What makes it fast for float32: of at most 2**15 values of magnitude below 2**E, those of at least 2**(E - 13) are
multiples of 2**(E - 36). So the float64 sum of these is exact, whatever its order: it takes 51 bits. For the squares x
is divided into h, a multiple of 2**(E - 18), and x - h, at most 2**(E - 19): the sums of h h, of h (x - h) and of
(x - h) (x - h) take 51, 50 and 49 bits. The few smaller values are summed in the same way by themselves.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.graph import Array
from graphopt.histogram import Extremes, Histogram

_UNIT = 1074  # float64's smallest magnitude is 2**-1074
_VALUES = 1 << 15  # whose sums are exact
_ALONE = 1 << 13  # values whose product BLAS leaves to one thread
_FEW = 64  # values that are quicker one by one
_HEAD, _SMALLEST = 18, 13  # bits below the largest magnitude

Floats = NDArray[np.float64]


class ExactHistogram(Histogram):
    """A `Histogram` whose mean and mean square are correctly rounded."""

    def __init__(self) -> None:
        super().__init__()
        self._total = 0  # of the values, in units of 2**-1074
        self._squares = 0  # of their squares, in units of 2**-2148

    @property
    def mean(self) -> float:
        """The mean, to the last bit; NaN without values."""
        return _quotient(self._total, self.count, _UNIT)

    @property
    def second_moment(self) -> float:
        """The mean of the squares, to the last bit; NaN without values."""
        return _quotient(self._squares, self.count, 2 * _UNIT)

    def merge(self, other: Extremes) -> None:
        """Take in all that `other` has seen.

        Raises:
            TypeError: `other` has no exact sums.
        """
        if not isinstance(other, ExactHistogram):
            raise TypeError("exact histograms merge with exact histograms only")
        super().merge(other)
        self._total += other._total
        self._squares += other._squares

    def to_json(self) -> dict[str, Any]:
        """The bins and the sums for a file."""
        return super().to_json() | {"total": hex(self._total), "squares": hex(self._squares)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any], seen: Extremes) -> ExactHistogram:
        """A histogram from what `to_json` gave.

        Raises:
            ValueError: the record is damaged.
        """
        histogram = cls()
        histogram._take_json(record, seen)
        try:
            histogram._total, histogram._squares = int(record["total"], 16), int(record["squares"], 16)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"its sums are damaged: {error}") from error
        return histogram

    def _add_chunk(self, chunk: Array, low: float, high: float) -> None:
        super()._add_chunk(chunk, low, high)
        for start in range(0, chunk.size, _VALUES):
            part = chunk[start : start + _VALUES]
            if part.dtype == np.float64:
                self._add_one_by_one(part)
            else:
                values = _scratch.values[: part.size]
                np.copyto(values, part)
                self._add_of_float32(values)

    def _add_one_by_one(self, values: Floats) -> None:
        for value in map(_units, values.tolist()):
            self._total += value
            self._squares += value * value

    def _add_of_float32(self, values: Floats) -> None:
        """Take in float64 values that are all float32's; they are overwritten."""
        while values.size > _FEW and (largest := float(max(-values.min(), values.max()))) > 0:
            exponent = math.frexp(largest)[1]
            head, tail = _scratch.head[: values.size], _scratch.tail[: values.size]
            is_small = np.less(np.abs(values, out=head), math.ldexp(1.0, exponent - _SMALLEST))
            is_small &= values != 0
            small = values[is_small]
            if small.size:
                values[is_small] = 0
            rounding = math.ldexp(1.5, 52 + exponent - _HEAD)  # adding it leaves no bits below 2**(exponent - _HEAD)
            np.add(values, rounding, out=head)
            np.subtract(head, rounding, out=head)
            np.subtract(values, head, out=tail)
            self._total += _units(float(values.sum()))
            crossed = _product(head, tail)
            for product in (_product(head, head), crossed, crossed, _product(tail, tail)):
                self._squares += _units(product, 2 * _UNIT)
            values = small
        self._add_one_by_one(values)


class _Scratch(threading.local):
    """Buffers, a set for each thread: fresh ones of this size would take longer than the arithmetic."""

    def __init__(self) -> None:
        self.values, self.head, self.tail = (np.empty(_VALUES) for _ in range(3))


_scratch = _Scratch()


def _product(one: Floats, other: Floats) -> float:
    """The sum of the products, which is exact in whatever order; in parts that BLAS starts no threads for."""
    parts = range(0, one.size, _ALONE)
    return float(sum(one[start : start + _ALONE] @ other[start : start + _ALONE] for start in parts))


def _units(value: float, unit: int = _UNIT) -> int:
    """A value as a multiple of 2**-unit."""
    fraction, exponent = math.frexp(value)
    shift = exponent - 53 + unit  # negative for values below 2**-1022, whose last bits are zeros then
    mantissa = int(math.ldexp(fraction, 53))
    return mantissa << shift if shift >= 0 else mantissa >> -shift


def _quotient(total: int, count: int, unit: int) -> float:
    return float(Fraction(total, count << unit)) if count else math.nan
