"""Find the ranges of the tensors that the target quantizes, by running the float graph over data.

The graph stays as it is; the ranges go into the context, where `qdq` and `--ranges` find them. What is
observed: `graphopt.observe`; how a range follows from it: `graphopt.thresholds`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import onnx_graphsurgeon as gs

from graphopt.calibrated_placement import place_calibrated
from graphopt.channel_statistics import ChannelStatistics
from graphopt.data_checks import DataChecks
from graphopt.data_free import METHODS, ranges_without_data
from graphopt.errors import PipelineError
from graphopt.exact_histogram import ExactHistogram
from graphopt.feeds import Samples
from graphopt.histogram import Histogram
from graphopt.input_checks import input_warnings
from graphopt.made_up import made_up_samples
from graphopt.method_search import CANDIDATES, samples_worth, search
from graphopt.model_io import Model
from graphopt.observe import observe
from graphopt.pass_base import Context, Effect, Pass, PassResult, Skip
from graphopt.passes.insert_qdq import InsertQdq, reasons_too_small
from graphopt.placement import place_all
from graphopt.ranges import Ranges, range_of
from graphopt.responses import responses
from graphopt.runtime import open_session
from graphopt.shapes import infer_shapes
from graphopt.thresholds import Method

DEFAULT_METHOD = Method.SEARCH


@dataclass(frozen=True, kw_only=True)
class Calibrate(Pass):
    """Find the ranges of activations from samples; without any from stored statistics and made-up inputs."""

    name: ClassVar[str] = "calibrate"
    effect: ClassVar[Effect] = Effect.EXACT

    method: Method = field(default=DEFAULT_METHOD, metadata={"help": "how a range is chosen from the values seen"})
    percent: float = field(
        default=99.99,
        metadata={"help": "for the method percentile: the share of the values that is not clipped"},
    )
    histograms: bool = field(
        default=False,
        metadata={"help": "keep the histograms in the ranges file, to merge or to choose anew"},
    )

    moments: bool = field(
        default=False, metadata={"help": "exact mean and mean square, not to half a bin: up to twice the time"}
    )
    channels: bool = field(
        default=False,
        metadata={"help": "also minimum, maximum, mean and variance of each channel, in one more run over the samples"},
    )

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise PipelineError(f"calibrate:percent must be above 0 and at most 100, not {self.percent}")
        if self.channels and self.method is Method.DATA_FREE:
            raise PipelineError("calibrate:channels needs data, and the method data-free looks at none")

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Put the ranges of what `context.target` quantizes into `context.ranges`.

        Raises:
            DataError: there are no samples, the model does not run on one of them, or one gives a tensor a
                NaN or an infinity.
            ModelError: onnxruntime cannot load the graph.
            PipelineError: statistics by channel are asked for, and there are no samples.
        """
        model = Model(graph, context.frame)
        infer_shapes(graph)
        placements = place_all(graph, context.target)
        tensors = list(dict.fromkeys(name for each in placements for name in each.observed))
        if self.channels and context.samples is None:
            raise PipelineError("calibrate:channels needs data: name them with --data")
        if context.samples is None or self.method is Method.DATA_FREE:
            return self._without_data(model, tensors, context)
        samples, original = context.samples, context.original or model
        method = CANDIDATES[0] if self.method is Method.SEARCH else self.method
        searches = self.method is Method.SEARCH and not samples.synthetic  # made-up inputs tell little of outputs
        checks = DataChecks(samples)
        observation = observe(
            model,
            tensors,
            checks.samples,
            ExactHistogram if self.moments and method.statistics is Histogram else method.statistics,
            progress=context.progress,
            memory_budget=context.memory_budget,
        )
        channels, without_channels = (
            self._channels(model, list(observation.statistics), samples, context) if self.channels else ({}, ())
        )
        behind = responses(graph, observation.statistics) if method.statistics is Histogram else {}
        ranges = Ranges(
            tensors={
                name: replace(
                    range_of(
                        seen,
                        method,
                        percent=self.percent,
                        quant_type=context.target.activation,
                        keep=self.histograms or searches,
                        response=behind.get(name),
                    ),
                    channels=channels.get(name),
                )
                for name, seen in observation.statistics.items()
            },
            source=samples.description,
            samples=observation.samples,
            synthetic=samples.synthetic,
            data_digest=checks.digest,
            target=context.target.name,
            method=method,
            percent=self.percent,
        )
        notes = observation.notes
        if searches and ranges.tensors:
            judged = replace(context, too_small=_too_small(graph, context, ranges))
            values = sum(seen.count for seen in observation.statistics.values()) / observation.samples
            found = search(graph, ranges, checks.drawn(samples_worth(values)), judged, InsertQdq())
            ranges, notes = found.ranges, (*notes, str(found))
        context.ranges = ranges if self.histograms else ranges.without_histograms()
        return PassResult(
            parts={"tensors": len(ranges.tensors), **_chosen(ranges)},
            skipped=(*observation.skipped, *without_channels),
            notes=notes,
            warnings=()
            if samples.synthetic
            else (*input_warnings(original, samples), *checks.warnings(), *_constant_tensors(ranges)),
        )

    def _without_data(self, model: Model, tensors: Sequence[str], context: Context) -> PassResult:
        samples = made_up_samples(open_session(model), model.graph, seed=context.seed)
        found = ranges_without_data(
            context.original or model,
            model,
            tensors,
            samples,
            seed=context.seed,
            progress=context.progress,
            memory_budget=context.memory_budget,
        )
        context.ranges = Ranges(
            tensors=found.tensors,
            source=found.source,
            samples=samples.count or 0,
            synthetic=True,
            target=context.target.name,
            method=Method.DATA_FREE,
        )
        counts = Counter(each.method for each in found.tensors.values())
        return PassResult(
            parts={"tensors": len(found.tensors), **counts},
            skipped=found.skipped,
            notes=(_sources_of(counts),),
        )

    def _channels(
        self, model: Model, tensors: Sequence[str], samples: Samples, context: Context
    ) -> tuple[dict[str, ChannelStatistics], tuple[Skip, ...]]:
        """The statistics by channel of the tensors that have channels."""
        found = observe(
            model,
            tensors,
            samples,
            ChannelStatistics,
            progress=context.progress,
            memory_budget=context.memory_budget,
        ).statistics
        varying = [name for name, seen in found.items() if seen.varies]
        reason = "its axis 1 has another size in another sample: it has no statistics by channel"
        return (
            {name: seen for name, seen in found.items() if not seen.varies},
            tuple(Skip(name, reason) for name in varying),
        )


