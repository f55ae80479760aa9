"""Operators that only move or select integers between a Q and a DQ, and so do the same on the real values.

A DequantizeLinear with one scale maps each integer by itself, and in order: DQ(q) = (q - zero_point) * scale. Of an
operator whose result holds elements of its inputs, chosen by their places or as the largest or smallest, it does not
matter whether it is mapped before or behind:

    DQ(move(q, ..., constant)) = move(DQ(q), ..., DQ(constant))

whatever the scale of the Q was. A Resize that interpolates rounds besides, which goes with the rounding of the Q.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graphopt.graph import has_input, is_constant, present, producer
from graphopt.operators import MOVING

_FIRST_INPUT = MOVING | {
    *("DepthToSpace", "GatherElements", "GatherND", "MaxPool", "ReduceMax", "ReduceMin", "Resize", "ReverseSequence"),
    *("SpaceToDepth", "Split"),
}
_SOME_INPUTS = {"Clip": (0, 1, 2), "Pad": (0, 2), "Where": (1, 2)}
_ALL_INPUTS = frozenset({"Concat", "Max", "Min"})
_VALUE_OF_PAD = 2  # the input


def moved_inputs(node: gs.Node) -> list[int] | None:
    """The inputs of a node whose elements its outputs hold, each as it is; None: it may compute others."""
    if node.domain not in (None, "", "ai.onnx"):
        return None
    if node.op in _ALL_INPUTS:
        indices: tuple[int, ...] = tuple(range(len(node.inputs)))
    elif node.op in _SOME_INPUTS:
        indices = _SOME_INPUTS[node.op]
    elif node.op in _FIRST_INPUT and not _returns_or_takes_other_values(node):
        indices = (0,)
    else:
        return None
    return [index for index in indices if has_input(node, index)]


def _returns_or_takes_other_values(node: gs.Node) -> bool:
    """Whether a MaxPool returns indices too, or a Resize has a value of its own for what lies outside."""
    if node.op == "MaxPool":
        return len(present(node.outputs)) > 1
    return bool(node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize")


def sources_of(tensor: gs.Tensor) -> list[gs.Tensor]:
    """The tensors whose elements `tensor` holds, behind any operators that move them; itself where there are none."""
    waiting, seen, found = [tensor], set[int](), list[gs.Tensor]()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        node = None if is_constant(each) else producer(each)
        indices = None if node is None else moved_inputs(node)
        if node is None or indices is None:
            found.append(each)
        else:
            waiting.extend(node.inputs[index] for index in indices)
    return found


def fills_with_integer_zero(node: gs.Node) -> bool:
    """Whether a node adds the integer 0 because it has no input that says otherwise: what it stands for is another."""
    return bool(
        node.op == "Pad" and node.attrs.get("mode", "constant") == "constant" and not has_input(node, _VALUE_OF_PAD)
    )


def set_fill(inputs: list[gs.Tensor], value: gs.Tensor) -> None:
    """Let the inputs of a Pad hold the value that it adds."""
    while len(inputs) <= _VALUE_OF_PAD:
        inputs.append(gs.Variable.empty())
    inputs[_VALUE_OF_PAD] = value
