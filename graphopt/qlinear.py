"""Operators that compute with integers and hold their scales themselves, written out as Q/DQ around float ones.

The *QOperator* form of quantized models, which onnxruntime's tool writes too, and its quantizers turn Q/DQ groups into:

    QLinearConv(x, s, z, w, s, z, s, z, b)   ->   DQ(x), (w - z) * s, b * s * s  ->  Conv  ->  Q

What both forms stand for is the same, to the bit; ONNX defines QLinearConv and QLinearMatMul, onnxruntime the others
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.dequantized import Dequantized
from graphopt.graph import Array, Names, constant_of, disconnect, has_input, is_constant, label_of


@dataclass(frozen=True)
class _Form:
    """Where such an operator has what: `operands` are the places of triples of values, scale and zero point."""

    op: str  # that computes the same in float
    operands: tuple[int, ...]
    output: (
        int  # the place of the output's scale, and of its zero point behind it; QGemm may lack both and return floats
    )
    condition: int | None = None  # an input that is no number
    bias: int | None = None  # integers with the product of both operands' scales
    axis: int = 1  # of the channels of a weight that is not transposed


_TWO = (0, 3)
_FORMS = {
    "QLinearConv": _Form("Conv", _TWO, 6, bias=8, axis=0),
    "QLinearMatMul": _Form("MatMul", _TWO, 6, axis=-1),
    "QGemm": _Form("Gemm", _TWO, 7, bias=6, axis=-1),
    "QLinearAdd": _Form("Add", _TWO, 6),
    "QLinearMul": _Form("Mul", _TWO, 6),
    "QLinearSigmoid": _Form("Sigmoid", (0,), 3),
    "QLinearLeakyRelu": _Form("LeakyRelu", (0,), 3),
    "QLinearSoftmax": _Form("Softmax", (0,), 3),
    "QLinearAveragePool": _Form("AveragePool", (0,), 3),
    "QLinearGlobalAveragePool": _Form("GlobalAveragePool", (0,), 3),
    "QLinearReduceMean": _Form("ReduceMean", (0,), 3),
    "QLinearWhere": _Form("Where", (1, 4), 7, condition=0),
    "QLinearConcat": _Form("Concat", (), 0),  # any number of operands, behind the output
}
_OTHERS = frozenset({"ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "MatMulNBits"})
_FROM_CONCAT = 2
_AXES_AS_INPUT = 18  # the opset since which those of ReduceMean are
_SOFTMAX_OF_ONE_AXIS = 13


def computes_with_integers(node: gs.Node) -> bool:
    """Whether a node takes integers in place of real values and computes with them, in whatever form."""
    return node.op in _FORMS or node.op.startswith("QLinear") or node.op in _OTHERS


def why_not_written_out(node: gs.Node, opset: int) -> str | None:
    """Why an operator that computes with integers cannot be written out; None where it can."""
    form = _FORMS.get(node.op)
    if form is None:
        return f"{node.op} computes with integers itself, there is no pair"
    if node.attrs.get("channels_last", 0):
        return f"{node.op} has its channels last, which {form.op} cannot"
    if form.op == "Softmax" and (int(node.attrs.get("opset", 1)) < _SOFTMAX_OF_ONE_AXIS) != (
        opset < _SOFTMAX_OF_ONE_AXIS
    ):
        return f"{node.op} is of opset {node.attrs.get('opset', 1)}, and the model of {opset}, where Softmax is another"
    operands = list(_operands(node, form))
    result = [_Quantized(node, form.output - 1)] if has_input(node, form.output) else []
    if any(each.scale is None or each.zero_point is None for each in (*operands, *result)):
        return f"scale or zero point of {node.op} is computed at run time"
    if any(each.scale.size > 1 and not is_constant(each.values) for each in operands if each.scale is not None):
        return f"{node.op} has a scale for each channel of an activation"
    if form.bias is not None and has_input(node, form.bias) and not is_constant(node.inputs[form.bias]):
        return f"the bias of {node.op} is computed at run time"
    return None


def write_out(node: gs.Node, opset: int, names: Names) -> list[gs.Node]:
    """The nodes that take the place of one for which `why_not_written_out` says nothing; it is disconnected."""
    form, new = _FORMS[node.op], list[gs.Node]()
    operands = list(_operands(node, form))
    inputs: list[gs.Tensor] = [] if form.condition is None else [node.inputs[form.condition]]
    axis = 0 if node.attrs.get("transB", 0) else form.axis
    inputs += [operand.in_float(axis, names, new) for operand in operands]
    if form.bias is not None and has_input(node, form.bias):
        inputs.append(_bias(node, form, operands, names))
    attributes = {key: value for key, value in node.attrs.items() if key not in ("channels_last", "opset")}
    if form.op == "ReduceMean" and opset >= _AXES_AS_INPUT and "axes" in attributes:
        axes = np.asarray(attributes.pop("axes"), np.int64)
        inputs.append(gs.Constant(names.fresh(f"{label_of(node)}/axes"), axes))
    (output,) = node.outputs
    scales = node.inputs[form.output : form.output + 2] if has_input(node, form.output) else []
    disconnect(node)
    if not scales:
        return [*new, gs.Node(form.op, node.name, attributes, inputs, [output])]
    real = gs.Variable(names.fresh(f"{output.name}/float"), np.dtype(np.float32), output.shape)
    new.append(gs.Node(form.op, node.name, attributes, inputs, [real]))
    new.append(gs.Node("QuantizeLinear", names.fresh(f"{output.name}/quantize"), {}, [real, *scales], [output]))
    return new


class _Quantized(NamedTuple):
    """Values with scale and zero point, at a place of an operator's inputs and the two behind it."""

    node: gs.Node
    place: int

    @property
    def values(self) -> gs.Tensor:
        return self.node.inputs[self.place]

    @property
    def scale(self) -> Array | None:
        return constant_of(self.node.inputs[self.place + 1])

    @property
    def zero_point(self) -> Array | None:
        """Zero where it is left out; None: computed at run time."""
        place = self.place + 2
        return constant_of(self.node.inputs[place]) if has_input(self.node, place) else np.zeros((), np.uint8)

    def in_float(self, axis: int, names: Names, new: list[gs.Node]) -> gs.Tensor:
        """A constant, or what a DequantizeLinear computes, which is appended to `new`."""
        output = names.fresh(f"{self.values.name}/float")
        if (stored := constant_of(self.values)) is not None:
            assert self.scale is not None and self.zero_point is not None
            return gs.Constant(output, Dequantized.of(stored, self.scale, self.zero_point, axis).values())
        real = gs.Variable(output, np.dtype(np.float32), self.values.shape)
        inputs = self.node.inputs[self.place : self.place + 3]
        new.append(gs.Node("DequantizeLinear", names.fresh(f"{output}/dequantize"), {}, list(inputs), [real]))
        return real


def _operands(node: gs.Node, form: _Form) -> Iterator[_Quantized]:
    places = form.operands or range(_FROM_CONCAT, len(node.inputs), 3)
    return (_Quantized(node, place) for place in places)


def _bias(node: gs.Node, form: _Form, operands: list[_Quantized], names: Names) -> gs.Constant:
    assert form.bias is not None
    tensor = node.inputs[form.bias]
    stored, scales = constant_of(tensor), [each.scale for each in operands]
    assert stored is not None and scales[0] is not None and scales[1] is not None
    scale = scales[0].astype(np.float64).reshape(-1) * scales[1].reshape(-1) * node.attrs.get("alpha", 1.0)
    return gs.Constant(names.fresh(f"{tensor.name}/float"), np.asarray(stored * scale, np.float32))
