"""Counting values into the bins of a histogram, compiled where the installation had a C compiler, else with numpy.

Both give the same counts. The compiled loop (`_counting.c`) takes half the time and does not hold Python's lock,
which np.bincount does.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 2048  # on each side of zero
CHUNK = 1 << 17  # the most values at a time: few calls, and buffers that stay in a core's cache

_COPIES = 4  # of the bins, for neighbouring values: where many are the same, each would wait for the one before
_APART = 2 * BINS + 8  # no power of two: the copies of a bin are in other sets of the caches
_LEAST_COPIED = 1 << 14  # values of a chunk


def count_with_numpy(values: NDArray[Any], per_width: float, counts: NDArray[np.int64]) -> None:
    """Add the values x with trunc(x * per_width) = k to bin k, `counts[k + BINS - 1]`; none is beyond the bins.

    Args:
        values: at most `CHUNK` of them, flat and contiguous, float32 or float64.
        per_width: the inverse of the width of a bin, a power of two and a normal number of the values' type.
        counts: 2 * BINS - 1 of them.
    """
    truncated, bins = _scratch.truncated[: values.size], _scratch.bins[: values.size]
    np.multiply(values, per_width, out=truncated, casting="unsafe")  # straight to int64 is slow on most CPUs
    if values.size < _LEAST_COPIED:
        np.add(truncated, BINS - 1, out=bins)
        np.add.at(counts, bins, 1)
        return
    np.add(truncated, _scratch.starts[: values.size], out=truncated)
    np.copyto(bins, truncated)
    found = np.bincount(bins, minlength=_COPIES * _APART).reshape(_COPIES, _APART)
    counts += found[:, : len(counts)].sum(axis=0)


class _Scratch(threading.local):
    """Buffers for one chunk, a set for each thread: fresh ones would quadruple the time by page faults."""

    def __init__(self) -> None:
        self.truncated = np.empty(CHUNK, np.int32)
        self.starts = np.tile(np.arange(_COPIES, dtype=np.int32) * _APART + BINS - 1, CHUNK // _COPIES)
        self.bins = np.empty(CHUNK, np.intp)  # what np.bincount takes without a copy


_scratch = _Scratch()

try:
    from graphopt._counting import count as count  # a name of this module, too
except ImportError:
    count = count_with_numpy
