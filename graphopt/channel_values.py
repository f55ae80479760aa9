"""What is known of the values of channels: which are one constant in every place, and which equal each other.

Channels are numbered by value along the axis of a tensor that carries units: two positions with one number hold the
same values for every input. Each operator that works on channels one by one passes numbers on:

    linear        y[o] by the row W[o] and b[o]; with groups, by the numbers of the channels of its group too
    elementwise   by the numbers of all operands in that position, and the parameters of the channel
    moves         each channel keeps its number, in the order in which its elements lie

Constants pass too: b[o] + sum over c of W[o, c] * x[c] where all x[c] that count are constant, and elementwise
operators are run on them. Padding is not constant, so that a padded channel passes on as constant only if it is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graphopt.channel_groups import ChannelGroups
from graphopt.evaluate import evaluate
from graphopt.graph import Array, constant_of, has_input, present
from graphopt.graph_export import opset_imports
from graphopt.linear import OPERATORS, Linear, linear
from graphopt.node_order import sorted_nodes
from graphopt.operators import ELEMENTWISE, MOVING
from graphopt.units import NONE

Ids = NDArray[np.int64]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class ChannelValues:
    """What is known of a tensor along the one axis that carries units.

    Attributes:
        axis: that axis.
        units: int64 [positions], NONE where there is none.
        numbers: int64 [positions]; equal ones hold equal values. They say nothing of other tensors.
        constants: float64 [positions], the value in every place, or NaN where it is not known to be one.
    """

    axis: int
    units: Ids
    numbers: Ids
    constants: Values


def channel_values(
    graph: gs.Graph, groups: ChannelGroups, overridable: Container[str] = ()
) -> dict[str, ChannelValues]:
    """What is known of each tensor that nodes compute and that carries units on one axis, by name.

    Args:
        graph: what `groups` were found in.
        groups: of the graph.
        overridable: names of the graph inputs with default values.
    """
    numbering = _Numbering(groups, overridable, opset_imports(graph))
    for node in sorted_nodes(graph):
        for index, tensor in enumerate(node.outputs):
            if tensor.name:
                numbering.follow(node, index, tensor)
    return numbering.found


class _Numbering:
    def __init__(
        self, groups: ChannelGroups, overridable: Container[str], imports: list[onnx.OperatorSetIdProto]
    ) -> None:
        self.found: dict[str, ChannelValues] = {}
        self._groups, self._overridable, self._imports = groups, overridable, imports

    def follow(self, node: gs.Node, index: int, tensor: gs.Tensor) -> None:
        """Number the channels of an output."""
        axes = self._groups.axes.get(tensor.name, ())
        carrying = [axis for axis, labels in enumerate(axes) if labels is not None]
        labels = axes[carrying[0]] if len(carrying) == 1 else None
        if labels is None or len(labels) != 1:
            return
        axis, units = carrying[0], labels[0]
        rule = _RULES.get(node.op) if not node.domain and (index == 0 or node.op == "Split") else None
        known = None if rule is None else rule(self, node, axis, units)
        numbers, constants = known or (np.arange(len(units)), np.full(len(units), np.nan))
        constants = np.where(np.isfinite(constants), constants, np.nan)
        self.found[tensor.name] = ChannelValues(axis, units, numbers, constants)

    def linear(self, node: gs.Node, axis: int, units: Ids) -> _Known | None:
        """Rows of weights with their bias, and what they make of constants."""
        operator = linear(node, self._overridable)
        rank = len(self._groups.axes[node.outputs[0].name])
        if isinstance(operator, str) or operator.dequantized is not None or axis != rank + operator.output_axis:
            return None
        bias = constant_of(node.inputs[2]) if has_input(node, 2) else np.zeros(1)
        weight = operator.channels_first()
        if weight.dtype.kind != "f" or bias is None or not _is_vector(bias, len(units)):
            return None
        groups, places = len(weight), weight.shape[2]
        seen = self._read_by(operator)
        columns = [_rows(weight.reshape(len(units), -1)), _rows(np.broadcast_to(bias.reshape(-1, 1), (len(units), 1)))]
        if groups > 1:
            numbers = np.arange(groups * places) if seen is None else seen.numbers
            columns += list(np.repeat(numbers.reshape(groups, places), len(units) // groups, axis=0).T)
        constants = np.full(groups * places, np.nan) if seen is None else seen.constants
        if operator.why_not_shift_before() is not None:
            constants = np.where(constants == 0, 0, np.nan)
        counts = (weight != 0).any(axis=tuple(range(3, weight.ndim)))  # [groups, out/group, in/group]
        varies = (counts & np.isnan(constants).reshape(groups, 1, places)).any(axis=2).reshape(-1)
        results = np.broadcast_to(operator.of_constants(np.nan_to_num(constants)), len(units))
        return _number(columns), np.where(varies, np.nan, results)

    def _read_by(self, operator: Linear) -> ChannelValues | None:
        tensor = operator.node.inputs[0]
        seen = self.found.get(tensor.name)
        if seen is None or seen.axis != len(self._groups.axes[tensor.name]) + operator.input_axis:
            return None
        return seen

    def elementwise(self, node: gs.Node, axis: int, units: Ids) -> _Known | None:
        """The operands in each position; run on what is constant in all of them."""
        rank, count = len(self._groups.axes[node.outputs[0].name]), len(units)
        columns: list[Ids] = []
        feed: dict[int, Array] = {}
        known: NDArray[np.bool_] = np.ones(count, bool)
        for index, tensor in enumerate(node.inputs):
            if not tensor.name:
                continue
            value, seen = constant_of(tensor), self.found.get(tensor.name)
            if value is not None:
                at = 0 if node.op == "BatchNormalization" else axis - rank + value.ndim
                varies = at >= 0 and value.ndim > 0 and value.shape[at] == count
                if varies:
                    columns.append(_rows(np.moveaxis(value, at, 0).reshape(count, -1)))
                known &= value.size == (count if varies else 1)
                feed[id(tensor)] = value
            elif seen is not None and index in _DATA.get(node.op, (index,)):
                operand_rank = len(self._groups.axes[tensor.name])
                if seen.axis != axis - rank + operand_rank or len(seen.units) != count:
                    return None
                columns.append(seen.numbers)
                known &= ~np.isnan(seen.constants)
                shape = [count if place == seen.axis else 1 for place in range(operand_rank)]
                feed[id(tensor)] = np.nan_to_num(seen.constants).astype(tensor.dtype).reshape(shape)
            elif tensor.shape is not None and _is_same_for_all(tensor.shape, axis - rank):
                known[:] = False
            else:
                return None
        if not columns:
            return None
        constants = np.full(count, np.nan)
        if known.any():
            result = evaluate([node], feed, node.outputs[:1], self._imports).values.get(id(node.outputs[0]))
            if result is not None and result.size == count:
                constants = np.where(known, result.reshape(-1).astype(np.float64), np.nan)
        return _number(columns), constants

    def nearby(self, node: gs.Node, axis: int, units: Ids) -> _Known | None:
        """Poolings, means and resizing: a constant stays one, unless there is padding that counts."""
        seen = self.found.get(node.inputs[0].name)
        if seen is None or not np.array_equal(seen.units, units):
            return None
        keeps = not _changes_constants(node)
        return seen.numbers, seen.constants if keeps else np.where(seen.constants == 0, 0, np.nan)

    def moved(self, node: gs.Node, axis: int, units: Ids) -> _Known | None:
        """Each channel's elements in another place: a channel in several positions is numbered by their order."""
        seen = self.found.get(node.inputs[0].name)
        if seen is None:
            return None
        real = np.flatnonzero(seen.units != NONE)
        order = real[np.argsort(seen.units[real])]
        ordered = seen.units[order]
        if len(np.unique(ordered)) < len(ordered) or not len(ordered):
            return None  # which of several positions elements come from is not known
        place = np.searchsorted(ordered, units).clip(max=len(ordered) - 1)
        is_known = ordered[place] == units
        numbers = np.where(is_known, seen.numbers[order[place]], len(seen.numbers) + np.arange(len(units)))
        constants = np.where(is_known, seen.constants[order[place]], np.nan)
        return _number([numbers, _occurrence(units)]), constants

    def concatenated(self, node: gs.Node, axis: int, units: Ids) -> _Known | None:
        """Side by side; channels of two operands never count as equal."""
        if node.attrs["axis"] % len(self._groups.axes[node.outputs[0].name]) != axis:
            return self.elementwise(node, axis, units)
        numbers: list[Ids] = []
        constants: list[Values] = []
        for tensor in present(node.inputs):
            seen = self.found.get(tensor.name)
            size = len(seen.units) if seen is not None else tensor.shape[axis] if tensor.shape is not None else None
            if not isinstance(size, int):
                return None
            own = np.arange(size) if seen is None else seen.numbers
            numbers.append(own + sum(each.max() + 1 for each in numbers[-1:]))
            constants.append(np.full(size, np.nan) if seen is None else seen.constants)
        result = np.concatenate(numbers)
        return (result, np.concatenate(constants)) if len(result) == len(units) else None


