"""Rules of operators that keep positions where they are: elementwise ones, normalisations, pooling, reductions."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graphopt.channel_contractions import spatial
from graphopt.channel_flow import Flow, Unclear, broadcast
from graphopt.channel_moves import Rule, axes_of
from graphopt.graph import constant_of, has_input, label_of, present
from graphopt.operators import ELEMENTWISE
from graphopt.units import Axis


def _elementwise(flow: Flow, node: gs.Node) -> None:
    operands = [flow.input(node, index) for index, tensor in enumerate(node.inputs) if tensor.name]
    axes = broadcast(flow, operands, max(map(len, operands), default=0))
    for index in range(len(node.outputs)):
        flow.give(node, index, axes)


def _same(flow: Flow, node: gs.Node) -> None:
    for index in range(len(node.outputs)):
        flow.give(node, index, flow.input(node, 0))


def _batch_norm(flow: Flow, node: gs.Node) -> None:
    data = flow.input(node, 0)
    parameters = [flow.input(node, index)[0] for index in range(1, len(node.inputs))]
    channels = flow.align(data[1], *parameters) if len(data) > 1 else data[-1]
    flow.give(node, 0, [data[0], channels, *data[2:]])
    for index in range(1, len(node.outputs)):
        flow.give(node, index, [channels])
    flow.scales.append((id(node), 1))


def _instance_norm(flow: Flow, node: gs.Node) -> None:
    data = flow.input(node, 0)
    channels = flow.align(data[1], *(flow.input(node, index)[0] for index in (1, 2)))
    for axis in data[2:]:
        _mean(flow, node, axis)
    flow.give(node, 0, [data[0], channels, *data[2:]])
    flow.scales.append((id(node), 1))


def _layer_norm(flow: Flow, node: gs.Node) -> None:
    data = flow.input(node, 0)
    first = node.attrs.get("axis", -1) % len(data)
    operands = [flow.input(node, index) for index, tensor in enumerate(node.inputs) if tensor.name]
    axes = broadcast(flow, operands, len(data))
    for axis in axes[first:]:
        _mean(flow, node, axis)
    flow.give(node, 0, axes)
    for index in range(1, len(node.outputs)):
        flow.give(node, index, [*axes[:first], *(Axis(1) for _ in axes[first:])])


def _group_norm(flow: Flow, node: gs.Node) -> None:
    data = flow.input(node, 0)
    groups = node.attrs["num_groups"]
    reason = f"GroupNormalization {label_of(node)} has groups that cut across them"
    group, place = flow.units.split(data[1], [groups, data[1].size // groups], reason)
    channels = flow.units.join([group, place])
    for index in (1, 2):
        parameter = flow.input(node, index)[0]
        flow.align(parameter, channels if parameter.size == channels.size else group)
    for axis in (place, *data[2:]):
        _mean(flow, node, axis)
    flow.give(node, 0, [data[0], channels, *data[2:]])


def _mean(flow: Flow, node: gs.Node, axis: Axis) -> None:
    if axis.columns:
        flow.inexact.append((axis, f"{node.op} {label_of(node)} takes a mean over them"))


def _reduce(flow: Flow, node: gs.Node) -> None:
    data = flow.input(node, 0)
    named = axes_of(node)
    if not named and node.attrs.get("noop_with_empty_axes"):
        flow.give(node, 0, data)
        return
    gone = {axis % len(data) for axis in named} if named else set(range(len(data)))
    for place in gone:
        if node.op == "ReduceMean":
            _mean(flow, node, data[place])
        elif node.op not in _SUMS:
            flow.hold(data[place], node, "reduces over them, and is no sum or mean")
    keep = node.attrs.get("keepdims", 1)
    flow.give(
        node, 0, [Axis(1) if place in gone else axis for place, axis in enumerate(data) if keep or place not in gone]
    )


_SUMS = {"ReduceL1", "ReduceL2", "ReduceSum", "ReduceSumSquare"}


def _pool(flow: Flow, node: gs.Node) -> None:
    data, sizes = flow.input(node, 0), flow.shape(node.outputs[0])
    if len(present(node.outputs)) > 1:
        raise Unclear("its second output counts positions in the whole input")
    flow.give(node, 0, [data[0], data[1], *spatial(flow, node, data, sizes)])


def _resize(flow: Flow, node: gs.Node) -> None:
    data, sizes = flow.input(node, 0), flow.shape(node.outputs[0])
    axes = [
        axis if axis.size == size and (place < 2 or not axis.columns) else flow.hold(axis, node, "resizes this axis")
        for place, (axis, size) in enumerate(zip(data, sizes, strict=True))
    ]
    axes = [Axis(size, axis.columns, axis.fixed) for axis, size in zip(axes, sizes, strict=True)]
    flow.give(node, 0, flow.follow_sizes(node, 3, axes) if has_input(node, 3) and not node.attrs.get("axes") else axes)


def _along_one_axis(default: int, what: str) -> Rule:
    """An operator that compares or sums positions of one axis with each other, so that none of them may go."""

    def rule(flow: Flow, node: gs.Node) -> None:
        data = list(flow.input(node, 0))
        place = node.attrs.get("axis", default) % len(data)
        data[place] = flow.hold(data[place], node, what)
        _give_changed(flow, node, data, place)

    return rule


def _give_changed(flow: Flow, node: gs.Node, data: list[Axis], place: int) -> None:
    for index, tensor in enumerate(node.outputs):
        if not tensor.name:
            continue
        sizes = flow.shape(tensor)
        if len(sizes) == len(data):
            flow.give(node, index, [*data[:place], Axis(sizes[place], fixed=data[place].fixed), *data[place + 1 :]])
        else:
            flow.give(node, index, [*data[:place], *data[place + 1 :]])


def _softmax(flow: Flow, node: gs.Node) -> None:
    """Before opset 13, over all axes from `axis` on, which is 1 by default."""
    data = list(flow.input(node, 0))
    first = node.attrs.get("axis", -1 if flow.opset >= 13 else 1) % len(data)
    for place in range(first, first + 1 if flow.opset >= 13 else len(data)):
        data[place] = flow.hold(data[place], node, _COMPARED)
    flow.give(node, 0, data)


def _cumulative_sum(flow: Flow, node: gs.Node) -> None:
    data = list(flow.input(node, 0))
    place = constant_of(node.inputs[1])
    if place is None:
        raise Unclear("it computes its axis when it runs")
    index = int(place.reshape(())) % len(data)
    data[index] = flow.hold(data[index], node, "sums them one after the other")
    flow.give(node, 0, data)


def _quantize(flow: Flow, node: gs.Node) -> None:
    data = list(flow.input(node, 0))
    if node.attrs.get("block_size"):
        raise Unclear("it has scales for blocks")
    place = node.attrs.get("axis", 1) % max(1, len(data))
    for index in range(1, len(node.inputs)):
        if has_input(node, index) and (scale := flow.input(node, index)) and scale[0].size > 1:
            data[place] = flow.align(data[place], scale[0])
    flow.give(node, 0, data)


def _range_like(flow: Flow, node: gs.Node) -> None:
    flow.give(
        node, 0, [Axis(size, fixed=f"{node.op} {label_of(node)} makes it") for size in flow.shape(node.outputs[0])]
    )


_MORE_ELEMENTWISE = (
    *("And", "BitShift", "BitwiseAnd", "Cast", "CastLike", "Ceil", "Cos", "Cosh", "Equal", "Floor", "Greater", "Mean"),
    *("GreaterOrEqual", "Identity", "IsInf", "IsNaN", "Less", "LessOrEqual", "Log", "Mod", "Not", "Or", "Reciprocal"),
    *("Round", "Shrink", "Sign", "Sin", "Sinh", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Tan", "Xor"),
)
_COMPARED = "compares them with each other: without some, the others change"

ALIGNMENTS: dict[str, Rule] = {
    **dict.fromkeys((*ELEMENTWISE, *_MORE_ELEMENTWISE), _elementwise),
    **dict.fromkeys(("Dropout",), _same),
    **dict.fromkeys(("AveragePool", "LpPool", "MaxPool"), _pool),
    **dict.fromkeys(("GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool"), _pool),
    **dict.fromkeys(("DequantizeLinear", "QuantizeLinear"), _quantize),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceLogSum", "ReduceLogSumExp"), _reduce),
    **dict.fromkeys(sorted(_SUMS), _reduce),
    **dict.fromkeys(("Hardmax", "LogSoftmax", "Softmax"), _softmax),
    **dict.fromkeys(("ArgMax", "ArgMin"), _along_one_axis(0, _COMPARED)),
    "BatchNormalization": _batch_norm,
    "CumSum": _cumulative_sum,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LRN": _along_one_axis(1, "normalises each by its neighbours"),
    "LayerNormalization": _layer_norm,
    "LpNormalization": _same,
    "RMSNormalization": _layer_norm,
    "Range": _range_like,
    "Resize": _resize,
    "SimplifiedLayerNormalization": _layer_norm,
    "TopK": _along_one_axis(-1, _COMPARED),
    "Upsample": _resize,
}
