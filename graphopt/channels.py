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

from dataclasses import replace

import onnx_graphsurgeon as gs

from graphopt.channel_alignments import ALIGNMENTS
from graphopt.channel_contractions import CONTRACTIONS
from graphopt.channel_flow import Flow, Unclear
from graphopt.channel_gathering import Gathering
from graphopt.channel_groups import ChannelGroups
from graphopt.channel_moves import MOVES, Rule
from graphopt.graph import all_graphs, bodies, label_of, nested_output_names
from graphopt.macs import count_macs
from graphopt.node_order import sorted_nodes
from graphopt.shapes import infer_shapes
from graphopt.sizes import Shape, at_assumed_sizes, fixed_shape
from graphopt.stated_sizes import SizeOf, carries_sizes, stated
from graphopt.units import Axis

_RULES: dict[str, Rule] = {**ALIGNMENTS, **CONTRACTIONS, **MOVES}
_READS_SIZES = {("Reshape", 1), ("Expand", 1), ("ConstantOfShape", 0), ("Resize", 3)}


def find_groups(graph: gs.Graph) -> ChannelGroups:
    """Find the channel groups of the main graph, whose shapes are inferred; else it is left as it is.

    Raises:
        ModelError: the graph has a cycle, or shape inference refuses it.
    """
    infer_shapes(graph)
    sized, _ = at_assumed_sizes(graph)
    flow = Flow(_shapes(sized), count_macs(sized).by_node, opset=graph.opset or 0)
    nodes = sorted_nodes(graph)
    _fill_in_ranks(flow, graph, nodes)
    for tensor in graph.inputs:
        _give_fixed(flow, tensor, f"it is the graph input {tensor.name}")
    for node in nodes:
        _follow(flow, node)
    for tensor in graph.outputs:
        for axis in flow.axes.get(id(tensor), ()):
            flow.units.freeze(axis, f"it is the graph output {tensor.name}")
    _hold_what_bodies_read(flow, graph)
    nested = (node for each in all_graphs(graph) if each is not graph for node in each.nodes)
    linear = tuple(label_of(node) for node in nested if node.op in CONTRACTIONS and not node.domain)
    return replace(Gathering(flow, graph, nodes).result(), nested=linear)


def _shapes(sized: gs.Graph) -> dict[str, Shape | None]:
    tensors = [*sized.inputs, *(tensor for node in sized.nodes for tensor in (*node.inputs, *node.outputs))]
    return {tensor.name: fixed_shape(tensor) for tensor in tensors}


def _fill_in_ranks(flow: Flow, graph: gs.Graph, nodes: list[gs.Node]) -> None:
    """State ranks that inference finds at assumed sizes only: Shape, and what is made of it, cannot be read without."""
    interface = {id(tensor) for tensor in graph.outputs}
    for node in nodes:
        for tensor in node.outputs:
            shape = flow.shapes.get(tensor.name)
            if tensor.shape is None and shape is not None and id(tensor) not in interface:
                tensor.shape = [None] * len(shape)


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
