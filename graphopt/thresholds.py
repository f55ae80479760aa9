"""The range that a quantized tensor covers, chosen from its histogram: how much to clip, for how fine a step.

`minmax` clips nothing, `moving-average` what few samples reach. `entropy` and `percentile` find a threshold T for |x|
and clip to [-T, T]; `mse` and `auto` find both ends, of all ranges the one with the least expected error of what
the rest of the graph sees. None goes
beyond the values observed. `data-free` has a way of its own (`graphopt.data_free`).
"""

from __future__ import annotations

from enum import Enum

import numpy as np
from numpy.typing import NDArray

from graphopt.graph import Array
from graphopt.histogram import Extremes, Histogram, MovingAverage
from graphopt.quantization import SMALLEST_SCALE, QuantType
from graphopt.responses import Response

Counts = NDArray[np.int64]
_Floats = NDArray[np.float64]

_LEVELS = 128  # of |x|: the magnitudes of an int8
_TIE = 1e-9  # nats: closer divergences differ by rounding only
_MSE_CANDIDATES = 256  # for each end of the range
_JUDGED_AGAIN = 256  # pairs of ends
_CLIPPING_WEIGHT = 3.0
"""Of a clipping error beside a rounding error of the same size, for AUTO.

Rounding errors have both signs and cancel in the sums that follow; clipping errors of a tensor have one, on the same
few channels and places. Of 1, 2, 3, 4, 6, 8 and 16, 2 and 3 keep most of the SQNR of 17 real nets for two targets.
"""


class Method(Enum):
    """How a range is chosen from what calibration saw; SEARCH tries several on a whole model."""

    SEARCH = "search"
    AUTO = "auto"
    MINMAX = "minmax"
    MOVING_AVERAGE = "moving-average"
    ENTROPY = "entropy"
    PERCENTILE = "percentile"
    MSE = "mse"
    DATA_FREE = "data-free"

    @property
    def statistics(self) -> type[Extremes]:
        """What must be observed for it; bins cost most of the time."""
        few = {Method.MINMAX: Extremes, Method.DATA_FREE: Extremes, Method.MOVING_AVERAGE: MovingAverage}
        return few.get(self, Histogram)

    @property
    def why_not_from_histograms(self) -> str | None:
        """Why the ranges do not follow from histograms, merged ones or kept ones; None where they do."""
        return {
            Method.SEARCH: "search quantizes the model and runs it on samples",
            Method.MOVING_AVERAGE: "moving-average depends on the order of the samples",
            Method.DATA_FREE: "data-free looks at the model's BatchNormalization, not at samples",
        }.get(self)


def choose_range(
    seen: Extremes,
    method: Method,
    quant_type: QuantType,
    *,
    percent: float = 99.99,
    response: Response | None = None,
) -> tuple[float, float, Method]:
    """The lowest and the highest value that the quantized tensor should represent, and the method that chose them.

    Args:
        seen: at least one value; what the method's `statistics` are.
        method: how to choose; not SEARCH, which is no rule for one tensor. AUTO looks for both ends as MSE does, with
            errors of clipped values counting `_CLIPPING_WEIGHT` times; where that clips nothing, it has turned out as
            MINMAX, and as MSE elsewhere.
        quant_type: of the quantized tensor: its number of steps, and whether they are symmetric around 0.
        percent: for PERCENTILE, the share of the values that is not clipped, above 0 and up to 100.
        response: for MSE and AUTO, what the rest of the graph sees of the values, where that is not themselves.
    """
    if not seen.count:
        raise ValueError("there is no range of no values")
    if method is Method.SEARCH:
        raise ValueError("search chooses among methods, no range")
    if method in (Method.MINMAX, Method.DATA_FREE):
        return seen.minimum, seen.maximum, method
    if isinstance(seen, MovingAverage):
        return seen.average_minimum, seen.average_maximum, method
    if not isinstance(seen, Histogram):
        raise TypeError(f"the method {method.value} needs {method.statistics.__name__}, not the extremes alone")
    low, high = _clipping_range(seen, method, percent, quant_type, response)
    low, high = max(seen.minimum, min(low, seen.maximum)), min(seen.maximum, max(high, seen.minimum))
    if method is Method.AUTO:
        method = Method.MINMAX if (low, high) == (seen.minimum, seen.maximum) else Method.MSE
    return low, high, method


