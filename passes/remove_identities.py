"""Remove nodes that return their input as it is.

Only what can be proven for every input of the model goes:

- Identity; Dropout at inference whose mask is not used; Sum, Max, Min and Mean of one tensor; Split into one
- Concat of one tensor and constants of size 0
- Cast and CastLike to the type that the tensor has
- Transpose that moves no axis; Pad by nothing; Slice of everything; Gather of everything in order; Flatten of a matrix
- Reshape to the shape that the tensor has, where all but one dimension are known to stay; Expand to no larger shape;
  Tile by 1; Squeeze and Unsqueeze of no axis; reductions that their attribute turns off; Resize by 1
- x + 0, 0 + x, x - 0, x * 1, 1 * x, x / 1, x ** 1, x and true, x or false where the constant does not broadcast x to a
  larger shape; Where with a condition that is the same everywhere, likewise
- Neg of Neg, Not of Not, Relu of what is not negative by its operator, and LeakyRelu with a slope of 1

A Clip without bounds stays: it makes an infinity the largest number of its type.

Names of graph inputs and outputs stay: where such a node computes a graph output, the node before it computes
that output instead; one that leads from a graph input, or a constant, to a graph output stays. Results are
bit-equal but for the sign of zero: -0 + 0 is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.graph import (
    all_graphs,
    constant_of,
    disconnect,
    has_input,
    integers_of,
    named_tensors,
    producer,
    replace_uses,
    set_output,
)
from graphopt.operators import NEVER_NEGATIVE
from graphopt.partial_values import dtype_of, known_dimensions, static_shape
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
        remover = _Remover(named_tensors(graph))
        for each in all_graphs(graph):
            remover.remove_in(each)
        return PassResult(rewrites=sum(remover.removed.values()), parts=remover.removed)


@dataclass
class _Remover:
    named: Set[int]  # ids of the tensors whose names stay
    removed: dict[str, int] = field(default_factory=dict)  # by operator

    def remove_in(self, graph: gs.Graph) -> None:
        """Remove the nodes of one graph."""
        own = {id(node) for node in graph.nodes}
        kept = []
        for node in graph.nodes:
            tensor = None if node.domain or node.op not in _SAME else _SAME[node.op](node, graph.opset)
            if tensor is not None and self._remove(node, tensor, own):
                self.removed[node.op] = self.removed.get(node.op, 0) + 1
            else:
                kept.append(node)
        graph.nodes[:] = kept

    def _remove(self, node: gs.Node, tensor: gs.Tensor, own: Set[int]) -> bool:
        """Let `tensor` take the place of the node's output; False where both names are needed."""
        output = node.outputs[0]
        if id(output) not in self.named:
            disconnect(node)
            replace_uses(output, tensor)
            return True
        source = producer(tensor)
        if source is None or id(source) not in own or id(tensor) in self.named:
            return False
        position = next(index for index, each in enumerate(source.outputs) if each is tensor)
        disconnect(node)
        set_output(source, position, output)
        replace_uses(tensor, output)
        return True


# Each rule returns the tensor that a node returns as it is, None where that is not certain.
_Rule = Callable[[gs.Node, int], gs.Tensor | None]


def _first_if(same: Callable[[gs.Node, int], bool]) -> _Rule:
    """Turn the question whether a node returns its first input into a rule."""

    def rule(node: gs.Node, opset: int) -> gs.Tensor | None:
        return node.inputs[0] if same(node, opset) else None

    return rule


def _identity(_node: gs.Node, _opset: int) -> bool:
    return True


def _dropout(node: gs.Node, opset: int) -> bool:
    mask = node.outputs[1] if len(node.outputs) > 1 else None
    if mask is not None and mask.outputs:
        return False
    if opset < 7:
        return bool(node.attrs.get("is_test", 0))
    if not has_input(node, 2):
        return True
    training = constant_of(node.inputs[2])
    return training is not None and not training.any()


def _of_one(node: gs.Node, _opset: int) -> bool:
    return len(node.inputs) == 1


def _split(node: gs.Node, _opset: int) -> bool:
    return len(node.outputs) == 1


def _concat(node: gs.Node, _opset: int) -> gs.Tensor | None:
    filled = [tensor for tensor in node.inputs if not _is_empty(tensor, node.attrs.get("axis", 1))]
    return filled[0] if len(filled) == 1 else None


def _is_empty(tensor: gs.Tensor, axis: int) -> bool:
    return isinstance(tensor, gs.Constant) and tensor.shape[axis] == 0


