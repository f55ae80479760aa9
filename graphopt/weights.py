"""Weights of operators: constants, and transposes of constants that others read as they are.

Exporters write the matrix of tied embeddings once: a Gather reads its rows, and the last product its transpose. `fold`
leaves such a Transpose alone, since its result would be stored besides; for who quantizes the product it is a weight.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graphopt.graph import Array, constant_of, is_constant, named_tensors, producer, remove_unread_nodes


def is_weight(tensor: gs.Tensor) -> bool:
    """Whether the value of a tensor is known before the model runs, without loading it."""
    return is_constant(tensor) or _transpose_of_constant(tensor) is not None


def weight_values(tensor: gs.Tensor) -> Array:
    """The value of a tensor that `is_weight`; a transpose is a view.

    Raises:
        ValueError: it is none.
    """
    node = _transpose_of_constant(tensor)
    values = constant_of(tensor if node is None else node.inputs[0])
    if values is None:
        raise ValueError(f"{tensor.name} is computed at run time")
    return values if node is None else values.transpose(node.attrs.get("perm"))


def remove_unread_transpose(graph: gs.Graph, tensor: gs.Tensor) -> None:
    """Take out the Transpose that computed a weight, once nothing reads it."""
    node = _transpose_of_constant(tensor)
    if node is not None and id(tensor) not in named_tensors(graph):
        remove_unread_nodes(graph, [node])


def _transpose_of_constant(tensor: gs.Tensor) -> gs.Node | None:
    node = None if is_constant(tensor) else producer(tensor)
    return node if node is not None and node.op == "Transpose" and is_constant(node.inputs[0]) else None
