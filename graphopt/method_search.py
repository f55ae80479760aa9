"""Which calibration method suits a model: the one with which its quantized outputs are closest to the float ones.

No rule about single tensors tells how their errors meet in the outputs. All methods but two choose from the same
histograms, so each one costs a quantized copy of the graph and a run over a few samples, and no calibration.

The scales of weights (`graphopt.weight_scales`) are compared with those that just cover them in the same way.

Then single tensors are given the range of another method, those first on which the methods differ most, and half of
their own, those first whose range is the largest multiple of their root mean square. That is kept where it brings the
outputs closer on sample after sample: a gain that may be chance (one-sided t-test on the logarithms of the errors) is
none, for outputs of a few numbers round one way on these samples and another way on the next.

For the same reason, more samples are compared than ranges need, where they cost little: of nets with ten outputs, 32
samples prefer another method than 128 do, whose choice holds on other data (docs/calibration.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import fmean, stdev
from typing import Any

import onnx_graphsurgeon as gs

from graphopt.feeds import Feed, Samples
from graphopt.graph_copy import copy_graph
from graphopt.held_out import decibels, noise_by_output, noise_to_signal
from graphopt.model_io import Model
from graphopt.pass_base import Context, Pass
from graphopt.progress import silent, track
from graphopt.ranges import Ranges, TensorRange
from graphopt.runtime import Session, arrays_in, open_session
from graphopt.thresholds import Method

CANDIDATES = (Method.MSE, Method.AUTO, Method.MINMAX, Method.PERCENTILE, Method.ENTROPY)
"""The first is the one where no other is better."""

LEAST_SAMPLES = 32
MOST_SAMPLES = 256
"""So many samples models are compared on, if there are; more than the least where they are small: `samples_worth`."""

EXCHANGES = 64
"""At most so many times a tensor is given another method's range, and half of its own."""

_FUTILE = 20  # tries in a row that bring nothing end the rest
_VALUES = 1 << 29  # of tensors that are quantized; samples of fewer in all are many
_TRIED_ON = 64  # samples at most
_TELLING = 4  # samples; fewer tell nothing of chance
_REVIEWS = (4, 8, 16, 32)  # numbers of samples after which a gain that is not likely any more is given up
_EARLY_REVIEW = 2  # where samples are few, or large
_LEAST_GAIN = 0.01  # of the logarithm of the error
_LEAST_T = 3.0  # chance exceeds it in one case of 100 with 8 samples, of 500 with 64
_SAME = 0.05  # ranges whose ends differ by less together, relative to the larger magnitude

_KEPT = 1 << 28  # bytes of outputs of the float graph; those beyond are computed again for each method


@dataclass(frozen=True)
class Found:
    """The ranges that were found, the method that most have, and errors as in `graphopt.held_out`.

    Attributes:
        ranges: of all tensors.
        errors: of each method alone; NaN where nothing compares.
        exchanged: how many tensors have another range.
        error: of `ranges`.
    """

    ranges: Ranges
    errors: dict[Method, float]
    exchanged: int
    error: float

    def __str__(self) -> str:
        by_method = ", ".join(f"{method.value} {decibels(error)}" for method, error in self.errors.items())
        chosen = self.ranges.method
        assert chosen is not None
        text = f"search took {chosen.value}: SQNR of the outputs, quantized by {by_method}"
        changes = ["scales that cover the weights"] if self.ranges.covering_weights else []
        changes += [f"other ranges for {self.exchanged} tensors"] if self.exchanged else []
        return f"{text}; {decibels(self.error)} with {' and '.join(changes)}" if changes else text


def samples_worth(values: float) -> int:
    """How many samples to compare models on, where each has so many values in the tensors that are quantized."""
    return min(MOST_SAMPLES, max(LEAST_SAMPLES, int(_VALUES / max(values, 1))))


def search(graph: gs.Graph, ranges: Ranges, feeds: Sequence[Feed], context: Context, quantize: Pass) -> Found:
    """Quantize copies of a float graph for `context.target` with the ranges of each method, and compare.

    Args:
        graph: stays as it is; its shapes are inferred.
        ranges: with histograms.
        feeds: what it is run on.
        context: of the pipeline; what `quantize` would ask for each copy anew should be known in it.
        quantize: the pass that puts ranges into a graph.

    Raises:
        DataError: a feed does not fit.
        ModelError: onnxruntime cannot load or run a graph.
    """
    comparing = _Comparing(graph, feeds, ranges.source, context, quantize)
    by_method: dict[Method, Ranges] = {}
    errors: dict[Method, float] = {}
    for method in track(CANDIDATES, context.progress, "comparing methods", len(CANDIDATES)):
        by_method[method] = ranges.rechosen(method, percent=ranges.percent, target=context.target)
        errors[method] = comparing.error(by_method[method])
    best_first = sorted(CANDIDATES, key=lambda method: math.inf if math.isnan(errors[method]) else errors[method])
    error = errors[best_first[0]]
    if (covering := comparing.error(replace(by_method[best_first[0]], covering_weights=True))) < error:
        by_method = {method: replace(found, covering_weights=True) for method, found in by_method.items()}
        error = covering
    best = by_method[best_first[0]]
    mixed = _exchange(comparing, [by_method[method] for method in best_first], context)
    exchanged = sum(mixed.tensors[name] is not found for name, found in best.tensors.items())
    if exchanged and (closer := comparing.error(mixed)) < error:
        return Found(mixed, errors, exchanged, closer)
    return Found(best, errors, 0, error)


