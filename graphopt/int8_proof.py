"""What onnxruntime really runs in int8: each node of a graph beside what the optimized graph has in its place.

onnxruntime gives a fused node the name of the operator that it stands for, perhaps with a suffix. So every node gets a
name of its own before the model is loaded, and the names in the optimized graph say what became of it. Layouts of
memory are left as they are: that level of optimization fuses nothing, and renames nodes.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import onnx

from graphopt.errors import ModelError
from graphopt.graph import all_nodes, label_of
from graphopt.model_io import Model
from graphopt.operators import MOVING
from graphopt.protobuf import all_graph_protos
from graphopt.runtime import optimized_graph

_MARK = "graphopt_node_"
_QUANTIZED_RESULT = ("QLinear", "QGemm", "QuantizeLinear", "DynamicQuantizeLinear")
_INT8_KERNELS = (
    *("QLinear", "QGemm", "QAttention", "QMoE", "ConvInteger", "MatMulInteger"),
    *("DynamicQuantizeMatMul", "DynamicQuantizeLSTM"),
)
_MOVES = MOVING | {
    *("Concat", "DepthToSpace", "Max", "MaxPool", "Min", "Pad", "ReduceMax", "ReduceMin", "Relu", "Resize"),
    *("SpaceToDepth", "Split", "Where"),
}


@dataclass(frozen=True)
class Int8Proof:
    """What became of the nodes of a graph, by `id`."""

    in_int8: frozenset[int]
    in_blocks: frozenset[int]  # products whose weight has 4 bits or so in blocks, and whose activation is float
    in_float: frozenset[int]  # the others are gone: folded, absorbed or fused into another
    quantizers_left: int  # Q and DQ nodes that onnxruntime runs


def prove(model: Model) -> Int8Proof:
    """Load a model in onnxruntime and see what becomes of each node; the model is left as it is.

    Raises:
        ModelError: onnxruntime refuses the model.

    """
    marked = model.copy()
    nodes, copies = (list(all_nodes(each.graph)) for each in (model, marked))
    for number, node in enumerate(copies):
        node.name = f"{_MARK}{number}"
    in_int8: set[int] = set()
    in_blocks: set[int] = set()
    in_float: set[int] = set()
    try:
        optimized = optimized_graph(marked, layouts=False)
    except ModelError as error:
        named = re.sub(rf"{_MARK}(\d+)", lambda match: label_of(nodes[int(match[1])]), str(error))
        raise ModelError(named) from error
    kinds: Counter[str] = Counter()
    for graph in all_graph_protos(optimized):
        stored = _stored_tensors(graph)
        for node in graph.node:
            kinds[node.op_type] += 1
            match = re.match(rf"{_MARK}(\d+)", node.name)
            if match is not None:
                found = in_int8 if _is_int8(node, stored) else in_float
                found = in_blocks if node.op_type == "MatMulNBits" else found
                found.add(id(nodes[int(match[1])]))
    left = kinds["QuantizeLinear"] + kinds["DequantizeLinear"]
    return Int8Proof(frozenset(in_int8), frozenset(in_blocks), frozenset(in_float - in_int8 - in_blocks), left)


def _stored_tensors(graph: onnx.GraphProto) -> set[str]:
    """Names of the tensors of a graph, in its order of computation, that hold quantized values."""
    stored: set[str] = set()
    for node in graph.node:
        if node.op_type.startswith(_QUANTIZED_RESULT) or (node.op_type in _MOVES and not stored.isdisjoint(node.input)):
            stored.update(node.output)
    return stored


def _is_int8(node: onnx.NodeProto, stored: set[str]) -> bool:
    return node.op_type.startswith(_INT8_KERNELS) or (node.op_type in _MOVES and not stored.isdisjoint(node.input))
