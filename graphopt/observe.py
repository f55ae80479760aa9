"""Run a float model over samples and keep what its tensors looked like, in memory that does not grow with them.

Where the extremes are enough, the model gets ReduceMin and ReduceMax nodes and nothing else leaves it
(`graphopt.reductions`); two samples run at a time. Where the values themselves are asked for, threads share the work
(`graphopt.overlap`): one takes in the tensors of a sample while the other runs the model on the next one.

Two samples' tensors are alive at a time. Where these would pass the memory budget, the tensors are observed in
groups, with one run over the samples each. Small samples are joined into batches
where the model proves to give the same bits for a batch as for its samples one by one (`graphopt.batches`).

Tensors inside branches of Ifs and bodies of loops become tensors of the main graph of a copy
(`graphopt.nested_tensors`); a sample for which a branch is not taken has no values of its tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.batches import LARGEST_BATCH, Batch, batches, can_join, gives_the_same_bits
from graphopt.errors import DataError, GraphoptError
from graphopt.feeds import Feed, Samples, place_of, shapes_of
from graphopt.graph import Array, all_graphs, bodies, is_constant
from graphopt.histogram import FLOAT_TYPES, Extremes, NonFiniteError
from graphopt.model_io import Model
from graphopt.nested_tensors import NestedTensor, nested_tensors, with_nested_outputs
from graphopt.overlap import Overlap, in_order, not_finite
from graphopt.pass_base import MEMORY_BUDGET, Skip
from graphopt.progress import Progress, silent, track
from graphopt.reductions import Reduced, Reductions
from graphopt.runtime import open_session, release_free_memory
from graphopt.shapes import infer_shapes
from graphopt.sizes import is_typed_tensor, nbytes, numpy_dtype, tensors_at

Statistics = TypeVar("Statistics", bound=Extremes)

_SAMPLES_ALIVE = 2
_BATCH_NBYTES = 2**23  # of all tensors; samples of fewer are joined up to it


@dataclass(frozen=True, kw_only=True)
class Observation(Generic[Statistics]):
    """What was seen of each tensor that had values, and what could not be observed."""

    statistics: Mapping[str, Statistics]
    skipped: tuple[Skip, ...]
    samples: int
    notes: tuple[str, ...] = ()  # how the memory budget was kept


def observe(
    model: Model,
    tensors: Sequence[str],
    samples: Samples,
    statistics: Callable[[], Statistics],
    *,
    progress: Progress = silent,
    memory_budget: int = MEMORY_BUDGET,
) -> Observation[Statistics]:
    """Run `model` over all samples and collect the statistics of `tensors`.

    Args:
        model: a float model; it runs with onnxruntime's optimizations on.
        tensors: names of floating-point tensors of the main graph, inputs and outputs included, and of nested graphs,
            as in `nested_tensors`.
        samples: any number of them, of any shapes that the model takes.
        statistics: makes the empty statistics of one tensor: `Histogram`, or `Extremes` where they suffice.
        progress: told after every sample.
        memory_budget: bytes of observed tensors that may be alive at a time; with `Extremes` none are.

    Raises:
        DataError: there are no samples, the model does not run on one of them, or one gives a tensor a NaN or
            an infinity; the message says which.
        ModelError: onnxruntime cannot load the model.
    """
    first = next(iter(samples), None)
    if first is None:
        raise DataError(f"{samples.description}: there are no samples to calibrate with")
    inner = _typed_nested_tensors(model)
    skipped = _unobservable(model.graph, tensors, inner)
    left_out = {skip.where for skip in skipped}
    names = [name for name in dict.fromkeys(tensors) if name not in left_out]
    model, names, called = _with_nested(model, names, inner)
    sized = tensors_at(model.graph, shapes_of(first))
    release_free_memory()
    if statistics().needs_values:
        sizes = _nbytes(model, names, sized, first)
        found = _observe_values(model, sizes, samples, statistics, progress, memory_budget)
    else:
        found = _observe_extremes(model, _dtypes(names, sized), samples, statistics, progress)
    skipped += [
        Skip(called.get(name, name), found.other_types.get(name, "it has no values in any sample"))
        for name in names
        if name not in found.seen or not found.seen[name].count
    ]
    return Observation(
        statistics={
            called.get(name, name): found.seen[name] for name in names if name in found.seen and found.seen[name].count
        },
        skipped=tuple(skipped),
        samples=found.samples,
        notes=found.notes,
    )


@dataclass
class _Found(Generic[Statistics]):
    seen: dict[str, Statistics]
    samples: int
    other_types: dict[str, str]  # by tensor, why it is not observed
    notes: tuple[str, ...] = ()


def _observe_extremes(
    model: Model,
    dtypes: Mapping[str, np.dtype[Any] | None],
    samples: Samples,
    statistics: Callable[[], Statistics],
    progress: Progress,
) -> _Found[Statistics]:
    floats = {name: dtype for name, dtype in dtypes.items() if dtype is not None and dtype.name in FLOAT_TYPES}
    seen = {name: statistics() for name in floats}
    reductions = Reductions(model, floats, threads=_threads_of_a_run()) if floats else None
    release_free_memory(collect=False)

    def reduced(batch: Batch) -> tuple[str, Mapping[str, Reduced | NonFiniteError]]:
        (place,) = batch.places
        with _failing_at(place):
            return place, reductions.run(batch.feed) if reductions else {}

    count = 0
    what = f"calibrate {len(floats)} tensors"
    single = batches(track(samples, progress, what, samples.count), 1)
    for place, found in in_order(reduced, single, threads=_samples_at_a_time()):
        count += 1
        for name, each in found.items():
            if isinstance(each, NonFiniteError):
                raise DataError(not_finite(name, each, place, _advice(samples)))
            seen[name].add_extremes(each.minimum, each.maximum, each.count)
    other = {name: _of_another_type(dtype) for name, dtype in dtypes.items() if name not in floats}
    return _Found(seen, count, other)


def _observe_values(
    model: Model,
    sizes: Mapping[str, int],
    samples: Samples,
    statistics: Callable[[], Statistics],
    progress: Progress,
    memory_budget: int,
) -> _Found[Statistics]:
    groups = _groups(sizes, memory_budget // _SAMPLES_ALIVE)
    found = _Found[Statistics]({}, 0, {}, _notes(sizes, groups, memory_budget))
    for number, group in enumerate(groups, 1):
        run = f", run {number} of {len(groups)}" if len(groups) > 1 else ""
        one = sum(sizes[name] for name in group)
        runner = _Runner(model, group, found.other_types)
        size = runner.batch_size(samples, one)
        what = f"calibrate {len(group)} tensors, {_SAMPLES_ALIVE * size * one / 2**20:.0f} MiB{run}"
        release_free_memory(collect=False)
        with Overlap(
            runner.run,
            statistics,
            group,
            advice=_advice(samples),
            threads=_samples_at_a_time(),
            alive=_SAMPLES_ALIVE,
        ) as overlap:
            for batch in batches(track(samples, progress, what, samples.count), size):
                overlap.put(batch)
                found.samples = batch.number + len(batch.places)
            found.seen |= overlap.result()
    return found


class _Runner:
    """Runs the model for the values of some of its tensors."""

    def __init__(self, model: Model, tensors: Sequence[str], other_types: dict[str, str]) -> None:
        inputs = {tensor.name for tensor in model.graph.inputs}
        self._inputs = [name for name in tensors if name in inputs]
        self._computed = [name for name in tensors if name not in inputs]
        self._other_types = other_types
        self._has_bodies = any(bodies(node) for node in model.graph.nodes)
        self._session = open_session(
            model, threads=_threads_of_a_run(), extra_outputs=self._computed, plan_memory=False
        )

    def batch_size(self, samples: Samples, nbytes: int) -> int:
        """How many samples to join, when one of them has `nbytes` in the tensors."""
        size = min(LARGEST_BATCH, _BATCH_NBYTES // max(nbytes, 1))
        if size < 2 or not self._computed or self._has_bodies or not can_join(self._session.inputs):
            return 1  # a batch would take one branch for all its samples
        feeds = list(islice(samples, size))
        return size if len(feeds) > 1 and gives_the_same_bits(self._session, feeds, self._computed) else 1

    def run(self, batch: Batch) -> dict[str, Array]:
        """The floating-point tensors that have a value.

        Raises:
            DataError: the model does not run on the batch.
        """
        values: dict[str, Any] = {}
        if self._computed:
            with _failing_at(batch.places[0]):
                values = self._session.run_without_copies(batch.feed, self._computed)
        values.update((name, batch.feed[name]) for name in self._inputs if name in batch.feed)
        floats = {}
        for name, value in values.items():
            if isinstance(value, np.ndarray) and value.dtype.name in FLOAT_TYPES:
                floats[name] = value
            elif isinstance(value, np.ndarray):
                self._other_types[name] = _of_another_type(value.dtype)
        return floats


def _advice(samples: Samples) -> str:
    """What to do about a sample in which a tensor is not finite."""
    if samples.synthetic:
        return "the inputs were made up, so give real ones (--data)"
    return "leave that sample out, or repair the model"


def _samples_at_a_time() -> int:
    """How many samples run at the same time: two threads of one sample each wait less than one sample's two do."""
    return min(_SAMPLES_ALIVE, os.cpu_count() or 1)


