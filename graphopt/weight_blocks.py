"""Which matrix products read weights in blocks of few bits, and how these are written.

    int4 W [K, N] -> DQ(scale [K / size, N], axis=0, block_size=size) -> MatMul(x, .)      opset 21

The activations stay float, so no ranges are needed. onnxruntime makes MatMulNBits of the two nodes where each
DequantizeLinear, and its constants, are of one product alone; in a branch or a body it refuses to load a model in which
they are not. For it, a weight that several products share is quantized once and stored for each, unless that takes more
bytes than the float weight. Its optimizer also joins a MatMul of two matrices and the Add behind it to a Gemm, and a
Gemm with another bias than a vector stays float: such a bias is flattened where it can be, else the MatMul is written
as a Gemm, which takes no Add in.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from onnx import numpy_helper

from graphopt.block_quantization import BlockedWeight, quantize_in_blocks
from graphopt.graph import (
    Array,
    Names,
    all_graphs,
    constant_of,
    has_input,
    is_constant,
    named_tensors,
    set_input,
)
from graphopt.pass_base import Skip
from graphopt.placement import node_label
from graphopt.quantizers import dtype_of
from graphopt.stored_values import StoredTensor
from graphopt.targets import Blocks
from graphopt.weights import is_weight, remove_unread_transpose, weight_values

OPSET = 21
"""The first in which DequantizeLinear knows blocks and types of 4 bits."""


class Product(NamedTuple):
    """A matrix product, and the graph that holds it."""

    graph: gs.Graph
    node: gs.Node


def products_for_blocks(
    root: gs.Graph, blocks: Blocks, size: int, excluded: set[int]
) -> tuple[list[Product], tuple[Skip, ...]]:
    """The products of a graph, those in branches and bodies too, whose weights are to be stored in blocks.

    Args:
        root: a float graph with dtypes and shapes as far as they are known.
        blocks: what the target's kernels read.
        size: of a block.
        excluded: ids of nodes that stay as they are.

    Returns:
        the products, and the others with the reason.
    """
    found: list[Product] = []
    skipped: list[Skip] = []
    for graph in all_graphs(root):
        for node in graph.nodes:
            if node.op not in ("MatMul", "Gemm") or node.domain not in (None, "", "ai.onnx") or id(node) in excluded:
                continue
            if (reason := _why_not(node, blocks, size)) is None:
                found.append(Product(graph, node))
            else:
                skipped.append(_skip(node, reason))
    if blocks.may_be_shared:
        return found, tuple(skipped)
    readers = Counter(id(product.node.inputs[1]) for product in found)
    most = int(32 / _bits_a_weight(blocks, size))
    for _, node in found:
        if (count := readers[id(node.inputs[1])]) > most:
            skipped.append(_skip(node, f"{count} products read {node.inputs[1].name}, and each would store its own"))
    return [product for product in found if readers[id(product.node.inputs[1])] <= most], tuple(skipped)


def _skip(node: gs.Node, reason: str) -> Skip:
    return Skip(node_label(node), f"no weights in blocks: {reason}")


def _bits_a_weight(blocks: Blocks, size: int) -> float:
    return _BITS + (_SCALE_BITS + (0 if blocks.quant_type.symmetric else _BITS)) / size


_BITS, _SCALE_BITS = 4, 32


def _why_not(node: gs.Node, blocks: Blocks, size: int) -> str | None:
    value, weight = node.inputs[:2]
    if not is_weight(weight):
        return f"its second input {weight.name} is computed at run time, or may be overridden by a caller"
    if is_constant(value):
        return "both inputs are constant: run fold first"
    if (dtype := dtype_of(weight)) != np.float32:
        return f"weight {weight.name} is {dtype}; only float32 is quantized"
    if (rank := len(weight.shape)) != 2:
        return f"weight {weight.name} has {rank} axes, and kernels read one matrix"
    if node.op == "Gemm" and (reason := _why_no_gemm(node)) is not None:
        return reason
    inner = weight.shape[1] if node.attrs.get("transB", 0) else weight.shape[0]
    if inner < size:
        return f"its sums have {inner} terms, fewer than the {size} weights of a block (block_size makes it smaller)"
    if blocks.divide and inner % size:
        return f"its sums have {inner} terms, which blocks of {size} do not divide (block_size makes it smaller)"
    if not np.isfinite(weight_values(weight)).all():
        return f"weight {weight.name} holds values that are not finite"
    return None


def _why_no_gemm(node: gs.Node) -> str | None:
    if node.attrs.get("transA", 0) or node.attrs.get("alpha", 1.0) != 1.0 or node.attrs.get("beta", 1.0) != 1.0:
        return "kernels need a Gemm with transA = 0, alpha = 1 and beta = 1"
    if not has_input(node, 2):
        return None
    bias, weight = node.inputs[2], node.inputs[1]
    columns = weight.shape[0] if node.attrs.get("transB", 0) else weight.shape[1]
    if bias.shape is not None and (tuple(bias.shape) == (columns,) or _is_row(bias, columns)):
        return None
    return f"its bias {bias.name} is no vector of {columns} values"


def _is_row(tensor: gs.Tensor, columns: int) -> bool:
    """Whether a tensor is a constant [1, N], which a vector stands for."""
    return is_constant(tensor) and tensor.shape is not None and tuple(tensor.shape) == (1, columns)


def store_in_blocks(root: gs.Graph, products: list[Product], blocks: Blocks, size: int) -> None:
    """Store the weights of products in blocks; `products_for_blocks` has found these products in `root`."""
    names, named = Names(root), named_tensors(root)
    quantized: dict[tuple[int, bool], BlockedWeight] = {}
    dequantized: dict[tuple[int, int, bool], gs.Variable] = {}
    for graph, node in products:
        weight = node.inputs[1]
        transposed = bool(node.attrs.pop("transB", 0))
        key, place = (id(weight), transposed), (id(graph), id(weight), transposed)
        if key not in quantized:
            values = weight_values(weight)
            quantized[key] = quantize_in_blocks(values.T if transposed else values, size, blocks.quant_type)
        if place not in dequantized or not blocks.may_be_shared:
            dequantized[place] = _dequantized(graph, weight, quantized[key], names)
        _prepare_bias(node, quantized[key].stored.shape[1], names, named)
        set_input(node, 1, dequantized[place])
        remove_unread_transpose(graph, weight)
    for graph in {id(product.graph): product.graph for product in products}.values():
        graph.toposort()


def _prepare_bias(node: gs.Node, columns: int, names: Names, named: set[int]) -> None:
    """Give a product a form that stays one of a matrix with blocks, whatever onnxruntime joins it with."""
    if node.op == "Gemm":
        if has_input(node, 2):
            _flatten(node, 2, columns, names)
        return
    (output,) = node.outputs
    if len(output.outputs) != 1 or id(output) in named or output.outputs[0].op != "Add":
        return
    if node.inputs[0].shape is None or len(node.inputs[0].shape) < 2:
        return
    (add,) = output.outputs
    index = int(add.inputs[0] is output)
    _flatten(add, index, columns, names)
    shape = add.inputs[index].shape
    if len(node.inputs[0].shape) == 2 and (shape is None or tuple(shape) != (columns,)):
        node.op = "Gemm"


def _flatten(node: gs.Node, index: int, columns: int, names: Names) -> None:
    bias = node.inputs[index]
    if _is_row(bias, columns):
        values = constant_of(bias)
        assert values is not None
        set_input(node, index, gs.Constant(names.fresh(f"{bias.name}_vector"), values.reshape(-1)))


def _dequantized(graph: gs.Graph, weight: gs.Tensor, blocked: BlockedWeight, names: Names) -> gs.Variable:
    """Add the DequantizeLinear of a blocked weight to a graph; return its output."""
    inputs = [
        _packed(names.fresh(f"{weight.name}_quantized"), blocked.stored),
        gs.Constant(names.fresh(f"{weight.name}_scale"), blocked.scale),
    ]
    if blocked.zero_point is not None:
        inputs.append(_packed(names.fresh(f"{weight.name}_zero_point"), blocked.zero_point))
    output = gs.Variable(names.fresh(f"{weight.name}_dequantized"), np.dtype(np.float32), list(blocked.stored.shape))
    attributes = {"axis": 0, "block_size": blocked.size}
    name = names.fresh(f"{weight.name}_DequantizeLinear")
    graph.nodes.append(gs.Node("DequantizeLinear", name, attributes, inputs, [output]))
    return output


def _packed(name: str, values: Array) -> gs.Constant:
    """A constant that holds two values of 4 bits in a byte, as a file does."""
    return gs.Constant(name, StoredTensor(numpy_helper.from_array(values, name)))
