"""What a tensor's values looked like over all samples, in memory that does not grow with them.

`Extremes` keeps the exact minimum and maximum and the numbers of values and of zeros. `Histogram` adds the
distribution: bin k counts the values x with trunc(x / width) = k, for -2047 <= k <= 2047. Truncation goes
towards zero, so the bins of x and of -x mirror each other, and bin 0 is (-width, width).

The width is a power of two, the smallest that makes 2048 * width exceed the largest |x| so far. When a larger
value comes, the width doubles as often as needed and neighbouring bins merge. Nothing moves that a fresh
start with the final width would have put elsewhere: x / width is exact in floating point, and
trunc(trunc(x / w) / 2) = trunc(x / 2w). So the result is the same, bit for bit, whatever the order of the
samples and however they are batched, and histograms of two shards of the data merge into that of all of it.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from graphopt.counting import BINS, CHUNK, count
from graphopt.graph import Array

FLOAT_TYPES = ("float16", "bfloat16", "float32", "float64")

_MOVING = 0.01  # weight of a new sample in a moving average
_SMALLEST_EXPONENT = -120  # of the bin width: its inverse is a float32; smaller values fall into bin 0


class NonFiniteError(ValueError):
    """A NaN or an infinity among the values; the message is which."""


class Extremes:
    """The exact minimum and maximum of a tensor, how many values it had and how many of them were zero."""

    needs_values: ClassVar[bool] = False  # whether `add_extremes` is not enough
    takes_pieces: ClassVar[bool] = True  # whether `add` may be given the values in any order and in parts

    def __init__(self) -> None:
        self.minimum = math.inf  # above the maximum while there are no values
        self.maximum = -math.inf
        self.count = 0
        self.zeros: int | None = 0  # None: somebody took in extremes, not values

    def add_extremes(self, minimum: float, maximum: float, count: int) -> None:
        """Take in a tensor of which only the finite extremes and the number of values are known; 0 changes nothing."""
        if count:
            self.minimum, self.maximum = min(self.minimum, minimum), max(self.maximum, maximum)
            self.count += count
            self.zeros = None

    def add(self, values: Array) -> None:
        """Take in an array of any shape and any of `FLOAT_TYPES`; an empty one changes nothing.

        Raises:
            NonFiniteError: a value is NaN or infinite; the values before it may have been taken in.
            TypeError: another dtype.
        """
        for chunk in _chunks(values):
            low, high = float(chunk.min()), float(chunk.max())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise NonFiniteError("NaN" if math.isnan(low) else "infinite")
            self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
            self.count += chunk.size
            if low <= 0 <= high and self.zeros is not None:
                self.zeros += int(np.count_nonzero(chunk == 0))
            self._add_chunk(chunk, low, high)

    def merge(self, other: Extremes) -> None:
        """Take in all that `other` has seen."""
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)
        self.count += other.count
        self.zeros = None if self.zeros is None or other.zeros is None else self.zeros + other.zeros

    def _add_chunk(self, chunk: Array, low: float, high: float) -> None:
        """Take in what only a subclass keeps; `low` and `high` are the chunk's extremes."""


