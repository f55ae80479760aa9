"""Fuse an Add of a constant into the matrix product before it.

    MatMul(x, W) + b        =  Gemm(x, W, b)                  x [M, K], W [K, N] constant, b [N]
    alpha * A' B' + b       =  Gemm(A, B, b, alpha, beta = 1)   of a Gemm that has no C yet

Only for a b that has one value per column, or one for all: it must not broadcast the product to a larger shape. It is
stored with the shape [N]. MatMul of tensors of more axes stays, as Gemm takes matrices only; so does one without an
Add, which gains nothing. Left alone: a product that something else reads too, integers, and opsets before 7.
"""

from __future__ import annotations

from collections.abc import Container, Set
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.graph import (
    Names,
    all_graphs,
    constant_of,
    disconnect,
    is_constant,
    label_of,
    named_tensors,
    producer,
    set_input,
    set_output,
)
from graphopt.partial_values import known_dimensions
from graphopt.pass_base import Context, Effect, Pass, PassResult, Skip

_FIRST_OPSET = 7  # with broadcasting as today
_FLOATS = (np.float16, np.float32, np.float64)


@dataclass(frozen=True, kw_only=True)
class FuseGemm(Pass):
    """Fuse MatMul or Gemm and the Add of a constant bias into one Gemm."""

    name: ClassVar[str] = "fuse-gemm"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Fuse in `graph` and the graphs in it; `skipped` names products that have a bias and stay."""
        pairs = [(each, _products_with_bias(each)) for each in all_graphs(graph) if each.opset >= _FIRST_OPSET]
        if not any(found for _, found in pairs):
            return PassResult()
        context.infer_shapes(graph)
        named, names = named_tensors(graph), Names(graph)
        fused, skipped = 0, []
        for each, found in pairs:
            gone: set[int] = set()
            for product, add, bias in found:
                if any(
                    len(size) != 2 for tensor in product.inputs[:2] if (size := known_dimensions(tensor)) is not None
                ):
                    continue  # Gemm takes matrices only
                reason = _why_not(product, bias, named)
                if reason is not None:
                    skipped.append(Skip(label_of(add), f"not fused into {product.op}: {reason}"))
                    continue
                _fuse(product, add, bias, names)
                gone.add(id(add))
            fused += len(gone)
            each.nodes[:] = [node for node in each.nodes if id(node) not in gone]
        return PassResult(rewrites=fused, skipped=tuple(skipped))


def _products_with_bias(graph: gs.Graph) -> list[tuple[gs.Node, gs.Node, gs.Tensor]]:
    """Return the products of two matrices, each with the Add of a constant that follows it and that constant."""
    own = {id(node) for node in graph.nodes}
    found = []
    for add in graph.nodes:
        if add.op != "Add" or add.domain:
            continue
        for tensor, bias in ((add.inputs[0], add.inputs[1]), (add.inputs[1], add.inputs[0])):
            product = producer(tensor)
            if product is not None and _may_be_fused(product, own) and is_constant(bias):
                found.append((product, add, bias))
    return found


def _may_be_fused(product: gs.Node, own: Container[int]) -> bool:
    if product.domain or id(product) not in own:
        return False
    if product.op == "MatMul":
        return is_constant(product.inputs[1]) and not is_constant(product.inputs[0])
    return product.op == "Gemm" and not any(tensor.name for tensor in product.inputs[2:])


def _why_not(product: gs.Node, bias: gs.Tensor, named: Set[int]) -> str | None:
    output = product.outputs[0]
    left, weight, added = (known_dimensions(tensor) for tensor in (*product.inputs[:2], bias))
    if left is None:
        return f"the rank of {product.inputs[0].name} is not known; fix the input shapes first"
    columns = None if weight is None else weight[_column_axis(product)]
    if columns is None or added is None:
        return "the number of its columns is not known"
    if len(added) > 2 or any(size != 1 for size in added[:-1]) or added[-1:] not in ((), (1,), (columns,)):
        return f"a bias of shape {list(added)} is not one value for each of {columns} columns"
    if bias.dtype not in _FLOATS:
        return f"onnxruntime has no Gemm of {bias.dtype}"
    if id(output) in named:
        return f"{output.name} is an output too"
    if len(output.outputs) > 1:
        return f"{output.name} is read by {len(output.outputs) - 1} other nodes too"
    return None


def _column_axis(product: gs.Node) -> int:
    return 0 if product.attrs.get("transB", 0) else 1


def _fuse(product: gs.Node, add: gs.Node, bias: gs.Tensor, names: Names) -> None:
    columns = (product.inputs[1].shape[_column_axis(product)],)
    if not isinstance(bias, gs.Constant) or tuple(bias.shape) != columns:
        values = np.broadcast_to(np.asarray(constant_of(bias)).reshape(-1), columns)
        bias = gs.Constant(names.fresh(bias.name), np.ascontiguousarray(values))
    (output,) = add.outputs
    disconnect(add)
    set_output(product, 0, output)
    if len(product.inputs) > 2:
        set_input(product, 2, bias)
    else:
        product.inputs.append(bias)
    product.op = "Gemm"
    product.attrs["beta"] = 1.0
