"""What the first BatchNormalization behind an input remembers of training, and how far something is from that.

It has the mean and the variance that each of its channels had. What the operators before it give for some inputs is
compared with that channel by channel, both taken for normal distributions:

    KL(N(m, v) || N(mean, var)) = (v / var + (m - mean)**2 / var - 1 - log(v / var)) / 2

and the median over the channels counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graphopt.graph import constant_of
from graphopt.model_io import Model
from graphopt.operators import MOVING

FITS = 2.0
"""The largest divergence of inputs that may be right: seven real nets stay below it."""

_CARRIES = MOVING | {"Cast", "Pad"}
_LINEAR = ("Conv", "Gemm", "MatMul")
_LEAST_VARIANCE = 1e-6  # of the largest channel's: a channel that was dead in training tells nothing


@dataclass(frozen=True)
class Remembered:
    """What one BatchNormalization remembers, and the tensor that it reads."""

    tensor: str
    mean: NDArray[np.float64]  # [C]
    variance: NDArray[np.float64]  # [C]


def first_remembered(tensor: gs.Tensor) -> Remembered | None:
    """What the BatchNormalization remembers that normalizes the first linear operator behind an input."""
    reached = [tensor]
    for each in reached:
        for node in each.outputs:
            if node.op in _CARRIES and node.inputs[0] is each:
                reached.append(node.outputs[0])
            elif node.op in _LINEAR and node.inputs[0] is each:
                for after in node.outputs[0].outputs:
                    if after.op == "BatchNormalization" and not after.attrs.get("training_mode", 0):
                        return _remembered(after)
    return None


def _remembered(node: gs.Node) -> Remembered | None:
    mean, variance = constant_of(node.inputs[3]), constant_of(node.inputs[4])
    if mean is None or variance is None:
        return None
    return Remembered(node.inputs[0].name, mean.astype(np.float64), variance.astype(np.float64))


def up_to(model: Model, name: str) -> Model:
    """The part of a model that computes one tensor."""
    copy = model.copy()
    copy.graph.outputs = [tensor for node in copy.graph.nodes for tensor in node.outputs if tensor.name == name]
    copy.graph.cleanup(remove_unused_graph_inputs=True)
    return copy


def median_divergence(
    mean: NDArray[np.float64], variance: NDArray[np.float64], remembered: Remembered
) -> NDArray[np.float64]:
    """Means and variances [..., C] -> the median over the channels of their divergence from those remembered, [...]."""
    alive = remembered.variance > _LEAST_VARIANCE * remembered.variance.max()
    expected = remembered.variance[alive]
    ratio = np.maximum(variance[..., alive] / expected, np.finfo(np.float64).tiny)
    offset = (mean - remembered.mean)[..., alive] ** 2 / expected
    return np.asarray(np.median(0.5 * (ratio + offset - 1 - np.log(ratio)), axis=-1))
