"""What each operator needs to work in another layout: which inputs have it, and which attributes name its axes.

A node works in the layout of its data when f(T_p(x)) = T_p(f'(x)), where T_p is Transpose with perm = p and f' is f
with its axes renamed, a -> p[a]. Elementwise operators need nothing renamed; Concat, Softmax, reductions, Pad and Slice
name axes in attributes or in constants, and a constant operand of a broadcast is permuted itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.graph import Array, Names, has_input, integers_of, is_constant, present, set_input
from graphopt.partial_values import dimensions_of, static_shape

Permutation = tuple[int, ...]


def inverse(permutation: Permutation) -> Permutation:
    """Return the permutation that undoes one."""
    return tuple(int(axis) for axis in np.argsort(permutation))


def permuted_constant(name: str, values: Array, names: Names) -> gs.Constant:
    """Return a new initializer whose name starts like an old one's."""
    return gs.Constant(names.fresh(f"{name}_transposed"), np.ascontiguousarray(values))


class Layout(NamedTuple):
    """A node about to change its layout: axis a of what it worked on becomes axis permutation[a]."""

    node: gs.Node
    permutation: Permutation
    names: Names

    def axes(self, axes: Iterable[int]) -> list[int]:
        """Rename axes, negative ones too."""
        return [self.permutation[axis] for axis in axes]

    def per_axis(self, values: Sequence[int]) -> list[int]:
        """Reorder one value for each axis."""
        return [values[axis] for axis in inverse(self.permutation)]

    def set_integers(self, index: int, values: Sequence[int]) -> None:
        """Give the node other integers: as the attribute that it has, or as input number `index`."""
        old = self.node.inputs[index]
        dtype = np.int64 if old.dtype is None else old.dtype
        set_input(self.node, index, permuted_constant(old.name, np.array(values, dtype), self.names))


class LayoutRule(NamedTuple):
    """How an operator follows a change of layout."""

    rename: Callable[[Layout], None]  # changes attributes and constants that name axes
    why_not: Callable[[gs.Node], str | None] = lambda _node: None
    all_inputs: bool = False  # else only the first input has the layout
    since: int = 1  # opset


def has_layout_rule(node: gs.Node) -> bool:
    """Tell whether an operator may work in another layout."""
    return not node.domain and node.op in LAYOUT_RULES


def why_not_movable(node: gs.Node, opset: int) -> str | None:
    """Say why a node cannot compute in another layout; None if it can."""
    rule = None if node.domain else LAYOUT_RULES.get(node.op)
    if rule is None:
        return "it works in one layout only"
    if opset < rule.since:
        return f"before opset {rule.since} it flattens its input"
    ranks = {-1 if tensor.shape is None else len(tensor.shape) for tensor in present(node.outputs)}
    rank = ranks.pop() if len(ranks) == 1 else -1
    if rank == -1:
        return "the rank of its result is not known"
    for tensor in node.inputs if rule.all_inputs else node.inputs[:1]:
        dimensions = dimensions_of(tensor)
        if dimensions is None:
            return f"the rank of its input {tensor.name} is not known"
        if len(dimensions) > rank or (len(dimensions) < rank and not rule.all_inputs):
            return "its result has another rank than its input"
        if len(dimensions) < rank and not is_constant(tensor) and any(dimension != 1 for dimension in dimensions):
            return f"its input {tensor.name} has fewer axes than its result and is computed at run time"
    if not data_inputs(node):
        return "all its inputs are constants"
    return rule.why_not(node)


def data_inputs(node: gs.Node) -> list[int]:
    """Return the inputs of a movable node that are computed and have its layout."""
    last = len(node.inputs) if LAYOUT_RULES[node.op].all_inputs else 1
    return [index for index in range(last) if not is_constant(node.inputs[index]) and not is_single(node.inputs[index])]


def data_outputs(node: gs.Node) -> list[gs.Tensor]:
    """Return the outputs of a movable node that have its layout."""
    return [tensor for tensor in present(node.outputs) if not is_single(tensor)]


def is_single(tensor: gs.Tensor) -> bool:
    """Whether a tensor has one element: then its layout is any."""
    dimensions = dimensions_of(tensor)
    return dimensions is not None and all(dimension == 1 for dimension in dimensions)


def reads_as_data(node: gs.Node, tensor: gs.Tensor) -> bool:
    """Tell whether a movable node reads a tensor as nothing but data."""
    data = data_inputs(node)
    return all(index in data for index, each in enumerate(node.inputs) if each is tensor)


def _integers(node: gs.Node, index: int, attribute: str) -> list[int] | None:
    """Return what a node states as an attribute in old opsets, as an input in new ones; None if omitted or computed."""
    return list(node.attrs[attribute]) if attribute in node.attrs else integers_of(node, index)


