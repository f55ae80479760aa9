"""Remove optional inputs that state what the operator does without them.

    LSTM, GRU, RNN    zeros as bias, initial state or peepholes     Pad     0 as the value to write
    Conv, ...         zeros as bias                                 Slice   1 as every step
    Gemm              zeros as C                                    Clip    the lowest or the largest value of the type

Whether an input is optional, the operator's definition in the opset of the graph tells. What a tensor is filled with is
known even where its shape is not: of an initializer, of ConstantOfShape, and of what only moves or repeats elements of
these, so the zeros that exporters compute for any batch size as the state of an LSTM go too. Omitted inputs at the end
of the list are dropped from it. The nodes that computed what is removed are then dead where nothing else reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.filled import filled_with
from graphopt.graph import all_graphs, set_input
from graphopt.pass_base import Context, Effect, Pass, PassResult


@dataclass(frozen=True, kw_only=True)
class RemoveDefaultInputs(Pass):
    """Remove optional inputs that state the default: zeros as bias or initial state, a step of 1 and more."""

    name: ClassVar[str] = "remove-default-inputs"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Remove them in `graph` and the graphs in it; `parts` counts the inputs by operator."""
        parts: dict[str, int] = {}
        for each in all_graphs(graph):
            for node in each.nodes:
                stated = [] if node.domain else _stated_defaults(node, each.opset)
                if stated:
                    _omit(node, stated)
                    parts[node.op] = parts.get(node.op, 0) + len(stated)
        return PassResult(rewrites=sum(parts.values()), parts=parts)


def _stated_defaults(node: gs.Node, opset: int) -> list[int]:
    """Return which inputs of a node could be left out."""
    return [
        index
        for index, is_default in _DEFAULTS.get(node.op, {}).items()
        if index < len(node.inputs)
        and node.inputs[index].name
        and _is_optional(node.op, index, opset)
        and (value := filled_with(node.inputs[index])) is not None
        and is_default(value)
    ]


def _omit(node: gs.Node, indices: list[int]) -> None:
    for index in indices:
        set_input(node, index, gs.Variable.empty())
    while not node.inputs[-1].name:
        list.pop(node.inputs)  # graphsurgeon would look the tensor up by name


@cache
def _is_optional(op: str, index: int, opset: int) -> bool:
    try:
        inputs = onnx.defs.get_schema(op, opset, "").inputs
    except onnx.defs.SchemaError:
        return False
    return index < len(inputs) and inputs[index].option == onnx.defs.OpSchema.FormalParameterOption.Optional


def _zero(value: np.generic) -> bool:
    return bool(value == 0)


def _one(value: np.generic) -> bool:
    return bool(value == 1)


def _lowest(value: np.generic) -> bool:
    return bool(value == _limits(value).min)


def _largest(value: np.generic) -> bool:
    return bool(value == _limits(value).max)


def _limits(value: np.generic) -> np.finfo[Any] | np.iinfo[Any]:
    return np.finfo(value.dtype) if value.dtype.kind == "f" else np.iinfo(value.dtype)


_DEFAULTS: dict[str, dict[int, Callable[[np.generic], bool]]] = {  # by operator and number of the input
    "Clip": {1: _lowest, 2: _largest},
    "Conv": {2: _zero},
    "ConvTranspose": {2: _zero},
    "GRU": {3: _zero, 5: _zero},
    "Gemm": {2: _zero},
    "LSTM": {3: _zero, 5: _zero, 6: _zero, 7: _zero},
    "Pad": {2: _zero},
    "RNN": {3: _zero, 5: _zero},
    "Slice": {4: _one},
}
