"""What is known of small integer tensors when some dimensions are not: the shape arithmetic that exporters write.

With a dynamic batch, Shape gives [batch, 3, 224, 224]: no constant, but the Gather that picks the 224 is one, and the
one that picks the batch gives the size of an axis that other tensors have too. Each tensor has a `PartialValue`: an
integer array and a mask of the elements that hold for every input; the others are the number of the size that they
stand for, or 0. Operators that move elements are applied to both; those that compute are applied to the values, and
an element is known where all its operands are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graphopt.graph import Array, all_graphs, constant_of, is_constant, present
from graphopt.shapes import is_name

MAX_ELEMENTS = 64  # a shape has a handful: larger tensors are data
_INTEGERS = (np.dtype(np.int64), np.dtype(np.int32))


@dataclass(frozen=True)
class PartialValue:
    """An integer tensor of which some elements are known: both arrays have the tensor's shape."""

    values: Array  # of the tensor's dtype, int64 or int32; where not known, a number of `ShapeValues.number` or 0
    known: NDArray[np.bool_]

    @property
    def complete(self) -> bool:
        """Whether every element is known."""
        return bool(self.known.all())


class ShapeValues:
    """The partial values of a graph and the graphs in it, and the sizes that they stand for."""

    def __init__(self, graph: gs.Graph) -> None:
        """Compute them; nodes must be in topological order, and shapes should have been inferred before."""
        self._values: dict[int, PartialValue] = {}
        self._numbers: dict[Hashable, int] = {}
        self._outputs = {id(output) for each in all_graphs(graph) for output in each.outputs}
        for each in all_graphs(graph):
            for node in each.nodes:
                rule = None if node.domain else _RULES.get(node.op)
                if rule is None or len(present(node.outputs)) != 1:
                    continue
                try:
                    value = rule(node, _Operands(node, self))
                except (_UnknownError, ValueError, IndexError):  # more than this knows, or not valid: left for others
                    continue
                if value.values.size <= MAX_ELEMENTS:
                    self._values[id(node.outputs[0])] = value

    def of(self, tensor: gs.Tensor) -> PartialValue | None:
        """Return what is known of a computed tensor; None when that is nothing."""
        return self._values.get(id(tensor))

    def number(self, tensor: gs.Tensor, axis: int) -> int:
        """Return the number of the size of an axis, above 0: equal numbers are equal sizes whatever the input.

        The name of a size counts, but not on graph outputs, where exporters write any.
        """
        size = tensor.shape[axis] if tensor.shape is not None else None
        named = is_name(size) and id(tensor) not in self._outputs
        return self._numbers.setdefault(size if named else (id(tensor), axis), len(self._numbers) + 1)


def dtype_of(attribute: object) -> np.dtype[Any] | None:
    """Return the numpy type that the `to` attribute of a Cast names; None for one that numpy does not have."""
    if not isinstance(attribute, int):
        return np.dtype(attribute)  # type: ignore[call-overload, no-any-return] # a numpy type, set by a script
    dtype = onnx.helper.tensor_dtype_to_np_dtype(attribute)
    return dtype if dtype.isbuiltin else None


def static_shape(tensor: gs.Tensor) -> tuple[int, ...] | None:
    """Return the shape as numbers, if every dimension is one.

    Exporters write 0 and -1 for "unknown", so neither counts as a number.
    """
    shape = known_dimensions(tensor)
    if shape is None or any(dimension is None for dimension in shape):
        return None
    return tuple(dimension for dimension in shape if dimension is not None)


def known_dimensions(tensor: gs.Tensor) -> tuple[int | None, ...] | None:
    """Return the dimensions, None where one is not known; None alone when not even the rank is."""
    if isinstance(tensor, gs.Constant):
        return tuple(tensor.shape)
    if tensor.shape is None:
        return None
    return tuple(
        int(dimension) if isinstance(dimension, int | np.integer) and dimension > 0 else None
        for dimension in tensor.shape
    )


