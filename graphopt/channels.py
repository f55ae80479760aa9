"""Channel groups: which positions of which axes of which tensors must be removed together.

    groups = find_groups(graph)

Every constant brings one unit for each position of its axes; rules of operators (`channel_contractions`,
`channel_alignments`, `channel_moves`) pass them on to results, merge those that meet, and refine them where an
operator looks at an axis as a product (`graphopt.units`). An operator without a rule keeps what it touches, and so do
graph inputs and outputs, with the reason. What is left is sorted into groups: units that occur on the same axes. No
topology is looked for; heads of attention, conv groups, channel shuffles and gates of LSTM follow from the rules.

The time is linear in the positions of all axes. Open input sizes are assumed (`graphopt.sizes`); units come from
weights, whose sizes are known, so what is found holds for all input sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graphopt.channel_alignments import ALIGNMENTS
from graphopt.channel_contractions import CONTRACTIONS
from graphopt.channel_flow import Flow, Linear, Unclear
from graphopt.channel_moves import MOVES, Rule
from graphopt.graph import all_graphs, bodies, constants_in, is_constant, label_of, nested_output_names, present
from graphopt.macs import count_macs
from graphopt.node_order import sorted_nodes
from graphopt.shapes import infer_shapes
from graphopt.sizes import Shape, at_assumed_sizes, fixed_shape
from graphopt.stated_sizes import SizeOf, carries_sizes, stated
from graphopt.units import NONE, Axis

Labels = tuple[NDArray[np.int64] | None, ...]
"""For each axis of a tensor, units [columns, positions] or None where none of its positions can go; -1 is no unit."""

Use = tuple[str, int]
"""A place where a constant is read: the name of the node's first output, and the number of the input."""

_RULES: dict[str, Rule] = {**ALIGNMENTS, **CONTRACTIONS, **MOVES}
_READS_SIZES = {("Reshape", 1), ("Expand", 1), ("ConstantOfShape", 0), ("Resize", 3)}


@dataclass(frozen=True)
class Member:
    """An axis that carries the units of a group."""

    tensor: str
    axis: int
    positions: int  # of the axis that go with each unit


@dataclass(frozen=True)
class Group:
    """Units that can be exchanged for one another: all lie on the same axes.

    Attributes:
        name: of the first linear operator that makes them, else of the first tensor that holds them.
        units: their numbers, in the order of the positions on the first axis.
        members: the axes, weights first.
        width: positions on the axis of `name` that go with each unit.
        macs, params: what goes with one unit, while all others are there.
        frozen: why no unit can be removed, a sentence; None: units can be.
        inexact: why outputs change more than by the contribution of what is removed, a sentence; None: they do not.
    """

    name: str
    units: NDArray[np.int64]
    members: tuple[Member, ...]
    width: int
    macs: int
    params: int
    frozen: str | None
    inexact: str | None

    @property
    def size(self) -> int:
        """How many units there are."""
        return len(self.units)


@dataclass(frozen=True)
class Cost:
    """MACs of a node or elements of a constant: a product of the shares that are left of `axes`."""

    amount: int
    axes: Labels


