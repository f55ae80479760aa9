"""Remove nodes that return their input as it is.

Only what can be proven for every input of the model goes:

- Identity; Dropout at inference whose mask is not used; Concat, Sum, Max, Min and Mean of one tensor
- Cast and CastLike to the type that the tensor has
- Transpose that moves no axis; Pad by nothing; Slice of everything; Flatten of a matrix
- Reshape to the shape that the tensor has, where all but one dimension are known to stay
- x + 0, 0 + x, x - 0, x * 1, 1 * x, x / 1 where the constant does not broadcast x to a larger shape

Names of graph inputs and outputs stay: where such a node computes a graph output, the node before it computes
that output instead; one that leads from a graph input, or a constant, to a graph output stays. Results are
bit-equal but for the sign of zero: -0 + 0 is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.graph import (
    all_graphs,
    constant_of,
    disconnect,
    nested_output_names,
    producer,
    replace_uses,
    set_output,
)
from graphopt.partial_values import dtype_of, known_dimensions
from graphopt.pass_base import Context, Effect, Pass, PassResult

_TO_THE_END = 2**31 - 1  # exporters write this, or more, as the end of a Slice that takes the rest


@dataclass(frozen=True, kw_only=True)
class RemoveIdentities(Pass):
    """Remove nodes that return their input as it is: Identity, Dropout at inference, x * 1 and more."""

    name: ClassVar[str] = "remove-identities"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Remove them from `graph` and the graphs in it; `parts` counts by operator."""
        if any(node.op in _READ_TYPES for each in all_graphs(graph) for node in each.nodes):
            context.infer_shapes(graph)
        remover = _Remover(
            outputs={id(output) for each in all_graphs(graph) for output in each.outputs},
            returned=nested_output_names(graph),
        )
        for each in all_graphs(graph):
            remover.remove_in(each)
        return PassResult(rewrites=sum(remover.removed.values()), parts=remover.removed)


@dataclass
class _Remover:
    outputs: Set[int]  # ids of graph outputs
    returned: Set[str]  # names that branches return
    removed: dict[str, int] = field(default_factory=dict)  # by operator

    def remove_in(self, graph: gs.Graph) -> None:
        own = {id(node) for node in graph.nodes}
        kept = []
        for node in graph.nodes:
            index = None if node.domain or node.op not in _KEPT_INPUT else _KEPT_INPUT[node.op](node, graph.opset)
            if index is not None and self._remove(node, node.inputs[index], own):
                self.removed[node.op] = self.removed.get(node.op, 0) + 1
            else:
                kept.append(node)
        graph.nodes[:] = kept

    def _remove(self, node: gs.Node, tensor: gs.Tensor, own: Set[int]) -> bool:
        """Let `tensor` take the place of the node's output; False where both names are needed."""
        output = node.outputs[0]
        if not self._is_named(output):
            disconnect(node)
            replace_uses(output, tensor)
            return True
        source = producer(tensor)
        if source is None or id(source) not in own or self._is_named(tensor):
            return False
        position = next(index for index, each in enumerate(source.outputs) if each is tensor)
        disconnect(node)
        set_output(source, position, output)
        replace_uses(tensor, output)
        return True

    def _is_named(self, tensor: gs.Tensor) -> bool:
        return id(tensor) in self.outputs or tensor.name in self.returned


# Each rule returns which input a node returns as it is, None where that is not certain.
_Rule = Callable[[gs.Node, int], int | None]


def _identity(_node: gs.Node, _opset: int) -> int | None:
    return 0


def _dropout(node: gs.Node, opset: int) -> int | None:
    mask = node.outputs[1] if len(node.outputs) > 1 else None
    if mask is not None and mask.outputs:
        return None
    if opset < 7:
        return 0 if node.attrs.get("is_test", 0) else None
    training = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    if training is None:
        return 0
    value = constant_of(training)
    return 0 if value is not None and not value.any() else None


def _of_one(node: gs.Node, _opset: int) -> int | None:
    return 0 if len(node.inputs) == 1 else None


def _cast(node: gs.Node, _opset: int) -> int | None:
    like = node.inputs[1].dtype if node.op == "CastLike" else dtype_of(node.attrs["to"])
    return 0 if like is not None and _same_dtype(node.inputs[0].dtype, like) else None


def _same_dtype(one: object, other: object) -> bool:
    if one is None or isinstance(one, int) or isinstance(other, int):
        return False
    return bool(np.dtype(one) == np.dtype(other))  # type: ignore[call-overload]


def _transpose(node: gs.Node, _opset: int) -> int | None:
    order = node.attrs.get("perm")
    return 0 if order is not None and list(order) == sorted(order) else None


