"""How close one model stays to another, and what it costs: the evidence behind every lossy pipeline.

Both run on the same samples; figures per output come from `graphopt.compare`, latency from interleaved runs of both in
this process on the first sample, size from the stored weights.

onnxruntime's int8 kernels may differ from the arithmetic that Q and DQ stand for: by a step on rounding ties, and on
x86 without VNNI by saturated sums. `exact` compares with that arithmetic, which is what other targets compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from graphopt.compare import Comparison, compare_sessions
from graphopt.feeds import Feed, Samples
from graphopt.graph import present
from graphopt.model_io import Model
from graphopt.progress import Progress, silent
from graphopt.runtime import Session, arrays_in, measure_latency, open_session

LAYER_BATCH = 48
"""Tensors compared in one run over the samples: all at once would hold every activation of both models."""
_LATENCY_SECONDS = 1.0
_SLOWER = 0.97  # of the reference's speed: closer, it is noise


@dataclass(frozen=True, kw_only=True)
class Check:
    """A model beside its reference.

    Latencies are median seconds of one run on one sample, both measured in turn, None where they would say nothing of
    the target, or where every sample gives outputs of other sizes; sizes are bytes of weights.
    """

    comparison: Comparison
    reference_nbytes: int
    other_nbytes: int
    reference_latency: float | None
    other_latency: float | None
    data: str
    synthetic: bool
    exact: bool
    notes: tuple[str, ...]  # what a user should know of the data
    layers: Comparison | None = None

    @property
    def speedup(self) -> float | None:
        """How many times faster than the reference; below 1: slower; None: not measured."""
        if self.reference_latency is None or self.other_latency is None:
            return None
        return self.reference_latency / self.other_latency

    @property
    def is_slower(self) -> bool:
        """Whether it was measured to be slower than the reference, by more than two measurements differ."""
        return self.speedup is not None and self.speedup < _SLOWER

    def shortfalls(self, min_sqnr: float | None, min_agreement: float | None) -> list[str]:
        """The outputs that miss a limit, as sentences; `min_sqnr` in dB, `min_agreement` a share of 1."""
        return self.comparison.shortfalls(min_sqnr, min_agreement)


def check_models(
    reference: Model,
    other: Model,
    samples: Samples,
    *,
    layers: bool = False,
    exact: bool = False,
    measure: bool = True,
    progress: Progress = silent,
) -> Check:
    """Compare `other` with `reference` on `samples` and measure both.

    Args:
        reference: usually the float model.
        other: a model with the same inputs and outputs.
        samples: feeds of both.
        layers: compare the tensors that both models have by name, too.
        exact: with the arithmetic that Q and DQ stand for, not onnxruntime's int8 kernels on this CPU.
        measure: measure latency here.
        progress: told about each sample.

    Raises:
        GraphoptError: inputs or outputs differ, or a model does not run on a sample.
    """
    sessions = [open_session(reference), open_session(other)]
    compared = [sessions[0], open_session(other, exact=True)] if exact else sessions
    comparison = compare_sessions(compared[0], compared[1], samples, progress=progress)
    latencies: list[float] | list[None] = [None, None]
    if measure:
        feed = _first_of_equal_sizes(sessions, samples) if comparison.resized() else next(iter(samples))
        if feed is not None:
            latencies = measure_latency(sessions, feed, seconds=_LATENCY_SECONDS)
    return Check(
        comparison=comparison,
        reference_nbytes=reference.nbytes,
        other_nbytes=other.nbytes,
        reference_latency=latencies[0],
        other_latency=latencies[1],
        data=samples.description,
        synthetic=samples.synthetic,
        exact=exact,
        notes=samples.notes,
        layers=compare_layers(reference, other, samples, progress) if layers else None,
    )


def _first_of_equal_sizes(sessions: Sequence[Session], samples: Samples) -> Feed | None:
    """The first sample of which all models make outputs of the same sizes: a Loop of more steps takes longer."""

    def sizes(session: Session, feed: Feed) -> list[tuple[int, ...]]:
        return [array.shape for value in session.run(feed).values() for array in arrays_in(value)]

    return next((feed for feed in samples if len({tuple(sizes(each, feed)) for each in sessions}) == 1), None)


def compare_layers(reference: Model, other: Model, samples: Samples, progress: Progress) -> Comparison:
    """Compare the float tensors that both models compute under the same name, a group of them at a time.

    Fused kernels do not compute what they fuse, so both models run as they are written.
    """
    names = shared_tensors(reference, other)
    groups = [names[start : start + LAYER_BATCH] for start in range(0, len(names), LAYER_BATCH)]
    compared = [
        compare_sessions(
            open_session(reference, optimize=False, extra_outputs=group),
            open_session(other, optimize=False, extra_outputs=group),
            samples,
            outputs=group,
            progress=progress,
        )
        for group in groups
    ]
    rows = tuple(row for comparison in compared for row in comparison.outputs)
    together = Comparison(rows, compared[0].samples if compared else 0)
    return replace(together, outputs=tuple(together.worst_first()))


def shared_tensors(reference: Model, other: Model) -> list[str]:
    """Names of float tensors that nodes of both main graphs compute, in the reference's order."""
    theirs = {tensor.name for node in other.graph.nodes for tensor in present(node.outputs)}
    ours: Sequence[str] = [
        tensor.name
        for node in reference.graph.nodes
        for tensor in present(node.outputs)
        if tensor.name in theirs and node.op != "Constant"
    ]
    return list(dict.fromkeys(ours))