class MovingAverage(Extremes):
    """Also averages of the samples' minima and maxima that favour the last samples.

    As quantization-aware training has them (Jacob et al. 2018, section 3.1; PyTorch's MovingAverageMinMaxObserver):
    average += (of this sample - average) / 100, from those of the first sample on. They depend on the order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.average_minimum = math.nan
        self.average_maximum = math.nan

    def add_extremes(self, minimum: float, maximum: float, count: int) -> None:
        """Take in a sample; one without values changes nothing."""
        if count and self.count:
            self.average_minimum += (minimum - self.average_minimum) * _MOVING
            self.average_maximum += (maximum - self.average_maximum) * _MOVING
        elif count:
            self.average_minimum, self.average_maximum = minimum, maximum
        super().add_extremes(minimum, maximum, count)

    def merge(self, other: Extremes) -> None:
        """Refuse.

        Raises:
            TypeError: always: what came first is not known.
        """
        raise TypeError("moving averages do not merge: they depend on the order of the samples")


class Histogram(Extremes):
    """The extremes of a tensor and the distribution of its values.

    `counts` has 2 * BINS - 1 int64 entries, bin k at `counts[k + BINS - 1]`; a bin is `2.0 ** width_exponent`
    wide.
    """

    needs_values: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.width_exponent = _SMALLEST_EXPONENT
        self.counts: NDArray[np.int64] = np.zeros(2 * BINS - 1, np.int64)

    @property
    def width(self) -> float:
        """The width of a bin, in the tensor's unit."""
        return math.ldexp(1.0, self.width_exponent)

    @property
    def mean(self) -> float:
        """The mean of the values with each at the middle of its bin: at most a bin width from the true mean.

        A sum of the values themselves would depend on the order in which floating point adds them. NaN
        without values.
        """
        if not self.count:
            return math.nan
        return float(self.middles() @ self.counts) / self.count

    @property
    def second_moment(self) -> float:
        """The mean of the squares, with each value at the middle of its bin, as `mean`."""
        if not self.count:
            return math.nan
        return float(self.middles() ** 2 @ self.counts) / self.count

    def middles(self) -> NDArray[np.float64]:
        """The middle of each bin, in the tensor's unit; 0 for bin 0, where the zeros are."""
        bins = np.arange(1 - BINS, BINS)
        return (bins + 0.5 * np.sign(bins)) * self.width

    def magnitudes(self) -> NDArray[np.int64]:
        """The counts of |x|: `BINS` int64 entries, entry k for k * width <= |x| < (k + 1) * width."""
        counts = self.counts[BINS - 1 :].copy()
        counts[1:] += self.counts[BINS - 2 :: -1]
        return counts

    def merge(self, other: Extremes) -> None:
        """Take in all that `other` has seen.

        Raises:
            TypeError: `other` has no bins.
        """
        if not isinstance(other, Histogram):
            raise TypeError("a histogram merges with histograms only: bare extremes have no bins")
        super().merge(other)
        exponent = max(self.width_exponent, other.width_exponent)
        self._widen(exponent)
        self.counts += _widened(other.counts, exponent - other.width_exponent)

    def to_json(self) -> dict[str, Any]:
        """The bins for a file; the extremes and the numbers of values and zeros are kept beside it."""
        filled = np.flatnonzero(self.counts)
        first, last = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 0)
        packed = zlib.compress(self.counts[first:last].astype("<i8").tobytes(), 9)
        return {
            "width_exponent": self.width_exponent,
            "first_bin": first + 1 - BINS,
            "counts": base64.b64encode(packed).decode(),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any], seen: Extremes) -> Histogram:
        """A histogram from what `to_json` gave and from what was kept beside it.

        Raises:
            ValueError: the record is damaged, or is of other values than `seen`.
        """
        histogram = cls()
        histogram._take_json(record, seen)
        return histogram

    def _take_json(self, record: Mapping[str, Any], seen: Extremes) -> None:
        self.minimum, self.maximum = seen.minimum, seen.maximum
        self.count, self.zeros = seen.count, seen.zeros
        try:
            counts = np.frombuffer(zlib.decompress(base64.b64decode(record["counts"], validate=True)), "<i8")
            first = int(record["first_bin"]) - 1 + BINS
            self.width_exponent = int(record["width_exponent"])
            self.counts[first : first + len(counts)] = counts
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise ValueError(f"its histogram is damaged: {error}") from error
        largest = max(-seen.minimum, seen.maximum)
        if self.counts.sum() != seen.count or self.width_exponent != _width_exponent(largest):
            raise ValueError("its histogram is of other values than its extremes and its count")

    def _add_chunk(self, chunk: Array, low: float, high: float) -> None:
        self._widen(_width_exponent(max(-low, high)))
        # A power of two: products are exact, or so small that they truncate to bin 0 whatever they round to.
        count(chunk, math.ldexp(1.0, -self.width_exponent), self.counts)

    def _widen(self, exponent: int) -> None:
        if exponent > self.width_exponent:
            self.counts = _widened(self.counts, exponent - self.width_exponent)
            self.width_exponent = exponent


def _width_exponent(largest: float) -> int:
    """The exponent of the narrowest bins that reach beyond the magnitude `largest`."""
    if largest == 0:
        return _SMALLEST_EXPONENT
    return max(math.frexp(largest)[1] - BINS.bit_length() + 1, _SMALLEST_EXPONENT)


def _widened(counts: NDArray[np.int64], doublings: int) -> NDArray[np.int64]:
    """The counts for bins `2 ** doublings` times as wide."""
    if doublings == 0:
        return counts
    bins = np.arange(1 - BINS, BINS)
    merged = np.sign(bins) * (abs(bins) >> min(doublings, BINS.bit_length()))  # rounds towards zero
    widened = np.zeros_like(counts)
    np.add.at(widened, merged + BINS - 1, counts)
    return widened


def _chunks(values: Array) -> Iterator[NDArray[Any]]:
    """The values in cache-sized flat pieces of float32 or float64, in any order."""
    if values.dtype.name not in FLOAT_TYPES:
        raise TypeError(f"a histogram takes {', '.join(FLOAT_TYPES)} values, not {values.dtype.name}")
    flat = values.ravel(order="K")  # memory order: a transposed array is not copied
    dtype = np.float64 if values.dtype.name == "float64" else np.float32
    for start in range(0, flat.size, CHUNK):
        yield flat[start : start + CHUNK].astype(dtype, copy=False)
