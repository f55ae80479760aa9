"""Which share of a model's MACs some of its operators do."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from graphopt.errors import ModelError
from graphopt.frame import gs_graphs
from graphopt.lint_rule import Subject
from graphopt.macs import Place, macs_by_operator

MACS_IN_INT8, MACS_IN_FLOAT8 = "share of MACs in int8", "share of MACs in float8"
"""Names of the figure in reports."""


def share_of_macs(subject: Subject, nodes: Collection[int]) -> float | None:
    """The share of nodes, given by `id`; None where no MACs are known."""
    macs = subject.shared(_macs)
    total = sum(macs.values())
    return sum(macs.get(place, 0) for place in _places_of(subject, nodes)) / total if total else None


def _macs(subject: Subject) -> Mapping[Place, int]:
    try:
        return macs_by_operator(subject.model.graph, subject.input_shapes)
    except ModelError:  # shape inference refuses it
        return {}


def _places_of(subject: Subject, nodes: Collection[int]) -> set[Place]:
    return {
        (key, node.outputs[0].name)
        for key, graph in gs_graphs(subject.model.graph)
        for node in graph.nodes
        if id(node) in nodes and node.outputs
    }
