"""What the rules of operators share while channels are followed through a graph: axes, and what must stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.graph import has_input, is_constant, label_of
from graphopt.sizes import Shape
from graphopt.stated_sizes import SizeOf, stated
from graphopt.units import Axis, Units


class Unclear(Exception):  # noqa: N818 - no error: the node is left alone for this reason
    """A rule cannot say what a node does to the axes; the message says why, as a clause."""


@dataclass(frozen=True)
class Linear:
    """A linear operator with a constant weight: what units cost, and what tells how much they matter.

    Attributes:
        node: its label.
        op: the operator.
        output: the name of its result.
        weight: the name of its weight.
        output_axis, input_axis: of the weight; with conv groups, `input_axis` counts within a group.
        data: the name of the tensor that it reads.
        data_axis: the axis of `data` that is summed over.
        groups: conv groups.
    """

    node: str
    op: str
    output: str
    weight: str
    output_axis: int
    input_axis: int
    data: str
    data_axis: int
    groups: int = 1


@dataclass(frozen=True)
class Work:
    """MACs of a node; they shrink with each of the axes."""

    macs: int
    axes: tuple[Axis, ...]


@dataclass
class Flow:
    """Axes by tensor and, for vectors, by use: two readers of one bias do not tie their channels together.

    Attributes:
        shapes: of all tensors by name, at assumed sizes where a model leaves them open.
        macs: of nodes by their first output.
        opset: of the model.
        units: all ids.
        axes: by the id of a tensor.
        uses: axes of constant vectors by the id of the node that reads them, and the input.
        works: what nodes compute.
        linears: the operators with a weight.
        inexact: axes that an operator takes the mean of, with the reason.
        scales: uses that scale each channel: the scale of BatchNormalization.
    """

    shapes: Mapping[str, Shape | None]
    macs: Mapping[str, int]
    opset: int = 0
    units: Units = field(default_factory=Units)
    axes: dict[int, list[Axis]] = field(default_factory=dict)
    uses: dict[tuple[int, int], list[Axis]] = field(default_factory=dict)
    works: list[Work] = field(default_factory=list)
    linears: list[Linear] = field(default_factory=list)
    inexact: list[tuple[Axis, str]] = field(default_factory=list)
    scales: list[tuple[int, int]] = field(default_factory=list)

    def shape(self, tensor: gs.Tensor) -> Shape:
        """The sizes of a tensor.

        Raises:
            Unclear: they are not known, or one is 0.
        """
        shape = self.shapes.get(tensor.name)
        if isinstance(tensor, gs.Constant):
            shape = tuple(tensor.shape)
        if shape is None:
            raise Unclear(f"the shape of {tensor.name} is not known")
        if 0 in shape:
            raise Unclear(f"{tensor.name} is empty")
        return shape

    def input(self, node: gs.Node, index: int) -> list[Axis]:
        """The axes of an input.

        Raises:
            Unclear: it is missing, or its shape is not known.
        """
        if not has_input(node, index):
            raise Unclear(f"it has no input {index}")
        tensor = node.inputs[index]
        if not is_constant(tensor):
            known = self.axes.get(id(tensor))
            if known is None:
                known = self.axes[id(tensor)] = [
                    Axis(size, fixed=f"the axes of {tensor.name} are not followed") for size in self.shape(tensor)
                ]
            return known
        shape = self.shape(tensor)
        if is_vector(shape):
            key = (id(node), index)
            if key not in self.uses:
                self.uses[key] = [self.units.fresh(size) for size in shape]
            return self.uses[key]
        if id(tensor) not in self.axes:
            self.axes[id(tensor)] = [self.units.fresh(size) for size in shape]
        return self.axes[id(tensor)]

    def give(self, node: gs.Node, index: int, axes: Sequence[Axis]) -> None:
        """State the axes of an output, where the node has it.

        Raises:
            Unclear: shape inference has found other sizes, so a rule or the model is wrong.
        """
        if index >= len(node.outputs) or not node.outputs[index].name:
            return
        tensor = node.outputs[index]
        if tuple(axis.size for axis in axes) != self.shape(tensor):
            raise Unclear(f"{tensor.name} has other sizes than its inputs lead to")
        self.axes[id(tensor)] = list(axes)

    def align(self, *axes: Axis) -> Axis:
        """See `Units.align`.

        Raises:
            Unclear: the sizes differ.
        """
        if len({axis.size for axis in axes}) > 1:
            raise Unclear(f"it joins axes of the sizes {', '.join(str(axis.size) for axis in axes)}")
        return self.units.align(axes)

    def hold(self, axis: Axis, node: gs.Node, what: str) -> Axis:
        """Keep all units of an axis because of what a node does with it, said as a clause."""
        return self.units.freeze(axis, f"{node.op} {label_of(node)} {what}")

    def hold_all(self, node: gs.Node, reason: str) -> None:
        """Keep all that a node reads, and give its outputs nothing to remove."""
        for index, tensor in enumerate(node.inputs):
            if not tensor.name:
                continue
            try:
                for axis in self.input(node, index):
                    self.units.freeze(axis, reason)
            except Unclear:
                pass
        for tensor in node.outputs:
            shape = self.shapes.get(tensor.name)
            if shape is not None:
                self.axes[id(tensor)] = [Axis(size, fixed=reason) for size in shape]

    def follow_sizes(self, node: gs.Node, index: int, axes: list[Axis]) -> list[Axis]:
        """Tie output axes to the sizes that an input states: units stay where these cannot follow."""
        entries = stated(node.inputs[index])
        result = []
        for place, axis in enumerate(axes):
            entry = entries[place] if entries is not None and len(entries) == len(axes) else None
            if isinstance(entry, SizeOf) and id(entry.tensor) in self.axes:
                source = self.axes[id(entry.tensor)][entry.axis]
                result.append(self.align(axis, source) if source.size == axis.size else axis)
            elif axis.columns and not isinstance(entry, int):
                result.append(self.hold(axis, node, "computes this size when it runs: put fold first"))
            else:
                result.append(axis)
        return result


def is_vector(shape: Shape) -> bool:
    """Whether at most one axis has more than one position: copying such a constant costs nothing."""
    return sum(size > 1 for size in shape) <= 1


def broadcast(flow: Flow, operands: Sequence[Sequence[Axis]], rank: int) -> list[Axis]:
    """The axes of an elementwise result: axes that meet are aligned, those of one position give way."""
    result = []
    for place in range(-rank, 0):
        meeting = [axes[place] for axes in operands if len(axes) >= -place]
        larger = [axis for axis in meeting if axis.size > 1]
        result.append(flow.align(*larger) if larger else meeting[0])
    return result


def positions(count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """0, 1, ... as the positions of an axis."""
    return np.arange(count, dtype=np.int64)
