"""From axes with units to groups: number the units, and find which of them occur on the same axes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graphopt.channel_flow import Flow
from graphopt.channel_groups import ChannelGroups, Cost, Group, Labels, Member
from graphopt.graph import constants_in, is_constant, present
from graphopt.units import NONE, Axis


class Gathering:
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
        """The groups of the graph."""
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