@dataclass(frozen=True)
class ChannelGroups:
    """All groups of a graph, and where their units are.

    Attributes:
        groups: in the order in which the graph first holds them.
        count: of units.
        axes: by tensor name; tensors without units are left out.
        uses: of constant vectors, by the place where they are read.
        macs: of each node that has any.
        params: elements of each constant of floating-point type.
        linears: linear operators with a constant weight.
        scales: uses that scale channels: the scale of BatchNormalization.
    """

    groups: tuple[Group, ...]
    count: int
    axes: Mapping[str, Labels]
    uses: Mapping[Use, Labels]
    macs: tuple[Cost, ...]
    params: tuple[Cost, ...]
    linears: tuple[Linear, ...]
    scales: tuple[Use, ...]

    def cost(self, kind: str, gone: NDArray[np.bool_]) -> float:
        """The "macs" or "params" of the graph without the units that are `gone`, bool [count]."""
        return sum(each.amount * _share(each.axes, gone) for each in (self.macs if kind == "macs" else self.params))

    def to_networkx(self) -> nx.Graph[str]:
        """Groups and the tensors that carry them as a bipartite graph; edges know axis and positions of each unit."""
        graph: nx.Graph[str] = nx.Graph()
        for group in self.groups:
            graph.add_node(group.name, kind="group", size=group.size, macs=group.macs, params=group.params)
            graph.nodes[group.name]["frozen"] = group.frozen or ""
            for member in group.members:
                tensor = f"tensor {member.tensor}"
                graph.add_node(tensor, kind="tensor")
                graph.add_edge(group.name, tensor, axis=member.axis, positions=member.positions)
        return graph

    def to_json(self) -> list[dict[str, Any]]:
        """The groups as JSON holds them."""
        return [
            {
                "name": group.name,
                "size": group.size,
                "width": group.width,
                "macs_per_unit": group.macs,
                "params_per_unit": group.params,
                "frozen": group.frozen,
                "inexact": group.inexact,
                "members": [vars(member) for member in group.members],
            }
            for group in self.groups
        ]

    def __str__(self) -> str:
        return "\n".join(
            f"{group.name}: {group.size} x {group.width}, {len(group.members)} members, "
            f"{group.macs:,} MACs and {group.params:,} parameters each"
            + (f", stays: {group.frozen}" if group.frozen else "")
            for group in self.groups
        )


def kept_positions(labels: NDArray[np.int64] | None, gone: NDArray[np.bool_]) -> NDArray[np.int64] | None:
    """The positions of an axis that stay without the units that are `gone`; None: all."""
    if labels is None:
        return None
    stays = ~(gone[labels] & (labels != NONE)).any(axis=0)
    return None if stays.all() else np.flatnonzero(stays)


def _share(axes: Labels, gone: NDArray[np.bool_]) -> float:
    share: float = 1.0
    for labels in axes:
        kept = kept_positions(labels, gone)
        if kept is not None and labels is not None:
            share *= len(kept) / int(labels.shape[1])
    return share


def find_groups(graph: gs.Graph) -> ChannelGroups:
    """Find the channel groups of the main graph, whose shapes are inferred; else it is left as it is.

    Raises:
        ModelError: the graph has a cycle, or shape inference refuses it.
    """
    infer_shapes(graph)
    sized, _ = at_assumed_sizes(graph)
    flow = Flow(_shapes(sized), count_macs(sized).by_node, opset=graph.opset or 0)
    nodes = sorted_nodes(graph)
    for tensor in graph.inputs:
        _give_fixed(flow, tensor, f"it is the graph input {tensor.name}")
    for node in nodes:
        _follow(flow, node)
    for tensor in graph.outputs:
        for axis in flow.axes.get(id(tensor), ()):
            flow.units.freeze(axis, f"it is the graph output {tensor.name}")
    _hold_what_bodies_read(flow, graph)
    return _Gathering(flow, graph, nodes).result()


def _shapes(sized: gs.Graph) -> dict[str, Shape | None]:
    tensors = [*sized.inputs, *(tensor for node in sized.nodes for tensor in (*node.inputs, *node.outputs))]
    return {tensor.name: fixed_shape(tensor) for tensor in tensors}


def _give_fixed(flow: Flow, tensor: gs.Tensor, reason: str) -> None:
    shape = flow.shapes.get(tensor.name)
    if shape is not None:
        flow.axes[id(tensor)] = [Axis(size, fixed=reason) for size in shape]


def _follow(flow: Flow, node: gs.Node) -> None:
    if node.op == "Constant" and not node.domain:
        return  # as an initializer: axes come when it is read
    rule = None if node.domain not in (None, "", "ai.onnx") else _RULES.get(node.op)
    if rule is None:
        kind = "has bodies" if bodies(node) else "is an operator without a rule"
        flow.hold_all(node, f"{node.op} {label_of(node)} {kind}")
        return
    try:
        rule(flow, node)
    except Unclear as reason:
        flow.hold_all(node, f"{node.op} {label_of(node)} is not followed: {reason}")
    _hold_sizes_that_are_computed_with(flow, node)


def _hold_sizes_that_are_computed_with(flow: Flow, node: gs.Node) -> None:
    if carries_sizes(node):
        return
    for index, tensor in enumerate(node.inputs):
        if (node.op, index) in _READS_SIZES or not tensor.inputs or not carries_sizes(tensor.inputs[0]):
            continue
        for entry in stated(tensor) or ():
            if isinstance(entry, SizeOf) and id(entry.tensor) in flow.axes:
                flow.hold(flow.axes[id(entry.tensor)][entry.axis], node, "computes with the size of this axis")


