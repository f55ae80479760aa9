"""Run a float model over samples and keep what its tensors looked like.

One pass over the samples in memory that does not grow with them: while onnxruntime computes sample n + 1,
which it does without Python's lock, a worker thread takes in the tensors of sample n; then the main thread
helps with what is left of them. At most two samples' tensors are alive.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.errors import DataError, GraphoptError
from graphopt.feeds import Feed, Samples
from graphopt.graph import Array, all_graphs, is_constant
from graphopt.histogram import FLOAT_TYPES, Extremes, NonFiniteError
from graphopt.model_io import Model
from graphopt.pass_base import Skip
from graphopt.progress import Progress, silent, track
from graphopt.runtime import Session, open_session

Statistics = TypeVar("Statistics", bound=Extremes)


@dataclass(frozen=True, kw_only=True)
class Observation(Generic[Statistics]):
    """What was seen of each tensor that had values, and what could not be observed."""

    statistics: Mapping[str, Statistics]
    skipped: tuple[Skip, ...]
    samples: int


def observe(
    model: Model,
    tensors: Sequence[str],
    samples: Samples,
    statistics: Callable[[], Statistics],
    *,
    progress: Progress = silent,
) -> Observation[Statistics]:
    """Run `model` over all samples and collect the statistics of `tensors`.

    Args:
        model: a float model; it runs with onnxruntime's optimizations on.
        tensors: names of floating-point tensors of the main graph, inputs and outputs included.
        samples: any number of them, of any shapes that the model takes.
        statistics: makes the empty statistics of one tensor: `Histogram`, or `Extremes` where they suffice.
        progress: told after every sample.

    Raises:
        DataError: there are no samples, the model does not run on one of them, or one gives a tensor a NaN or
            an infinity; the message says which.
        ModelError: onnxruntime cannot load the model.
    """
    skipped = _unobservable(model.graph, tensors)
    left_out = {skip.where for skip in skipped}
    observer = _Observer([name for name in tensors if name not in left_out], statistics)
    graph_inputs = {tensor.name for tensor in model.graph.inputs}
    inputs = [name for name in observer.seen if name in graph_inputs]
    computed = [name for name in observer.seen if name not in graph_inputs]
    session = open_session(model, threads=_inference_threads(), extra_outputs=computed)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="observe") as worker:
        number = -1
        waiting: deque[tuple[str, Any]] = deque()
        helped: Future[None] = worker.submit(observer.take, waiting)
        for number, feed in enumerate(track(samples, progress, "calibrate", samples.count)):
            values = _run(session, feed, computed, number)
            # copies: a source may fill the same arrays for the next sample while the worker still reads them
            values.update((name, feed[name].copy()) for name in inputs if name in feed)
            observer.take(waiting)
            helped.result()
            observer.refuse_non_finite(number - 1)
            waiting = deque(values.items())
            helped = worker.submit(observer.take, waiting)
        observer.take(waiting)
        helped.result()
        observer.refuse_non_finite(number)
    if number < 0:
        raise DataError(f"{samples.description}: there are no samples to calibrate with")
    return Observation(
        statistics={name: seen for name, seen in observer.seen.items() if seen.count},
        skipped=(*skipped, *observer.without_values()),
        samples=number + 1,
    )


class _Observer(Generic[Statistics]):
    """Takes in the tensors of one sample after another; threads may share the tensors of one sample."""

    def __init__(self, names: Sequence[str], statistics: Callable[[], Statistics]) -> None:
        self.seen = {name: statistics() for name in names}
        self._other_types: dict[str, str] = {}
        self._non_finite: dict[str, str] = {}

    def take(self, waiting: deque[tuple[str, Any]]) -> None:
        """Take in the tensors, by name, that no other thread has taken out of `waiting`."""
        while waiting:
            try:
                name, value = waiting.popleft()
            except IndexError:  # another thread took the last one
                return
            self._take_one(name, value)

    def _take_one(self, name: str, value: Any) -> None:
        if not isinstance(value, np.ndarray):  # an optional tensor without a value
            return
        if value.dtype.name not in FLOAT_TYPES:
            self._other_types[name] = f"its values are {value.dtype.name}: only floating-point tensors are quantized"
            return
        try:
            self.seen[name].add(value)
        except NonFiniteError as error:
            self._non_finite[name] = str(error)

    def refuse_non_finite(self, number: int) -> None:
        """Check that sample `number`, now taken in, was finite.

        Raises:
            DataError: names the first tensor that was not, in the order that was asked for.
        """
        for name in self.seen if self._non_finite else ():
            if name in self._non_finite:
                raise DataError(
                    f"tensor {name} is {self._non_finite[name]} in sample {number} (counted from 0): "
                    "leave that sample out, or repair the model"
                )

    def without_values(self) -> list[Skip]:
        """The tensors of which there is nothing to keep, and why."""
        return [
            Skip(name, self._other_types.get(name, "it has no values in any sample"))
            for name, seen in self.seen.items()
            if not seen.count
        ]


def _inference_threads() -> int:
    # One core is the worker's. With a thread for each core, onnxruntime's, which spin while they wait, and
    # the worker take turns: twice the time on two cores.
    return max(1, (os.cpu_count() or 1) - 1)


def _run(session: Session, feed: Feed, tensors: Sequence[str], number: int) -> dict[str, Array]:
    if not tensors:
        return {}
    try:
        return session.run_without_copies(feed, tensors)
    except GraphoptError as error:
        raise DataError(f"the model does not run on sample {number} (counted from 0): {error}") from error


def _unobservable(graph: gs.Graph, names: Sequence[str]) -> list[Skip]:
    """Those of `names` that cannot be outputs of the main graph, or hold nothing to calibrate."""
    read = {tensor.name: tensor for node in graph.nodes for tensor in node.inputs}  # constants are only read
    computed = {tensor.name: tensor for node in graph.nodes for tensor in node.outputs}
    tensors = read | computed | {tensor.name: tensor for tensor in graph.inputs}
    nested = {
        tensor.name for body in all_graphs(graph) if body is not graph for node in body.nodes for tensor in node.outputs
    }
    skips = (_why_not(name, tensors.get(name), name in nested) for name in dict.fromkeys(names))
    return [skip for skip in skips if skip is not None]


def _why_not(name: str, tensor: gs.Tensor | None, is_nested: bool) -> Skip | None:
    if tensor is None and is_nested:
        return Skip(name, "it is inside a branch or a body, where its values cannot be observed")
    if tensor is None:
        return Skip(name, "the graph has no tensor of that name")
    if is_constant(tensor):
        return Skip(name, "it is constant: its range is known without samples")
    return None
