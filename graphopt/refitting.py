"""Refit the linear operators of a cut graph, one after another, to what the original computes at the same places.

After channels are removed, an operator reads fewer channels and, behind others that were cut, slightly wrong ones. Its
weight and bias are chosen anew so that its output comes closest to the original's, on rows of data (`graphopt.patches`)
by least squares (`graphopt.least_squares`). The operators are taken in topological order and each reads what those
before it, set already, hand on, so that it makes up for their errors too. Which operators, and what each should come
to: `graphopt.refit_operators`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.cut import Cut
from graphopt.feeds import Samples
from graphopt.graph import Array, Names, constant_of, is_constant
from graphopt.held_out import is_held_out
from graphopt.least_squares import Affinity, Moments
from graphopt.pass_base import Context
from graphopt.progress import track
from graphopt.refit_operators import Operator, operators_to_refit
from graphopt.replay import Piece, Replay

_EXACT = 1e-9  # of the target's variance


@dataclass(frozen=True)
class Evidence:
    """What is known of one operator: the map it has now, and sums over the samples to fit and to judge with."""

    now: Affinity
    fit: Moments
    judge: Moments

    @property
    def is_exact(self) -> bool:
        """Whether the operator computes what it should, but for rounding."""
        return self.judge.error(self.now) <= _EXACT * self.judge.power()

    @property
    def is_finite(self) -> bool:
        """Whether all rows were numbers."""
        return self.fit.finite and self.judge.finite


Rule = Callable[[Evidence], Affinity]


@dataclass(frozen=True)
class Data:
    """The samples that operators are refitted on.

    Attributes:
        samples: feeds of the model.
        count: how many there are.
        rows: how many rows of one operator's input and output to take at most, over all samples.
        seed: draws them.
    """

    samples: Samples
    count: int
    rows: int
    seed: int


def refit(
    graph: gs.Graph,
    cut: Cut,
    data: Data,
    rule: Rule,
    context: Context,
    what: str,
) -> dict[str, Affinity]:
    """Set each operator of `graph` in turn to what `rule` makes of the evidence; return the new maps by its output.

    A rule that returns the map that it was given leaves the operator alone. An operator that computes what it should
    already, or that sees a NaN or an infinity, is left alone too.

    Raises:
        DataError: one of the graphs does not run on a sample.
        ModelError: onnxruntime cannot load a part of one.
    """
    operators, _ = operators_to_refit(graph, cut, context)
    replay = Replay((graph, cut.original), context.frame, data.samples, data.count, context.memory_budget // 2)
    names = Names(graph)
    changed: dict[str, Affinity] = {}
    for operator in track(operators, context.progress, what, len(operators)):
        evidence = _evidence(operator, replay, cut, data)
        if evidence.is_exact or not evidence.is_finite:
            continue
        chosen = rule(evidence)
        if chosen is not evidence.now and operator.set(graph, chosen, names):
            changed[operator.output] = chosen
    return changed


def _evidence(operator: Operator, replay: Replay, cut: Cut, data: Data) -> Evidence:
    sizes = operator.patches.groups, operator.patches.features, operator.patches.outputs
    evidence = Evidence(operator.affinity(), Moments(*sizes), Moments(*sizes))
    random = np.random.default_rng(data.seed)
    most = -(-data.rows // data.count)
    computed = [tensor.name for tensor in operator.others if not is_constant(tensor)]
    here = Piece(operator.node, [operator.reads, *computed])
    there = Piece(operator.original, [operator.target])
    for index, (now, before) in enumerate(replay.run(here, there)):
        target = _kept(before[operator.target], cut, operator.target)
        for tensor in operator.others:
            target = target - (now[tensor.name] if tensor.name in now else np.asarray(constant_of(tensor)))
        sums = evidence.judge if is_held_out(index) else evidence.fit
        for x, y in operator.patches.rows(now[operator.reads], target, most, random):
            sums.add(x, y)
    return evidence


def _kept(value: Array, cut: Cut, name: str) -> Array:
    """The positions of the original's tensor `name` that the cut graph still has."""
    for axis, positions in enumerate(cut.kept.get(name, ())):
        if positions is not None:
            value = np.take(value, positions, axis)
    return value
