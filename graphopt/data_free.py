"""Ranges without data, from what a model's BatchNormalizations remember of its training.

Behind a BatchNormalization channel c has the mean beta[c] and the standard deviation |gamma[c]| over the training data
(Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2.1). So the
model runs on made-up inputs with each BatchNormalization replaced by an InstanceNormalization of the same gamma and
beta: it gives every channel of every sample just that mean and that deviation, whatever the inputs, and the operators
behind it, activation functions, additions, poolings, make of it what they make of real data.

That tells all of a tensor as long as only operators lie between it and the BatchNormalizations that keep values apart.
Behind a Conv, a Gemm or an average over all places it tells too little: real samples differ there, and normalized
ones do not. Such tensors get a range that also covers what the unchanged model shows on the made-up inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx_graphsurgeon as gs

from graphopt.feeds import Samples
from graphopt.graph import constant_of, is_constant
from graphopt.histogram import Extremes
from graphopt.model_io import Model
from graphopt.node_order import sorted_nodes
from graphopt.observe import observe
from graphopt.operators import MOVING, POINTWISE
from graphopt.pass_base import MEMORY_BUDGET, Skip
from graphopt.progress import Progress, silent
from graphopt.ranges import TensorRange
from graphopt.shapes import infer_shapes

STORED, BOTH, MADE_UP = "batch-norm", "batch-norm+made-up", "made-up"
"""What a range comes from, as its `method`."""

_LEAST_PLACES = 16  # over which a normalization by their own statistics means something


def ranges_without_data(
    original: Model,
    model: Model,
    tensors: Sequence[str],
    samples: Samples,
    *,
    progress: Progress = silent,
    memory_budget: int = MEMORY_BUDGET,
) -> tuple[dict[str, TensorRange], tuple[Skip, ...]]:
    """Ranges from made-up samples and from the statistics stored in the original model.

    Args:
        original: the model before anything was folded.
        model: the one whose tensors are asked for; those of a name that the original has too are the same tensors.
        tensors: names.
        samples: made up.
        progress: told after every sample.
        memory_budget: bytes of activations to hold at a time.

    Returns:
        the ranges, and the tensors that cannot be observed.

    Raises:
        DataError: the model does not run on a sample, or a tensor is not finite.
    """
    seen = observe(model, tensors, samples, Extremes, progress=progress, memory_budget=memory_budget)
    normalized, stored = with_stored_statistics(original)
    names = [name for name in seen.statistics if name in stored]
    more: Mapping[str, Extremes] = {}
    if names:
        more = observe(normalized, names, samples, Extremes, progress=progress, memory_budget=memory_budget).statistics
    return {name: _range(found, more.get(name), stored.get(name, False)) for name, found in seen.statistics.items()}, (
        seen.skipped
    )


def _range(made_up: Extremes, normalized: Extremes | None, is_told: bool) -> TensorRange:
    low, high, method, count = made_up.minimum, made_up.maximum, MADE_UP, made_up.count
    if normalized is not None and is_told:
        low, high, method = normalized.minimum, normalized.maximum, STORED
    elif normalized is not None:
        low, high, method = min(low, normalized.minimum), max(high, normalized.maximum), BOTH
    return TensorRange(
        minimum=low,
        maximum=high,
        method=method,
        observed_minimum=low,
        observed_maximum=high,
        mean=None,
        zeros=None,
        count=count,
    )


def with_stored_statistics(model: Model) -> tuple[Model, dict[str, bool]]:
    """A copy whose BatchNormalizations normalize each sample by itself, and the tensors that this changes.

    Each of these is True where it is told by the stored statistics alone. BatchNormalizations in training mode, with
    computed parameters, or over fewer than 16 places stay as they are.
    """
    copy = model.copy()
    infer_shapes(copy.graph)
    told: dict[str, bool] = {}
    for node in sorted_nodes(copy.graph):
        if _is_replaced(node):
            node.op = "InstanceNormalization"
            node.attrs = {name: value for name, value in node.attrs.items() if name == "epsilon"}
            node.inputs = list(node.inputs)[:3]
            told[node.outputs[0].name] = True
            continue
        computed = [tensor for tensor in node.inputs if tensor.name and not is_constant(tensor)]
        if any(tensor.name in told for tensor in computed):
            alone = all(told.get(tensor.name, False) for tensor in computed)
            told |= {tensor.name: alone and node.op in POINTWISE | MOVING for tensor in node.outputs if tensor.name}
    return copy, told


def _is_replaced(node: gs.Node) -> bool:
    if node.op != "BatchNormalization" or node.domain or node.attrs.get("training_mode", 0):
        return False
    shape = node.inputs[0].shape
    if shape is None or len(shape) < 3 or len([output for output in node.outputs if output.name]) != 1:
        return False
    places = [size for size in shape[2:] if isinstance(size, int) and size > 0]
    known = len(places) == len(shape) - 2
    return all(constant_of(tensor) is not None for tensor in node.inputs[1:5]) and (
        not known or math.prod(places) >= _LEAST_PLACES
    )