def dimensions_of(tensor: gs.Tensor) -> tuple[int | None, ...] | None:
    """Return the dimensions of a tensor, also where it is the output of a Constant node."""
    return shape_of_constant(tensor) if is_constant(tensor) else known_dimensions(tensor)


def shape_of_constant(tensor: gs.Tensor) -> tuple[int, ...]:
    """Return the shape of a constant; that of an initializer without loading it.

    Raises:
        ValueError: the tensor is no constant.
    """
    if isinstance(tensor, gs.Constant):
        return tuple(tensor.shape)
    value = constant_of(tensor)
    if value is None:
        raise ValueError(f"{tensor.name} is not constant")
    return value.shape


class _UnknownError(Exception):
    """An operand of which nothing is known."""


class _Operands:
    """The operands of one node: partial values where elements may be unknown, plain arrays where they may not."""

    def __init__(self, node: gs.Node, found: ShapeValues) -> None:
        self._tensors = list(node.inputs)
        self.found = found

    def __len__(self) -> int:
        return len(self._tensors)

    def has(self, index: int) -> bool:
        return index < len(self._tensors) and bool(self._tensors[index].name)

    def partial(self, index: int) -> PartialValue:
        tensor = self._tensors[index]
        computed = self.found.of(tensor)
        if computed is not None:
            return computed
        if isinstance(tensor, gs.Constant) and tensor.dtype not in _INTEGERS:
            raise _UnknownError  # asked first: reading the value would load a weight
        value = constant_of(tensor)
        if value is None or value.dtype not in _INTEGERS or value.size > MAX_ELEMENTS:
            raise _UnknownError
        return PartialValue(value, np.ones(value.shape, np.bool_))

    def known(self, index: int) -> Array:
        partial = self.partial(index)
        if not partial.complete:
            raise _UnknownError
        return partial.values


_Rule = Callable[[gs.Node, _Operands], PartialValue]


def _moved(partial: PartialValue, move: Callable[[Array], Array]) -> PartialValue:
    return PartialValue(np.asarray(move(partial.values)), np.asarray(move(partial.known)))


def _shape(node: gs.Node, operands: _Operands) -> PartialValue:
    tensor = node.inputs[0]
    dimensions = known_dimensions(tensor)
    if dimensions is None:
        raise _UnknownError
    axes = range(len(dimensions))[slice(node.attrs.get("start"), node.attrs.get("end"))]
    sizes = [dimensions[axis] for axis in axes]
    values = [operands.found.number(tensor, axis) if dimensions[axis] is None else dimensions[axis] for axis in axes]
    return PartialValue(np.array(values, np.int64), np.array([size is not None for size in sizes], np.bool_))


def _size(node: gs.Node, _operands: _Operands) -> PartialValue:
    shape = static_shape(node.inputs[0])
    if shape is None:
        raise _UnknownError
    return PartialValue(np.asarray(np.prod(shape, dtype=np.int64)), np.asarray(True))


def _same(_node: gs.Node, operands: _Operands) -> PartialValue:
    return operands.partial(0)


def _cast(node: gs.Node, operands: _Operands) -> PartialValue:
    wanted = dtype_of(node.attrs["to"])
    if wanted not in _INTEGERS:
        raise _UnknownError
    partial, limits = operands.partial(0), np.iinfo(wanted)
    if np.any(partial.known & ((partial.values < limits.min) | (partial.values > limits.max))):
        raise _UnknownError  # what an overflow gives is not defined
    return PartialValue(partial.values.astype(wanted), partial.known)


def _gather(node: gs.Node, operands: _Operands) -> PartialValue:
    indices, axis = operands.known(1), node.attrs.get("axis", 0)
    return _moved(operands.partial(0), lambda array: np.take(array, indices, axis))


