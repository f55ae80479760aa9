"""Int8 islands: operators that hand integers to each other, and whether an island is worth its conversions.

Between an island and the float graph around it stand a Q or a DQ, in onnxruntime also a change of layout. What an
island saves must pay for them:

    saved = sum over its operators of MACs * saving per MAC
    spent = sum over its borders of a fixed cost + elements * cost per element

with the costs of the target's table, measured there one operator at a time. An estimate is only asked which islands
are surely too small; `qdq:autotune=true` measures (`graphopt.autotune`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import networkx as nx
import onnx_graphsurgeon as gs

from graphopt.graph import producer
from graphopt.macs import count_macs
from graphopt.placement import Placement
from graphopt.sizes import Shape, at_assumed_sizes, at_sizes
from graphopt.targets import Costs


@dataclass(frozen=True)
class Island:
    """Operators that are connected by quantized tensors.

    Attributes:
        nodes: the operators, in the graph's order.
        borders: the tensors that are quantized on the way in, and those that are dequantized on the way out.
    """

    nodes: tuple[gs.Node, ...]
    borders: tuple[gs.Tensor, ...]


def islands_of(graph: gs.Graph, placement: Placement) -> list[Island]:
    """The islands of a placement, in the order of their first operators."""
    kept = {id(node): node for node in placement.nodes}
    joined = nx.Graph()
    joined.add_nodes_from(kept)
    borders: dict[int, list[gs.Tensor]] = {key: [] for key in kept}
    outputs = {id(tensor) for tensor in graph.outputs}
    for name, activation in placement.activations.items():
        tensor = activation.tensor
        before = _computing(tensor, kept)
        users = [node for node in (*placement.users[name], *tensor.outputs) if id(node) in kept]
        members = [*before, *(id(node) for node in users)]
        if not members:
            continue
        nx.add_path(joined, members)
        is_read_in_float = id(tensor) in outputs or any(id(node) not in kept for node in tensor.outputs)
        if not before or is_read_in_float:
            borders[members[0]].append(tensor)
    for rescaled, _ in placement.rescaled:
        node = producer(rescaled.tensor)
        nx.add_path(joined, [id(each) for each in (node, *rescaled.tensor.outputs) if id(each) in kept])
    order = {id(node): index for index, node in enumerate(placement.nodes)}
    found = [sorted(members, key=order.__getitem__) for members in nx.connected_components(joined)]
    return [
        Island(
            tuple(kept[member] for member in members), tuple(tensor for member in members for tensor in borders[member])
        )
        for members in sorted(found, key=lambda members: order[members[0]])
    ]


def _computing(tensor: gs.Tensor, kept: Mapping[int, gs.Node]) -> list[int]:
    """The id of the int8 operator that computes a tensor, be it through an activation or a bias that it absorbs."""
    node = producer(tensor)
    while node is not None and id(node) not in kept:
        operands = [each for each in node.inputs if each.inputs]
        if node.op not in ("Relu", "Clip", "Add") or len(operands) != 1:
            return []
        node = producer(operands[0])
    return [] if node is None else [id(node)]


def too_small(
    graph: gs.Graph, placement: Placement, costs: Costs, input_shapes: Mapping[str, Shape] | None = None
) -> dict[int, str]:
    """By id of a node, why its island does not pay.

    Args:
        graph: the float graph.
        placement: of that graph.
        costs: of its target.
        input_shapes: by input name; None: open sizes are assumed as in `graphopt.sizes`.
    """
    islands = islands_of(graph, placement)
    sized = at_assumed_sizes(graph)[0] if input_shapes is None else at_sizes(graph, input_shapes)
    macs = count_macs(sized).by_node
    sizes = {tensor.name: tensor.shape for node in sized.nodes for tensor in (*node.inputs, *node.outputs)}
    reasons: dict[int, str] = {}
    for island in islands:
        elements = [_elements(sizes.get(tensor.name)) for tensor in island.borders]
        counted = [macs.get(node.outputs[0].name, 0) for node in island.nodes]
        if None in elements or not any(counted):
            continue
        saved = sum(
            count * costs.saved_ns_per_mac.get(node.op, 0.0) * _is_dense(node)
            for node, count in zip(island.nodes, counted, strict=True)
        )
        spent = sum(costs.border_ns + costs.border_ns_per_element * count for count in elements if count is not None)
        if saved < spent:
            reason = (
                f"{sum(counted):,} MACs between float operators: int8 would save some {saved / 1e3:.1f} us and spend "
                f"{spent / 1e3:.1f} us on conversions (qdq:small_islands=true quantizes it)"
            )
            reasons |= {id(node): reason for node in island.nodes}
    return reasons


def _is_dense(node: gs.Node) -> bool:
    """Whether an operator's sums run over many channels; depthwise kernels gain nothing from int8."""
    return node.op != "Conv" or node.attrs.get("group", 1) == 1 or int(node.inputs[1].shape[1]) > 1


def _elements(shape: object) -> int | None:
    if not isinstance(shape, (list, tuple)) or not all(isinstance(size, int) for size in shape):
        return None
    return math.prod(shape)
