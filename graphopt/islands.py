"""Int8 islands: operators that hand integers to each other, and whether an island is worth its conversions.

Between an island and the float graph around it stand a Q or a DQ, in onnxruntime also a change of layout. What an
island saves must pay for them:

    saved = sum over its operators of MACs * saving per MAC
    spent = sum over its borders of a fixed cost + elements * cost per element

with the costs of the target's table, measured there one kind of operator at a time; int8 kernels that are slower than
float ones save less than nothing. An estimate is only asked which islands surely do not pay; `qdq:autotune=true`
measures (`graphopt.autotune`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import onnx_graphsurgeon as gs

from graphopt.conv_kernels import is_depthwise
from graphopt.graph import all_graphs, is_constant, producer
from graphopt.macs import count_macs
from graphopt.placement import Placement
from graphopt.sizes import Shape, at_assumed_sizes, at_sizes, fixed_shape
from graphopt.targets import DEPTHWISE, FEW_ROWS, Costs

_FEW_ROWS = 16


@dataclass(frozen=True)
class Island:
    """Operators that are connected by quantized tensors.

    Attributes:
        nodes: the operators, in the graph's order.
        borders: the tensors that are quantized on the way in, and those that are dequantized on the way out.
    """

    nodes: tuple[gs.Node, ...]
    borders: tuple[gs.Tensor, ...]


def islands_of(placement: Placement) -> list[Island]:
    """The islands of a placement, in the order of their first operators."""
    graph = placement.graph
    kept = {id(node): node for node in placement.nodes}
    joined = nx.Graph()
    joined.add_nodes_from(kept)
    borders: dict[int, list[gs.Tensor]] = {key: [] for key in kept}
    outputs = {id(tensor) for tensor in graph.outputs}
    for name, activation in placement.activations.items():
        tensor = activation.tensor
        computing = placement.computed_by.get(name)
        users = [node for node in (*placement.users[name], *tensor.outputs) if id(node) in kept]
        members = [id(node) for node in (computing, *users) if node is not None]
        if not members:
            continue
        nx.add_path(joined, members)
        is_read_in_float = id(tensor) in outputs or any(id(node) not in kept for node in tensor.outputs)
        if computing is None or is_read_in_float:
            borders[members[0]].append(tensor)
    for rescaled, _ in placement.rescaled:
        node = producer(rescaled.tensor)
        nx.add_path(joined, [id(each) for each in (node, *rescaled.tensor.outputs) if id(each) in kept])
    order = {id(node): index for index, node in enumerate(graph.nodes)}
    found = [sorted(members, key=order.__getitem__) for members in nx.connected_components(joined)]
    return [
        Island(
            tuple(kept[member] for member in members), tuple(tensor for member in members for tensor in borders[member])
        )
        for members in sorted(found, key=lambda members: order[members[0]])
    ]


def too_small(
    graph: gs.Graph, placements: Sequence[Placement], costs: Costs, input_shapes: Mapping[str, Shape] | None = None
) -> dict[int, str]:
    """By id of a node, why its island does not pay.

    Args:
        graph: the float graph.
        placements: of that graph and its branches.
        costs: of its target.
        input_shapes: by input name; None: open sizes are assumed as in `graphopt.sizes`.
    """
    sized = at_assumed_sizes(graph)[0] if input_shapes is None else at_sizes(graph, input_shapes)
    counterparts = dict(zip(map(id, all_graphs(graph)), all_graphs(sized), strict=True))
    reasons: dict[int, str] = {}
    for placement in placements:
        reasons |= _too_small_in(placement, counterparts[id(placement.graph)], costs)
    return reasons


def _too_small_in(placement: Placement, sized: gs.Graph, costs: Costs) -> dict[int, str]:
    macs = count_macs(sized).by_node
    shapes = {tensor.name: fixed_shape(tensor) for node in sized.nodes for tensor in (*node.inputs, *node.outputs)}
    reasons: dict[int, str] = {}
    for island in islands_of(placement):
        known = [shape for tensor in island.borders if (shape := shapes.get(tensor.name)) is not None]
        counted = [macs.get(node.outputs[0].name, 0) for node in island.nodes]
        if len(known) < len(island.borders) or not any(counted):
            continue
        savings = [
            count * costs.saved_ns_per_mac.get(_kind(node, count), 0.0)
            for node, count in zip(island.nodes, counted, strict=True)
        ]
        saved, lost = sum(each for each in savings if each > 0), -sum(each for each in savings if each < 0)
        spent = sum(costs.border_ns + costs.border_ns_per_element * math.prod(shape) for shape in known)
        if saved < lost + spent:
            losing = f", lose {lost / 1e3:.1f} us in depthwise Convs" if lost else ""
            reason = (
                f"{sum(counted):,} MACs between float operators: int8 would save some {saved / 1e3:.1f} us{losing} and "
                f"spend {spent / 1e3:.1f} us on conversions (qdq:small_islands=true quantizes it)"
            )
            reasons |= {id(node): reason for node in island.nodes}
    return reasons


def _kind(node: gs.Node, macs: int) -> str:
    """What an operator is called in a table of costs."""
    op: str = node.op
    if is_depthwise(node):
        return DEPTHWISE
    if op in ("Gemm", "MatMul") and is_constant(node.inputs[1]) and macs <= _FEW_ROWS * math.prod(node.inputs[1].shape):
        return FEW_ROWS
    return op
