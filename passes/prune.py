"""Remove channels: whole units of channel groups, so that every tensor of the graph stays rectangular and smaller.

Which positions go together: `graphopt.channels`; how much they matter: `graphopt.channel_importance`; how many go:
`graphopt.channel_choice`; how the graph is cut: `graphopt.channel_removal`. The outputs are those of the graph with
zeros in place of what was removed, where it is read (except behind means over removed channels, such as those of
LayerNormalization). `refit` behind it recovers accuracy without training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.absorption import absorb
from graphopt.channel_choice import (
    Gone,
    Limits,
    Scope,
    eligible_groups,
    factors_cut_elsewhere,
    given_back,
    least_important,
    within_budget,
)
from graphopt.channel_groups import ChannelGroups, Group
from graphopt.channel_importance import Importance, Reduce, Scores, score_units, within_groups
from graphopt.channel_removal import composed, remove_units
from graphopt.channel_sensitivity import sensitivities
from graphopt.channel_statistics import ChannelStatistics, LastAxisStatistics
from graphopt.channels import find_groups
from graphopt.dead_channels import dead_units
from graphopt.errors import PipelineError
from graphopt.feeds import Samples
from graphopt.made_up import made_up_samples
from graphopt.model_io import Model
from graphopt.observe import observe
from graphopt.pass_base import Context, Effect, Pass, PassResult, Skip
from graphopt.runtime import measure_latency, open_session
from graphopt.shapes import infer_shapes

_BUDGETS = ("ratio", "macs", "params", "latency")
_LATENCY_TRIES = 6
_NESTED = "it is in a branch or a body, where channels are not followed"
_ONE_BUDGET = f"prune needs exactly one of {', '.join(_BUDGETS)}, such as prune:macs=0.7, or dead=true"


@dataclass(frozen=True, kw_only=True)
class Prune(Pass):
    """Remove the least important channels, by a share of them or by a budget; `refit` behind it recovers accuracy."""

    name: ClassVar[str] = "prune"
    effect: ClassVar[Effect] = Effect.LOSSY

    ratio: float | None = field(default=None, metadata={"help": "the share of channels to remove"})
    macs: float | None = field(default=None, metadata={"help": "the share of MACs to keep at most"})
    params: float | None = field(default=None, metadata={"help": "the share of parameters to keep at most"})
    latency: float | None = field(
        default=None, metadata={"help": "the share of latency to keep at most, measured in onnxruntime on this machine"}
    )
    importance: Importance = field(default=Importance.L2, metadata={"help": "what tells how much a channel matters"})
    reduce: Reduce = field(default=Reduce.MEAN, metadata={"help": "how the members of a group are combined"})
    scope: Scope = field(default=Scope.LOCAL, metadata={"help": "the same share of each group, or the least of all"})
    round_to: int = field(
        default=0, metadata={"help": "keep a multiple of it; 0: what the target likes, less for small groups"}
    )
    max_ratio: float = field(default=0.9, metadata={"help": "remove at most this share of a group"})
    exclude: tuple[str, ...] = field(default=(), metadata={"help": "patterns of groups to leave alone, such as *head*"})
    dead: bool = field(
        default=False,
        metadata={
            "help": "channels that are constant, read with zeros or equal to another one first; alone: only those"
        },
    )
    steps: int = field(default=1, metadata={"help": "remove in so many steps, measuring importance anew before each"})
    seed: int = field(default=0, metadata={"help": "for random importance"})

    def __post_init__(self) -> None:
        given = {name: value for name in _BUDGETS if (value := getattr(self, name)) is not None}
        if len(given) > 1:
            raise PipelineError(_ONE_BUDGET)
        for name, value in given.items():
            if not 0 < value < 1:
                raise PipelineError(f"prune:{name} must be above 0 and below 1, not {value}")
        if not 0 < self.max_ratio <= 1:
            raise PipelineError(f"prune:max_ratio must be above 0 and at most 1, not {self.max_ratio}")
        if self.round_to < 0 or self.steps < 1:
            raise PipelineError("prune:round_to must be at least 0 and prune:steps at least 1")

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Cut `graph`, and leave what was cut in `context.cut`.

        Raises:
            PipelineError: there is no budget, or it cannot be met.
            DataError: a sample does not fit the model.
            ModelError: shape inference refuses the graph.
        """
        if not self.dead and all(getattr(self, name) is None for name in _BUDGETS):
            raise PipelineError(_ONE_BUDGET)
        removed = 0
        parts: dict[str, int] = {}
        skipped: tuple[Skip, ...] = ()
        before: tuple[float, float] | None = None
        after = (0.0, 0.0)
        warnings: tuple[str, ...] = ()
        cut = context.cut
        for step in range(1, self.steps + 1):
            groups = find_groups(graph)
            left_out = self._left_out(groups)
            if step == 1:
                skipped = tuple(Skip(name, reason) for name, reason in left_out.items())
                skipped += tuple(Skip(name, _NESTED) for name in groups.nested)
            if self.dead and step == 1:
                found = absorb(graph, groups, eligible_groups(groups, left_out), context.defaults)
                skipped += found.skipped
                kinds = {"constant": found.constant, "duplicate": found.duplicate}
                parts.update({name: number for name, number in kinds.items() if number})
                if parts:
                    groups = find_groups(graph)
                    left_out = self._left_out(groups)
            nothing: Gone = np.zeros(groups.count, bool)
            costs = groups.cost("macs", nothing), groups.cost("params", nothing)
            before = before or costs
            after = costs
            eligible = eligible_groups(groups, left_out)
            if not eligible:
                break
            scores, warnings = self._scores(graph, groups, context)
            dead = dead_units(graph, groups) if self.dead else nothing
            scores = np.where(dead, -1.0, scores)
            if any(getattr(self, name) is not None for name in _BUDGETS):
                gone = self._choose(graph, context, groups, eligible, scores, before, step)
            else:
                gone = _all_but_one(eligible, dead)
            if not gone.any():
                continue
            made = remove_units(graph, groups, gone)
            cut = made if cut is None else composed(cut, made)
            removed += int(gone.sum())
            after = groups.cost("macs", gone), groups.cost("params", gone)
            for group in eligible:
                count = int(gone[group.units].sum())
                parts["groups cut"] = parts.get("groups cut", 0) + bool(count and step == 1)
        if removed:
            context.cut = cut
            infer_shapes(graph)
        notes = () if before is None or not removed else (_summary(before, after),)
        absorbed = parts.get("constant", 0) + parts.get("duplicate", 0)  # where no budget asked for them to go
        return PassResult(rewrites=removed or absorbed, parts=parts, skipped=skipped, notes=notes, warnings=warnings)

    def _left_out(self, groups: ChannelGroups) -> dict[str, str]:
        """The groups that are left alone, with the reason."""
        left = {group.name: group.frozen for group in groups.groups if group.frozen is not None}
        for group in groups.groups:
            pattern = next((each for each in self.exclude if fnmatchcase(group.name, each)), None)
            if pattern is not None:
                left.setdefault(group.name, f"it is excluded by {pattern}")
        for name, reason in factors_cut_elsewhere(groups, left).items():
            left.setdefault(name, reason)
        return left

    def _scores(self, graph: gs.Graph, groups: ChannelGroups, context: Context) -> tuple[Scores, tuple[str, ...]]:
        """The importance of every unit, and what is to be said of the data that it was measured on."""
        if not self.importance.needs_data:
            return score_units(graph, groups, self.importance, self.reduce, {}, self.seed), ()
        model = Model(graph, context.frame)
        warnings: tuple[str, ...] = ()
        samples = context.samples
        if samples is None:
            samples = made_up_samples(open_session(model), graph, seed=context.seed)
            warnings = (f"importance {self.importance.value} was measured on made-up inputs: give --data",)
        if self.importance is Importance.TAYLOR:
            return within_groups(sensitivities(model, groups, samples, progress=context.progress), groups), warnings
        statistics = self._statistics(graph, groups, model, samples, context)
        return score_units(graph, groups, self.importance, self.reduce, statistics, self.seed), warnings

    def _statistics(
        self, graph: gs.Graph, groups: ChannelGroups, model: Model, samples: Samples, context: Context
    ) -> dict[str, ChannelStatistics]:
        """Mean and variance of the channels that linear operators read."""
        found: dict[str, ChannelStatistics] = {}
        ranks = {tensor.name: len(tensor.shape) for node in graph.nodes for tensor in node.inputs if tensor.shape}
        for kind in (ChannelStatistics, LastAxisStatistics):
            names = {
                linear.data
                for linear in groups.linears
                if linear.data in groups.axes
                and linear.data in ranks
                and (linear.data_axis == 1) == (kind is ChannelStatistics)
                and linear.data_axis in (1, ranks[linear.data] - 1)
            }
            if names:
                seen = observe(
                    model,
                    sorted(names),
                    samples,
                    kind,
                    progress=context.progress,
                    memory_budget=context.memory_budget,
                )
                found |= seen.statistics
        return found

    def _choose(
        self,
        graph: gs.Graph,
        context: Context,
        groups: ChannelGroups,
        eligible: list[Group],
        scores: np.ndarray[tuple[int], np.dtype[np.float64]],
        before: tuple[float, float],
        step: int,
    ) -> Gone:
        limits = Limits(self.round_to or context.target.channel_multiple, self.max_ratio, adapts=not self.round_to)
        kind, budget = next((name, value) for name in _BUDGETS if (value := getattr(self, name)) is not None)

        def choose(ratio: float) -> Gone:
            return least_important(groups, eligible, scores, ratio, self.scope, limits)

        share = step / self.steps
        if kind == "ratio":
            return choose(1 - (1 - budget * share) / (1 - budget * (step - 1) / self.steps))
        most = 1 - (1 - budget) * share
        if kind == "latency":
            gone = within_budget(choose, _measuring(graph, groups, context), most, _LATENCY_TRIES)
        else:
            amount = before[kind == "params"]
            cost = partial(groups.cost, kind)
            gone = within_budget(choose, cost, most * amount)
            if gone is not None:
                gone = given_back(eligible, scores, gone, limits, cost, most * amount)
        if gone is None:
            least = groups.cost("params" if kind == "params" else "macs", choose(1.0))
            reached = "" if kind == "latency" else f"; {least / before[kind == 'params']:.3f} is the least"
            raise PipelineError(
                f"prune:{kind}={budget} cannot be met with max_ratio {self.max_ratio} and the groups that can be cut"
                f"{reached}: graphopt groups shows why the others stay"
            )
        return gone