def _threads_of_a_run() -> int:
    """Samples that run at the same time share these; a thread for each core besides would only wait."""
    return max(1, (os.cpu_count() or 1) - 1)


@contextmanager
def _failing_at(place: str) -> Iterator[None]:
    try:
        yield
    except GraphoptError as error:
        raise DataError(f"the model does not run on {place}: {error}") from error


def _dtypes(names: Sequence[str], sized: Mapping[str, gs.Tensor]) -> dict[str, np.dtype[Any] | None]:
    return {name: numpy_dtype(sized[name].dtype) if is_typed_tensor(sized[name]) else None for name in names}


def _of_another_type(dtype: np.dtype[Any] | None) -> str:
    if dtype is None:
        return "its type is unknown to ONNX shape inference"
    return f"its values are {dtype.name}: only floating-point tensors are quantized"


def _nbytes(model: Model, names: Sequence[str], sized: Mapping[str, gs.Tensor], feed: Feed) -> dict[str, int]:
    """The bytes of each tensor on one feed: as inferred, or else as counted in one run of the model."""
    found = {name: nbytes(sized[name]) for name in names}
    dtypes = _dtypes(names, sized)
    uncounted = {
        name: dtype
        for name, dtype in dtypes.items()
        if dtype is not None and dtype.name in FLOAT_TYPES and found[name] is None
    }
    if uncounted:
        with _failing_at(place_of(feed, 0)):
            counted = Reductions(model, uncounted).run(feed)
        for name, reduced in counted.items():
            found[name] = 0 if isinstance(reduced, NonFiniteError) else reduced.count * uncounted[name].itemsize
    return {name: count or 0 for name, count in found.items()}