def _slice(node: gs.Node, operands: _Operands) -> PartialValue:
    if "starts" in node.attrs:  # opset < 10
        starts, ends = node.attrs["starts"], node.attrs["ends"]
        axes, steps = node.attrs.get("axes", range(len(starts))), [1] * len(starts)
    else:
        starts, ends = operands.known(1).tolist(), operands.known(2).tolist()
        axes = operands.known(3).tolist() if operands.has(3) else range(len(starts))
        steps = operands.known(4).tolist() if operands.has(4) else [1] * len(starts)
    if list(axes) not in ([0], [-1]) or operands.partial(0).values.ndim != 1 or steps[0] <= 0:
        raise _UnknownError  # shapes have one axis; backwards slices follow other rules than Python's
    return _moved(operands.partial(0), lambda array: array[starts[0] : ends[0] : steps[0]])


def _axes(node: gs.Node, operands: _Operands) -> list[int] | None:
    if operands.has(1):
        return [int(axis) for axis in operands.known(1).reshape(-1)]
    axes: list[int] | None = node.attrs.get("axes")
    return axes


def _unsqueeze(node: gs.Node, operands: _Operands) -> PartialValue:
    axes = _axes(node, operands)
    if axes is None:
        raise _UnknownError
    return _moved(operands.partial(0), lambda array: np.expand_dims(array, tuple(axes)))


def _squeeze(node: gs.Node, operands: _Operands) -> PartialValue:
    axes = _axes(node, operands)
    return _moved(operands.partial(0), lambda array: np.squeeze(array, None if axes is None else tuple(axes)))


def _concat(node: gs.Node, operands: _Operands) -> PartialValue:
    parts = [operands.partial(index) for index in range(len(operands))]
    axis = node.attrs["axis"]
    return PartialValue(
        np.concatenate([part.values for part in parts], axis),
        np.concatenate([part.known for part in parts], axis),
    )


def _reshape(_node: gs.Node, operands: _Operands) -> PartialValue:
    shape = operands.known(1).tolist()
    if 0 in shape:
        raise _UnknownError  # copies a dimension or makes an empty tensor: rare in shape arithmetic
    return _moved(operands.partial(0), lambda array: array.reshape(shape))


def _computed(compute: Callable[[Array, Array], Array], neutral: int, *, commutes: bool) -> _Rule:
    """Return the rule of an operator with an operand that changes nothing, and so keeps what the other stands for."""

    def rule(_node: gs.Node, operands: _Operands) -> PartialValue:
        left, right = operands.partial(0), operands.partial(1)
        known = left.known & right.known
        values = np.where(known, compute(left.values, right.values), 0)
        values = np.where(~left.known & right.known & (right.values == neutral), left.values, values)
        if commutes:
            values = np.where(~right.known & left.known & (left.values == neutral), right.values, values)
        return PartialValue(values.astype(left.values.dtype), known)

    return rule


def _quotient(left: Array, right: Array) -> Array:
    """Divide integers and truncate, as C and onnxruntime do; unknown divisors are 0 and give any value."""
    divisor = np.where(right == 0, 1, right)
    return np.asarray(np.sign(left) * np.sign(divisor) * (np.abs(left) // np.abs(divisor)))


def _divide(node: gs.Node, operands: _Operands) -> PartialValue:
    divisor = operands.partial(1)
    if np.any(divisor.known & (divisor.values == 0)):
        raise _UnknownError
    return _computed(_quotient, 1, commutes=False)(node, operands)


_RULES: dict[str, _Rule] = {
    "Shape": _shape,
    "Size": _size,
    "Identity": _same,
    "Cast": _cast,
    "Gather": _gather,
    "Slice": _slice,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Concat": _concat,
    "Reshape": _reshape,
    "Add": _computed(np.add, 0, commutes=True),
    "Sub": _computed(np.subtract, 0, commutes=False),
    "Mul": _computed(np.multiply, 1, commutes=True),
    "Div": _divide,
}