def _cast(node: gs.Node, _opset: int) -> bool:
    like = node.inputs[1].dtype if node.op == "CastLike" else dtype_of(node.attrs["to"])
    return like is not None and _same_dtype(node.inputs[0].dtype, like)


def _same_dtype(one: object, other: object) -> bool:
    if one is None or isinstance(one, int) or isinstance(other, int):
        return False
    return bool(np.dtype(one) == np.dtype(other))  # type: ignore[call-overload]


def _transpose(node: gs.Node, _opset: int) -> bool:
    order = node.attrs.get("perm")
    return order is not None and list(order) == sorted(order)


def _pad(node: gs.Node, opset: int) -> bool:
    pads = node.attrs.get("pads") if opset < 11 else integers_of(node, 1)
    return pads is not None and not any(pads)


def _slice(node: gs.Node, opset: int) -> bool:
    dimensions = known_dimensions(node.inputs[0])
    if opset < 10:
        starts, ends = node.attrs["starts"], node.attrs["ends"]
        axes, steps = node.attrs.get("axes"), None
    else:
        starts, ends = integers_of(node, 1), integers_of(node, 2)
        axes, steps = integers_of(node, 3), integers_of(node, 4)
        if any(given and known is None for given, known in ((has_input(node, 3), axes), (has_input(node, 4), steps))):
            return False
    if starts is None or ends is None or any(starts) or any(step != 1 for step in steps or ()):
        return False
    for axis, end in zip(axes if axes is not None else range(len(ends)), ends, strict=True):
        dimension = dimensions[axis] if dimensions is not None else None
        if end < (_TO_THE_END if dimension is None else dimension):
            return False
    return True


def _gather(node: gs.Node, _opset: int) -> bool:
    dimensions, indices = known_dimensions(node.inputs[0]), constant_of(node.inputs[1])
    if dimensions is None or indices is None:
        return False
    size = dimensions[node.attrs.get("axis", 0)]
    return size is not None and indices.shape == (size,) and bool((indices == np.arange(size)).all())


def _flatten(node: gs.Node, _opset: int) -> bool:
    dimensions = known_dimensions(node.inputs[0])
    return dimensions is not None and len(dimensions) == 2 and node.attrs.get("axis", 1) in (1, -1)


def _reshape(node: gs.Node, opset: int) -> bool:
    """Keep where all dimensions but one are known to stay: the number of elements then settles the last."""
    dimensions = known_dimensions(node.inputs[0])
    target = integers_of(node, 1) if opset >= 5 else node.attrs.get("shape")
    if dimensions is None or target is None or len(target) != len(dimensions):
        return False
    copies = not node.attrs.get("allowzero", 0)
    changed = [
        (dimension, wanted)
        for dimension, wanted in zip(dimensions, target, strict=True)
        if wanted != dimension and not (wanted == 0 and copies)
    ]
    if not changed:
        return True
    if len(changed) > 1 or (changed[0][0] is not None and changed[0][1] != -1):
        return False
    # another one that is not known may be 0, and then the number of elements settles nothing
    return changed[0][1] == -1 or dimensions.count(None) == 1


def _expand(node: gs.Node, _opset: int) -> bool:
    target = integers_of(node, 1)
    return target is not None and _keeps_shape(node.inputs[0], target)


def _tile(node: gs.Node, opset: int) -> bool:
    repeats = integers_of(node, 1) if opset >= 6 else None
    return repeats is not None and all(each == 1 for each in repeats)


def _squeeze(node: gs.Node, _opset: int) -> bool:
    """Keep where every axis of size 1 is asked for, and there is none."""
    shape = static_shape(node.inputs[0])
    return not has_input(node, 1) and not node.attrs.get("axes") and shape is not None and 1 not in shape


def _unsqueeze(node: gs.Node, opset: int) -> bool:
    return (node.attrs.get("axes") if opset < 13 else integers_of(node, 1)) == []


def _reduce(node: gs.Node, _opset: int) -> bool:
    return bool(node.attrs.get("noop_with_empty_axes", 0)) and (not has_input(node, 1) or integers_of(node, 1) == [])


def _resize(node: gs.Node, opset: int) -> bool:
    if node.attrs.get("coordinate_transformation_mode", "half_pixel") not in _ALIGNED or has_input(node, 3):
        return False
    index = 1 if opset < 11 else 2
    scales = constant_of(node.inputs[index]) if has_input(node, index) else None
    return scales is not None and scales.size > 0 and bool((scales == 1).all())


_ALIGNED = ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "asymmetric", "align_corners")