def _pad(node: gs.Node, opset: int) -> int | None:
    pads = node.attrs.get("pads") if opset < 11 else _integers(node, 1)
    return 0 if pads is not None and not any(pads) else None


def _integers(node: gs.Node, index: int) -> list[int] | None:
    """Return the value of a constant integer input of one axis; None where omitted or not constant."""
    if index >= len(node.inputs) or not node.inputs[index].name:
        return None
    value = constant_of(node.inputs[index])
    return None if value is None else [int(each) for each in value.reshape(-1)]


def _slice(node: gs.Node, opset: int) -> int | None:
    dimensions = known_dimensions(node.inputs[0])
    if opset < 10:
        starts, ends = node.attrs["starts"], node.attrs["ends"]
        axes, steps = node.attrs.get("axes"), None
    else:
        starts, ends = _integers(node, 1), _integers(node, 2)
        axes, steps = _integers(node, 3), _integers(node, 4)
        if any(given and known is None for given, known in ((_has(node, 3), axes), (_has(node, 4), steps))):
            return None
    if starts is None or ends is None or any(starts) or any(step != 1 for step in steps or ()):
        return None
    for axis, end in zip(axes if axes is not None else range(len(ends)), ends, strict=True):
        dimension = dimensions[axis] if dimensions is not None else None
        if end < (_TO_THE_END if dimension is None else dimension):
            return None
    return 0


def _has(node: gs.Node, index: int) -> bool:
    return index < len(node.inputs) and bool(node.inputs[index].name)


def _flatten(node: gs.Node, _opset: int) -> int | None:
    dimensions = known_dimensions(node.inputs[0])
    return 0 if dimensions is not None and len(dimensions) == 2 and node.attrs.get("axis", 1) in (1, -1) else None


def _reshape(node: gs.Node, opset: int) -> int | None:
    """Keep where all dimensions but one are known to stay: the number of elements then settles the last."""
    dimensions = known_dimensions(node.inputs[0])
    target = _integers(node, 1) if opset >= 5 else node.attrs.get("shape")
    if dimensions is None or target is None or len(target) != len(dimensions):
        return None
    copies = not node.attrs.get("allowzero", 0)
    changed = [
        (dimension, wanted)
        for dimension, wanted in zip(dimensions, target, strict=True)
        if wanted != dimension and not (wanted == 0 and copies)
    ]
    if not changed:
        return 0
    if len(changed) > 1 or (changed[0][0] is not None and changed[0][1] != -1):
        return None
    if changed[0][1] != -1 and dimensions.count(None) > 1:
        return None  # another one may be 0, and then the number of elements settles nothing
    return 0


def _neutral(element: int, first_too: bool) -> _Rule:
    def rule(node: gs.Node, opset: int) -> int | None:
        if opset < 7:
            return None  # broadcasting followed other rules
        for kept, other in ((0, 1), (1, 0)) if first_too else ((0, 1),):
            if (
                not isinstance(node.inputs[kept], gs.Constant)  # else it is for fold-constants
                and _is_filled_with(element, node.inputs[other])
                and _keeps_shape(node.inputs[kept], node.inputs[other])
            ):
                return kept
        return None

    return rule


def _is_filled_with(element: int, tensor: gs.Tensor) -> bool:
    value = constant_of(tensor) if producer(tensor) is not None or isinstance(tensor, gs.Constant) else None
    return value is not None and value.size > 0 and bool((value == element).all())


def _keeps_shape(tensor: gs.Tensor, other: gs.Tensor) -> bool:
    """Tell whether `tensor` broadcast with a constant has the shape that it has alone."""
    value = constant_of(other)
    if value is None:
        return False
    if value.ndim == 0:
        return True
    dimensions = known_dimensions(tensor)
    if dimensions is None or len(dimensions) < value.ndim:
        return False
    aligned = dimensions[len(dimensions) - value.ndim :]
    return all(wanted in (1, dimension) for wanted, dimension in zip(value.shape, aligned, strict=True))


_KEPT_INPUT: dict[str, _Rule] = {
    "Identity": _identity,
    "Dropout": _dropout,
    "Concat": _of_one,
    "Sum": _of_one,
    "Max": _of_one,
    "Min": _of_one,
    "Mean": _of_one,
    "Cast": _cast,
    "CastLike": _cast,
    "Transpose": _transpose,
    "Pad": _pad,
    "Slice": _slice,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Add": _neutral(0, first_too=True),
    "Sub": _neutral(0, first_too=False),
    "Mul": _neutral(1, first_too=True),
    "Div": _neutral(1, first_too=False),
}
_READ_TYPES = {"Add", "Cast", "CastLike", "Div", "Flatten", "Mul", "Reshape", "Slice", "Sub"}  # or shapes
