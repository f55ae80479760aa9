"""The bias of a linear operator in a graph: an input of its own, or the constant of the Add behind a MatMul."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.graph import Array, Names, constant_of, has_input, is_constant, only_reader, set_input


@dataclass(frozen=True)
class Bias:
    """Where the bias of an operator is, or goes where it has none.

    Attributes:
        node: Conv, ConvTranspose, Gemm or MatMul.
        add: the Add of a constant that follows a MatMul and serves as its bias; see `bias_add`.
    """

    node: gs.Node
    add: gs.Node | None = None

    @property
    def output(self) -> gs.Tensor:
        """The operator's result, bias included."""
        return (self.add or self.node).outputs[0]

    def values(self) -> Array | None:
        """The constant that is added, of any shape that broadcasts; None where there is none."""
        node, index = self._place
        if not has_input(node, index):
            return None
        values = np.asarray(constant_of(node.inputs[index]))
        return np.asarray(values * node.attrs.get("beta", 1.0)) if node.op == "Gemm" else values

    def put(self, values: Array, names: Names) -> None:
        """Let the operator add other values, under the old name where nothing else reads the old ones."""
        node, index = self._place
        put_constant(node, index, values, names)
        if node.op == "Gemm":
            node.attrs["beta"] = 1.0

    @property
    def _place(self) -> tuple[gs.Node, int]:
        """The node and the number of its input that is the bias."""
        if self.add is None:
            return self.node, 2
        return self.add, 0 if is_constant(self.add.inputs[0]) else 1


def put_constant(node: gs.Node, index: int, values: Array, names: Names) -> None:
    """Let a node read new values, under the old name where nothing else reads the old ones.

    Args:
        node: has its inputs before number `index`.
        index: the number of an input, which may be missing so far.
        values: shared with the graph from now on.
        names: those of the graph.
    """
    wanted = node.inputs[index].name if has_input(node, index) else f"{node.outputs[0].name}/bias"
    is_own = has_input(node, index) and _is_own(node.inputs[index])
    constant = gs.Constant(wanted if is_own else names.fresh(wanted), values)
    if index < len(node.inputs):
        set_input(node, index, constant)
    else:
        node.inputs.append(constant)


def bias_add(matmul: gs.Node, channels: int, named: Container[int]) -> gs.Node | None:
    """The Add of one constant per channel that alone reads the product of a MatMul, which has no bias of its own.

    Args:
        matmul: in a graph with shapes inferred.
        channels: the size of the last axis of its product.
        named: ids of the tensors that are read by name (`graphopt.graph.named_tensors`).
    """
    add = only_add(matmul.outputs[0], named)
    constants = [] if add is None else [each for each in add.inputs if is_constant(each)]
    if add is None or len(constants) != 1 or not same_shape(matmul.outputs[0], add.outputs[0]):
        return None
    return add if is_per_channel(constants[0], channels) else None


def only_add(tensor: gs.Tensor, named: Container[int]) -> gs.Node | None:
    """The Add that alone reads a tensor; `named` as in `bias_add`."""
    reader = only_reader(tensor, named)
    return reader if reader is not None and reader.op == "Add" and not reader.domain else None


def is_per_channel(bias: gs.Tensor, channels: int) -> bool:
    """Whether a constant is one number, or one for each of so many channels along its last axis."""
    shape = np.asarray(constant_of(bias)).shape
    return math.prod(shape) == 1 or (math.prod(shape) == channels and shape[-1] == channels)


def same_shape(one: gs.Tensor, other: gs.Tensor) -> bool:
    """Whether two tensors are known to have the same shape."""
    return one.shape is not None and other.shape is not None and list(one.shape) == list(other.shape)


def _is_own(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and len(tensor.outputs) == 1
