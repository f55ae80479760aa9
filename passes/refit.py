"""Make up for removed channels without training: new weights and biases from data, each step kept only if it helps.

Three steps, each of which sets one operator after another (`graphopt.refitting`), from the cheapest on:

    absorb   b + mean(y - W x): what the removed channels gave on average goes into the bias
    refit    W and b by ridge least squares, with the strength that is best on held-out rows, or none where none helps
    match    W and b scaled and shifted so that each channel has the mean and the variance of its target

Every fourth sample is held out. A step is kept where the error of the graph's outputs on these falls: the noise over
the signal, as in SQNR, averaged over the outputs. Fitting the consumers after a cut by least squares is the method of
He, Zhang and Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", arXiv:1707.06168; here all operators
behind a cut are refitted, sums of residual branches included, and the samples need no labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

import onnx_graphsurgeon as gs

from graphopt.cut import Cut
from graphopt.errors import PipelineError
from graphopt.feeds import Samples
from graphopt.graph import Names
from graphopt.graph_copy import copy_graph
from graphopt.held_out import HELD_OUT, Judge, count_of, percent
from graphopt.least_squares import Affinity
from graphopt.made_up import made_up_samples
from graphopt.model_io import Model
from graphopt.pass_base import Context, Effect, Pass, PassResult
from graphopt.refit_operators import Operator, operators_to_refit
from graphopt.refitting import Data, Evidence, Rule, refit
from graphopt.runtime import open_session

_FEW = 32  # samples; fewer say little about what held-out ones will need
_ROWS_FOR_MEANS = 2**12
_MOST_SCALED = 2.0


class Step(Enum):
    """A step of the ladder; the module docstring has the formulas."""

    ABSORB = "absorb"
    REFIT = "refit"
    MATCH = "match"


@dataclass(frozen=True, kw_only=True)
class Refit(Pass):
    """Fit the weights and biases of a cut graph to the outputs that the original has, operator by operator."""

    name: ClassVar[str] = "refit"
    effect: ClassVar[Effect] = Effect.LOSSY

    steps: tuple[Step, ...] = field(default=tuple(Step), metadata={"help": "what to try, in this order"})
    samples: int = field(default=256, metadata={"help": "how many samples to use at most; a quarter is held out"})
    rows: int = field(
        default=2**15, metadata={"help": "how many positions of each operator to fit at most, over all samples"}
    )
    ridges: tuple[float, ...] = field(
        default=(1e-3, 1e-2, 1e-1, 1.0, 10.0),
        metadata={"help": "strengths, over the mean variance of the inputs, of the pull towards the weights before"},
    )

    def __post_init__(self) -> None:
        if not self.steps:
            raise PipelineError(f"refit:steps must be one or more of {', '.join(step.value for step in Step)}")
        if self.samples < HELD_OUT:
            raise PipelineError(f"refit:samples must be at least {HELD_OUT}, not {self.samples}")
        if self.rows < 1:
            raise PipelineError(f"refit:rows must be at least 1, not {self.rows}")
        if not self.ridges or not all(ridge > 0 for ridge in self.ridges):
            raise PipelineError(f"refit:ridges must be one or more numbers above 0, not {self.ridges}")

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Set weights and biases; reads `context.cut`.

        Raises:
            PipelineError: no channels were cut before.
            DataError: there are too few samples, or one that a graph does not run on.
        """
        cut = context.cut
        if cut is None:
            raise PipelineError("refit makes up for removed channels: put prune before it")
        context.infer_shapes(graph)
        operators, skipped = operators_to_refit(graph, cut, context)
        if not operators:
            return PassResult(skipped=tuple(skipped))
        samples, count = self._samples(cut, context)
        ladder = _Ladder(graph, cut, context, samples, count, max(each.nbytes for each in operators))
        for step in self.steps:
            ladder.climb(step.value, *self._rule_and_rows(step))
        changed = _set(graph, operators, ladder.maps)
        return PassResult(
            rewrites=changed,
            skipped=tuple(skipped),
            parts={"operators": changed, "samples": count},
            notes=(*ladder.lines, ladder.memory),
            warnings=_warnings(samples, count),
        )

    def _samples(self, cut: Cut, context: Context) -> tuple[Samples, int]:
        if context.samples is None:
            session = open_session(Model(cut.original, context.frame))
            return made_up_samples(session, cut.original, count=self.samples, seed=context.seed), self.samples
        samples = context.samples.first(self.samples)
        return samples, count_of(samples, self.name)

    def _rule_and_rows(self, step: Step) -> tuple[Rule, int]:
        if step is Step.ABSORB:
            return _absorbed, min(self.rows, _ROWS_FOR_MEANS)
        return (self._refitted if step is Step.REFIT else _matched), self.rows

    def _refitted(self, evidence: Evidence) -> Affinity:
        """The best on held-out rows of: nothing new, the means matched, a fit with each of the ridges."""
        fit, judge = evidence.fit, evidence.judge
        maps = [fit.means_matched(evidence.now), *(fit.ridge(evidence.now, ridge) for ridge in self.ridges)]
        best = min((each for each in maps if each.finite), key=judge.error, default=evidence.now)
        return best if judge.error(best) < judge.error(evidence.now) else evidence.now


def _absorbed(evidence: Evidence) -> Affinity:
    return evidence.fit.means_matched(evidence.now)


def _matched(evidence: Evidence) -> Affinity:
    return evidence.fit.variances_matched(evidence.now, _MOST_SCALED)


class _Ladder:
    """The steps that were taken, and the best weights so far."""

    def __init__(self, graph: gs.Graph, cut: Cut, context: Context, samples: Samples, count: int, largest: int) -> None:
        self.maps: Mapping[str, Affinity] = {}
        self._graph, self._cut, self._context = graph, cut, context
        self._samples, self._count = samples, count
        self._judge = Judge(open_session(Model(cut.original, context.frame)), samples)
        self._error = self._judge.error(open_session(Model(graph, context.frame)))
        self._announced = f"up to {(largest + context.memory_budget // 2) / 2**20:.0f} MiB"
        self.memory = (
            f"memory: up to {largest / 2**20:.0f} MiB of sums, and up to {context.memory_budget / 2**21:.0f} MiB of "
            "activations between operators"
        )
        self.lines = [f"error on {count // HELD_OUT} held-out samples: cut alone {percent(self._error)}"]

    def climb(self, step: str, rule: Rule, rows: int) -> None:
        """Take a step from the best weights so far, and keep it where the held-out error falls."""
        trial = copy_graph(self._graph)
        context = self._context
        data = Data(self._samples, self._count, rows, context.seed)
        maps = refit(trial, self._cut, data, rule, context, f"{step}, {self._announced}")
        error = self._judge.error(open_session(Model(trial, context.frame))) if maps else self._error
        is_kept = error < self._error
        self.lines.append(f"{step}: {percent(error)}, {'kept' if is_kept else 'not kept'}")
        if is_kept:
            self._graph, self._error, self.maps = trial, error, {**self.maps, **maps}


def _set(graph: gs.Graph, operators: list[Operator], maps: Mapping[str, Affinity]) -> int:
    names = Names(graph)
    chosen = [(each, maps[each.output]) for each in operators if each.output in maps]
    return sum(operator.set(graph, fitted, names) for operator, fitted in chosen)


def _warnings(samples: Samples, count: int) -> tuple[str, ...]:
    if samples.synthetic:
        return ("refit used made-up inputs: the weights fit noise, not data; give --data",)
    if count < _FEW:
        return (f"refit had only {count} samples; from {_FEW} on the weights fit more than these",)
    return ()
