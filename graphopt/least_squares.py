"""Linear maps fitted to data by least squares, from sums over rows that are gathered one block at a time.

With rows x of F features and y of O outputs, means mx and my, and C = E[x x'] - mx mx', c = E[x y'] - mx my',

    ridge     W = W0 + (C + r I)^-1 (c - C W0),   b = my - W' mx,     r = ridge * mean(diag C)
    error     E[(y - W'x - b)^2] = var(y) - 2 diag(W'c) + diag(W'C W) + (my - W'mx - b)^2    for each output

The ridge pulls towards the weights W0 that are there, not towards zero: along directions that the rows do not show,
the operator stays what it was. The bias is not penalised. What is gathered does not grow with the rows: F * F + F * O
numbers for each group of channels, in float64, because the differences above cancel in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64s = NDArray[np.float64]

_LEAST_ROWS = 256  # to wait for
_NO_VARIANCE = 1e-12  # relative to the mean square; below it a channel is constant but for rounding


@dataclass(frozen=True)
class Affinity:
    """y = weight' x + bias, for each group of channels by itself."""

    weight: Float64s  # [groups, features, outputs]
    bias: Float64s  # [groups, outputs]

    @property
    def finite(self) -> bool:
        """Whether every value is a number."""
        return bool(np.isfinite(self.weight).all() and np.isfinite(self.bias).all())


class Moments:
    """Sums over rows (x, y) from which every least-squares fit of y to x follows."""

    def __init__(self, groups: int, features: int, outputs: int) -> None:
        self._rows = 0
        self._x = np.zeros((groups, features))
        self._y = np.zeros((groups, outputs))
        self._xx = np.zeros((groups, features, features))
        self._xy = np.zeros((groups, features, outputs))
        self._yy = np.zeros((groups, outputs))
        self._waiting: list[tuple[Float64s, Float64s]] = []  # rows for one product instead of many small ones
        self._most_waiting = max(features, _LEAST_ROWS)

    @staticmethod
    def nbytes(groups: int, features: int, outputs: int) -> int:
        """How many bytes the sums take, and the rows that wait to be added to them."""
        sums = features * features + features * outputs + features + 2 * outputs
        return 8 * groups * (sums + max(features, _LEAST_ROWS) * (features + outputs))

    def add(self, x: NDArray[Any], y: NDArray[Any]) -> None:
        """Take in rows: x [groups, rows, features], y [groups, rows, outputs], of any floating-point type."""
        for start in range(0, x.shape[1], self._most_waiting):
            part = slice(start, start + self._most_waiting)
            if self._waiting and self._count_waiting() + x[:, part].shape[1] > self._most_waiting:
                self._take_in()
            self._waiting.append((x[:, part].astype(np.float64), y[:, part].astype(np.float64)))

    @property
    def rows(self) -> int:
        """How many rows were added."""
        return self._rows + self._count_waiting()

    def _count_waiting(self) -> int:
        return sum(x.shape[1] for x, _ in self._waiting)

    def _take_in(self) -> None:
        if not self._waiting:
            return
        x, y = (np.concatenate(parts, axis=1) for parts in zip(*self._waiting, strict=True))
        self._waiting = []
        across = x.swapaxes(1, 2)
        self._rows += x.shape[1]
        self._x += x.sum(axis=1)
        self._y += y.sum(axis=1)
        self._xx += across @ x
        self._xy += across @ y
        self._yy += np.square(y).sum(axis=1)

    @property
    def finite(self) -> bool:
        """Whether no row held a NaN or an infinity."""
        self._take_in()
        return bool(np.isfinite(self._yy).all() and np.isfinite(self._xx.sum()))

    def ridge(self, start: Affinity, ridge: float) -> Affinity:
        """Return the least-squares fit, pulled towards `start`; see the module docstring."""
        covariance, across = self._centred()
        diagonal = covariance.diagonal(axis1=1, axis2=2).mean(axis=1)
        strength = ridge * diagonal + np.finfo(np.float64).tiny
        right = across - covariance @ start.weight
        places = np.arange(covariance.shape[1])
        covariance[:, places, places] += strength[:, np.newaxis]
        seen = diagonal > 0  # a group whose features never change says nothing
        weight = start.weight.copy()
        weight[seen] += np.linalg.solve(covariance[seen], right[seen])
        return self.means_matched(Affinity(weight, start.bias))

    def means_matched(self, fitted: Affinity) -> Affinity:
        """Return the map with the bias that gives each output the mean of y."""
        self._take_in()
        return Affinity(fitted.weight, (self._y - _applied(self._x, fitted.weight)) / max(self._rows, 1))

    def variances_matched(self, fitted: Affinity, most: float) -> Affinity:
        """Return the map scaled and shifted so that each output has the mean and the variance of y.

        No output is scaled by more than `most` or by less than its inverse; one that does not vary is only shifted.
        """
        variance, explained, _ = self._variances(fitted.weight)
        varies = (variance > 0) & (explained > 0)
        ratio = np.sqrt(np.divide(variance, explained, out=np.ones_like(variance), where=varies))
        scaled = fitted.weight * np.clip(ratio, 1 / most, most)[:, np.newaxis, :]
        return self.means_matched(Affinity(scaled, fitted.bias))

    def error(self, fitted: Affinity) -> float:
        """Return the mean square of y - weight' x - bias, summed over outputs and groups."""
        variance, explained, shared = self._variances(fitted.weight)
        offset = (self._y - _applied(self._x, fitted.weight)) / max(self._rows, 1) - fitted.bias
        return float(np.maximum(variance - 2 * shared + explained, 0).sum() + np.square(offset).sum())

    def power(self) -> float:
        """Return the variance of y, summed over outputs and groups: the error of a map that knows only the means."""
        self._take_in()
        mean = self._y / max(self._rows, 1)
        return float(np.maximum(self._yy / max(self._rows, 1) - np.square(mean), 0).sum())

    def _centred(self) -> tuple[Float64s, Float64s]:
        self._take_in()
        rows = max(self._rows, 1)
        mean = self._x / rows
        covariance = self._xx / rows - mean[:, :, np.newaxis] * mean[:, np.newaxis, :]
        across = self._xy / rows - mean[:, :, np.newaxis] * (self._y / rows)[:, np.newaxis, :]
        return covariance, across

    def _variances(self, weight: Float64s) -> tuple[Float64s, Float64s, Float64s]:
        """The variance of y, that of weight' x, and the covariance of both: each [groups, outputs]."""
        covariance, across = self._centred()
        square, mean = self._yy / max(self._rows, 1), self._y / max(self._rows, 1)
        variance = square - np.square(mean)
        variance[variance <= _NO_VARIANCE * square] = 0
        explained = np.maximum((weight * (covariance @ weight)).sum(axis=1), 0)
        return variance, explained, (weight * across).sum(axis=1)


def _applied(rows: Float64s, weight: Float64s) -> Float64s:
    """Row sums [groups, features] through a weight [groups, features, outputs]."""
    return (rows[:, np.newaxis, :] @ weight)[:, 0, :]