def _neutral(element: int, first_too: bool) -> _Rule:
    def rule(node: gs.Node, opset: int) -> gs.Tensor | None:
        if opset < 7:
            return None  # broadcasting followed other rules
        for kept, other in ((0, 1), (1, 0)) if first_too else ((0, 1),):
            if (
                not isinstance(node.inputs[kept], gs.Constant)  # else it is for fold-constants
                and _is_filled_with(element, node.inputs[other], node.inputs[kept])
            ):
                return node.inputs[kept]
        return None

    return rule


def _is_filled_with(element: int, tensor: gs.Tensor, kept: gs.Tensor) -> bool:
    """Tell whether a tensor is a constant with one value, which leaves the shape of `kept` alone."""
    if isinstance(tensor, gs.Constant) and not _keeps_shape(kept, tensor.shape):
        return False  # asked first: reading the value would load a weight
    value = constant_of(tensor)
    return value is not None and value.size > 0 and bool((value == element).all()) and _keeps_shape(kept, value.shape)


def _keeps_shape(tensor: gs.Tensor, other: Sequence[int]) -> bool:
    """Tell whether `tensor` broadcast with a tensor of another shape has the shape that it has alone."""
    if not other:
        return True
    dimensions = known_dimensions(tensor)
    if dimensions is None or len(dimensions) < len(other):
        return False
    aligned = dimensions[len(dimensions) - len(other) :]
    return all(wanted in (1, dimension) for wanted, dimension in zip(other, aligned, strict=True))


def _where(node: gs.Node, _opset: int) -> gs.Tensor | None:
    condition = constant_of(node.inputs[0])
    if condition is None or condition.size == 0 or condition.any() != condition.all():
        return None
    kept, other = node.inputs[1:] if condition.any() else reversed(node.inputs[1:])
    shape = static_shape(other)
    return kept if shape is not None and _keeps_shape(kept, condition.shape) and _keeps_shape(kept, shape) else None


def _twice(node: gs.Node, _opset: int) -> gs.Tensor | None:
    before = producer(node.inputs[0])
    return before.inputs[0] if before is not None and before.op == node.op and not before.domain else None


def _relu(node: gs.Node, opset: int) -> bool:
    before = producer(node.inputs[0])
    if before is None or before.domain:
        return False
    if before.op != "Clip":
        return before.op in NEVER_NEGATIVE
    if opset < 11:
        return bool(before.attrs.get("min", -1) >= 0)
    low = constant_of(before.inputs[1]) if has_input(before, 1) else None
    return low is not None and bool(low >= 0)


def _leaky_relu(node: gs.Node, _opset: int) -> bool:
    return bool(node.attrs.get("alpha", 0.01) == 1)


_SAME: dict[str, _Rule] = {
    "Identity": _first_if(_identity),
    "Dropout": _first_if(_dropout),
    "Concat": _concat,
    "Sum": _first_if(_of_one),
    "Max": _first_if(_of_one),
    "Min": _first_if(_of_one),
    "Mean": _first_if(_of_one),
    "Split": _first_if(_split),
    "Cast": _first_if(_cast),
    "CastLike": _first_if(_cast),
    "Transpose": _first_if(_transpose),
    "Pad": _first_if(_pad),
    "Slice": _first_if(_slice),
    "Gather": _first_if(_gather),
    "Flatten": _first_if(_flatten),
    "Reshape": _first_if(_reshape),
    "Expand": _first_if(_expand),
    "Tile": _first_if(_tile),
    "Squeeze": _first_if(_squeeze),
    "Unsqueeze": _first_if(_unsqueeze),
    # for the other reductions, opsets differ in what is left to do without axes
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"), _first_if(_reduce)),
    "Resize": _first_if(_resize),
    "Add": _neutral(0, first_too=True),
    "Sub": _neutral(0, first_too=False),
    "Mul": _neutral(1, first_too=True),
    "Div": _neutral(1, first_too=False),
    "Pow": _neutral(1, first_too=False),
    "And": _neutral(1, first_too=True),
    "Or": _neutral(0, first_too=True),
    "Where": _where,
    "Neg": _twice,
    "Not": _twice,
    "Relu": _first_if(_relu),
    "LeakyRelu": _first_if(_leaky_relu),
}
_READ_TYPES = {  # or shapes
    *("Add", "And", "Cast", "CastLike", "Div", "Expand", "Flatten", "Gather", "Mul", "Or", "Pow", "Reshape", "Slice"),
    *("Squeeze", "Sub", "Where"),
}
