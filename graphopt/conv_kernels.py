"""Conv as arithmetic on kernels: what a Conv does apart from its input, and the sum of two.

Conv is linear in its weight, and a kernel stays the same function when zeros are put around it and the pads grow by as
much. An output at position o reads the input at o * stride - begin + j * dilation, so along each axis kernel position j
is number j + (P - begin) / dilation on a grid that two kernels share, with P the larger begin; both have outputs of the
same size for every input where begin + end - (k - 1) * dilation agrees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.affine import Channels
from graphopt.graph import constant_of, has_input, is_constant

_FLOATS = (np.float16, np.float32, np.float64)
_MAX_GROWTH = 4096  # bytes of weight


@dataclass(frozen=True, kw_only=True)
class ConvKernel:
    """A Conv without its input: y = Conv(x, weight, bias)."""

    weight: Channels  # [Cout, Cin/g, k...]
    bias: Channels  # [Cout]
    group: int
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]  # pads
    ends: tuple[int, ...]
    dtype: np.dtype[Any]  # of the weights in the model; here they are float64
    freed: int  # bytes of weight that nothing else reads

    @property
    def sizes(self) -> tuple[int, ...]:
        """The spatial sizes of the kernel."""
        return self.weight.shape[2:]

    @property
    def finite(self) -> bool:
        """Whether the dtype can hold the weights."""
        with np.errstate(over="ignore"):
            return all(np.isfinite(each.astype(self.dtype)).all() for each in (self.weight, self.bias))

    @property
    def excess(self) -> list[int]:
        """By how much the output is larger than the input along each axis, at stride 1."""
        steps = zip(self.begins, self.ends, self.sizes, self.dilations, strict=True)
        return [begin + end - (size - 1) * dilation for begin, end, size, dilation in steps]


def is_depthwise(node: gs.Node, weight: Sequence[int] | None = None) -> bool:
    """Whether each output channel of a Conv reads one input channel of several.

    `weight` is the shape of its weight, for one that a DequantizeLinear computes: by default that of its input.
    """
    if node.op != "Conv" or node.attrs.get("group", 1) == 1:
        return False
    return bool((node.inputs[1].shape if weight is None else weight)[1] == 1)


def why_not_known(conv: gs.Node) -> str | None:
    """Say why what a Conv does is not known before the model runs."""
    if not all(is_constant(tensor) for tensor in conv.inputs[1:] if tensor.name):
        return "its weight or bias is not constant"
    if conv.inputs[1].dtype not in _FLOATS:
        return f"its weight is of {conv.inputs[1].dtype}"
    auto_pad = conv.attrs.get("auto_pad", "NOTSET")
    if auto_pad.startswith("SAME") and any(stride != 1 for stride in conv.attrs.get("strides") or ()):
        return f"with strides, the pads of auto_pad {auto_pad} depend on the size of the input"
    return None


def kernel_of(conv: gs.Node) -> ConvKernel:
    """Return what a Conv does for which `why_not_known` has no reason."""
    tensor = conv.inputs[1]
    stored = np.asarray(constant_of(tensor))
    sizes = stored.shape[2:]
    dilations = tuple(conv.attrs.get("dilations") or [1] * len(sizes))
    pads = _stated_pads(conv, [(size - 1) * dilation for size, dilation in zip(sizes, dilations, strict=True)])
    bias = constant_of(conv.inputs[2]) if has_input(conv, 2) else None
    return ConvKernel(
        weight=stored.astype(np.float64),
        bias=np.zeros(stored.shape[0]) if bias is None else bias.astype(np.float64),
        group=conv.attrs.get("group", 1),
        strides=tuple(conv.attrs.get("strides") or [1] * len(sizes)),
        dilations=dilations,
        begins=tuple(pads[: len(sizes)]),
        ends=tuple(pads[len(sizes) :]),
        dtype=stored.dtype,
        freed=stored.nbytes if len(tensor.outputs) == 1 else 0,
    )


def _stated_pads(conv: gs.Node, reaches: list[int]) -> list[int]:
    auto_pad = conv.attrs.get("auto_pad", "NOTSET")
    if auto_pad == "NOTSET":
        return list(conv.attrs.get("pads") or [0] * (2 * len(reaches)))
    smaller = [reach // 2 for reach in reaches]
    larger = [reach - reach // 2 for reach in reaches]
    return {"SAME_UPPER": smaller + larger, "SAME_LOWER": larger + smaller}.get(auto_pad, [0] * (2 * len(reaches)))


def diagonal(beside: ConvKernel, factor: gs.Tensor | None) -> ConvKernel | None:
    """Return x * factor as a kernel of size 1, for an x that a Conv reads; None where it is not one per channel."""
    channels, per_group = beside.weight.shape[:2]
    scale = np.ones(channels) if factor is None else per_channel(factor, beside)
    if scale is None or channels != per_group * beside.group:
        return None
    nothing, ones = (0,) * len(beside.sizes), (1,) * len(beside.sizes)
    weight = np.zeros((channels, per_group, *ones))
    weight.reshape(channels, per_group)[np.arange(channels), np.arange(channels) % per_group] = scale
    point = replace(beside, strides=ones, dilations=ones, begins=nothing, ends=nothing, freed=0)
    return replace(point, weight=weight, bias=np.zeros(channels))


def per_channel(tensor: gs.Tensor, kernel: ConvKernel) -> Channels | None:
    """Return one value per channel of a constant that broadcasts to the output along it alone, else None."""
    channels, axes = len(kernel.bias), len(kernel.sizes)
    if isinstance(tensor, gs.Constant) and math.prod(tensor.shape) not in (1, channels):
        return None  # without loading it
    value = constant_of(tensor)
    if value is None or value.ndim > axes + 2 or value.size not in (1, channels):
        return None
    shape = (1,) * (axes + 2 - value.ndim) + value.shape  # aligned from the right: [1, C, 1, ...]
    if value.size != 1 and shape[1] != channels:
        return None
    return np.broadcast_to(value.astype(np.float64).reshape(-1), (channels,))


def joined(one: ConvKernel, other: ConvKernel) -> ConvKernel | str:
    """Return the kernel that does what two do whose outputs are added, or why there is none."""
    if (one.group, one.strides, len(one.bias)) != (other.group, other.strides, len(other.bias)):
        return "strides, groups or channels differ"
    if one.dtype != other.dtype:
        return f"one has weights of {one.dtype}, the other of {other.dtype}"
    pairs = list(zip(one.sizes, one.dilations, other.sizes, other.dilations, strict=True))
    if any(size > 1 and size_2 > 1 and dilation != dilation_2 for size, dilation, size_2, dilation_2 in pairs):
        return "dilations differ"
    if one.excess != other.excess:
        return "the pads do not make up for the difference of the kernel sizes"
    dilations = tuple(dilation if size > 1 else dilation_2 for size, dilation, _, dilation_2 in pairs)
    begins = tuple(map(max, one.begins, other.begins))
    places = []
    for kernel in (one, other):
        shifts = [begin - own for begin, own in zip(begins, kernel.begins, strict=True)]
        if any(shift % dilation for shift, dilation in zip(shifts, dilations, strict=True)):
            return "the pads differ by less than the dilation"
        places.append([shift // dilation for shift, dilation in zip(shifts, dilations, strict=True)])
    sizes = tuple(max(p + k, q + m) for p, k, q, m in zip(places[0], one.sizes, places[1], other.sizes, strict=True))
    shape = (*one.weight.shape[:2], *sizes)
    grown = math.prod(shape) * one.dtype.itemsize - one.freed - other.freed
    if grown > _MAX_GROWTH:
        return f"a kernel for both, of {list(sizes)}, would grow the model by {grown} bytes"
    weight = np.zeros(shape)
    for kernel, place in zip((one, other), places, strict=True):
        inside = [slice(start, start + size) for start, size in zip(place, kernel.sizes, strict=True)]
        weight[(slice(None), slice(None), *inside)] += kernel.weight
    return ConvKernel(
        weight=weight,
        bias=one.bias + other.bias,
        group=one.group,
        strides=one.strides,
        dilations=dilations,
        begins=begins,
        ends=tuple(map(max, one.ends, other.ends)),
        dtype=one.dtype,
        freed=one.freed + other.freed,
    )
