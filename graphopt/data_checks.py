"""What is wrong with calibration data, seen while they go by: constant and repeated samples, too few, NaN and Inf.

Each feed is read once more and hashed; nothing of it is kept but 16 bytes, by which repeated samples show and which,
added up, name the data whatever their order (`graphopt.ranges`).
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from graphopt.errors import DataError
from graphopt.feeds import Array, Feed, Samples, place_of
from graphopt.ranges import DIGEST_BITS, added_digests

FEW_SAMPLES = 32
"""Fewer are warned about."""


class DataChecks:
    """Checks samples while somebody else iterates over them; what it found is of the last iteration."""

    def __init__(self, samples: Samples) -> None:
        self.samples = replace(samples, start=self._watched)
        self._source = samples
        self._digests: dict[str, int] = {}  # with the number of samples that have it
        self._constant: list[str] = []

    @property
    def digest(self) -> str:
        """Of all samples, whatever their order."""
        return added_digests(digest for digest, count in self._digests.items() for _ in range(count))

    def warnings(self) -> tuple[str, ...]:
        """What a user should know of the data, most telling first."""
        total = sum(self._digests.values())
        repeated = total - len(self._digests)
        found = []
        if _is_telling(len(self._constant), total):
            found.append(
                f"{len(self._constant)} of {total} samples hold one value throughout (first: {self._constant[0]}): "
                "is that real data?"
                if total > 1
                else f"the only sample holds one value throughout ({self._constant[0]}): is that real data?"
            )
        if _is_telling(repeated, total - 1):
            repeat = (
                "samples repeat another one: they tell" if repeated > 1 else "samples repeats another one: it tells"
            )
            found.append(f"{repeated} of {total} {repeat} nothing new")
        if total < FEW_SAMPLES:
            found.append(f"the ranges come from {total} samples; from {FEW_SAMPLES} on they are steadier")
        return tuple(found)

    def drawn(self, limit: int) -> list[Feed]:
        """At most `limit` different samples, held in memory: the same ones in the same order, however they came."""
        wanted, found = set(heapq.nsmallest(limit, self._digests)), dict[str, Feed]()
        for feed in self._source:
            digest = _digest(feed)
            if digest in wanted:
                found[digest] = feed
            if len(found) == len(wanted):
                break
        return [found[digest] for digest in sorted(found)]

    def _watched(self) -> Iterator[Feed]:
        self._digests, self._constant = {}, []
        for number, feed in enumerate(self._source):
            place = place_of(feed, number)
            for name, array in feed.items():
                _refuse_non_finite(name, array, place)
            if _is_constant(feed):
                self._constant.append(place)
            digest = _digest(feed)
            self._digests[digest] = self._digests.get(digest, 0) + 1
            yield feed


def _is_telling(odd: int, total: int) -> bool:
    """Whether odd samples are worth a warning: one among many is a black photo, or a scene that stood still."""
    return odd > 1 or odd == total == 1


def _refuse_non_finite(name: str, array: Array, place: str) -> None:
    if array.dtype.kind != "f" or not array.size:
        return
    low, high = array.min(), array.max()
    if np.isnan(low) or high == np.inf:  # -infinity is what masks of attention hold
        what = "NaN" if np.isnan(low) else "infinite values"
        raise DataError(f"input {name} has {what} in {place}: leave that sample out, or mend it")


def _is_constant(feed: Feed) -> bool:
    """Whether every float input of more than one value holds the same one throughout.

    One that varies makes up for others: a recurrent state starts as zeros beside real audio.
    """
    floats = [array for array in feed.values() if array.dtype.kind == "f" and array.size > 1]
    return bool(floats) and all(array.min() == array.max() for array in floats)


def _digest(feed: Feed) -> str:
    state = hashlib.blake2b(digest_size=DIGEST_BITS // 8)
    for name in sorted(feed):
        array = feed[name]
        state.update(f"{name} {array.dtype} {array.shape} ".encode())
        state.update(str(array.tolist()).encode() if array.dtype.kind == "O" else np.ascontiguousarray(array).data)
    return state.hexdigest()
