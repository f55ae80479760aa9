"""Which int8 operators onnxruntime runs on tensors whose channels come last, as they do around its int8 Convs.

It puts a Transpose on either side of each Conv and moves them on until they cancel: through an operator behind which a
Conv waits, through one that has several inputs if all of them come from a Transpose, and through any MaxPool (read in
core/optimizer/transpose_optimization, confirmed by loading such graphs in tests/test_channels_last.py). At the end of a
net, behind a hard-swish or a Sigmoid, they stay where they are, and what follows has its channels first.
"""

from __future__ import annotations

from graphopt.graph import producer
from graphopt.placement import Placement

_CONVS = ("Conv", "AveragePool")  # an AveragePool is written as a Conv
_MIX_AXES = ("Reshape", "Flatten", "Expand", "DepthToSpace")  # no Transpose moves through


def pools_with_channels_first(placement: Placement) -> frozenset[int]:
    """The ids of the MaxPools among a placement's operators that run on tensors whose channels come first."""
    kept = {id(node): node for node in placement.nodes}
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
    return frozenset(id(node) for node in nodes if node.op == "MaxPool" and id(node) not in last)
