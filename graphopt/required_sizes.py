"""Sizes that a model leaves open and its weights ask for: a product takes as many features as its weight has rows.

Each open axis of an input is followed through operators that keep it, to where it meets an axis of a constant: it is
summed over with a weight, or stands beside a bias, a scale or a mean. What other operators do with it asks for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_graphsurgeon as gs

from graphopt.errors import ModelError
from graphopt.feeds import InputSpec, fixed_size, is_named
from graphopt.graph import constant_of, has_input, integers_of, is_constant, producer
from graphopt.node_order import sorted_nodes
from graphopt.operators import ELEMENTWISE

_PAIRS = frozenset({"DequantizeLinear", "QuantizeLinear"})
_SAME = _PAIRS | {"Cast", "Dropout", "Identity", "LogSoftmax", "LpNormalization", "Softmax"}


@dataclass(frozen=True)
class _Place:
    """An axis of an input."""

    input: str
    axis: int


_Axes = list[_Place | None]
_Rule = Callable[["_Following", gs.Node, _Axes], list[_Axes]]


def with_required_sizes(inputs: Sequence[InputSpec], graph: gs.Graph) -> list[InputSpec]:
    """The inputs with the sizes that weights of the main graph ask for in place of open ones.

    A name that one of them has says the same size everywhere. Where two weights ask for different sizes of an axis, the
    first one counts.
    """
    try:
        found = _Following(graph).run()
    except ModelError:  # the graph has a cycle
        return list(inputs)
    named = {
        dimension: size
        for spec in inputs
        for axis, dimension in enumerate(spec.shape)
        if is_named(dimension) and (size := found.get(_Place(spec.name, axis))) is not None
    }
    return [
        replace(
            spec,
            shape=tuple(
                dimension
                if fixed_size(dimension) is not None
                else found.get(_Place(spec.name, axis)) or named.get(dimension, dimension)
                for axis, dimension in enumerate(spec.shape)
            ),
        )
        for spec in inputs
    ]


class _Following:
    """By id of a tensor, which axis of an input each of its axes is; None where that is not known."""

    def __init__(self, graph: gs.Graph) -> None:
        self.nodes = sorted_nodes(graph)
        self.axes: dict[int, _Axes] = {
            id(tensor): [_Place(tensor.name, axis) for axis in range(len(tensor.shape))]
            for tensor in graph.inputs
            if tensor.shape
        }
        self.found: dict[_Place, int] = {}

    def run(self) -> Mapping[_Place, int]:
        for node in self.nodes:
            rule = None if node.domain not in (None, "", "ai.onnx") else _RULES.get(node.op)
            known = [index for index, tensor in enumerate(node.inputs) if id(tensor) in self.axes]
            if rule is None or not known or not any(self.axes[id(node.inputs[known[0]])]):
                continue
            try:
                results = rule(self, node, self.axes[id(node.inputs[known[0]])])
            except (
                IndexError,
                StopIteration,
                ValueError,
            ):  # other ranks than the operator takes: onnx's checker says so
                continue
            self.axes |= {id(tensor): axes for tensor, axes in zip(node.outputs, results, strict=False)}
        return self.found

    def ask(self, place: _Place | None, size: int) -> None:
        """Note that a constant has `size` positions along an axis."""
        if place is not None and size > 0:
            self.found.setdefault(place, size)


def _elementwise(following: _Following, node: gs.Node, _: _Axes) -> list[_Axes]:
    shapes = [shape for tensor in node.inputs if (shape := _constant_shape(tensor)) is not None]
    operands = [following.axes[id(tensor)] for tensor in node.inputs if id(tensor) in following.axes]
    result: _Axes = []
    for place in range(-max(map(len, (*shapes, *operands))), 0):
        axes = [axes[place] for axes in operands if len(axes) >= -place]
        for shape in shapes:
            if len(shape) >= -place and shape[place] != 1:
                for axis in axes:
                    following.ask(axis, shape[place])
        result.append(next(filter(None, axes), None))
    is_known = len(shapes) + len(operands) == len([tensor for tensor in node.inputs if tensor.name])
    return [result] if is_known else []


def _same(_: _Following, node: gs.Node, axes: _Axes) -> list[_Axes]:
    return [axes] * len(node.outputs)


def _transpose(_: _Following, node: gs.Node, axes: _Axes) -> list[_Axes]:
    return [[axes[place] for place in node.attrs.get("perm") or range(len(axes))[::-1]]]


def _unsqueeze(_: _Following, node: gs.Node, axes: _Axes) -> list[_Axes]:
    named = _named_axes(node)
    if named is None:
        return []
    rank = len(axes) + len(named)
    new, rest = {axis % rank for axis in named}, iter(axes)
    return [[None if axis in new else next(rest) for axis in range(rank)]]


def _squeeze(_: _Following, node: gs.Node, axes: _Axes) -> list[_Axes]:
    named = _named_axes(node)
    if named is None:
        return []
    gone = {axis % len(axes) for axis in named}
    return [[place for axis, place in enumerate(axes) if axis not in gone]]


def _named_axes(node: gs.Node) -> list[int] | None:
    return integers_of(node, 1) if has_input(node, 1) else node.attrs.get("axes")


def _matmul(following: _Following, node: gs.Node, axes: _Axes) -> list[_Axes]:
    left, right = map(_constant_shape, node.inputs[:2])
    if right is not None and len(right) <= 2:
        following.ask(axes[-1], right[0])
        return [[*axes[:-1], *[None] * (len(right) - 1)]]
    if left is not None and len(axes) > 1:
        following.ask(axes[-2], left[-1])
    return []


def _gemm(following: _Following, node: gs.Node, axes: _Axes) -> list[_Axes]:
    right = _constant_shape(node.inputs[1])
    if right is None or id(node.inputs[0]) not in following.axes:
        return []
    rows, features = axes[::-1] if node.attrs.get("transA") else axes
    following.ask(features, right[1 if node.attrs.get("transB") else 0])
    return [[rows, None]]


def _conv(following: _Following, node: gs.Node, axes: _Axes) -> list[_Axes]:
    weight = _constant_shape(node.inputs[1])
    if weight is not None:
        of_groups = weight[1] * node.attrs.get("group", 1)
        following.ask(axes[1], weight[0] if node.op == "ConvTranspose" else of_groups)
    return [[axes[0], *[None] * (len(axes) - 1)]]


def _channels(following: _Following, node: gs.Node, axes: _Axes) -> list[_Axes]:
    scale = _constant_shape(node.inputs[1])
    if len(axes) > 1 and scale is not None:
        following.ask(axes[1], math.prod(scale))
    return [axes]


def _last_axes(following: _Following, node: gs.Node, axes: _Axes) -> list[_Axes]:
    scale = _constant_shape(node.inputs[1]) or ()
    for place, size in zip(axes[len(axes) - len(scale) :], scale, strict=False):
        following.ask(place, size)
    return [axes]


def _recurrent(following: _Following, node: gs.Node, axes: _Axes) -> list[_Axes]:
    """X [T, N, I], or [N, T, I], and W [D, gates * H, I]."""
    weight = _constant_shape(node.inputs[1])
    if weight is not None and id(node.inputs[0]) in following.axes:
        following.ask(axes[2], weight[2])
    return []


def _constant_shape(tensor: gs.Tensor) -> tuple[int, ...] | None:
    """The sizes of a constant, also behind Q and DQ; those of a Constant node's output may not be stated."""
    while (node := producer(tensor)) is not None and node.op in _PAIRS:
        tensor = node.inputs[0]
    if not is_constant(tensor):
        return None
    if tensor.shape is not None and all(isinstance(size, int) for size in tensor.shape):
        return tuple(tensor.shape)
    value = constant_of(tensor)
    return None if value is None else value.shape


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), _channels),
    **dict.fromkeys(("Conv", "ConvTranspose"), _conv),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), _recurrent),
    "Gemm": _gemm,
    "LayerNormalization": _last_axes,
    "MatMul": _matmul,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
