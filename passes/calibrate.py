"""Find the ranges of the tensors that the target quantizes, by running the float graph over data.

The graph stays as it is; the ranges go into the context, where `qdq` and `--ranges` find them. What is
observed: `graphopt.observe`; how a range follows from it: `graphopt.thresholds`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import onnx_graphsurgeon as gs

from graphopt.errors import PipelineError
from graphopt.histogram import Extremes, Histogram
from graphopt.made_up import made_up_samples
from graphopt.model_io import Model
from graphopt.observe import observe
from graphopt.pass_base import Context, Effect, Pass, PassResult
from graphopt.placement import place
from graphopt.ranges import Ranges, TensorRange
from graphopt.runtime import open_session
from graphopt.shapes import infer_shapes
from graphopt.thresholds import Method, choose_range

DEFAULT_METHOD = Method.MSE
FEW_SAMPLES = 32
"""Fewer are warned about."""


@dataclass(frozen=True, kw_only=True)
class Calibrate(Pass):
    """Find the ranges of activations from samples; without data from synthetic inputs, which mean little."""

    name: ClassVar[str] = "calibrate"
    effect: ClassVar[Effect] = Effect.EXACT

    method: Method = field(default=DEFAULT_METHOD, metadata={"help": "how a range is chosen from the values seen"})
    percent: float = field(
        default=99.99,
        metadata={"help": "for the method percentile: the share of the values that is not clipped"},
    )

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise PipelineError(f"calibrate:percent must be above 0 and at most 100, not {self.percent}")

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Put the ranges of what `context.target` quantizes into `context.ranges`.

        Raises:
            DataError: there are no samples, the model does not run on one of them, or one gives a tensor a
                NaN or an infinity.
            ModelError: onnxruntime cannot load the graph.
        """
        model = Model(graph, context.frame)
        infer_shapes(graph)
        tensors = place(graph, context.target).observed
        samples = context.samples
        if samples is None:
            samples = made_up_samples(open_session(model), seed=context.seed)
        observation = observe(model, tensors, samples, self.method.statistics, progress=context.progress)
        symmetric = context.target.activation.symmetric
        context.ranges = Ranges(
            tensors={name: self._range(seen, symmetric) for name, seen in observation.statistics.items()},
            source=samples.description,
            samples=observation.samples,
            synthetic=samples.synthetic,
        )
        return PassResult(
            parts={"tensors": len(context.ranges.tensors)},
            skipped=observation.skipped,
            notes=_notes(context.ranges),
        )

    def _range(self, seen: Extremes, symmetric: bool) -> TensorRange:
        minimum, maximum = choose_range(seen, self.method, percent=self.percent, symmetric=symmetric)
        return TensorRange(
            minimum=minimum,
            maximum=maximum,
            method=self.method.value,
            observed_minimum=seen.minimum,
            observed_maximum=seen.maximum,
            mean=seen.mean if isinstance(seen, Histogram) else None,
            zero_fraction=None if seen.zeros is None else seen.zeros / seen.count,
            count=seen.count,
        )


def _notes(ranges: Ranges) -> tuple[str, ...]:
    if ranges.synthetic:
        return (f"no data were given: the ranges come from {ranges.samples} made-up inputs; use --data",)
    if ranges.samples < FEW_SAMPLES:
        return (f"the ranges come from {ranges.samples} samples; from {FEW_SAMPLES} on they are steadier",)
    return ()
