"""What onnxruntime 1.32 ends the process at: a dequantized tensor that is moved, and then read inside a nested graph.

    q -> DQ -> Transpose -> t, which the body of a Loop reads             abort, at any level of optimization
    q -> DQ -> Transpose -> Q -> DQ -> t, which the body reads            runs, and the Transpose moves integers

Its optimizer that moves DequantizeLinear past such operators (QDQPropagationTransformer) takes the read from outside
for one of the Loop's own inputs. An encoder in int8 whose features a decoder reads in a Loop is such a model. Which
operators it moves past was tried with one model of each.
"""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs

from graphopt.graph import Names, all_graphs, all_nodes, bodies, producer, replace_uses
from graphopt.protobuf import all_graph_protos
from graphopt.quantizers import Quantizer, dequantizer_of

PROPAGATION = "QDQPropagationTransformer"
"""What onnxruntime calls the optimizer, without which it runs such a model."""

_PASSED = frozenset({"MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})


def moved_read(graph: onnx.GraphProto) -> str | None:
    """The name of a tensor that onnxruntime would abort at; None when there is none."""
    for each in all_graph_protos(graph):
        holders = [node for node in each.node if any(attribute.HasField("g") for attribute in node.attribute)]
        if not holders:
            continue
        dequantized, moved = set[str](), set[str]()
        for node in each.node:
            if node.op_type == "DequantizeLinear":
                dequantized.update(node.output)
            elif node.op_type in _PASSED and (node.input[0] in dequantized or node.input[0] in moved):
                moved.add(node.output[0])
            elif node.op_type == "Identity":  # onnxruntime takes it out before
                for names in (dequantized, moved):
                    names.update(node.output if node.input[0] in names else ())
        for name in (name for holder in holders for name in _read_inside(holder)):
            if name in moved:
                return name
    return None


def _read_inside(holder: onnx.NodeProto) -> list[str]:
    graphs = [nested for each in holder.attribute if each.HasField("g") for nested in all_graph_protos(each.g)]
    return [name for nested in graphs for node in nested.node for name in node.input]


def quantize_moved_reads(root: gs.Graph) -> int:
    """Put a pair with the same scale behind what moves a dequantized tensor into nested graphs, in place.

    Returns how many; one of several scales cannot go behind what moves it, and is left.
    """
    names = Names(root)
    count = 0
    for graph in all_graphs(root):
        inner = [node for holder in graph.nodes for body in bodies(holder) for node in all_nodes(body)]
        read = {id(tensor): tensor for node in inner for tensor in node.inputs}
        own = {id(tensor) for node in graph.nodes for tensor in node.outputs}
        for tensor in (tensor for key, tensor in read.items() if key in own):
            dequantizer = _moved_from(tensor)
            if dequantizer is not None and dequantizer.is_per_tensor:
                _add_pair(graph, tensor, dequantizer, names)
                count += 1
        if inner:
            graph.toposort()
    return count


def _moved_from(tensor: gs.Tensor) -> Quantizer | None:
    """The DequantizeLinear before the operators that move a tensor; None where it is not moved, or by others."""
    is_moved = False
    while (node := producer(tensor)) is not None and node.op in _PASSED | {"Identity"}:
        tensor, is_moved = node.inputs[0], is_moved or node.op in _PASSED
    return dequantizer_of(tensor) if is_moved else None


def _add_pair(graph: gs.Graph, tensor: gs.Tensor, like: Quantizer, names: Names) -> None:
    constants = like.node.inputs[1:]
    stored = gs.Variable(names.fresh(f"{tensor.name}_quantized"), like.data.dtype, tensor.shape)
    result = gs.Variable(names.fresh(f"{tensor.name}_dequantized"), tensor.dtype, tensor.shape)
    replace_uses(tensor, result)
    for op, inputs, output in (
        ("QuantizeLinear", [tensor, *constants], stored),
        ("DequantizeLinear", [stored, *constants], result),
    ):
        graph.nodes.append(gs.Node(op, names.fresh(f"{tensor.name}_{op}"), {}, inputs, [output]))
