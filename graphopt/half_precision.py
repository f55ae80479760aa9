"""Which tensors and graphs are of half precision: float16 and bfloat16, which targets do not quantize."""

from __future__ import annotations

import onnx_graphsurgeon as gs
from onnx import TensorProto

from graphopt.graph import all_nodes, constants_in
from graphopt.sizes import numpy_dtype

HALF_TYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}

_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "output_datatype")  # of ONNX's operators: numbers of types


def is_half(tensor: gs.Tensor) -> bool:
    """Whether a tensor is known to be of a half type."""
    return bool(tensor.dtype) and numpy_dtype(tensor.dtype).name in HALF_TYPES


def half_attributes(node: gs.Node) -> list[str]:
    """The attributes of a node that ask for a half type."""
    return [key for key in _TYPE_ATTRIBUTES if node.attrs.get(key) in HALF_TYPES.values()]


def computes_in_half(graph: gs.Graph) -> bool:
    """Whether an operator, functions and nested graphs included, reads a half type, Casts behind inputs apart."""
    results = {id(tensor) for tensor in graph.outputs if not tensor.outputs}  # of which nothing is computed
    graphs = (graph, *graph.functions)
    return (
        any(is_half(tensor) and any(node.op != "Cast" for node in tensor.outputs) for tensor in graph.inputs)
        or any(is_half(value) and id(value) not in results for each in graphs for value in constants_in(each))
        or any(
            half_attributes(node) and not all(id(tensor) in results for tensor in node.outputs)
            for each in graphs
            for node in all_nodes(each)
        )
    )
