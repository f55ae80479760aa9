"""Units that can go for nothing: each place that sums over them multiplies them by zero, or they are zero there.

    y = sum over c of W[c] x[c]         c may go where W[c] = 0 or x[c] = 0 for every input

Zeros come from rows of weights with a zero bias, as training with a penalty on whole channels leaves them, and pass
through operators that keep zeros; constant and duplicate channels become such (`graphopt.absorption`). What is zero
only on the data seen is none: this holds for every input.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graphopt.channel_contractions import CONTRACTIONS
from graphopt.channel_flow import Linear
from graphopt.channel_groups import ChannelGroups, Labels
from graphopt.channel_moves import MOVES
from graphopt.conv_kernels import is_depthwise
from graphopt.graph import constant_of, has_input, is_constant, present
from graphopt.node_order import sorted_nodes
from graphopt.units import NONE

Mask = NDArray[np.bool_]

_KEEPS_ZERO = frozenset(
    {
        *(
            "Abs",
            "AveragePool",
            "Cast",
            "Ceil",
            "Dropout",
            "Elu",
            "Erf",
            "Floor",
            "Gelu",
            "GlobalAveragePool",
            "HardSwish",
        ),
        *("GlobalMaxPool", "Identity", "LeakyRelu", "MaxPool", "Neg", "PRelu", "Relu", "Round", "Selu", "Sign", "Sin"),
        *("Sqrt", "Swish", "Tanh", "ThresholdedRelu", "Concat", "Add", "Sub", "Sum", "Mish", "Resize"),
        *(set(MOVES) - {"ConstantOfShape", "Pad", "Shape"}),
    }
)
"""Zero in every input that carries a unit gives zero in the output."""

_MIXING = frozenset({"LpNormalization"})  # divides by a norm: zeros change nothing, other values do

_JOINS = frozenset({"Add", "Concat", "Sub", "Sum"})


def dead_units(graph: gs.Graph, groups: ChannelGroups) -> Mask:
    """The units of which the removal changes no output but for rounding, bool [groups.count].

    Args:
        graph: what `groups` were found in.
        groups: of the graph.
    """
    linears = {linear.output: linear for linear in groups.linears if linear.op in _WITH_ONE_WEIGHT}
    zero: dict[str, Mask] = {}
    read: Mask = np.zeros(groups.count, bool)
    for node in sorted_nodes(graph):
        if node.op in CONTRACTIONS or node.op in _MIXING or node.op.startswith("Reduce"):
            _add_read(node, groups, linears, zero, read)
        for tensor in present(node.outputs):
            axes = groups.axes.get(tensor.name)
            if axes is not None:
                zero[tensor.name] = _zero_in(node, groups, linears, zero) & _carried(axes, groups.count)
    usable: Mask = np.zeros(groups.count, bool)
    for group in groups.groups:
        if group.frozen is None and group.inexact is None:
            usable[group.units] = True
    return np.asarray(usable & ~read)


def _add_read(
    node: gs.Node, groups: ChannelGroups, linears: dict[str, Linear], zero: dict[str, Mask], read: Mask
) -> None:
    """Mark the units that a node sums over, and that count."""
    linear = linears.get(node.outputs[0].name)
    for tensor in present(node.inputs):
        axes = groups.axes.get(tensor.name)
        if axes is None or constant_of(tensor) is not None:
            continue
        counts = _carried(axes, groups.count) & ~zero.get(tensor.name, np.zeros(groups.count, bool))
        if linear is not None and linear.data == tensor.name:
            counts &= ~_multiplied_by_zero(node, linear, groups)
        # of what it passes on, a reader behind it decides
        if node.op.startswith("Reduce") or _passes_channels_on(node):
            counts &= ~_carried(groups.axes.get(node.outputs[0].name, ()), groups.count)
        read |= counts


def _passes_channels_on(node: gs.Node) -> bool:
    """Whether it is a depthwise Conv with a constant weight: an input and an output channel go together."""
    return not node.domain and node.op == "Conv" and is_constant(node.inputs[1]) and is_depthwise(node)


_WITH_ONE_WEIGHT = frozenset({"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})


def _multiplied_by_zero(node: gs.Node, linear: Linear, groups: ChannelGroups) -> Mask:
    """The units on the input axis of a weight that is zero for all of them."""
    axes = groups.axes.get(linear.weight)
    weight = next((constant_of(each) for each in node.inputs if each.name == linear.weight), None)
    labels = None if axes is None else axes[linear.input_axis]
    if labels is None or weight is None:
        return np.zeros(groups.count, bool)
    return _all_zero(weight, linear.input_axis, labels, groups.count)


def _all_zero(weight: NDArray[np.generic], axis: int, labels: NDArray[np.int64], count: int) -> Mask:
    """The units that an axis carries, and at whose positions a constant is zero."""
    filled = (weight != 0).any(axis=tuple(place for place in range(weight.ndim) if place != axis))
    carried: Mask = np.zeros(count, bool)
    nonzero: Mask = np.zeros(count, bool)
    for column in labels:
        real = column != NONE
        carried[column[real]] = True
        nonzero[column[real & filled]] = True
    return np.asarray(carried & ~nonzero)


def _zero_in(node: gs.Node, groups: ChannelGroups, linears: dict[str, Linear], zero: dict[str, Mask]) -> Mask:
    """The units at whose positions the outputs are zero whatever the input."""
    nothing: Mask = np.zeros(groups.count, bool)
    if node.op in _WITH_ONE_WEIGHT:
        linear = linears.get(node.outputs[0].name)
        return nothing if linear is None else _zero_rows(node, linear, groups)
    if node.op in _JOINS and not all(_is_data(each) for each in present(node.inputs)):
        return nothing
    carrying = [each for each in present(node.inputs) if each.name in groups.axes and each.name in zero]
    if node.op == "Mul":
        return np.logical_or.reduce([zero[each.name] for each in carrying]) if carrying else nothing
    if node.op not in _KEEPS_ZERO or len(carrying) < len([each for each in present(node.inputs) if _is_data(each)]):
        return nothing
    spared = [zero[each.name] | ~_carried(groups.axes[each.name], groups.count) for each in carrying]
    return np.asarray(np.logical_and.reduce(spared)) if spared else nothing


def _is_data(tensor: gs.Tensor) -> bool:
    """Whether an input is computed, not a constant: constants of the other operators only scale or move."""
    return constant_of(tensor) is None


def _zero_rows(node: gs.Node, linear: Linear, groups: ChannelGroups) -> Mask:
    nothing: Mask = np.zeros(groups.count, bool)
    axes = groups.axes.get(linear.weight)
    weight = next((constant_of(each) for each in node.inputs if each.name == linear.weight), None)
    labels = None if axes is None else axes[linear.output_axis]
    if weight is None or labels is None or linear.groups > 1:
        return nothing
    result = _all_zero(weight, linear.output_axis, labels, groups.count)
    if not has_input(node, 2):
        return result
    bias, uses = constant_of(node.inputs[2]), groups.uses.get((linear.output, 2))
    if bias is None or uses is None or uses[-1] is None:
        return nothing
    return result & _all_zero(bias.reshape(-1), 0, uses[-1], groups.count)


def _carried(axes: Labels, count: int) -> Mask:
    result: Mask = np.zeros(count, bool)
    for labels in axes:
        if labels is not None:
            result[labels[labels != NONE]] = True
    return result
