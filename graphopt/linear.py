"""Linear operators whose weights are known, and the weights with which they do more.

With W the weight, b the bias, o the output channels and i the input channels, summed over,

    after:    s[o] * (W x + b)[o] + t[o]   =  ((s W) x)[o] + (s[o] b[o] + t[o])
    before:   (W (s x + t) + b)[o]         =  sum_i s[i] W[o, i] x[i]  +  (b[o] + sum_i W[o, i] t[i])

so only W and b change. The second holds for a shift t only where each output sees every tap of W on real input: not
with padding, which is zero after the shift, and not for ConvTranspose. Where the channels lie differs by operator
(https://onnx.ai/onnx/operators/); `_channels_first` shows each W as [groups, out/group, in/group, taps ...]:

    Conv           W [Cout, Cin/g, taps ...]      channels of x and y on axis 1     b [Cout]
    ConvTranspose  W [Cin, Cout/g, taps ...]      the same                          b [Cout]
    Gemm           B [K, N]; transB: [N, K]       alpha * A B + beta * C: axis -1   beta * C, C to [M, N]
    MatMul         B [K, N]                       axis -1                           none: an Add follows

A weight may come from DequantizeLinear(q, scale): a factor for each output channel then goes into its scale
(`graphopt.dequantized`). The arithmetic is in float64 and cast once, to the type of W. Constants may have other
readers, so each operator gets new ones of its own.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graphopt.affine import Affine, Channels, why_not_constant
from graphopt.dequantized import Dequantized, dequantized, rescaled, why_not_rescaled
from graphopt.graph import Array, Names, constant_of, has_input, set_input, set_output
from graphopt.partial_values import shape_of_constant

OPERATORS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


@dataclass(frozen=True)
class LinearWeights:
    """The constants of a linear operator; the bias broadcasts to its channels and is None where it is zero."""

    weight: Array | Dequantized
    bias: Array | None

    @property
    def finite(self) -> bool:
        """Whether every value is a number that the dtype can hold."""
        weight = self.weight.scale if isinstance(self.weight, Dequantized) else self.weight
        return all(bool(np.isfinite(each).all()) for each in (weight, self.bias) if each is not None)


@dataclass(frozen=True)
class Linear:
    """A linear operator whose weight and bias are constant: see `linear`."""

    node: gs.Node
    weight_shape: tuple[int, ...]
    dequantized: Dequantized | None  # what its weight is computed from

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"{self.node.op} {self.node.name}".rstrip()

    @property
    def output_axis(self) -> int:
        """The axis of its output channels, counted from the end."""
        return 1 - len(self.weight_shape) if self._is_convolution else -1

    @property
    def input_axis(self) -> int:
        """The axis of its input channels, counted from the end."""
        if self._is_convolution:
            return 1 - len(self.weight_shape)
        return -2 if self.node.attrs.get("transA", 0) else -1

    @property
    def output_channels(self) -> int:
        """How many channels it returns."""
        sizes, groups = self.weight_shape, self._groups
        return sizes[1] * groups if self._outputs_second else sizes[0]

    @property
    def input_channels(self) -> int:
        """How many channels it reads."""
        sizes, groups = self.weight_shape, self._groups
        return sizes[0] if self._outputs_second else sizes[1] * groups

    @property
    def has_bias_input(self) -> bool:
        """Whether the operator can add a bias by itself."""
        return bool(self.node.op != "MatMul")

    def why_not_shift_before(self) -> str | None:
        """Say why a shift before it cannot go into its bias; None if it can."""
        if self.node.op == "ConvTranspose":
            return f"{self.label} does not see a shift in every tap of its kernel"
        if any(self.node.attrs.get("pads") or ()) or self.node.attrs.get("auto_pad", "NOTSET") in _SAME:
            return f"{self.label} pads with zeros after the shift"
        return None

    def why_not_after(self, affine: Affine, opset: int) -> str | None:
        """Say why its weight cannot take the scale of `affine` for its output channels."""
        return self._why_not_scaled(affine, self._output_axis_of_weight, opset)

    def why_not_before(self, affine: Affine, opset: int) -> str | None:
        """Say why its weight cannot take the scale of `affine` for its input channels."""
        return self._why_not_scaled(affine, None, opset)

    def after(self, affine: Affine) -> LinearWeights:
        """Return the weights with which it does what `affine`, along its output channels, does after it."""
        scale, shift = affine.over(self.output_channels)
        bias = self._bias() * scale + shift
        factors = scale.reshape(self._groups, -1, *[1] * (self._taps + 1))
        return self._new(self._scaled(factors, scale), bias)

    def before(self, affine: Affine) -> LinearWeights:
        """Return the weights with which it does what `affine`, along its input channels, does before it."""
        scale, shift = affine.over(self.input_channels)
        factors = scale.reshape(self._groups, 1, -1, *[1] * self._taps)
        return self._new(self._scaled(factors, scale), self.of_constants(shift) if shift.any() else self._bias())

    def of_constants(self, values: Channels) -> Channels:
        """Return what it computes, bias included, of input channels that are `values` in every place, unpadded."""
        weight = self.channels_first()
        taps = weight.sum(axis=tuple(range(3, weight.ndim)), dtype=np.float64)  # [groups, out/group, in/group]
        added = (taps @ values.reshape(self._groups, -1, 1)).reshape(-1)
        return np.asarray(self._bias() + added * self.node.attrs.get("alpha", 1.0))

    def channels_first(self) -> Array:
        """Return its weight as [groups, output channels / group, input channels / group, taps ...], not to write to."""
        return _channels_first(self.node, _known(self.node.inputs[1]))

    def merged(self, weights: LinearWeights, sources: NDArray[np.int64]) -> LinearWeights:
        """Return weights with which it reads channel `sources[c]` in place of each input channel c.

        Args:
            weights: to start from, of this operator; neither quantized nor in groups.
            sources: for each input channel the one that equals it, which is its own source.
        """
        if isinstance(weights.weight, Dequantized) or self._groups > 1:
            raise ValueError(f"{self.label} is quantized or has groups")
        result = weights.weight.copy()
        view = _channels_first(self.node, result)[0]
        moved = np.flatnonzero(sources != np.arange(len(sources)))
        with np.errstate(over="ignore"):  # `finite` tells
            for source in np.unique(sources[moved]):
                view[:, source] = view[:, sources == source].sum(axis=1, dtype=np.float64)
        view[:, moved] = 0
        return LinearWeights(result, weights.bias)

    @property
    def _is_convolution(self) -> bool:
        return self.node.op in ("Conv", "ConvTranspose")

    @property
    def _outputs_second(self) -> bool:
        """Whether the output channels are the second axis of the weight, and the input channels the first."""
        if self.node.op == "Gemm":
            return not self.node.attrs.get("transB", 0)
        return self.node.op in ("ConvTranspose", "MatMul")

    @property
    def _groups(self) -> int:
        return int(self.node.attrs.get("group", 1)) if self._is_convolution else 1

    @property
    def _taps(self) -> int:
        return len(self.weight_shape) - 2

    @property
    def _output_axis_of_weight(self) -> int | None:
        if not self._outputs_second:
            return 0
        return 1 if self._groups == 1 else None

    def _why_not_scaled(self, affine: Affine, axis: int | None, opset: int) -> str | None:
        return None if self.dequantized is None else why_not_rescaled(self.dequantized, axis, affine.scale, opset)

    def _bias(self) -> Channels:
        bias = _bias_input(self.node)
        if bias is None:
            return np.zeros(1)
        values = _known(bias).astype(np.float64)
        return values * self.node.attrs.get("beta", 1.0) if self.node.op == "Gemm" else values.reshape(-1)

    def _scaled(self, factors: Channels, scale: Channels) -> Array | Dequantized:
        if self.dequantized is not None:
            return rescaled(self.dequantized, scale, self._output_axis_of_weight or 0)
        values = _known(self.node.inputs[1])
        result = np.empty_like(values, order="C", subok=False)  # a memory-mapped file is not to be written to
        old, new = _channels_first(self.node, values), _channels_first(self.node, result)
        with np.errstate(over="ignore", invalid="ignore"):  # `finite` tells
            np.multiply(old, factors, out=new, dtype=np.float64, casting="unsafe")  # cast in small blocks
        return result

    def _new(self, weight: Array | Dequantized, bias: Channels) -> LinearWeights:
        dtype = weight.scale.dtype if isinstance(weight, Dequantized) else weight.dtype
        if _bias_input(self.node) is None and not bias.any():
            return LinearWeights(weight, None)
        with np.errstate(over="ignore"):
            return LinearWeights(weight, bias.astype(dtype))


def linear(node: gs.Node, overridable: Container[str]) -> Linear | str:
    """Return the linear operator that a node is, or why it is none whose weights are known.

    Args:
        node: any node.
        overridable: names of the graph inputs with default values.
    """
    label = f"{node.op} {node.name}".strip()
    if node.domain or node.op not in OPERATORS:
        return f"{label} is not linear"
    weight, bias = node.inputs[1], _bias_input(node)
    for role, tensor in (("bias", bias), ("weight", weight)):
        reason = None if tensor is None else why_not_constant(tensor, overridable)
        if tensor is not None and reason is not None and dequantized(tensor) is None:
            return f"the {role} of {label} {reason}"
    stored = dequantized(weight)
    shape = shape_of_constant(weight) if stored is None else stored.shape
    if node.op == "MatMul" and len(shape) != 2:
        return f"the weight of {label} is no matrix"
    return Linear(node, shape, stored)


def set_weights(node: gs.Node, weights: LinearWeights, names: Names) -> tuple[list[gs.Node], list[gs.Node]]:
    """Give a linear operator new weights; return the nodes to put right before it and right after it in its graph.

    The last of them computes what the operator computed before: a MatMul has no bias, so an Add follows it.
    """
    before: list[gs.Node] = []
    old, output = node.inputs[1], node.outputs[0]
    if isinstance(weights.weight, Dequantized):
        before = [weights.weight.node(old, names)]
        set_input(node, 1, before[0].outputs[0])
    else:
        set_input(node, 1, gs.Constant(names.fresh(old.name), weights.weight))
    if weights.bias is None:
        return before, []
    bias = _bias_input(node)
    constant = gs.Constant(names.fresh(f"{output.name}/bias" if bias is None else bias.name), weights.bias)
    if node.op == "MatMul":
        product = gs.Variable(names.fresh(f"{output.name}/product"), output.dtype, output.shape)
        set_output(node, 0, product)
        return before, [gs.Node("Add", names.fresh(f"{output.name}/add"), inputs=[product, constant], outputs=[output])]
    if len(node.inputs) > 2:
        set_input(node, 2, constant)
    else:
        node.inputs.append(constant)
    if node.op == "Gemm":
        node.attrs["beta"] = 1.0
    return before, []


_SAME = ("SAME_UPPER", "SAME_LOWER")


def _channels_first(node: gs.Node, weight: Array) -> Array:
    """Return a view of a weight as [groups, output channels / group, input channels / group, taps ...]."""
    if node.op == "Conv":
        groups = node.attrs.get("group", 1)
        return weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    if node.op == "ConvTranspose":
        groups = node.attrs.get("group", 1)
        return weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:]).swapaxes(1, 2)
    return weight[np.newaxis] if node.attrs.get("transB", 0) else weight.T[np.newaxis]


def _bias_input(node: gs.Node) -> gs.Tensor | None:
    return node.inputs[2] if has_input(node, 2) else None


def _known(tensor: gs.Tensor) -> Array:
    value = constant_of(tensor)
    if value is not None:
        return value
    stored = dequantized(tensor)
    if stored is None:
        raise ValueError(f"{tensor.name} is not constant")
    return stored.values()
