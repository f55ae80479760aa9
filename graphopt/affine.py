"""Nodes that scale and shift: y = scale * x + shift, with one pair of numbers for each channel or one for all.

    BatchNormalization   scale = gamma / sqrt(var + epsilon)     shift = beta - scale * mean      axis 1
    x * k, k * x         scale = k                               shift = 0
    x / k                scale = 1 / k                           shift = 0
    x + k, k + x         scale = 1                               shift = k
    x - k                scale = 1                               shift = -k
    k - x                scale = -1                              shift = k
    -x                   scale = -1                              shift = 0

(https://onnx.ai/onnx/operators/). Which axis of x a constant k runs along is proved by aligning the two from the
right, as broadcasting does: [C, 1, 1] and [1, C, 1, 1] run along axis -3, [C] along axis -1, whatever C is. All
arithmetic is in float64; what is stored is cast once.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graphopt.graph import Array, constant_of, is_constant, present, producer
from graphopt.partial_values import known_dimensions, shape_of_constant

Channels = NDArray[np.float64]

ELEMENTWISE = frozenset({"Add", "Div", "Mul", "Neg", "Sub"})
"""Operators that scale and shift when their other operand is constant."""

_FLOATS = {"float16", "bfloat16", "float32", "float64"}  # integers wrap and truncate: they are not reassociated
_DEFAULT_EPSILON = 1e-5  # of BatchNormalization's operator page
_PARAMETERS = ("scale", "bias", "mean", "variance")  # inputs 1 to 4 of BatchNormalization
_PRODUCTS = ("Gemm", "MatMul")
_RANK_OF_INPUT = {"BatchNormalization", "Clip", "Identity", "LeakyRelu", "Neg", "Relu", "Sigmoid"}


@dataclass(frozen=True)
class Affine:
    """y = scale * x + shift along one axis of x, counted from the end; both arrays are float64 of shape [C].

    Without an axis both have shape [1] and hold for every element.
    """

    scale: Channels
    shift: Channels
    axis: int | None

    def then(self, after: Affine) -> Affine | None:
        """Return both, one after the other; None where they run along two axes."""
        if None not in (self.axis, after.axis) and self.axis != after.axis:
            return None
        scale, shift = np.broadcast_arrays(self.scale * after.scale, self.shift * after.scale + after.shift)
        return Affine(scale, shift, after.axis if self.axis is None else self.axis)

    @property
    def keeps_scale(self) -> bool:
        """Whether it only shifts."""
        return bool((self.scale == 1).all())

    @property
    def keeps_zero(self) -> bool:
        """Whether it only scales."""
        return bool((self.shift == 0).all())

    @property
    def finite(self) -> bool:
        """Whether every number is one."""
        return bool(np.isfinite(self.scale).all() and np.isfinite(self.shift).all())

    @property
    def scale_alone(self) -> Affine:
        """Return the scale without the shift."""
        return replace(self, shift=np.zeros_like(self.shift))

    @property
    def shift_alone(self) -> Affine:
        """Return the shift without the scale."""
        return replace(self, scale=np.ones_like(self.scale))

    def over(self, channels: int) -> tuple[Channels, Channels]:
        """Return scale and shift with one number for each channel."""
        if self.scale.size == channels:
            return self.scale, self.shift
        return np.repeat(self.scale, channels), np.repeat(self.shift, channels)

    def constant(self, values: Channels, dtype: Any) -> Array:
        """Return `values`, the scale or the shift, in the shape in which they broadcast to x."""
        shape = () if self.axis is None else (-1, *[1] * (-self.axis - 1))
        with np.errstate(over="ignore"):  # whether the result is finite is the caller's question
            return np.asarray(values.reshape(shape), dtype)


class AffineNode(NamedTuple):
    """What an affine node does, and to which of its inputs."""

    source: gs.Tensor
    affine: Affine


def affine_of(node: gs.Node, opset: int, overridable: Container[str]) -> AffineNode | str | None:
    """Return what a node does if it is affine with known numbers; a reason if it only looks so; else None.

    Args:
        node: of a graph whose shapes have been inferred.
        opset: of that graph.
        overridable: names of the graph inputs with default values.
    """
    if node.domain or not node.outputs:
        return None
    if node.op == "BatchNormalization":
        return _why_not_batch_norm(node, opset, overridable) or _batch_norm(node)
    if node.op == "Neg":
        return AffineNode(node.inputs[0], Affine(-np.ones(1), np.zeros(1), None)) if _is_float(node) else None
    if node.op in ELEMENTWISE and opset >= 7:  # before, broadcasting followed other rules
        return _elementwise(node, overridable)
    return None


def is_batch_norm(node: gs.Node) -> bool:
    """Tell whether a node is ONNX's BatchNormalization, in whatever mode."""
    return node.op == "BatchNormalization" and not node.domain


def why_not_constant(tensor: gs.Tensor, overridable: Container[str]) -> str | None:
    """Say why the value of a tensor is not known, as the rest of a sentence that the tensor begins."""
    if is_constant(tensor):
        return None
    source = producer(tensor)
    if source is not None:
        return f"is computed by {source.op} {source.name}".rstrip()
    if tensor.name in overridable:
        return f"is graph input {tensor.name}, which a caller may override: run freeze-inputs first"
    return f"is graph input {tensor.name}"


