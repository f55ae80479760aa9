"""Absorb a scale and a shift per output channel into the linear operator before them.

With W the weight of a linear operator and b its bias, both along the output channels c,

    s[c] * (W x + b)[c] + t[c]  =  ((s W) x)[c] + (s[c] b[c] + t[c])

so only W and b change. Where the output channels of W lie differs by operator
(https://onnx.ai/onnx/operators/):

    Conv           W [Cout, Cin/g, k...]      axis 0                                  b [Cout]
    ConvTranspose  W [Cin, Cout/g, k...]      axis 1, anew for each group of Cin      b [Cout]
    Gemm           B [K, N]; transB: [N, K]   N, in alpha * A B + beta * C            beta * C, C to [M, N]
    MatMul         B [K, N]                   N                                       none: an Add follows

All have their channels on axis 1 of the output; MatMul only when that is a matrix. The arithmetic is in
float64 and cast once, to the type of W. Constants may have other readers, so each operator gets new ones of
its own.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graphopt.graph import Array, Names, constant_of, producer, set_input, set_output

Channels = NDArray[np.float64]


@dataclass(frozen=True)
class Affine:
    """y[c] = scale[c] * x[c] + shift[c] along axis 1; both arrays are float64 of shape [C]."""

    scale: Channels
    shift: Channels


@dataclass(frozen=True)
class LinearWeights:
    """The constants of a linear operator, of the dtype of its weight; the bias broadcasts to its channels."""

    weight: Array
    bias: Array

    @property
    def finite(self) -> bool:
        """Whether every value is a number that the dtype can hold."""
        return bool(np.isfinite(self.weight).all() and np.isfinite(self.bias).all())


def why_not_linear(node: gs.Node | None, overridable: Container[str]) -> str | None:
    """Say why a node is no linear operator whose weights are known; None if it is one.

    Args:
        node: the node; None where a graph input takes its place.
        overridable: names of the graph inputs with default values.
    """
    if node is None:
        return "it reads a graph input; there is no linear operator before it to fold into"
    label = f"{node.op} {node.name}".strip()
    if node.domain or node.op not in _SCALED:
        return f"{label} before it is not linear"
    for role, tensor in (("weight", node.inputs[1]), ("bias", _bias(node))):
        reason = None if tensor is None else why_not_constant(tensor, overridable)
        if reason is not None:
            return f"the {role} of {label} {reason}"
    if node.op == "MatMul" and (_rank(node.inputs[1]), _rank(node.outputs[0])) != (2, 2):
        return f"the channels of {label} are its last axis, which is axis 1 only where it is known to return a matrix"
    return None


def why_not_constant(tensor: gs.Tensor, overridable: Container[str]) -> str | None:
    """Say why the value of a tensor is not known, as the rest of a sentence that the tensor begins."""
    if constant_of(tensor) is not None:
        return None
    source = producer(tensor)
    if source is not None:
        return f"is computed by {source.op} {source.name}".rstrip()
    if tensor.name in overridable:
        return f"is graph input {tensor.name}, which a caller may override: run freeze-inputs first"
    return f"is graph input {tensor.name}"


def absorbed(node: gs.Node, affine: Affine) -> LinearWeights:
    """Return the weights with which a linear operator does what `affine` does after it.

    Args:
        node: an operator for which `why_not_linear` has no reason.
        affine: with as many channels as the operator has output channels.
    """
    weight = _known(node.inputs[1])
    bias = _bias(node)
    old_bias = np.zeros(1) if bias is None else _known(bias).astype(np.float64)
    if node.op == "Gemm":
        old_bias = old_bias * node.attrs.get("beta", 1.0)
    elif bias is not None:
        old_bias = old_bias.reshape(-1)
    scaled = _SCALED[node.op](node, weight.astype(np.float64), affine.scale)
    shifted = old_bias * affine.scale + affine.shift
    with np.errstate(over="ignore"):  # `finite` tells
        return LinearWeights(scaled.astype(weight.dtype), shifted.astype(weight.dtype))


def set_weights(node: gs.Node, weights: LinearWeights, names: Names) -> list[gs.Node]:
    """Give a linear operator new weights; return the nodes to put right after it in its graph.

    Those compute what the operator computed before: a MatMul has no bias, so an Add follows it.
    """
    set_input(node, 1, gs.Constant(names.fresh(node.inputs[1].name), weights.weight))
    bias = _bias(node)
    output = node.outputs[0]
    constant = gs.Constant(names.fresh(f"{output.name}/bias" if bias is None else bias.name), weights.bias)
    if node.op == "MatMul":
        product = gs.Variable(names.fresh(f"{output.name}/product"), output.dtype, output.shape)
        set_output(node, 0, product)
        return [gs.Node("Add", names.fresh(f"{output.name}/add"), inputs=[product, constant], outputs=[output])]
    if len(node.inputs) > 2:
        set_input(node, 2, constant)
    else:
        node.inputs.append(constant)
    if node.op == "Gemm":
        node.attrs["beta"] = 1.0
    return []


def _bias(node: gs.Node) -> gs.Tensor | None:
    return node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None


def _known(tensor: gs.Tensor) -> Array:
    value = constant_of(tensor)
    if value is None:
        raise ValueError(f"{tensor.name} is not constant")
    return value


def _rank(tensor: gs.Tensor) -> int | None:
    return None if tensor.shape is None else len(tensor.shape)


def _scaled_conv(_node: gs.Node, weight: Channels, scale: Channels) -> Channels:
    return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))


def _scaled_conv_transpose(node: gs.Node, weight: Channels, scale: Channels) -> Channels:
    groups = node.attrs.get("group", 1)
    grouped = weight.reshape(groups, -1, *weight.shape[1:])  # [g, Cin/g, Cout/g, k...]
    factors = scale.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
    return (grouped * factors).reshape(weight.shape)


def _scaled_gemm(node: gs.Node, weight: Channels, scale: Channels) -> Channels:
    return weight * (scale[:, np.newaxis] if node.attrs.get("transB", 0) else scale)


def _scaled_matmul(_node: gs.Node, weight: Channels, scale: Channels) -> Channels:
    return weight * scale


_SCALED: dict[str, Callable[[gs.Node, Channels, Channels], Channels]] = {
    "Conv": _scaled_conv,
    "ConvTranspose": _scaled_conv_transpose,
    "Gemm": _scaled_gemm,
    "MatMul": _scaled_matmul,
}
