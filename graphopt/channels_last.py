"""Which int8 MaxPools onnxruntime runs on tensors whose channels come last, as they do around its int8 Convs.

It puts a Transpose on either side of each Conv and moves them on until they cancel: through operators behind which a
Conv waits, through one that has several inputs if all of them come from a Transpose, and through any MaxPool (read in
core/optimizer/transpose_optimization, confirmed by loading such graphs in tests/test_channels_last.py). At the end of a
net, behind a hard-swish or a Sigmoid, they stay where they are, and what follows has its channels first.

A MaxPool in float before a Q becomes one on integers, for onnxruntime moves the Q before it. Its channels come first
unless an int8 Conv is before it, with nothing but elementwise operators and the like between them.
"""

from __future__ import annotations

from collections.abc import Set

import onnx_graphsurgeon as gs

from graphopt.graph import producer
from graphopt.layouts import has_layout_rule
from graphopt.placement import Placement

_CONVS = ("Conv", "AveragePool")  # an AveragePool is written as a Conv
_MIX_AXES = ("Reshape", "Flatten", "Expand", "DepthToSpace")  # no Transpose moves through


def pools_with_channels_first(placement: Placement) -> frozenset[int]:
    """The ids of the MaxPools of a graph that run on channels that come first, if they run on integers."""
    kept = set(map(id, placement.nodes))
    pools = [node for node in placement.graph.nodes if node.op == "MaxPool"]
    last = _with_channels_last(placement, kept) if pools else frozenset()
    in_float = [node for node in pools if id(node) not in kept and not _is_behind_conv(node, kept)]
    in_int8 = [node for node in pools if id(node) in kept and id(node) not in last]
    return frozenset(map(id, (*in_float, *in_int8)))


def _with_channels_last(placement: Placement, kept: Set[int]) -> frozenset[int]:
    """The ids of the operators of a placement whose results have their channels last."""
    nodes = [node for node in placement.graph.nodes if id(node) in kept]
    rescaled = {id(each.tensor) for each, _ in placement.rescaled}
    makers: dict[int, list[int]] = {}
    for node in nodes:
        found = [placement.computed_by.get(tensor.name) or producer(tensor) for tensor in node.inputs]
        makers[id(node)] = [id(maker) for maker in found if maker is not None and id(maker) in kept]

    before_conv: set[int] = set()
    for node in reversed(nodes):
        if node.op in _CONVS or (id(node) in before_conv and node.op not in _MIX_AXES):
            before_conv.update(makers[id(node)])

    last: set[int] = set()
    for node in nodes:
        moved = [maker in last for maker in makers[id(node)]]
        follows = node.op == "MaxPool" or id(node.outputs[0]) in rescaled or id(node) in before_conv
        if node.op in _CONVS or (any(moved) and follows) or (len(moved) > 1 and all(moved)):
            last.add(id(node))
    return frozenset(last)


def _is_behind_conv(node: gs.Node, kept: Set[int]) -> bool:
    """Whether an int8 Conv is before a node, and nothing that works in one layout only between them."""
    pending, seen = [node], {id(node)}
    while pending:
        for tensor in pending.pop().inputs:
            before = producer(tensor)
            if before is None or id(before) in seen:
                continue
            if before.op in _CONVS and id(before) in kept:
                return True
            if has_layout_rule(before) or before.op == "MaxPool":
                seen.add(id(before))
                pending.append(before)
    return False
