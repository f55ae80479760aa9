"""Affine quantization in numpy: scale, zero point, quantize, dequantize.

A real x is stored as the integer q = clamp(round_half_even(x / scale) + zero_point, qmin, qmax) and read back as
(q - zero_point) * scale: the arithmetic of ONNX QuantizeLinear and DequantizeLinear
(https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html). *Symmetric* means zero_point = 0 for signed types. A float8
value is rounded to the nearest of its type, half to even, instead of to an integer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

Array = NDArray[Any]

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
"""A scale below the smallest normal float32 may be flushed to zero by a runtime, and then divides by it."""


@dataclass(frozen=True)
class QuantType:
    """A stored type and the part of its range that is used.

    Weights use [-127, 127] of int8, so that negating a weight never overflows; activations use the whole range.
    """

    dtype: np.dtype[Any]
    minimum: int
    maximum: int
    symmetric: bool  # the zero point is 0, and the range is widened to be symmetric around it

    @property
    def is_float(self) -> bool:
        """Whether it stores floats: values far below the scale keep their relative precision."""
        return self.dtype.name.startswith("float")

    @property
    def levels(self) -> int:
        """Steps between the lowest and the highest value."""
        return self.maximum - self.minimum


UINT8 = QuantType(np.dtype(np.uint8), 0, 255, symmetric=False)
INT8 = QuantType(np.dtype(np.int8), -128, 127, symmetric=False)
UINT16 = QuantType(np.dtype(np.uint16), 0, 65535, symmetric=False)
INT16 = QuantType(np.dtype(np.int16), -32768, 32767, symmetric=False)
INT8_SYMMETRIC = QuantType(np.dtype(np.int8), -128, 127, symmetric=True)
INT8_WEIGHT = QuantType(np.dtype(np.int8), -127, 127, symmetric=True)
INT4_WEIGHT = QuantType(helper.tensor_dtype_to_np_dtype(TensorProto.INT4), -8, 7, symmetric=True)
UINT4_WEIGHT = QuantType(helper.tensor_dtype_to_np_dtype(TensorProto.UINT4), 0, 15, symmetric=False)
FLOAT8_E4M3 = QuantType(helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN), -448, 448, symmetric=True)


@dataclass(frozen=True)
class QuantParams:
    """Scale and zero point of one tensor: scalars, or one value for each index of `axis`."""

    scale: Array  # float32, > 0, shape () or [C]
    zero_point: Array  # of the quantized dtype, same shape as scale
    quant_type: QuantType
    axis: int | None = None

    def _along_axis(self, values: Array, rank: int) -> Array:
        if self.axis is None:
            return values
        shape = [1] * rank
        shape[self.axis] = -1
        return values.reshape(shape)

    def scaled(self, factor: float) -> QuantParams:
        """The parameters of the same integers where they stand for values `factor` times as large; `factor` > 0."""
        return self if factor == 1 else replace(self, scale=np.asarray(self.scale * factor, np.float32))

    def quantize(self, values: Array) -> Array:
        """Real values -> stored ones of the quantized dtype, same shape."""
        scale = self._along_axis(self.scale, values.ndim)
        zero_point = self._along_axis(self.zero_point, values.ndim).astype(np.float32)
        steps = values / scale if self.quant_type.is_float else np.rint(values / scale)
        stored = np.asarray(steps + zero_point)  # of shape (), numpy makes a scalar
        return np.asarray(stored.clip(self.quant_type.minimum, self.quant_type.maximum), self.quant_type.dtype)

    def dequantize(self, stored: Array) -> Array:
        """Stored values -> float32, same shape."""
        zero_point = self._along_axis(self.zero_point, stored.ndim).astype(np.float32)
        scale = self._along_axis(self.scale, stored.ndim)
        return np.asarray((stored.astype(np.float32) - zero_point) * scale, np.float32)


def params_of_range(minimum: float, maximum: float, quant_type: QuantType) -> QuantParams:
    """Per-tensor parameters that cover [minimum, maximum].

    The range is first widened to contain 0, so that 0 (padding, Relu) is exact; symmetric types cover
    [-m, m] with m = max(|minimum|, |maximum|) by +-qmax steps. Where only 0 was seen the range is [0, 1]: any scale has
    the 0, and kernels divide biases by it.
    """
    low, high = min(minimum, 0.0), max(maximum, 0.0)
    high = 1.0 if low == high else high
    if quant_type.symmetric:
        scale = np.float32(max(max(-low, high) / quant_type.maximum, SMALLEST_SCALE))
        zero_point = 0
    else:
        scale = np.float32(max((high - low) / quant_type.levels, SMALLEST_SCALE))
        zero_point = quant_type.minimum + round(-low / float(scale))
        zero_point = min(max(zero_point, quant_type.minimum), quant_type.maximum)
    return QuantParams(np.asarray(scale), np.asarray(zero_point, quant_type.dtype), quant_type)


def rows_of_channels(weight: Array, axis: int | None) -> Array:
    """A weight of any shape as [C, values of each index of `axis`]; one row of all values where `axis` is None."""
    return weight.reshape(1, -1) if axis is None else np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)


def params_of_weight(
    weight: Array,
    axis: int | None,
    quant_type: QuantType,
    *,
    least: Array | float = 0.0,
) -> QuantParams:
    """Symmetric parameters of a weight: per tensor, or one scale for each index of `axis`.

    scale[c] = max |weight[c]| / qmax. A channel of zeros gets scale 1: any would do, and no division by zero follows.

    Args:
        weight: any shape.
        axis: of the channels; None: one scale.
        quant_type: of the stored weight.
        least: no scale is smaller; one value, or one for each channel.
    """
    bound = np.abs(rows_of_channels(weight, axis).astype(np.float64)).max(axis=1, initial=0.0) / quant_type.maximum
    scale = np.where(bound > 0, np.maximum(np.maximum(bound, SMALLEST_SCALE), least), 1.0).astype(np.float32)
    scale = scale.reshape(()) if axis is None else scale
    return QuantParams(scale, np.zeros(scale.shape, quant_type.dtype), quant_type, axis=axis)
