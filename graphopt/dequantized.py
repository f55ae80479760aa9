"""Weights that a model stores quantized: DequantizeLinear of constants, w = (q - zero_point) * scale.

A factor f for each output channel goes into the scale, and q stays as it is:

    f[o] * (q - zero_point) * scale[o]  =  (q - zero_point) * (f[o] * scale[o])

A negative factor turns the sign of q - zero_point instead, since runtimes want scales above zero, and a factor of
zero turns q into zero_point. (https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graphopt.affine import Channels
from graphopt.graph import Array, Names, constant_of, is_constant, producer


@dataclass(frozen=True)
class Dequantized:
    """The constants of a DequantizeLinear; scale and zero point have shape [] or [size of axis]."""

    quantized: Array
    scale: Array
    zero_point: Array | None
    axis: int | None  # None: one scale for the whole tensor

    @classmethod
    def of(cls, quantized: Array, scale: Array, zero_point: Array | None, axis: int) -> Self:
        """One with the axis where scale or zero point has more than one value, in whatever shape single ones are."""
        if scale.size == 1 and (zero_point is None or zero_point.size == 1):
            return cls(quantized, scale.reshape(()), None if zero_point is None else zero_point.reshape(()), None)
        return cls(quantized, scale, zero_point, axis % quantized.ndim)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return tuple(self.quantized.shape)

    def values(self) -> Array:
        """Return the weight in the dtype of the scale."""
        centred = self.quantized.astype(np.float64) - self.aligned_zero_point()
        return np.asarray(centred * self._aligned(self.scale), self.scale.dtype)

    def aligned_zero_point(self) -> NDArray[np.int64]:
        """Return the zero point in the shape in which it broadcasts to the weight."""
        return np.asarray(0 if self.zero_point is None else self._aligned(self.zero_point), np.int64)

    def node(self, old: gs.Tensor, names: Names) -> gs.Node:
        """Return a DequantizeLinear that computes it, named after the tensor whose place it takes."""
        values = {"quantized": self.quantized, "scale": self.scale, "zero_point": self.zero_point}
        inputs = [
            gs.Constant(names.fresh(f"{old.name}/{role}"), value) for role, value in values.items() if value is not None
        ]
        output = gs.Variable(names.fresh(old.name), self.scale.dtype, list(self.shape))
        attributes = {} if self.axis is None else {"axis": self.axis}
        return gs.Node("DequantizeLinear", names.fresh(f"{old.name}/dequantize"), attributes, inputs, [output])

    def _aligned(self, values: Array) -> Array:
        if self.axis is None:
            return values
        return values.reshape(-1, *[1] * (len(self.shape) - 1 - self.axis))


def dequantized(tensor: gs.Tensor) -> Dequantized | None:
    """Return what a DequantizeLinear of constants computes a tensor from; None for any other tensor.

    One with blocks, with another output type than that of its scale, or of a type that numpy lacks is another one too.
    """
    node = producer(tensor)
    if node is None or node.op != "DequantizeLinear" or node.domain:
        return None
    if node.attrs.get("block_size", 0) or node.attrs.get("output_dtype", 0):
        return None
    if (
        not all(is_constant(each) for each in node.inputs if each.name)
        or np.dtype(node.inputs[0].dtype).kind not in "iu"
    ):
        return None
    quantized, scale, *rest = (constant_of(each) for each in node.inputs if each.name)
    assert quantized is not None and scale is not None  # is_constant
    zero_point = rest[0] if rest else None
    return Dequantized.of(quantized, scale, zero_point, int(node.attrs.get("axis", 1)))


def why_not_rescaled(weight: Dequantized, output_axis: int | None, scale: Channels, opset: int) -> str | None:
    """Say why factors, one for all or one for each size of `output_axis`, cannot go into the scale."""
    one = np.unique(scale).size == 1
    if not one and output_axis is None:
        return "its quantized weight has no axis of these channels alone"
    if not one and opset < 13:
        return f"a DequantizeLinear of opset {opset} has one scale; raise the opset to 13"
    if not one and weight.axis not in (None, output_axis):
        return "its quantized weight has a scale along its input channels"
    if (scale < 0).any() and _cannot_turn(weight):
        return "a negative factor would take its quantized weight out of range"
    return None


def rescaled(weight: Dequantized, scale: Channels, output_axis: int) -> Dequantized:
    """Return the weight times `scale`, one factor for each size of `output_axis`; see `why_not_rescaled`."""
    if np.unique(scale).size == 1:
        factors, axis, aligned = scale[0], weight.axis, scale[0]
    else:
        factors, axis = scale, output_axis
        aligned = scale.reshape(-1, *[1] * (weight.quantized.ndim - 1 - output_axis))
    magnitude = np.where(factors == 0, 1.0, np.abs(factors))
    with np.errstate(over="ignore"):
        new_scale = np.asarray(weight.scale.astype(np.float64) * magnitude, weight.scale.dtype)
    zero_point = weight.zero_point
    if zero_point is not None and axis is not None and zero_point.ndim == 0:
        zero_point = np.full(new_scale.shape, zero_point)
    quantized = weight.quantized
    if (scale <= 0).any():
        centre = weight.aligned_zero_point()
        turned = centre + np.sign(aligned).astype(np.int64) * (quantized.astype(np.int64) - centre)
        quantized = turned.astype(quantized.dtype)
    return Dequantized(quantized, new_scale, zero_point, axis)


def _cannot_turn(weight: Dequantized) -> bool:
    centre = weight.aligned_zero_point()
    turned = 2 * centre - weight.quantized.astype(np.int64)
    limits = np.iinfo(weight.quantized.dtype)
    return bool((turned < limits.min).any() or (turned > limits.max).any())