def _hold_what_bodies_read(flow: Flow, graph: gs.Graph) -> None:
    names = nested_output_names(graph)
    inner = [each for each in all_graphs(graph) if each is not graph]
    read = {id(tensor): tensor for each in inner for node in each.nodes for tensor in node.inputs}
    read.update((id(t), t) for node in graph.nodes if names for t in node.outputs if t.name in names)
    for key, tensor in read.items():
        for axis in flow.axes.get(key, ()):
            flow.units.freeze(axis, f"a body of If, Loop or Scan reads {tensor.name}")


class _Gathering:
    """Turns a flow into groups: numbers the units, and finds which of them occur on the same axes."""

    def __init__(self, flow: Flow, graph: gs.Graph, nodes: list[gs.Node]) -> None:
        self._flow = flow
        self._graph = graph
        self._number: NDArray[np.int64] = np.full(flow.units.count, NONE)
        self._count = 0
        self._by_axis: dict[tuple[str, int], NDArray[np.int64]] = {}
        tensors = {id(t): t for node in nodes for t in (*present(node.inputs), *present(node.outputs))}
        first_output = {id(node): present(node.outputs)[0].name for node in nodes if present(node.outputs)}
        self.axes = {
            tensor.name: labels
            for key, tensor in tensors.items()
            if key in flow.axes and (labels := self._labels(flow.axes[key])) is not None
        }
        self.uses = {
            (first_output[node], index): labels
            for (node, index), axes in flow.uses.items()
            if (labels := self._labels(axes)) is not None
        }
        self._constants = {tensor.name for tensor in tensors.values() if is_constant(tensor)}
        self._used_constants = {
            (first_output[id(node)], index): node.inputs[index].name
            for node in nodes
            for index in range(len(node.inputs))
            if (id(node), index) in flow.uses
        }
        self._scales = tuple((first_output[node], index) for node, index in flow.scales)

    def _labels(self, axes: list[Axis]) -> Labels | None:
        labels = tuple(self._numbered(axis) for axis in axes)
        return None if all(each is None for each in labels) else labels

    def _numbered(self, axis: Axis) -> NDArray[np.int64] | None:
        columns = self._flow.units.resolved(axis).columns
        columns = tuple(column for column in columns if (column != NONE).any())
        if not columns:
            return None
        stacked = np.stack(columns)
        ids = stacked[stacked != NONE]
        new = ids[self._number[ids] == NONE]
        if len(new):
            distinct, first = np.unique(new, return_index=True)
            self._number[distinct[np.argsort(first)]] = np.arange(self._count, self._count + len(distinct))
            self._count += len(distinct)
        return np.where(stacked == NONE, NONE, self._number[stacked])

    def result(self) -> ChannelGroups:
        flow = self._flow
        works = [Cost(work.macs, self._labels(list(work.axes)) or ()) for work in flow.works]
        frozen = self._reasons(flow.units.frozen())
        inexact: dict[int, str] = {}
        for axis, reason in flow.inexact:
            labels = self._numbered(axis)
            for unit in np.unique(labels[labels != NONE]).tolist() if labels is not None else ():
                inexact.setdefault(unit, reason)
        costs = [*self._params()]
        groups = self._groups(frozen, inexact, works, costs)
        return ChannelGroups(
            groups=groups,
            count=self._count,
            axes=self.axes,
            uses=self.uses,
            macs=tuple(works),
            params=tuple(costs),
            linears=tuple(flow.linears),
            scales=self._scales,
        )

    def _reasons(self, by_id: Mapping[int, str]) -> dict[int, str]:
        return {int(number): reason for unit, reason in by_id.items() if (number := self._number[unit]) != NONE}

    def _params(self) -> Iterator[Cost]:
        """Each constant once; a vector that is read in several places counts where it is read first."""
        uses: dict[str, Labels] = {}
        for use, name in self._used_constants.items():
            uses.setdefault(name, self.uses.get(use, ()))
        for constant in constants_in(self._graph):
            if np.dtype(constant.dtype).kind == "f":
                labels = self.axes.get(constant.name, uses.get(constant.name, ()))
                yield Cost(int(np.prod(constant.shape, dtype=np.int64)), labels)

    def _groups(
        self, frozen: dict[int, str], inexact: dict[int, str], works: list[Cost], params: list[Cost]
    ) -> tuple[Group, ...]:
        signature: NDArray[np.uint64] = np.zeros(self._count, np.uint64)
        columns: list[tuple[str, int, NDArray[np.int64]]] = []
        random = np.random.default_rng(0)
        by_place = [*self.axes.items(), *((self._used_constants[use], labels) for use, labels in self.uses.items())]
        for name, axes in by_place:
            for axis, labels in enumerate(axes):
                for column in labels if labels is not None else ():
                    units = column[column != NONE]
                    mark = random.integers(2**63, dtype=np.uint64)
                    np.add.at(signature, units, mark)
                    columns.append((name, axis, units))
        reasons = dict.fromkeys(frozen.values())
        mark_of = dict(zip(reasons, random.integers(2**63, size=len(reasons), dtype=np.uint64), strict=True))
        if frozen:
            signature[list(frozen)] += np.array([mark_of[reason] for reason in frozen.values()])
        _, first, group_of = np.unique(signature, return_index=True, return_inverse=True)
        group_of = group_of.reshape(-1)
        members: list[list[Member]] = [[] for _ in first]
        sizes = np.bincount(group_of, minlength=len(first))
        for name, axis, units in columns:
            for group, count in zip(*_counted(group_of[units]), strict=True):
                members[group].append(Member(name, axis, count // int(sizes[group])))
        macs, weights = self._per_unit(works), self._per_unit(params)
        makers, carried = self._makers(group_of), self._carried()
        ordered = np.argsort(group_of, kind="stable")
        starts = np.concatenate([[0], np.cumsum(sizes)])
        names: set[str] = set()
        result = []
        for group in np.argsort(first).tolist():
            units = ordered[starts[group] : starts[group + 1]]
            own = sorted(members[group], key=lambda member: member.tensor not in self._constants)
            name, width = makers.get(group, (own[0].tensor if own else "", own[0].positions if own else 1))
            unit = int(units[0])
            if unit not in carried:
                continue
            result.append(
                Group(
                    _fresh(name, names),
                    units,
                    tuple(own),
                    width,
                    round(macs[unit]),
                    round(weights[unit]),
                    frozen.get(unit, _too_few(units)),
                    inexact.get(unit),
                )
            )
        return tuple(result)

    def _per_unit(self, costs: list[Cost]) -> NDArray[np.float64]:
        total = np.zeros(self._count)
        for cost in costs:
            for labels in cost.axes:
                if labels is not None:
                    np.add.at(total, labels[labels != NONE], cost.amount / labels.shape[1])
        return total

    def _carried(self) -> set[int]:
        """The units on a channel axis of a linear operator; others are not worth a group."""
        found: set[int] = set()
        for linear in self._flow.linears:
            axes = self.axes.get(linear.weight, ())
            for place in (linear.output_axis, linear.input_axis):
                labels = axes[place] if axes else None
                if labels is not None:
                    found.update(np.unique(labels[labels != NONE]).tolist())
        return found

    def _makers(self, group_of: NDArray[np.int64]) -> dict[int, tuple[str, int]]:
        """The first linear operator of which the output axis of the weight holds a group, and how often."""
        makers: dict[int, tuple[str, int]] = {}
        for linear in self._flow.linears:
            axes = self.axes.get(linear.weight)
            labels = axes[linear.output_axis] if axes is not None else None
            for column in labels if labels is not None else ():
                for unit, count in zip(*_counted(column[column != NONE]), strict=True):
                    makers.setdefault(int(group_of[unit]), (linear.node, count))
        return makers


def _counted(values: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    found, counts = np.unique(values, return_counts=True)
    return found.tolist(), counts.tolist()


def _too_few(units: NDArray[np.int64]) -> str | None:
    return "it is one unit alone: without it, an axis would be empty" if len(units) < 2 else None


def _fresh(name: str, taken: set[str]) -> str:
    number, fresh = 1, name
    while fresh in taken:
        number += 1
        fresh = f"{name}#{number}"
    taken.add(fresh)
    return fresh