class _Comparing:
    """A float graph, and how far quantized copies of it are from it."""

    def __init__(self, graph: gs.Graph, feeds: Sequence[Feed], source: str, context: Context, quantize: Pass) -> None:
        self.feeds = feeds
        self._graph = graph
        self._source = source
        self._context = context
        self._quantize = quantize
        self._reference = _Once(open_session(Model(graph, context.frame)))

    def error(self, ranges: Ranges) -> float:
        """`noise_to_signal` on all feeds."""
        return noise_to_signal(self._reference, self._session(ranges), self._samples(self.feeds))

    def errors(self, ranges: Ranges) -> Iterator[list[float]]:
        """`noise_by_output` on each of the feeds that exchanges are tried on."""
        session = self._session(ranges)
        for feed in self.feeds[:_TRIED_ON]:
            yield noise_by_output(self._reference, session, self._samples([feed]))

    def _session(self, ranges: Ranges) -> Session:
        context, copy = self._context, copy_graph(self._graph)
        self._quantize.apply(copy, replace(context, ranges=ranges, progress=silent))
        return open_session(Model(copy, context.frame), exact=not context.target.runs_here)

    def _samples(self, feeds: Sequence[Feed]) -> Samples:
        return Samples(lambda: iter(feeds), self._source, len(feeds))


def _exchange(comparing: _Comparing, best_first: Sequence[Ranges], context: Context) -> Ranges:
    """The first of some ranges, with another one's or half of its own where the outputs are surely closer with it."""
    current = best_first[0]
    if len(comparing.feeds) < _TELLING:
        return current
    errors = list(comparing.errors(current))
    if not all(map(_compares, errors)):
        return current
    for what, candidates in ("exchanging ranges", _contested(best_first)), ("halving ranges", _halved(current)):
        tried = list(islice(candidates, EXCHANGES))
        in_vain = 0
        for name, other in track(tried, context.progress, what, len(tried)):
            trial = replace(current, tensors={**current.tensors, name: other})
            if (found := _if_smaller(comparing.errors(trial), errors)) is not None:
                current, errors, in_vain = trial, found, 0
            elif (in_vain := in_vain + 1) == _FUTILE:
                break
    return current


def _halved(ranges: Ranges) -> Iterator[tuple[str, TensorRange]]:
    """Tensors with half of their range, those first that have the largest range for their root mean square."""

    def reach(name: str) -> float:
        found = ranges.tensors[name]
        largest = max(-found.minimum, found.maximum)
        return largest / math.sqrt(found.second_moment) if found.second_moment else 0.0

    for name in sorted(ranges.tensors, key=lambda name: (-reach(name), name)):
        found = ranges.tensors[name]
        half = f"half of {found.method}"
        yield name, replace(found, minimum=found.minimum / 2, maximum=found.maximum / 2, method=half)


def _contested(best_first: Sequence[Ranges]) -> Iterator[tuple[str, TensorRange]]:
    """Tensors with a range that differs from that in the first ranges, those first on which they differ most."""
    distinct: list[tuple[float, str, list[TensorRange]]] = []
    for name, own in best_first[0].tensors.items():
        others: list[TensorRange] = []
        for ranges in best_first[1:]:
            other = ranges.tensors[name]
            if all(_difference(other, each) > _SAME for each in (own, *others)):
                others.append(other)
        if others:
            distinct.append((max(_difference(own, other) for other in others), name, others))
    for _, name, others in sorted(distinct, key=lambda each: (-each[0], each[1])):
        for other in others:
            yield name, other


def _difference(one: TensorRange, other: TensorRange) -> float:
    """By how much both ends differ together, relative to the largest of all magnitudes."""
    largest = max(map(abs, (one.minimum, one.maximum, other.minimum, other.maximum)))
    return (abs(one.minimum - other.minimum) + abs(one.maximum - other.maximum)) / largest if largest else 0.0


def _if_smaller(found: Iterator[list[float]], errors: Sequence[list[float]]) -> list[list[float]] | None:
    """The errors found, where they are surely smaller than `errors` sample by sample; read no further than needed.

    The gain on a sample is the mean logarithm over its outputs: each counts alike, whatever its error is.
    """
    smaller: list[list[float]] = []
    gains: list[float] = []
    reviews = _REVIEWS if len(errors) > LEAST_SAMPLES else (_EARLY_REVIEW, *_REVIEWS)
    for after, before in zip(found, errors, strict=True):
        if not _compares(after):
            return None
        smaller.append(after)
        gains.append(fmean(math.log(old / new) for old, new in zip(before, after, strict=True)))
        if len(gains) in reviews and fmean(gains) + _standard_error(gains) < _LEAST_GAIN:
            return None
    return smaller if fmean(gains) >= max(_LEAST_GAIN, _LEAST_T * _standard_error(gains)) else None


def _standard_error(gains: Sequence[float]) -> float:
    """Of their mean."""
    return stdev(gains) / math.sqrt(len(gains))


def _compares(errors: Sequence[float]) -> bool:
    """Whether there are errors, and logarithms of them."""
    return bool(errors) and all(0 < error < math.inf for error in errors)


class _Once:
    """A session that remembers what it returned for a feed, as long as the feed is there."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._kept: dict[int, dict[str, Any]] = {}  # by id of the feed
        self._left = _KEPT
        self.outputs = session.outputs

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> dict[str, Any]:
        if (found := self._kept.get(id(feed))) is None:
            found = self._session.run(feed, outputs)
            self._left -= sum(array.nbytes for value in found.values() for array in arrays_in(value))
            if self._left >= 0:
                self._kept[id(feed)] = found
        return found
