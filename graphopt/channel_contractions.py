"""Rules of operators that sum over an axis of a weight: Conv, ConvTranspose, Gemm, MatMul, Einsum, LSTM, GRU, RNN.

The axes that are summed over lose the same positions on both sides, and the sum over what is left equals the sum with
zeros in the places that went. All other axes pass on to the result. Groups of a convolution split both channel axes:

    X [N, g * C/g, ...], W [g * M/g, C/g, ...] -> Y [N, g * M/g, ...]

so what can go is a whole group, or the same place in every group.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import onnx_graphsurgeon as gs

from graphopt.channel_flow import Flow, Linear, Unclear, Work, broadcast
from graphopt.channel_moves import Rule
from graphopt.graph import has_input, is_constant, label_of
from graphopt.units import Axis


def _conv(flow: Flow, node: gs.Node) -> None:
    data, weight, sizes = flow.input(node, 0), flow.input(node, 1), flow.shape(node.outputs[0])
    for axis in weight[2:]:
        flow.hold(axis, node, "has these in its kernel")
    groups = node.attrs.get("group", 1)
    if groups == 1:
        summed = flow.align(data[1], weight[1])
        output = weight[0]
    else:
        group, output_place = _in_groups(flow, weight[0], groups, node)
        input_group, input_place = _in_groups(flow, data[1], groups, node)
        flow.align(group, input_group)
        summed = flow.align(input_place, weight[1])
        output = flow.units.join([group, output_place])
    output = _with_bias(flow, node, 2, output)
    flow.give(node, 0, [data[0], output, *spatial(flow, node, data, sizes)])
    flow.works.append(Work(flow.macs.get(node.outputs[0].name, 0), (output, summed)))
    _note(flow, node, 1, (0, 1), 1, groups)


def _conv_transpose(flow: Flow, node: gs.Node) -> None:
    data, weight, sizes = flow.input(node, 0), flow.input(node, 1), flow.shape(node.outputs[0])
    for axis in weight[2:]:
        flow.hold(axis, node, "has these in its kernel")
    groups = node.attrs.get("group", 1)
    summed = flow.align(data[1], weight[0])
    output = weight[1]
    if groups > 1:
        group, _ = _in_groups(flow, summed, groups, node)
        output = flow.units.join([group, output])
    output = _with_bias(flow, node, 2, output)
    flow.give(node, 0, [data[0], output, *spatial(flow, node, data, sizes)])
    flow.works.append(Work(flow.macs.get(node.outputs[0].name, 0), (summed, weight[1])))
    _note(flow, node, 1, (1, 0), 1, groups)


def _in_groups(flow: Flow, axis: Axis, groups: int, node: gs.Node) -> list[Axis]:
    if axis.size % groups:
        raise Unclear(f"{axis.size} channels are no multiple of its {groups} groups")
    sizes = [groups, axis.size // groups]
    return flow.units.split(axis, sizes, f"{node.op} {label_of(node)} has groups that cut across them")


def _with_bias(flow: Flow, node: gs.Node, index: int, output: Axis) -> Axis:
    return flow.align(output, flow.input(node, index)[-1]) if has_input(node, index) else output


def spatial(flow: Flow, node: gs.Node, axes: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
    """The axes from the third on, which a node works along: nothing there can go."""
    return [
        Axis(size, fixed=flow.hold(axis, node, "works along this axis").fixed)
        if axis.columns
        else Axis(size, (), axis.fixed)
        for axis, size in zip(axes[2:], sizes[2:], strict=True)
    ]


def _note(
    flow: Flow, node: gs.Node, index: int, weight_axes: tuple[int, int], data_axis: int, groups: int = 1, data: int = 0
) -> None:
    """Remember a linear operator with a constant weight of output and input axis `weight_axes`."""
    if is_constant(node.inputs[index]):
        names = node.outputs[0].name, node.inputs[index].name
        flow.linears.append(
            Linear(label_of(node), node.op, *names, *weight_axes, node.inputs[data].name, data_axis, groups)
        )


def _gemm(flow: Flow, node: gs.Node) -> None:
    left, right = flow.input(node, 0), flow.input(node, 1)
    turned = bool(node.attrs.get("transA")), bool(node.attrs.get("transB"))
    rows, inner = left[::-1] if turned[0] else left
    other, columns = right[::-1] if turned[1] else right
    summed = flow.align(inner, other)
    result = [rows, columns]
    if has_input(node, 2):
        result = broadcast(flow, [result, flow.input(node, 2)], 2)
    flow.give(node, 0, result)
    flow.works.append(Work(flow.macs.get(node.outputs[0].name, 0), (rows, summed, columns)))
    _note(flow, node, 1, (0, 1) if turned[1] else (1, 0), 0 if turned[0] else 1)


def _matmul(flow: Flow, node: gs.Node) -> None:
    ranks = [len(flow.input(node, index)) for index in (0, 1)]
    batch = [f"batch{place}" for place in range(max(0, *(rank - 2 for rank in ranks)))]
    left = [*batch[len(batch) - max(0, ranks[0] - 2) :], *["row"][: ranks[0] - 1], "sum"]
    right = [*batch[len(batch) - max(0, ranks[1] - 2) :], "sum", *["column"][: ranks[1] - 1]]
    _contract(flow, node, [left, right], [*batch, *["row"][: ranks[0] - 1], *["column"][: ranks[1] - 1]])
    if ranks[1] == 2:
        _note(flow, node, 1, (1, 0), ranks[0] - 1)
    elif ranks[0] == 2 and is_constant(node.inputs[0]):
        _note(flow, node, 0, (0, 1), max(0, ranks[1] - 2), data=1)


def _einsum(flow: Flow, node: gs.Node) -> None:
    terms, arrow, output = node.attrs["equation"].replace(" ", "").partition("->")
    if "." in terms:
        raise Unclear("its equation leaves axes without letters")
    if not arrow:
        letters = sorted(set(terms) - {","})
        output = "".join(letter for letter in letters if terms.count(letter) == 1)
    operands = [list(term) for term in terms.split(",")]
    _contract(flow, node, operands, list(output))
    if len(operands) == 2 and len(operands[1]) == 2 and is_constant(node.inputs[1]):
        summed = [letter for letter in operands[1] if letter not in output]
        if len(summed) == 1 and summed[0] in operands[0]:
            inner = operands[1].index(summed[0])
            _note(flow, node, 1, (1 - inner, inner), operands[0].index(summed[0]))


def _contract(flow: Flow, node: gs.Node, terms: Sequence[Sequence[str]], output: Sequence[str]) -> None:
    """Align axes with the same label, and give the result those in `output`."""
    meeting: dict[str, list[Axis]] = {}
    for index, term in enumerate(terms):
        for label, axis in zip(term, flow.input(node, index), strict=True):
            meeting.setdefault(label, []).append(axis)
    labelled = {}
    for label, axes in meeting.items():
        larger = [axis for axis in axes if axis.size > 1]
        labelled[label] = flow.align(*larger) if larger else axes[0]
    flow.give(node, 0, [labelled[label] for label in output])
    flow.works.append(Work(flow.macs.get(node.outputs[0].name, 0), tuple(labelled.values())))


def _recurrent(gates: int) -> Rule:
    """X [T, N, I], W [D, gates * H, I], R [D, gates * H, H], B [D, 2 * gates * H], states [D, N, H], P [D, 3 * H]."""

    def rule(flow: Flow, node: gs.Node) -> None:
        data, weight, recurrence = (flow.input(node, index) for index in range(3))
        hidden, gate = recurrence[2], Axis(gates)
        stacked = flow.units.join([gate, hidden])
        summed = flow.align(data[2], weight[2])
        flow.align(weight[1], stacked)
        flow.align(recurrence[1], flow.units.join([gate, hidden]))
        if has_input(node, 3):
            flow.align(flow.input(node, 3)[1], flow.units.join([Axis(2 * gates), hidden]))
        if has_input(node, 7):
            flow.align(flow.input(node, 7)[1], flow.units.join([Axis(3), hidden]))
        batch_first = bool(node.attrs.get("layout", 0))
        for index in (5, 6):
            if has_input(node, index):
                flow.align(flow.input(node, index)[2], hidden)
        time, batch = (data[1], data[0]) if batch_first else (data[0], data[1])
        for axis in (time, batch, weight[0], recurrence[0]):
            flow.hold(axis, node, "works along this axis")
        directions = Axis(weight[0].size, fixed=f"{label_of(node)} runs in {weight[0].size} directions")
        state = [batch, directions, hidden] if batch_first else [directions, batch, hidden]
        flow.give(node, 0, [batch, time, directions, hidden] if batch_first else [time, directions, batch, hidden])
        for index in (1, 2):
            flow.give(node, index, state)
        macs = flow.macs.get(next(tensor.name for tensor in node.outputs if tensor.name), 0)
        share = summed.size / (summed.size + hidden.size)
        flow.works.append(Work(round(macs * share), (stacked, summed)))
        flow.works.append(Work(macs - round(macs * share), (stacked, hidden)))
        for index, read in zip(count(1), (node.inputs[0].name, ""), strict=False):
            if index < 3 and is_constant(node.inputs[index]):
                names = label_of(node), node.op, node.outputs[0].name, node.inputs[index].name
                flow.linears.append(Linear(*names, 1, 2, read, 2))

    return rule


CONTRACTIONS: dict[str, Rule] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    "GRU": _recurrent(3),
    "Gemm": _gemm,
    "LSTM": _recurrent(4),
    "MatMul": _matmul,
    "RNN": _recurrent(1),
}