def _all_but_one(eligible: list[Group], dead: Gone) -> Gone:
    """The dead units of eligible groups; a group of nothing else keeps one, so that no axis is empty."""
    gone = np.zeros_like(dead)
    for group in eligible:
        units = group.units[dead[group.units]]
        gone[units[1:] if len(units) == group.size else units] = True
    return gone


def _measuring(graph: gs.Graph, groups: ChannelGroups, context: Context) -> Callable[[Gone], float]:
    """A function that measures how long a cut graph takes, as a share of the model's time before any cut."""
    whole = Model(graph if context.cut is None else context.cut.original, context.frame)
    reference = open_session(whole, threads=1)
    samples = context.samples or made_up_samples(reference, whole.graph, seed=context.seed)
    feed = next(iter(samples))

    def measure(gone: Gone) -> float:
        model = Model(graph, context.frame).copy()
        remove_units(model.graph, groups, gone)
        before, after = measure_latency([reference, open_session(model, threads=1)], feed, seconds=1.0)
        return after / before

    return measure


def _summary(before: tuple[float, float], after: tuple[float, float]) -> str:
    shares = [
        f"{new:,.0f} of {old:,.0f} {name} ({new / old:.1%})" if old else ""
        for name, old, new in zip(("MACs", "parameters"), before, after, strict=True)
    ]
    return f"left: {', '.join(filter(None, shares))}"
