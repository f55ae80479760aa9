"""Threads that run a model on one sample while they take in the tensors of another.

onnxruntime computes without Python's lock and so does most of what numpy does, but for np.bincount. So at most one
thread takes in values as long as another one can run the model, and each tensor is handed out in pieces, so that
whoever is free can help with what is left. Every thread keeps statistics of its own; they merge exactly.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

import numpy as np

from graphopt.batches import Batch
from graphopt.errors import DataError
from graphopt.graph import Array
from graphopt.histogram import Extremes, NonFiniteError

Statistics = TypeVar("Statistics", bound=Extremes)
Item = TypeVar("Item")
Found = TypeVar("Found")

_PIECE = 1 << 18  # values that a thread takes in before it looks at what else there is to do


@dataclass
class _Sample:
    """A batch on its way: put, run, taken in."""

    batch: Batch
    pieces: int = 0  # that are not taken in yet


@dataclass(frozen=True)
class _Piece:
    """A part of one tensor of one batch."""

    sample: _Sample
    name: str
    values: Array
    whole: Array  # the tensor, to find out which sample a wrong value belongs to


class Overlap(Generic[Statistics]):
    """A context manager: `put` every batch, then ask for the `result`.

    Args:
        run: runs the model on a batch and returns the floating-point tensors that there are.
        statistics: makes the empty statistics of one tensor.
        names: of the tensors, in the order in which errors prefer them.
        advice: what to do about values that are not finite.
        threads: how many.
        alive: batches whose tensors may be in memory at a time.
    """

    def __init__(
        self,
        run: Callable[[Batch], dict[str, Array]],
        statistics: Callable[[], Statistics],
        names: Sequence[str],
        *,
        advice: str,
        threads: int,
        alive: int,
    ) -> None:
        self._run = run
        self._statistics = statistics
        self._divides = statistics().takes_pieces
        self._order = {name: number for number, name in enumerate(names)}
        self._advice = advice
        self._most_alive = alive
        self._changed = threading.Condition()
        self._put: deque[_Sample] = deque()
        self._pieces: deque[_Piece] = deque()
        self._alive = 0
        self._taking = 0
        self._closed = False
        self._failures: list[tuple[int, int, Exception]] = []  # with the numbers of batch and tensor
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="observe")
        self._threads: list[Future[dict[str, Statistics]]] = [self._pool.submit(self._work) for _ in range(threads)]

    def put(self, batch: Batch) -> None:
        """Hand over a batch, once another one is done with if there are as many as may be.

        Raises:
            Exception: what `run` raised, or DataError: a tensor was not finite; of the first batch of which that
                is so.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._alive < self._most_alive or self._failures)
            if not self._failures:
                self._alive += 1
                self._put.append(_Sample(batch))
                self._changed.notify_all()
                return
        self.result()

    def result(self) -> dict[str, Statistics]:
        """The statistics of everything that was put.

        Raises:
            Exception: as `put`.
        """
        self._close()
        seen, *others = [thread.result() for thread in self._threads]
        if self._failures:
            raise min(self._failures, key=lambda failure: failure[:2])[2]
        for other in others:
            for name, statistics in other.items():
                seen[name].merge(statistics)
        return seen

    def __enter__(self) -> Self:
        """Return itself; the threads are there already."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the threads; after an error, without what they have not begun with."""
        if error is not None:
            with self._changed:
                self._alive -= len(self._put) + len({id(piece.sample) for piece in self._pieces})
                self._put.clear()
                self._pieces.clear()
        self._close()
        self._pool.shutdown()

    def _close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> dict[str, Statistics]:
        seen = {name: self._statistics() for name in self._order}
        while (task := self._next()) is not None:
            if isinstance(task, _Sample):
                self._run_on(task)
            else:
                self._take(task, seen[task.name])
        return seen

    def _next(self) -> _Sample | _Piece | None:
        """What to do next: the model comes first, unless nobody takes in what there is; None at the end."""
        with self._changed:
            while True:
                if self._pieces and not (self._taking and self._put):
                    self._taking += 1
                    return self._pieces.popleft()
                if self._put:
                    return self._put.popleft()
                if self._closed and not self._alive:
                    return None
                self._changed.wait()

    def _run_on(self, sample: _Sample) -> None:
        pieces: list[_Piece] = []
        try:
            values = self._run(sample.batch)
            while values:  # each piece keeps its tensor alive, and nothing else does
                name, tensor = values.popitem()
                pieces += _pieces(sample, name, tensor) if self._divides else [_Piece(sample, name, tensor, tensor)]
        except Exception as error:  # handed on by `put` or `result`
            self._fail(sample.batch.number, -1, error)
        with self._changed:
            sample.pieces = len(pieces)
            self._pieces.extend(pieces)
            self._alive -= not pieces
            self._changed.notify_all()

    def _take(self, piece: _Piece, seen: Statistics) -> None:
        try:
            seen.add(piece.values)
        except NonFiniteError as error:
            place = piece.sample.batch.place_of_first(~np.isfinite(piece.whole))
            message = not_finite(piece.name, error, place, self._advice)
            self._fail(piece.sample.batch.number, self._order[piece.name], DataError(message))
        with self._changed:
            self._taking -= 1
            piece.sample.pieces -= 1
            if not piece.sample.pieces:  # nobody waits for less, and each waking costs Python's lock
                self._alive -= 1
                self._changed.notify_all()

    def _fail(self, batch: int, tensor: int, error: Exception) -> None:
        """Note a failure, and begin with no other batch: those before it are under way and may have failed first."""
        with self._changed:
            self._failures.append((batch, tensor, error))
            self._alive -= len(self._put)
            self._put.clear()
            self._changed.notify_all()


def in_order(function: Callable[[Item], Found], items: Iterable[Item], *, threads: int) -> Iterator[Found]:
    """What the function gives for each item, in their order; as many are under way as there are threads, and one waits.

    Raises:
        Exception: what the function raised for the first item that it fails for, or what `items` raised.
    """
    pending: deque[Future[Found]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="observe") as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def not_finite(tensor: str, what: NonFiniteError, place: str, advice: str) -> str:
    """Say that a tensor is not finite in the sample that is called `place`."""
    return f"tensor {tensor} is {what} in {place}: {advice}"


def _pieces(sample: _Sample, name: str, tensor: Array) -> Iterator[_Piece]:
    flat = tensor.reshape(-1)
    for number in range(math.ceil(flat.size / _PIECE)):
        yield _Piece(sample, name, flat[number * _PIECE : (number + 1) * _PIECE], tensor)