def _notes(sizes: Mapping[str, int], groups: Sequence[Sequence[str]], memory_budget: int) -> tuple[str, ...]:
    if len(groups) == 1:
        return ()
    largest = max(sum(sizes[name] for name in group) for group in groups) * _SAMPLES_ALIVE
    note = (
        f"the samples ran {len(groups)} times, for a group of tensors each, to keep to "
        f"{memory_budget / 2**20:.0f} MiB of activations"
    )
    if largest > memory_budget:
        return (f"{note}; the largest tensor alone took {largest / 2**20:.0f} MiB",)
    return (note,)


def _groups(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """The tensors in groups of at most `most` bytes each; a larger tensor is a group of its own."""
    groups: list[list[str]] = []
    total = 0
    for name, size in sizes.items():
        if not groups or total + size > most:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    return groups or [[]]


def _typed_nested_tensors(model: Model) -> dict[str, NestedTensor]:
    """Those of a copy whose types are inferred: an If needs the type of what its other branch gives."""
    if not any(bodies(node) for node in model.graph.nodes):
        return {}
    typed = model.copy()
    infer_shapes(typed.graph)
    return nested_tensors(typed.graph)


def _with_nested(
    model: Model, names: Sequence[str], inner: Mapping[str, NestedTensor]
) -> tuple[Model, list[str], dict[str, str]]:
    """A model whose main graph has all tensors, what they are called there, and by that the names asked for."""
    main = {tensor.name for node in model.graph.nodes for tensor in (*node.inputs, *node.outputs)}
    main.update(tensor.name for tensor in model.graph.inputs)
    dtypes = {name: numpy_dtype(inner[name].tensor.dtype) for name in names if name not in main}
    if not dtypes:
        return model, list(names), {}
    model, outer = with_nested_outputs(model, dtypes)
    return model, [outer.get(name, name) for name in names], {outside: name for name, outside in outer.items()}


def _unobservable(graph: gs.Graph, names: Sequence[str], inner: Mapping[str, NestedTensor]) -> list[Skip]:
    """Those of `names` that cannot be outputs of the main graph, or hold nothing to calibrate."""
    read = {tensor.name: tensor for node in graph.nodes for tensor in node.inputs}  # constants are only read
    computed = {tensor.name: tensor for node in graph.nodes for tensor in node.outputs}
    tensors = read | computed | {tensor.name: tensor for tensor in graph.inputs}
    nested = {
        tensor.name for body in all_graphs(graph) if body is not graph for node in body.nodes for tensor in node.outputs
    }
    reasons = {
        name: _why_not(tensors[name])
        if name in tensors
        else _why_not_nested(inner[name])
        if name in inner
        else _why_not_found(name in nested, any(key.endswith(f"/{name}") for key in inner))
        for name in dict.fromkeys(names)
    }
    return [Skip(name, reason) for name, reason in reasons.items() if reason is not None]


def _why_not(tensor: gs.Tensor) -> str | None:
    return "it is constant: its range is known without samples" if is_constant(tensor) else None


def _why_not_nested(nested: NestedTensor) -> str | None:
    tensor = nested.tensor
    dtype = numpy_dtype(tensor.dtype) if is_typed_tensor(tensor) else None
    if dtype is None or dtype.name not in FLOAT_TYPES:
        return _of_another_type(dtype)
    return _why_not(tensor) or nested.why_not_given


def _why_not_found(is_nested: bool, is_ambiguous: bool) -> str:
    if is_ambiguous:
        return "more than one nested graph has a tensor of that name: say which, as If/then_branch/name"
    if is_nested:
        return "it is in a graph of another operator than If, Loop and Scan, where nothing is observed"
    return "the graph has no tensor of that name"