def _clipping_range(
    histogram: Histogram, method: Method, percent: float, quant_type: QuantType, response: Response | None
) -> tuple[float, float]:
    if method in (Method.MSE, Method.AUTO):
        weight = _CLIPPING_WEIGHT if method is Method.AUTO else 1.0
        return mse(histogram, quant_type, clipping_weight=weight, response=response)
    counts = np.trim_zeros(histogram.magnitudes(), "b")  # beyond the largest value there is nothing to choose
    if method is Method.ENTROPY:
        threshold = entropy(counts, histogram.width)
    else:
        threshold = percentile(counts, histogram.width, percent)
    return -threshold, threshold


def percentile(counts: Counts, width: float, percent: float) -> float:
    """The smallest bin edge with at least `percent` % of all |x| below it; arguments as `entropy`."""
    below = np.cumsum(counts)
    return (int(np.searchsorted(below, percent / 100 * int(below[-1]))) + 1) * width


def entropy(counts: Counts, width: float) -> float:
    """The threshold that loses least information by the Kullback-Leibler divergence.

    S. Migacz, "8-bit Inference with TensorRT", GTC 2017 (S7310), in the form of NVIDIA's Model Optimizer:
    first counts[0] = counts[1], which hides the spike of zeros that a Relu leaves. Then for i = 128 ...
    len(counts), with C = sum of counts and C_i = sum of counts[:i]:

        P = counts[:i], with the C - C_i values beyond added to the last bin; normalized by C
        Q = counts[:i] without these, merged into 128 levels (bin j into level floor(128 j / i)), the mass of
            each level spread evenly over its non-empty bins; normalized by C_i
        D(P || Q) = sum of P log(P / Q)

    The threshold is the edge i * width for the smallest D; of equal ones the largest i. Where Q is 0 and P is
    not, D is infinite: that happens when bin i - 1 is empty and there are values beyond it, so such an i is
    never chosen.

    All i are had at once. With m and n the mass and the number of non-empty bins of each level, c a count and
    c' the last count with the outliers:

        C D = sum over j < i - 1 of c log c  +  c' log c'  -  C log C  +  C log C_i
              - sum over levels of (m, in the last level m + C - C_i) log(m / n)

    and m, n, C_i and the first sum are differences of prefix sums: a [len(counts) - 127, 128] matrix in all.

    Args:
        counts: int64 [N], the histogram of |x| from 0; calibration uses N = 2048.
        width: of a bin.
    """
    if len(counts) <= _LEVELS or not counts[1:].any():
        return len(counts) * width  # one candidate, or nothing but the hidden spike
    counts = np.concatenate((counts[1:2], counts[1:]))
    total = int(counts.sum())
    inside = _prefix_sums(counts)
    candidates = np.arange(_LEVELS, len(counts) + 1)
    outliers = total - inside[candidates]
    last = counts[candidates - 1]
    finite = (last > 0) | (outliers == 0)  # and so is the last candidate: it has no outliers
    candidates, outliers, last = candidates[finite], outliers[finite], last[finite]

    # bin j is in level floor(128 j / i): level k begins at bin ceil(k i / 128)
    edges = (candidates[:, None] * np.arange(_LEVELS + 1) + _LEVELS - 1) // _LEVELS
    mass = np.diff(inside[edges])
    filled = np.diff(_prefix_sums(counts > 0)[edges])
    log_level = np.log(np.maximum(mass, 1) / np.maximum(filled, 1))
    within_levels = (mass * log_level).sum(axis=1) + outliers * log_level[:, -1]
    own = _prefix_sums(_x_log_x(counts))[candidates - 1] + _x_log_x(last + outliers)
    normalization = total * (np.log(inside[candidates]) - np.log(total))
    divergence = (own + normalization - within_levels) / total
    best = candidates[divergence <= divergence.min() + _TIE][-1]
    return int(best) * width


