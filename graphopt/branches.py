"""Branches of the data flow that meet in one node: where they parted, and how long each is."""

from __future__ import annotations

import networkx as nx
import onnx_graphsurgeon as gs

from graphopt.graph import producer


def data_flow(graph: gs.Graph) -> nx.DiGraph:
    """The graph's nodes by id, with an edge from each producer to each consumer, and one root before all sources."""
    flow = nx.DiGraph()
    for node in graph.nodes:
        before = [parent for parent in map(producer, node.inputs) if parent is not None]
        flow.add_edges_from((id(parent), id(node)) for parent in before)
        if not before:
            flow.add_edge("source", id(node))
    return flow


def branch_lengths(flow: nx.DiGraph, node: gs.Node) -> tuple[int, int] | None:
    """Operators between a two-input node and the lowest common ancestor of its branches, for each input."""
    left, right = producer(node.inputs[0]), producer(node.inputs[1])
    if left is None or right is None:
        return None
    meeting = nx.lowest_common_ancestor(flow, id(left), id(right))
    if meeting is None:
        return None
    return (
        nx.shortest_path_length(flow, meeting, id(left)),
        nx.shortest_path_length(flow, meeting, id(right)),
    )
