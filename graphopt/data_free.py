"""Ranges without data, from what a model's BatchNormalizations remember of its training.

- Behind a BatchNormalization, and as far as `graphopt.normalization_ranges` follows it, mean and deviation of every
  channel are stored in the model: a range covers 5.5 deviations on each side of it (after Nagel et al. 2019)
- The rest, inputs and what Conv, Gemm and averages over all places compute, is seen in a run on made-up inputs, which
  the first BatchNormalization makes as large as those in training (`graphopt.likely_inputs`). Real inputs reach
  farther than noise, which looks like nothing that a model knows: half of what was seen is added to what it computes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphopt.feeds import Samples
from graphopt.histogram import Extremes
from graphopt.likely_inputs import likely_samples
from graphopt.model_io import Model
from graphopt.normalization_ranges import BOUNDS, STORED, Distribution, predicted_distributions
from graphopt.observe import observe
from graphopt.pass_base import MEMORY_BUDGET, Skip
from graphopt.progress import Progress, silent
from graphopt.ranges import TensorRange

MADE_UP = "made-up"
METHODS = (STORED, BOUNDS, MADE_UP)
"""What a range comes from, as its `method`."""

_MARGIN = 1.5
_SAME = 1e-3  # relative difference of the extremes of one tensor in two models that compute the same


@dataclass(frozen=True, kw_only=True)
class DataFreeRanges:
    """Ranges by tensor name, what cannot be observed, and a description of the made-up inputs."""

    tensors: Mapping[str, TensorRange]
    skipped: tuple[Skip, ...]
    source: str


def ranges_without_data(
    original: Model,
    model: Model,
    tensors: Sequence[str],
    samples: Samples,
    *,
    seed: int = 0,
    progress: Progress = silent,
    memory_budget: int = MEMORY_BUDGET,
) -> DataFreeRanges:
    """Ranges from made-up samples and from the statistics stored in the original model.

    Args:
        original: the model before anything was folded.
        model: the one whose tensors are asked for. What the original tells of a tensor counts if one of that name has
            the same values in both.
        tensors: names.
        samples: made up.
        seed: of what is made up besides.
        progress: told after every sample.
        memory_budget: bytes of activations to hold at a time.

    Raises:
        DataError: the model does not run on a sample, or a tensor is not finite.
    """
    likely = likely_samples(original, samples, seed=seed)
    seen = observe(model, tensors, likely, Extremes, progress=progress, memory_budget=memory_budget)
    predicted = predicted_distributions(original)
    told = [name for name in seen.statistics if name in predicted]
    if told and original is not model:
        ours, theirs = (
            observe(each, told, likely.first(1), Extremes, memory_budget=memory_budget).statistics
            for each in (model, original)
        )
        told = [name for name in told if name in theirs and _is_same(ours[name], theirs[name])]
    inputs = {tensor.name for tensor in model.graph.inputs}
    known = {name: predicted[name] for name in told}
    return DataFreeRanges(
        tensors={
            name: _range(found, known.get(name), 1.0 if name in inputs else _MARGIN)
            for name, found in seen.statistics.items()
        },
        skipped=seen.skipped,
        source=likely.description,
    )


def _is_same(one: Extremes, other: Extremes) -> bool:
    allowed = _SAME * max(abs(other.minimum), abs(other.maximum))
    return abs(one.minimum - other.minimum) <= allowed and abs(one.maximum - other.maximum) <= allowed


def _range(seen: Extremes, told: Distribution | None, margin: float) -> TensorRange:
    low, high = min(seen.minimum, margin * seen.minimum), max(seen.maximum, margin * seen.maximum)
    if told is not None:
        low, high = told.range
    return TensorRange(
        minimum=low,
        maximum=high,
        method=MADE_UP if told is None else told.told_by,
        observed_minimum=seen.minimum,
        observed_maximum=seen.maximum,
        mean=None,
        zeros=None,
        count=seen.count,
    )
