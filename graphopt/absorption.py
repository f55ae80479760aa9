"""Let linear operators do without channels that are constant, or that equal another channel.

    sum over c of W[c] x[c]     x[c] = k for every input:    W[c] = 0 and W[c] k added to the bias
                                x[c] = x[d]:                 W[c] = 0 and W[c] added to W[d]

What the graph computes stays, but for rounding, and every reader then multiplies such a channel by zero: it is dead
(`graphopt.dead_channels`). A unit is absorbed only where every reader of it can do so. Padding is zero, not k: an
operator that pads keeps a constant channel, unless it equals another one.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graphopt.affine import Affine
from graphopt.channel_groups import ChannelGroups, Group
from graphopt.channel_values import ONE_BY_ONE, ChannelValues, channel_values
from graphopt.graph import Names, is_constant, label_of, present
from graphopt.linear import Linear, LinearWeights, linear, set_weights
from graphopt.node_order import sorted_nodes
from graphopt.pass_base import Skip
from graphopt.units import NONE

Mask = NDArray[np.bool_]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Absorbed:
    """What became dead."""

    constant: int
    duplicate: int
    skipped: tuple[Skip, ...]


def absorb(graph: gs.Graph, groups: ChannelGroups, among: list[Group], overridable: Container[str] = ()) -> Absorbed:
    """Multiply constant and duplicate channels by zero, in place.

    Args:
        graph: what `groups` were found in; they describe it no longer when anything was absorbed.
        groups: of the graph.
        among: the groups whose units are to go.
        overridable: names of the graph inputs with default values.
    """
    able: Mask = np.zeros(groups.count, bool)
    for group in among:
        able[group.units] = group.frozen is None and group.inexact is None
    readers = _readers(graph, groups, able, overridable)
    able &= np.logical_or.reduce([each.carried for each in readers], initial=False)
    constant = able & np.logical_and.reduce([each.spared | ~each.carried for each in readers], initial=True)
    source = _sources(groups.count, among, readers, able & ~constant)
    duplicate = source != np.arange(groups.count)
    changed = [(each.operator, each.without(constant, source)) for each in readers]
    skipped = [skip for each in readers if (skip := each.kept_for_padding(able & ~constant & ~duplicate)) is not None]
    for operator, weights in changed:
        if weights is not None and not weights.finite:
            reason = f"its weights of {operator.node.inputs[1].dtype} cannot hold the sum of those of equal channels"
            return Absorbed(0, 0, (Skip(label_of(operator.node), reason), *skipped))
    was_read = np.logical_or.reduce([each.counts for each in readers], initial=False)
    names = Names(graph)
    for operator, weights in changed:
        if weights is not None:
            _set(graph, operator, weights, names)
    return Absorbed(int((constant & was_read).sum()), int((duplicate & was_read).sum()), tuple(skipped))


class _Reader:
    """A linear operator that sums over an axis with units.

    Attributes:
        operator: it.
        carried: the units that it sums over, bool [groups.count].
        counts: those that it does not multiply by zero.
        spared: those that it can do without: multiplied by zero, or constants that can go into the bias.
    """

    def __init__(self, operator: Linear, values: ChannelValues, count: int) -> None:
        self.operator, self._values = operator, values
        weight = operator.channels_first()[0]  # [out, in, taps ...]
        counts = (weight != 0).any(axis=(0, *range(2, weight.ndim)))
        self._is_constant = ~np.isnan(values.constants)
        can_shift = operator.why_not_shift_before() is None
        spared = ~counts | (values.constants == 0) | (self._is_constant & can_shift)
        self._positions_spared = spared
        self.carried = self._any(np.ones(len(counts), bool), count)
        self.counts = self._any(counts, count)
        self.spared = self.carried & ~self._any(~spared, count)

    def _any(self, positions: Mask, count: int) -> Mask:
        """The units of which any position is marked."""
        result: Mask = np.zeros(count, bool)
        units = self._values.units[positions]
        result[units[units != NONE]] = True
        return result

    def signatures(self, units: Mask) -> Mapping[int, tuple[int, ...]]:
        """The numbers of what each unit holds, in the order of its positions, for those that it cannot do without."""
        result: dict[int, tuple[int, ...]] = {}
        for unit, number in zip(self._values.units.tolist(), self._values.numbers.tolist(), strict=True):
            if unit != NONE and units[unit] and not self.spared[unit]:
                result[unit] = (*result.get(unit, ()), number)
        return result

    def without(self, constant: Mask, source: Ids) -> LinearWeights | None:
        """The weights that multiply these by zero; None: those that it has."""
        units, places = self._values.units, np.arange(len(self._values.units))
        real = units != NONE
        goes = real & (constant[units] | (source[units] != units))
        if not (goes & self.counts[units]).any():
            return None
        bare = goes & self.spared[units]
        shift = np.where(bare, np.nan_to_num(self._values.constants), 0.0)
        weights = self.operator.before(Affine(np.where(bare, 0.0, 1.0), shift, self.operator.input_axis))
        merged = goes & ~bare
        if not merged.any():
            return weights
        of_unit: dict[int, list[int]] = {}
        for place in np.flatnonzero(real).tolist():
            of_unit.setdefault(int(units[place]), []).append(place)
        sources = places.copy()
        for unit in np.unique(units[merged]).tolist():
            sources[of_unit[unit]] = of_unit[int(source[unit])]
        return self.operator.merged(weights, sources)

    def kept_for_padding(self, left: Mask) -> Skip | None:
        """The constants that stay, with the reason."""
        reason = self.operator.why_not_shift_before()
        units = self._values.units
        held = (units != NONE) & left[units] & self._is_constant & ~self._positions_spared
        if reason is None or not held.any():
            return None
        return Skip(
            label_of(self.operator.node), f"{int(held.sum())} of the channels that it reads are constant, but {reason}"
        )


def _readers(graph: gs.Graph, groups: ChannelGroups, able: Mask, overridable: Container[str]) -> list[_Reader]:
    """The operators that sum over units; what is read in any other way is struck from `able`."""
    values = channel_values(graph, groups, overridable)
    result: list[_Reader] = []
    for node in sorted_nodes(graph):
        passed: Mask = np.zeros(groups.count, bool)
        for tensor in present(node.outputs):
            passed |= _carried(groups, tensor)
        for index, tensor in enumerate(node.inputs):
            if not tensor.name or tensor.name not in groups.axes or is_constant(tensor):
                continue
            operator = linear(node, overridable) if index == 0 else ""
            seen = values.get(tensor.name)
            if isinstance(operator, Linear) and seen is not None and _is_plain(operator, seen, groups, tensor):
                result.append(_Reader(operator, seen, groups.count))
            elif node.domain or (node.op not in _PASS_ON and not _is_depthwise(operator)):
                able &= ~_carried(groups, tensor)
            elif node.op.startswith("Reduce") or node.op not in _MOVES_PARTS:
                able &= ~_carried(groups, tensor) | passed
    return result


_MOVES_PARTS = frozenset({"Gather", "Shape", "Slice", "Split"})
"""Operators that leave parts of their input unread."""

_PASS_ON = ONE_BY_ONE | _MOVES_PARTS


def _carried(groups: ChannelGroups, tensor: gs.Tensor) -> Mask:
    result: Mask = np.zeros(groups.count, bool)
    for labels in groups.axes.get(tensor.name, ()):
        if labels is not None:
            result[labels[labels != NONE]] = True
    return result


def _is_plain(operator: Linear, values: ChannelValues, groups: ChannelGroups, tensor: gs.Tensor) -> bool:
    """Whether an operator sums over the units of its input, with a weight that can be set."""
    weight = None if operator.dequantized is not None else operator.channels_first()
    is_summed = values.axis == len(groups.axes[tensor.name]) + operator.input_axis
    return weight is not None and weight.dtype.kind == "f" and len(weight) == 1 and is_summed


def _is_depthwise(operator: Linear | str) -> bool:
    """Whether each output channel reads one input channel, so that the two go together."""
    if isinstance(operator, str) or operator.node.op != "Conv" or operator.dequantized is not None:
        return False
    weight = operator.channels_first()
    return len(weight) > 1 and weight.shape[2] == 1


def _sources(count: int, among: list[Group], readers: list[_Reader], able: Mask) -> Ids:
    """For each unit the first of its group that equals it wherever it is read: itself, where none does."""
    seen: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
    for number, reader in enumerate(readers):
        for unit, signature in reader.signatures(able).items():
            seen.setdefault(unit, []).append((number, signature))
    source = np.arange(count)
    for group in among:
        first: dict[tuple[tuple[int, tuple[int, ...]], ...], int] = {}
        for unit in group.units[able[group.units]].tolist():
            source[unit] = first.setdefault(tuple(seen[unit]), unit)
    return source


def _set(graph: gs.Graph, operator: Linear, weights: LinearWeights, names: Names) -> None:
    """Set weights under the old names, where nothing else reads the old ones."""
    node = operator.node
    old: list[gs.Tensor] = [tensor for tensor in node.inputs[1:3] if tensor.name]
    _, after = set_weights(node, weights, names)
    for before, now in zip(old, node.inputs[1:3], strict=False):
        if now is not before and not before.outputs and isinstance(before, gs.Constant):
            now.name = before.name
    if after:
        place = next(index for index, each in enumerate(graph.nodes) if each is node)
        graph.nodes[place + 1 : place + 1] = after
