"""Channel groups as values: what they hold, what goes with them, how they print and export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from graphopt.channel_flow import Linear
from graphopt.units import NONE

Labels = tuple[NDArray[np.int64] | None, ...]
"""For each axis of a tensor, units [columns, positions] or None where none of its positions can go; -1 is no unit."""

Use = tuple[str, int]
"""A place where a constant is read: the name of the node's first output, and the number of the input."""


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
        nested: labels of linear operators in branches and bodies, where channels are not followed.
    """

    groups: tuple[Group, ...]
    count: int
    axes: Mapping[str, Labels]
    uses: Mapping[Use, Labels]
    macs: tuple[Cost, ...]
    params: tuple[Cost, ...]
    linears: tuple[Linear, ...]
    scales: tuple[Use, ...]
    nested: tuple[str, ...] = ()

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
