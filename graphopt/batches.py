"""Small samples joined into batches, for a model that gives the same bits for a batch as for its samples one by one.

One inference of a small net costs less than starting it, and so does taking in a small tensor. A model may be given
batches only where that changes nothing: a first axis may also be time, or be mixed by a Reshape or a reduction, and
a product of more rows may add in another order. So a batch is tried, and every tensor compared with those of its
samples, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.errors import GraphoptError
from graphopt.feeds import Array, Feed, InputSpec, SourcedFeed, fixed_size, place_of
from graphopt.runtime import Session

LARGEST_BATCH = 32


@dataclass(frozen=True)
class Batch:
    """Samples that the model gets in one call, along axis 0."""

    number: int  # of its first sample, from 0
    feed: Feed
    places: tuple[str, ...]  # how an error names each sample

    def place_of_first(self, wrong: Array) -> str:
        """How an error names the first sample of which `wrong`, a mask of one of the model's tensors, holds a True."""
        if len(self.places) == 1:
            return self.places[0]
        row = int(np.argmax(wrong.reshape(len(wrong), -1).any(axis=1)))
        return self.places[row * len(self.places) // len(wrong)]


def batches(samples: Iterable[Feed], size: int) -> Iterator[Batch]:
    """Join up to `size` samples in a row, where their arrays have the same shapes.

    The arrays are copies: a source may fill the same ones for the next sample.
    """
    waiting: list[Feed] = []
    number = 0
    for feed in samples:
        if waiting and (len(waiting) == size or _shapes(feed) != _shapes(waiting[0])):
            yield _batch(number, waiting)
            number += len(waiting)
            waiting = []
        waiting.append(_copy(feed))
    if waiting:
        yield _batch(number, waiting)


def can_join(inputs: Sequence[InputSpec]) -> bool:
    """Whether the model leaves axis 0 of all its inputs open."""
    return bool(inputs) and all(spec.shape and fixed_size(spec.shape[0]) is None for spec in inputs)


def gives_the_same_bits(session: Session, feeds: Sequence[Feed], tensors: Sequence[str]) -> bool:
    """Whether a batch of `feeds` has in each tensor, along axis 0, just what the single feeds have in it."""
    if len({_shapes(feed) for feed in feeds}) > 1:
        return False
    try:
        together = session.run(_batch(0, list(feeds)).feed, tensors)
    except GraphoptError:  # some models state an open size, and take only 1
        return False
    alone = [session.run(feed, tensors) for feed in feeds]
    return all(_equal(together[name], [values[name] for values in alone]) for name in tensors)


def _equal(together: object, alone: Sequence[object]) -> bool:
    arrays = [array for array in (together, *alone) if isinstance(array, np.ndarray) and array.ndim]
    if len(arrays) != len(alone) + 1 or len({array.shape for array in arrays[1:]}) > 1:
        return False
    joined = np.concatenate(arrays[1:])
    return joined.shape == arrays[0].shape and joined.tobytes() == arrays[0].tobytes()


def _batch(number: int, feeds: list[Feed]) -> Batch:
    places = tuple(place_of(feed, number + index) for index, feed in enumerate(feeds))
    if len(feeds) == 1:
        return Batch(number, feeds[0], places)
    return Batch(number, {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}, places)


def _copy(feed: Feed) -> Feed:
    copies = {name: array.copy() for name, array in feed.items()}
    return SourcedFeed(copies, feed.where) if isinstance(feed, SourcedFeed) else copies


def _shapes(feed: Feed) -> tuple[tuple[int, ...], ...]:
    return tuple(array.shape for array in feed.values())