def _needs_constant(index: int) -> Callable[[gs.Node], str | None]:
    def why_not(node: gs.Node) -> str | None:
        computed = has_input(node, index) and not is_constant(node.inputs[index])
        return f"its input {node.inputs[index].name} is computed at run time" if computed else None

    return why_not


def _rename_nothing(_layout: Layout) -> None:
    pass


def _rename_axis(default: int) -> Callable[[Layout], None]:
    def rename(layout: Layout) -> None:
        layout.node.attrs["axis"] = layout.permutation[layout.node.attrs.get("axis", default)]

    return rename


def _rename_axes(index: int) -> Callable[[Layout], None]:
    def rename(layout: Layout) -> None:
        axes = _integers(layout.node, index, "axes")
        if "axes" in layout.node.attrs:
            layout.node.attrs["axes"] = layout.axes(axes or ())
        elif axes is not None:
            layout.set_integers(index, layout.axes(axes))

    return rename


def _rename_axes_of_slice(layout: Layout) -> None:
    node = layout.node
    if "starts" in node.attrs:
        axes = layout.axes(node.attrs.get("axes", range(len(node.attrs["starts"]))))
        order = np.argsort(axes)  # shape inference of opset 9 knows sorted axes only
        node.attrs["axes"] = [axes[place] for place in order]
        for name in ("starts", "ends"):
            node.attrs[name] = [node.attrs[name][place] for place in order]
        return
    if not has_input(node, 3):  # the first ones
        (count,) = static_shape(node.inputs[1]) or (0,)
        dtype = np.int64 if node.inputs[1].dtype is None else node.inputs[1].dtype
        axes = gs.Constant(layout.names.fresh(f"{node.outputs[0].name}_axes"), np.arange(count, dtype=dtype))
        if len(node.inputs) == 3:
            node.inputs.append(axes)
        else:
            set_input(node, 3, axes)
    _rename_axes(3)(layout)


def _why_not_slice(node: gs.Node) -> str | None:
    if "starts" not in node.attrs and not has_input(node, 3) and static_shape(node.inputs[1]) is None:
        return "how many axes it slices is not known"
    return _needs_constant(3)(node)


def _reorder_pads(layout: Layout) -> None:
    if has_input(layout.node, 3):
        return _rename_axes(3)(layout)
    pads = _integers(layout.node, 1, "pads") or []
    half = len(pads) // 2
    moved = layout.per_axis(pads[:half]) + layout.per_axis(pads[half:])
    if "pads" in layout.node.attrs:
        layout.node.attrs["pads"] = moved
    else:
        layout.set_integers(1, moved)
    return None


def _why_not_pad(node: gs.Node) -> str | None:
    return _needs_constant(3 if has_input(node, 3) else 1)(node)


def _reorder_repeats(layout: Layout) -> None:
    layout.set_integers(1, layout.per_axis(_integers(layout.node, 1, "repeats") or []))


def _rename_axis_of_scale(layout: Layout) -> None:
    if not is_single(layout.node.inputs[1]):
        _rename_axis(1)(layout)


def _why_not_quantize(node: gs.Node) -> str | None:
    if node.attrs.get("block_size", 0):
        return "its scales are those of blocks"
    return None if dimensions_of(node.inputs[1]) is not None else "the rank of its scale is not known"


# fmt: off
_ELEMENTWISE = (
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "CastLike", "Ceil", "Celu", "Clip",
    "Cos", "Cosh", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN",
    "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin",
    "Sinh", "Softplus", "Softsign", "Sqrt", "Tan", "Tanh", "ThresholdedRelu",
)
_BROADCASTING = (
    "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual",
    "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
)
_REDUCING = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
# fmt: on

LAYOUT_RULES: dict[str, LayoutRule] = {
    **dict.fromkeys(_ELEMENTWISE, LayoutRule(_rename_nothing)),
    **dict.fromkeys(_BROADCASTING, LayoutRule(_rename_nothing, all_inputs=True)),
    **{f"Reduce{each}": LayoutRule(_rename_axes(1), _needs_constant(1)) for each in _REDUCING},
    **dict.fromkeys(("ArgMax", "ArgMin", "Split"), LayoutRule(_rename_axis(0))),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), LayoutRule(_rename_axis(-1), since=13)),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), LayoutRule(_rename_axis_of_scale, _why_not_quantize)),
    "Concat": LayoutRule(_rename_axis(0), all_inputs=True),
    "LpNormalization": LayoutRule(_rename_axis(-1)),
    "Pad": LayoutRule(_reorder_pads, _why_not_pad),
    "Slice": LayoutRule(_rename_axes_of_slice, _why_not_slice),
    "Tile": LayoutRule(_reorder_repeats, _needs_constant(1)),
    "TopK": LayoutRule(_rename_axis(-1)),
}