def _too_small(graph: gs.Graph, context: Context, ranges: Ranges) -> dict[str, str]:
    """What `qdq` leaves in float since it does not pay; nothing where that is everything: no method would matter."""
    if context.target.costs is None:
        return {}
    placements = place_calibrated(graph, context.target, {}, ranges)
    found = reasons_too_small(graph, placements, context.target, context, ranges)
    return found if len(found) < sum(len(each.nodes) for each in placements) else {}


def _constant_tensors(ranges: Ranges) -> tuple[str, ...]:
    """A warning of tensors that had one value in all samples."""
    names = [name for name, found in ranges.tensors.items() if found.observed_minimum == found.observed_maximum]
    if not names:
        return ()
    if len(names) == 1:
        return (f"{names[0]} has one value in all samples: its range is a guess; add samples in which it varies",)
    what = f"{len(names)} tensors (first: {names[0]})"
    return (f"{what} have one value in all samples: their ranges are guesses; add samples in which they vary",)


def _chosen(ranges: Ranges) -> Counter[str]:
    """How many tensors got their range by which method, where that is not the same for all."""
    return Counter(found.method for found in ranges.tensors.values() if ranges.method is Method.AUTO)


def _sources_of(counts: Counter[str]) -> str:
    stored, bounds, made_up = (counts[method] for method in METHODS)
    return (
        f"data-free: the ranges of {stored} tensors come from statistics stored in BatchNormalization, {bounds} from "
        f"operators with bounds, {made_up} from made-up inputs; calibrate on data where you can"
    )
