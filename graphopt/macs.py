"""Multiply-accumulate operations: one rule per operator, from shapes alone.

    Conv            |Y| * C/group * kernel sizes        W [M, C/group, k...]
    ConvTranspose   |X| * M/group * kernel sizes        W [C, M/group, k...]
    Gemm, MatMul    |Y| * K                             K is the dimension that is summed over
    MatMulNBits     |X| * N                             X [..., K]; onnxruntime's product with weights of 4 bits
    Einsum          product of all labels' sizes, once less than there are operands
    LSTM, GRU, RNN  T * N * (|W| + |R|)                 W and R of all directions and gates

|Y| is the number of elements of Y. Bias, activations and element-wise operators count nothing. An operator
that is not in the table counts nothing either. A node with branches counts as much as the larger branch, a
Loop or Scan as much as one turn of its body. Convolutions and products between DequantizeLinear and
QuantizeLinear are counted like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_graphsurgeon as gs

from graphopt.frame import GraphKey, nested_key
from graphopt.graph import bodies
from graphopt.sizes import Shape, at_assumed_sizes, at_sizes, fixed_shape
from graphopt.weights import is_weight

Place = tuple[GraphKey, str]
"""Which graph a node is in, and the name of its first output."""


@dataclass(frozen=True)
class MacCount:
    """MACs of a graph."""

    by_node: dict[str, int]  # by the name of the node's first output; nodes without MACs are left out
    unknown: int  # nodes, nested ones too, that have MACs but a shape that inference does not find
    operators: dict[Place, int]  # the same where nodes with branches or a body stand for the operators in the larger

    @property
    def total(self) -> int:
        """MACs of one inference call."""
        return sum(self.by_node.values())


def macs_by_node(graph: gs.Graph) -> dict[str, int]:
    """MACs of each node of the main graph that has any, by the name of its first output.

    Open input sizes are assumed as in `graphopt.sizes`. The graph is left as it is.
    """
    sized, _ = at_assumed_sizes(graph)
    return count_macs(sized).by_node


def macs_with_weight(node: gs.Node, read: float | None, computed: float | None) -> float:
    """MACs of a Conv or product with a constant weight, by how many values it reads and computes; of others 0.

    Of a Conv those that it computes must be known, of a product those that it reads.
    """
    if len(node.inputs) < 2 or not is_weight(node.inputs[1]) or node.inputs[1].shape is None:
        return 0
    shape = [int(size) for size in node.inputs[1].shape]
    if node.op == "Conv":
        return (computed or 0) * math.prod(shape[1:])
    if node.op == "MatMul":
        return (read or 0) * (shape[-1] if len(shape) > 1 else 1)
    if node.op == "Gemm":
        return (read or 0) * shape[0 if node.attrs.get("transB") else 1]
    return 0


def macs_by_operator(graph: gs.Graph, input_shapes: Mapping[str, Shape] | None = None) -> dict[Place, int]:
    """MACs as in `macs_by_node`, but of the operators themselves, also those in branches and bodies.

    Of an If, those in its larger branch alone. `input_shapes` are by name, None: assumed.
    """
    return count_macs(at_sizes(graph, input_shapes)).operators


def count_macs(sized: gs.Graph, key: GraphKey = ()) -> MacCount:
    """Count on a graph whose shapes are inferred; `key` says where it is in the main graph."""
    by_node: dict[str, int] = {}
    operators: dict[Place, int] = {}
    unknown = 0
    for node in sized.nodes:
        try:
            macs = _RULES[node.op](_Shapes(node)) if node.op in _RULES else 0
        except _UnknownShapeError:
            unknown += 1
            continue
        if macs:
            operators[key, node.outputs[0].name] = macs
        if bodies(node):
            attributes = [(name, body) for name, body in node.attrs.items() if isinstance(body, gs.Graph)]
            nested = [count_macs(body, nested_key(key, node, name)) for name, body in attributes]
            unknown += sum(count.unknown for count in nested)
            largest = max(nested, key=lambda count: count.total)
            operators |= largest.operators
            macs += largest.total
        if macs:
            by_node[node.outputs[0].name] = macs
    return MacCount(by_node, unknown, operators)


class _UnknownShapeError(Exception):
    """A rule asked for a shape that shape inference did not find."""


class _Shapes:
    """The shapes and attributes of a node, as rules ask for them."""

    def __init__(self, node: gs.Node) -> None:
        self._node = node
        self.attrs: dict[str, Any] = node.attrs

    def input(self, index: int) -> Shape:
        return self._known(self._node.inputs[index])

    def output(self) -> Shape:
        return self._known(self._node.outputs[0])

    def inputs(self) -> list[Shape]:
        return [self._known(tensor) for tensor in self._node.inputs]

    @staticmethod
    def _known(tensor: gs.Tensor) -> Shape:
        shape = fixed_shape(tensor)
        if shape is None:
            raise _UnknownShapeError(tensor.name)
        return shape


Rule = Callable[[_Shapes], int]


def _conv(weight: int) -> Rule:
    return lambda shapes: math.prod(shapes.output()) * math.prod(shapes.input(weight)[1:])


def _conv_transpose(shapes: _Shapes) -> int:
    return math.prod(shapes.input(0)) * math.prod(shapes.input(1)[1:])


def _gemm(shapes: _Shapes) -> int:
    return math.prod(shapes.output()) * shapes.input(0)[0 if shapes.attrs.get("transA") else 1]


def _matmul(shapes: _Shapes) -> int:
    return math.prod(shapes.output()) * shapes.input(0)[-1]


def _matmul_nbits(shapes: _Shapes) -> int:
    return math.prod(shapes.input(0)) * int(shapes.attrs["N"])


def _einsum(shapes: _Shapes) -> int:
    terms = shapes.attrs["equation"].replace(" ", "").split("->")[0].split(",")
    if any("." in term for term in terms):
        raise _UnknownShapeError("an ellipsis stands for sizes without labels")
    sizes = {
        label: size
        for term, shape in zip(terms, shapes.inputs(), strict=True)
        for label, size in zip(term, shape, strict=True)
    }
    return (len(terms) - 1) * math.prod(sizes.values())


def _recurrent(shapes: _Shapes) -> int:
    steps_and_batch = math.prod(shapes.input(0)[:2])  # [T, N, I], or [N, T, I] with layout=1
    return steps_and_batch * (math.prod(shapes.input(1)) + math.prod(shapes.input(2)))


_RULES: dict[str, Rule] = {
    "Conv": _conv(weight=1),
    "ConvInteger": _conv(weight=1),
    "QLinearConv": _conv(weight=3),
    "DeformConv": _conv(weight=1),
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearMatMul": _matmul,
    "MatMulNBits": _matmul_nbits,
    "Einsum": _einsum,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
}