def rank_of(tensor: gs.Tensor) -> int | None:
    """Return the number of axes, also where only the weight of a convolution on either side tells it."""
    asked = tensor
    while known_dimensions(tensor) is None:
        source = producer(tensor)
        if source is not None and source.op in ("Conv", "ConvTranspose"):
            return _rank_of_weight(source)
        if source is None or source.op not in _RANK_OF_INPUT:
            ranks = {_rank_of_weight(reader) for reader in asked.outputs if reader.op in ("Conv", "ConvTranspose")}
            return next(iter(ranks), None)
        tensor = source.inputs[0]
    dimensions = known_dimensions(tensor)
    return None if dimensions is None else len(dimensions)


def _rank_of_weight(convolution: gs.Node) -> int | None:
    dimensions = known_dimensions(convolution.inputs[1])
    return None if dimensions is None else len(dimensions)


def _is_float(node: gs.Node) -> bool:
    dtype = node.outputs[0].dtype if node.inputs[0].dtype is None else node.inputs[0].dtype
    return dtype is not None and not isinstance(dtype, int) and np.dtype(dtype).name in _FLOATS


def _why_not_batch_norm(node: gs.Node, opset: int, overridable: Container[str]) -> str | None:
    if opset < 7:
        return f"BatchNormalization of opset {opset} may mean training; raise the opset to 9 or later first"
    if node.attrs.get("spatial", 1) != 1:
        return "spatial=0 normalizes every element on its own, not every channel"
    if node.attrs.get("training_mode", 0):
        return "training_mode=1 normalizes with the statistics of each batch; export the model in inference mode"
    if len(present(node.outputs)) > 1:
        return "its extra outputs ask for the statistics of each batch; export the model in inference mode"
    for role, tensor in zip(_PARAMETERS, node.inputs[1:5], strict=True):
        reason = why_not_constant(tensor, overridable)
        if reason is not None:
            return f"its {role} {reason}"
    return None


def _batch_norm(node: gs.Node) -> AffineNode | str:
    scale, bias, mean, variance = (
        np.asarray(constant_of(tensor)).astype(np.float64).reshape(-1) for tensor in node.inputs[1:5]
    )
    rank = rank_of(node.inputs[0])
    if rank is None or rank < 2:
        return "the rank of its input is not known, so neither is the place of its channels"
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = scale / np.sqrt(variance + node.attrs.get("epsilon", _DEFAULT_EPSILON))
        affine = Affine(factor, bias - factor * mean, 1 - rank)
    return AffineNode(node.inputs[0], affine) if affine.finite else "its scale and shift are not finite"


def _elementwise(node: gs.Node, overridable: Container[str]) -> AffineNode | str | None:
    known = [is_constant(tensor) for tensor in node.inputs]
    if known.count(True) != 1:
        named = next((tensor for tensor in node.inputs if tensor.name in overridable), None)
        return None if named is None else f"its operand {why_not_constant(named, overridable)}"
    constant, source = node.inputs[known.index(True)], node.inputs[known.index(False)]
    shape = shape_of_constant(constant)
    axes = [index - len(shape) for index, size in enumerate(shape) if size != 1]
    if len(axes) > 1:
        return f"its constant {constant.name} varies along {len(axes)} axes, not along the channels alone"
    axis = axes[0] if axes else None
    reason = _why_not_aligned(source, constant.name, shape, axis)
    if reason is not None:
        return reason
    value = np.asarray(constant_of(constant))
    if value.dtype.name not in _FLOATS:
        return None
    affine = _OF_OPERATOR[node.op](value.astype(np.float64).reshape(-1), constant is node.inputs[0], axis)
    if affine is None:
        return "a constant divided by x is not affine in x"
    return AffineNode(source, affine) if affine.finite else f"its constant {constant.name} gives no finite factor"


def _why_not_aligned(source: gs.Tensor, name: str, shape: tuple[int, ...], axis: int | None) -> str | None:
    """Say why the constant may change the shape of what it is combined with."""
    before, dimensions = producer(source), known_dimensions(source)
    rank = rank_of(source)
    if rank is None and any(node is not None and node.op in _PRODUCTS for node in (before, *source.outputs)):
        rank = 1  # at least
    if len(shape) > (rank or 0):
        return f"whether {source.name} has the {len(shape)} axes of its constant {name} is not known"
    if axis is None:
        return None
    size = None if dimensions is None else dimensions[axis]
    if size is None and before is not None and before.op in ("Conv", "ConvTranspose", *_PRODUCTS):
        return None  # the number of its output channels is compared where it folds
    return None if size == shape[axis] else f"whether axis {axis} of {source.name} has size {shape[axis]} is not known"


def _product(value: Channels, _first: bool, axis: int | None) -> Affine:
    return Affine(value, np.zeros_like(value), axis)


def _quotient(value: Channels, first: bool, axis: int | None) -> Affine | None:
    with np.errstate(divide="ignore"):
        return None if first else Affine(1 / value, np.zeros_like(value), axis)


def _sum(value: Channels, _first: bool, axis: int | None) -> Affine:
    return Affine(np.ones_like(value), value, axis)


def _difference(value: Channels, first: bool, axis: int | None) -> Affine:
    return Affine(-np.ones_like(value), value, axis) if first else Affine(np.ones_like(value), -value, axis)


_OF_OPERATOR = {"Mul": _product, "Div": _quotient, "Add": _sum, "Sub": _difference}
