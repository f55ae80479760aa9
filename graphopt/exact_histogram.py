"""A histogram that also holds the exact sums of the values and of their squares, for a third more time.

Sums in floating point depend on the order in which they are added. Here they are Python integers, in units of
2**-1074 and its square, so they are the same, bit for bit, whatever the order, and those of two histograms add up.

What makes it fast for float32: of at most 2**15 values of magnitude below 2**E, those of at least 2**(E - 13) are
multiples of 2**(E - 36). So the float64 sum of these is exact, whatever its order: it takes 51 bits. For the squares x
is divided into h, a multiple of 2**(E - 18), and x - h, at most 2**(E - 19): the sums of h h, of h (x - h) and of
(x - h) (x - h) take 51, 50 and 49 bits. The few smaller values are summed in the same way by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.graph import Array
from graphopt.histogram import Extremes, Histogram

_UNIT = 1074  # float64's smallest magnitude is 2**-1074
_VALUES = 1 << 13  # at a time: 2**15 would be exact too, but BLAS would start threads for their products
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
            values = chunk[start : start + _VALUES].astype(np.float64)
            if chunk.dtype == np.float64:
                self._add_one_by_one(values)
            else:
                self._add_of_float32(values)

    def _add_one_by_one(self, values: Floats) -> None:
        for value in map(_units, values.tolist()):
            self._total += value
            self._squares += value * value

    def _add_of_float32(self, values: Floats) -> None:
        while values.size and (largest := float(max(-values.min(), values.max()))) > 0:
            exponent = math.frexp(largest)[1]
            is_small = np.abs(values) < math.ldexp(1.0, exponent - _SMALLEST)
            small = values[is_small & (values != 0)]
            if small.size:
                values[is_small] = 0
            rounding = math.ldexp(1.5, 52 + exponent - _HEAD)  # adding it leaves no bits below 2**(exponent - _HEAD)
            head = (values + rounding) - rounding
            tail = values - head
            self._total += _units(float(values.sum()))
            crossed = float(head @ tail)
            for product in (float(head @ head), crossed, crossed, float(tail @ tail)):
                self._squares += _units(product, 2 * _UNIT)
            values = small


def _units(value: float, unit: int = _UNIT) -> int:
    """A value as a multiple of 2**-unit."""
    numerator, denominator = value.as_integer_ratio()
    return (numerator << unit) // denominator


def _quotient(total: int, count: int, unit: int) -> float:
    return float(Fraction(total, count << unit)) if count else math.nan
