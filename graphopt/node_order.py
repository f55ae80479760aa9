"""Nodes in an order in which each comes after the nodes it needs.

graphsurgeon's own sort regroups all nodes by depth, recurses once for each level, and misses an outer
tensor that a branch returns without computing on it. This one keeps the order it finds as far as it can.
"""

from __future__ import annotations

from collections.abc import Iterator

import networkx as nx
import onnx_graphsurgeon as gs

from graphopt.errors import ModelError
from graphopt.graph import bodies, present


def sorted_nodes(graph: gs.Graph) -> list[gs.Node]:
    """Return the nodes of one graph in topological order; the graph is left as it is.

    Raises:
        ModelError: the nodes need each other in a circle.

    """
    nodes = list(graph.nodes)
    producers = {tensor.name: index for index, node in enumerate(nodes) for tensor in present(node.outputs)}
    edges = [
        (producers[name], index) for index, node in enumerate(nodes) for name in names_read(node) if name in producers
    ]
    if all(producer < consumer for producer, consumer in edges):
        return nodes
    order: nx.DiGraph[int] = nx.DiGraph(edges)
    order.add_nodes_from(range(len(nodes)))
    try:
        return [nodes[index] for index in nx.lexicographical_topological_sort(order)]
    except nx.NetworkXUnfeasible as error:
        circle = [nodes[producer] for producer, _ in nx.find_cycle(order)]
        names = ", ".join(node.name or node.op for node in circle[:4])
        raise ModelError(f"the nodes {names} need each other's outputs; the graph must have no cycle") from error


def names_read(node: gs.Node) -> Iterator[str]:
    """Yield the tensors that a node reads, those that its branches and bodies take from outside included."""
    yield from (tensor.name for tensor in node.inputs)
    for body in bodies(node):
        own = {tensor.name for inner in body.nodes for tensor in inner.outputs}
        own.update(tensor.name for tensor in body.inputs)
        read = (name for inner in body.nodes for name in names_read(inner))
        yield from (name for name in read if name not in own)
        yield from (tensor.name for tensor in body.outputs if tensor.name not in own)