_Known = tuple[Ids, Values]
_DATA = {"BatchNormalization": (0,)}


def _number(columns: list[Ids]) -> Ids:
    """One number for each distinct tuple."""
    return np.unique(np.stack(columns), axis=1, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _rows(rows: Array) -> Ids:
    """One number for each distinct row, by its bytes: -0 is 0."""
    plain = np.ascontiguousarray(rows + 0 if rows.dtype.kind == "f" else rows)
    packed = plain.view(np.dtype((np.void, plain.dtype.itemsize * plain.shape[1]))).reshape(-1)
    return np.unique(packed, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _occurrence(units: Ids) -> Ids:
    """For each position, how many before it have the same unit."""
    order = np.argsort(units, kind="stable")
    _, first, sizes = np.unique(units[order], return_index=True, return_counts=True)
    result = np.empty_like(units)
    result[order] = np.arange(len(units)) - np.repeat(first, sizes)
    return result


def _is_vector(bias: Array, channels: int) -> bool:
    return bias.size == 1 or (bias.size == channels and bias.shape[-1] == channels)


def _is_same_for_all(shape: list[int | str | None], axis: int) -> bool:
    """Whether an operand has one position, or none, along an axis counted from the end."""
    return len(shape) < -axis or shape[axis] == 1


def _changes_constants(node: gs.Node) -> bool:
    if node.op == "AveragePool":
        is_padded = any(node.attrs.get("pads") or ()) or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
        return bool(node.attrs.get("ceil_mode") or (is_padded and node.attrs.get("count_include_pad")))
    if node.op == "Resize":
        is_outside = node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize"
        return bool(is_outside or node.attrs.get("mode", "nearest") == "cubic")
    return False


_MORE_ELEMENTWISE = ("Cast", "Ceil", "Floor", "Reciprocal", "Round", "Sign", "BatchNormalization")
_NEARBY = ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "ReduceMax", "ReduceMean", "ReduceMin")

_RULES: dict[str, Callable[[_Numbering, gs.Node, int, Ids], _Known | None]] = {
    **dict.fromkeys(sorted(OPERATORS), _Numbering.linear),
    **dict.fromkeys((*ELEMENTWISE, *_MORE_ELEMENTWISE), _Numbering.elementwise),
    **dict.fromkeys((*_NEARBY, "Resize"), _Numbering.nearby),
    **dict.fromkeys((*MOVING, "Split"), _Numbering.moved),
    "Concat": _Numbering.concatenated,
}

ONE_BY_ONE = frozenset(_RULES) - OPERATORS
"""Operators that work on the channels of an axis that they pass on one by one."""
