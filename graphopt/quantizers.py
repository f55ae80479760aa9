"""QuantizeLinear and DequantizeLinear as they stand in a graph, whichever tool wrote them.

One view of both operators, of ONNX's and of onnxruntime's own (domain com.microsoft): scales in initializers or in
Constant nodes, zero points left out, negative axes, one scale, a scale for each channel or for each block.
(https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.graph import Array, constant_of, has_input, is_constant, label_of, producer
from graphopt.sizes import numpy_dtype

_DOMAINS = (None, "", "ai.onnx", "com.microsoft")
_MOVES = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True, eq=False)
class Quantizer:
    """One QuantizeLinear or DequantizeLinear."""

    node: gs.Node

    @property
    def quantizes(self) -> bool:
        """Whether it is a QuantizeLinear."""
        return bool(self.node.op == "QuantizeLinear")

    @property
    def data(self) -> gs.Tensor:
        """What it reads: the real values, or the stored ones."""
        return self.node.inputs[0]

    @property
    def output(self) -> gs.Tensor:
        """What it computes."""
        return self.node.outputs[0]

    @property
    def label(self) -> str:
        """What reports call it."""
        return label_of(self.node)

    @cached_property
    def scale(self) -> Array | None:
        """The scales; None where they are computed at run time."""
        return constant_of(self.node.inputs[1])

    @property
    def has_zero_point(self) -> bool:
        """Whether the input is there; else the zero point is 0."""
        return has_input(self.node, 2)

    @cached_property
    def zero_point(self) -> Array | None:
        """The zero points, zeros of the scales' shape where they are left out; None: computed at run time."""
        if self.has_zero_point:
            return constant_of(self.node.inputs[2])
        return np.zeros(() if self.scale is None else self.scale.shape, np.int64)

    @cached_property
    def stored_dtype(self) -> np.dtype[Any] | None:
        """The type of the stored values; None where nothing tells."""
        if self.has_zero_point:
            return dtype_of(self.node.inputs[2])
        if not self.quantizes:
            return dtype_of(self.data)
        stated = int(self.node.attrs.get("output_dtype", 0))
        return numpy_dtype(stated) if stated else np.dtype(np.uint8)

    @property
    def block_size(self) -> int:
        """How many values along the axis share a scale; 0: there are no blocks."""
        return int(self.node.attrs.get("block_size", 0))

    @property
    def is_per_tensor(self) -> bool:
        """Whether one scale holds for the whole tensor."""
        shape = self.node.inputs[1].shape
        return not self.block_size and (not shape or (len(shape) == 1 and shape[0] == 1))

    @property
    def axis(self) -> int:
        """The axis of the scales, counted from the front where the rank is known."""
        axis = int(self.node.attrs.get("axis", 1))
        shape = self.data.shape if self.data.shape is not None else self.output.shape
        return axis if axis >= 0 or shape is None else axis + len(shape)

    def has_scale_of(self, other: Quantizer) -> bool:
        """Whether both are constant and the same, scale and zero point."""
        pairs = ((self.scale, other.scale), (self.zero_point, other.zero_point))
        return all(a is not None and b is not None and np.array_equal(a, b) for a, b in pairs)


def quantizer_of(node: gs.Node | None) -> Quantizer | None:
    """A node as a quantizer, if it is one."""
    if node is None or node.op not in ("QuantizeLinear", "DequantizeLinear") or node.domain not in _DOMAINS:
        return None
    return Quantizer(node) if len(node.inputs) > 1 and node.outputs else None


def dequantizer_of(tensor: gs.Tensor) -> Quantizer | None:
    """The DequantizeLinear that computes a tensor."""
    found = quantizer_of(producer(tensor))
    return None if found is None or found.quantizes else found


def quantizers_after(tensor: gs.Tensor) -> Iterator[Quantizer]:
    """The QuantizeLinear nodes that quantize a tensor, each once."""
    for node in {id(node): node for node in tensor.outputs}.values():
        found = quantizer_of(node)
        if found is not None and found.quantizes and found.data is tensor:
            yield found


def before_pair(tensor: gs.Tensor) -> gs.Tensor:
    """The tensor that a Q and a DQ stand behind; the tensor itself where none do."""
    dequantizer = dequantizer_of(tensor)
    quantizer = None if dequantizer is None else quantizer_of(producer(dequantizer.data))
    return tensor if quantizer is None or not quantizer.quantizes else quantizer.data


def is_weight(quantizer: Quantizer) -> bool:
    """Whether what it quantizes is known before the model runs, perhaps moved, or stored already."""
    tensor = quantizer.data
    while not is_constant(tensor):
        node = producer(tensor)
        if node is None or not (node.op in _MOVES or quantizer_of(node) is not None):
            return False
        tensor = node.inputs[0]
    return True


def dtype_of(tensor: gs.Tensor) -> np.dtype[Any] | None:
    """The dtype of a tensor, types that numpy lacks included; None where it is not known."""
    return None if not tensor.dtype else numpy_dtype(tensor.dtype)


def values_of(dequantizer: Quantizer, stored: Array) -> Array:
    """What the DequantizeLinear makes of `stored`: (stored - z) * s in the type that it computes."""
    scale, zero_point = dequantizer.scale, dequantizer.zero_point
    assert scale is not None and zero_point is not None
    dtype = dtype_of(dequantizer.output) or scale.dtype
    wide = np.float64
    centred = stored.astype(wide) - _along(dequantizer, zero_point.astype(wide), stored.shape)
    return np.asarray(centred * _along(dequantizer, scale.astype(wide), stored.shape), dtype)


def change_by(quantizer: Quantizer, dequantizer: Quantizer) -> tuple[Array, Array]:
    """What a pair does but for rounding and clipping: x * factor + shift, in shapes that broadcast to x.

    Q gives x / s + z, DQ (q - y) * t; together x * (t / s) + (z - y) * t.
    """
    shape = tuple(quantizer.data.shape or ())
    dtype = dtype_of(quantizer.data) or np.dtype(np.float32)
    sides = []
    for each in (quantizer, dequantizer):
        assert each.scale is not None and each.zero_point is not None
        sides.append([_along(each, value.astype(np.float64), shape) for value in (each.scale, each.zero_point)])
    (s, z), (t, y) = sides
    return np.asarray(t / s, dtype), np.asarray((z - y) * t, dtype)


def ends_of(quantizer: Quantizer) -> tuple[float | None, float | None]:
    """The lowest and the highest value that pass a Q with one scale; None where the type is no integer."""
    dtype = quantizer.stored_dtype
    if dtype is None or dtype.kind not in "iu" or not quantizer.is_per_tensor:
        return None, None
    assert quantizer.scale is not None and quantizer.zero_point is not None
    scale, zero_point, limits = float(quantizer.scale.flat[0]), int(quantizer.zero_point.flat[0]), np.iinfo(dtype)
    return (int(limits.min) - zero_point) * scale, (int(limits.max) - zero_point) * scale


def _along(quantizer: Quantizer, values: Array, shape: tuple[Any, ...]) -> Array:
    """One value, or a value for each channel or block in a shape that broadcasts to `shape`."""
    if quantizer.is_per_tensor:
        return values.reshape(())
    if quantizer.block_size:  # the last block may be shorter
        repeated = np.repeat(values, quantizer.block_size, axis=quantizer.axis)
        return repeated.take(range(shape[quantizer.axis]), axis=quantizer.axis)
    return values.reshape([-1 if axis == quantizer.axis else 1 for axis in range(len(shape))])
