"""Weights that are to stay float between integers, where the runtime would quantize them by itself.

onnxruntime rewrites a Conv, ConvTranspose or Gemm that reads a DQ and whose result goes to a Q, at once or by way of an
activation function: it stores the float weight as int8 with one scale for all channels, whatever kept it float here,
and where it has no int8 kernel it dequantizes that in every run (its WeightBiasQuantization, in 1.32). A LeakyRelu with
a slope of 1 between the operator and its Q returns what it is given, and keeps onnxruntime from that; behind a Conv or
a Gemm it becomes a part of that.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_graphsurgeon as gs

from graphopt.graph import Names, has_input, is_constant, set_output
from graphopt.quantizers import dequantizer_of, quantizers_after


def keep_weights_float(graph: gs.Graph, operators: Collection[str], activations: Collection[str], names: Names) -> int:
    """Put a LeakyRelu behind each operator whose float weight the runtime would quantize; return behind how many.

    Args:
        graph: with its quantizers; its branches stay as they are.
        operators: types of operators of which the runtime does so.
        activations: functions that it does not see between an operator and a Q.
        names: of the main graph.
    """
    nodes: list[gs.Node] = []
    for node in graph.nodes:
        nodes.append(node)
        if node.op in operators and not node.domain and _is_between(node, activations):
            (output,) = node.outputs
            before = gs.Variable(names.fresh(f"{output.name}_float"), output.dtype, output.shape)
            set_output(node, 0, before)
            name = names.fresh(f"{output.name}_LeakyRelu")
            nodes.append(gs.Node("LeakyRelu", name, {"alpha": 1.0}, [before], [output]))
    kept = len(nodes) - len(graph.nodes)
    graph.nodes[:] = nodes
    return kept


def _is_between(node: gs.Node, activations: Collection[str]) -> bool:
    """Whether an operator with a float weight reads a DQ and all that reads its result are Qs."""
    if not has_input(node, 1) or not is_constant(node.inputs[1]) or dequantizer_of(node.inputs[0]) is None:
        return False
    (result,) = node.outputs
    if len(result.outputs) == 1 and result.outputs[0].op in activations:
        (result,) = result.outputs[0].outputs
    return 0 < len(list(quantizers_after(result))) == len(result.outputs)