def mse(
    histogram: Histogram, quant_type: QuantType, *, clipping_weight: float = 1.0, response: Response | None = None
) -> tuple[float, float]:
    """The range [low, high], low <= 0 <= high, with the least expected squared error of quantization.

    The error is that of f(x), where `response` is f, or of x itself. With f' the slope of f, a value inside is off by a
    uniform rounding error, f'(x)**2 * step**2 / 12 on average; a value beyond an end by (f(x) - f(end))**2. step =
    (high - low) / levels (255 of uint8), or T / qmax (127 of int8) where the integers are symmetric and cover [-T, T].
    Values of bin 0 count as exact zeros, which cost nothing.

    Candidates for each end are 256 bin edges between 0 and the last bin that is filled, in all combinations. The zero
    point is an integer, which moves the ends by up to half a step: a small end may be lost that way. So the best
    candidates are judged again by the ends that they really have.

    Args:
        histogram: of at least one value.
        quant_type: of the quantized tensor.
        clipping_weight: by which the squared errors of values beyond the ends are multiplied.
        response: what the rest of the graph sees of the values; left alone where it is not finite.
    """
    if response is not None and not np.isfinite(response.at(histogram.middles()[histogram.counts > 0])).all():
        response = None
    above, below = _Side(histogram, 1, response), _Side(histogram, -1, response)
    if quant_type.symmetric:
        ends = max(above.candidates, below.candidates, key=lambda each: float(each[-1]))
        clipping, inside = np.add(above.costs(ends), below.costs(ends))
        best = ends[np.argmin(clipping_weight * clipping + inside * (ends / quant_type.maximum) ** 2 / 12)]
        return -float(best), float(best)

    lows, highs = below.candidates[:, None], above.candidates[None, :]
    clipping, inside = (one + other for one, other in zip(below.costs(lows), above.costs(highs), strict=True))
    cost = clipping_weight * clipping + inside * ((lows + highs) / quant_type.levels) ** 2 / 12
    few = np.argpartition(cost, min(_JUDGED_AGAIN, cost.size) - 1, axis=None)[:_JUDGED_AGAIN]
    lows, highs = (np.broadcast_to(ends, cost.shape).ravel()[few] for ends in (lows, highs))
    steps = np.maximum((lows + highs) / quant_type.levels, SMALLEST_SCALE)
    below_zero = np.rint(lows / steps)
    clipping, inside = np.add(below.costs(below_zero * steps), above.costs((quant_type.levels - below_zero) * steps))
    best = np.argmin(clipping_weight * clipping + inside * steps**2 / 12)
    return -float(lows[best]), float(highs[best])


class _Side:
    """The values of one sign: what a range costs that ends at some distance from zero."""

    def __init__(self, histogram: Histogram, sign: int, response: Response | None) -> None:
        counts = histogram.counts[len(histogram.counts) // 2 :: sign].astype(np.float64)
        counts[0] = 0  # zeros
        self._width = histogram.width
        edges = sign * np.arange(len(counts) + 1) * self._width
        middles = edges[:-1] + sign * self._width / 2
        if response is None:
            self._values, at_middles, slopes = edges, middles, np.ones(len(counts))
        else:
            self._values, at_middles = response.at(edges), response.at(middles)
            slopes = np.diff(self._values) / self._width
        with np.errstate(invalid="ignore"):
            moments = [_prefix_sums(np.where(counts > 0, counts * at_middles**power, 0)) for power in range(3)]
            self._inside = _prefix_sums(np.where(counts > 0, counts * slopes**2, 0))
        self._beyond = [each[-1] - each for each in moments]
        self._extreme = max(histogram.maximum if sign > 0 else -histogram.minimum, 0.0)

    @property
    def candidates(self) -> _Floats:
        """Distances of ends from zero, ascending: 0, bin edges, and the largest of the values."""
        filled = int(np.flatnonzero(np.diff(self._beyond[0]))[-1]) + 1 if self._beyond[0][0] else 0
        edges = np.unique(np.linspace(0, filled, _MSE_CANDIDATES + 1).round()) * self._width
        return np.minimum(edges, self._extreme)

    def costs(self, ends: _Floats) -> tuple[_Floats, _Floats]:
        """For ranges that end so far from zero: squared clipping errors, and the sum of f'(x)**2 inside."""
        bins = np.minimum(ends / self._width, len(self._values) - 1)
        nearest = np.rint(bins).astype(np.intp)
        beyond, first, second = (each[nearest] for each in self._beyond)
        value = np.interp(bins, np.arange(len(self._values)), self._values)
        return second - 2 * value * first + value**2 * beyond, self._inside[nearest]


def _prefix_sums(values: Array) -> Array:
    """[N] -> [N + 1]; entry i is the sum of the first i values."""
    return np.concatenate(([0], np.cumsum(values)))


def _x_log_x(counts: Counts) -> _Floats:
    """0 where the count is 0."""
    return np.asarray(counts * np.log(np.maximum(counts, 1)), np.float64)
