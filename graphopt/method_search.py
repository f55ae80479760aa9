"""Which calibration method suits a model: the one with which its quantized outputs are closest to the float ones.

No rule about single tensors tells how their errors meet in the outputs. All methods but two choose from the same
histograms, so each one costs a quantized copy of the graph and a run over a few samples, and no calibration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_graphsurgeon as gs

from graphopt.feeds import Feed, Samples
from graphopt.graph_copy import copy_graph
from graphopt.held_out import decibels, noise_to_signal
from graphopt.model_io import Model
from graphopt.pass_base import Context, Pass
from graphopt.progress import track
from graphopt.ranges import Ranges
from graphopt.runtime import Session, arrays_in, open_session
from graphopt.thresholds import Method

CANDIDATES = (Method.MSE, Method.AUTO, Method.MINMAX, Method.PERCENTILE, Method.ENTROPY)
"""The first is the one where no other is better."""

SAMPLES = 32
"""At most so many, that models are compared on."""


_KEPT = 1 << 28  # bytes of outputs of the float graph; those beyond are computed again for each method


@dataclass(frozen=True)
class Found:
    """The ranges of the best method, and the error of each, as in `graphopt.held_out`; NaN where nothing compares."""

    ranges: Ranges
    errors: dict[Method, float]

    def __str__(self) -> str:
        by_method = ", ".join(f"{method.value} {decibels(error)}" for method, error in self.errors.items())
        chosen = self.ranges.method
        assert chosen is not None
        return f"search took {chosen.value}: SQNR of the outputs, quantized by {by_method}"


def search(graph: gs.Graph, ranges: Ranges, feeds: Sequence[Feed], context: Context, quantize: Pass) -> Found:
    """Quantize copies of a float graph for `context.target` with the ranges of each method, and compare.

    Args:
        graph: stays as it is; its shapes are inferred.
        ranges: with histograms.
        feeds: what it is run on.
        context: its target and progress.
        quantize: the pass that puts ranges into a graph.

    Raises:
        DataError: a feed does not fit.
        ModelError: onnxruntime cannot load or run a graph.
    """
    samples = Samples(lambda: iter(feeds), ranges.source, len(feeds))
    reference = _Once(open_session(Model(graph, context.frame)))
    found: list[tuple[Ranges, float]] = []
    for method in track(CANDIDATES, context.progress, "comparing methods", len(CANDIDATES)):
        candidate = ranges.rechosen(method, percent=ranges.percent, target=context.target)
        copy = copy_graph(graph)
        quantize.apply(copy, Context(target=context.target, frame=context.frame, ranges=candidate))
        session = open_session(Model(copy, context.frame), exact=not context.target.runs_here)
        found.append((candidate, noise_to_signal(reference, session, samples)))
    best, _ = min(found, key=lambda each: math.inf if math.isnan(each[1]) else each[1])
    return Found(best, dict(zip(CANDIDATES, (error for _, error in found), strict=True)))


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
