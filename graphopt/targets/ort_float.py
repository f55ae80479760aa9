"""Which operators onnxruntime leaves in float, and why: read off the Q/DQ graph as it stands in the file.

A group is fused into an int8 kernel when every input comes from a DequantizeLinear, the output goes to one
QuantizeLinear and is no graph output, and the types fit (core/optimizer/
qdq_transformer in onnxruntime's source; held against the installed version by tests/test_lint_ort.py). The guards
below name the first condition that fails. Where the model can be loaded, the optimized graph says which operators are
in float, and the guards only why; for another machine, the guards decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.errors import ModelError
from graphopt.graph import has_input, is_constant, label_of, present
from graphopt.int8_proof import Int8Proof, prove
from graphopt.lint_rule import Subject
from graphopt.quantizers import Quantizer, dequantizer_of, dtype_of, is_weight, quantizers_after
from graphopt.sizes import fixed_shape
from graphopt.targets.target import Role, Rule

_INSTEAD = {"BatchNormalization": "fold it before the model is quantized (strip-qdq, fold, calibrate, qdq)"}


@dataclass(frozen=True)
class Group:
    """An operator with the quantizers around it, as a fusion would need them.

    Attributes:
        node: the operator.
        rule: what the target's table says of it.
        inputs: by index of the inputs that must be quantized, the DequantizeLinear there.
        result: the tensor that the QuantizeLinear should read: behind a bias that is added, and behind an
            activation function where that is what stands between.
        activation: that activation function.
        quantizer: the QuantizeLinear there.
        exposed: of the node's output and the result, those that are graph outputs.

    """

    node: gs.Node
    rule: Rule
    inputs: dict[int, Quantizer | None]
    result: gs.Tensor
    activation: gs.Node | None
    quantizer: Quantizer | None
    exposed: tuple[gs.Tensor, ...]


@dataclass(frozen=True)
class FloatOperator:
    """An operator that runs in float in a quantized model."""

    node: gs.Node
    rule: str  # the id of the lint rule that says why
    reason: str


def proof(subject: Subject) -> Int8Proof | ModelError | None:
    """What onnxruntime makes of the model, or why it does not load it; None: the target is another machine."""
    if not subject.target.runs_here:
        return None
    try:
        return prove(subject.model)
    except ModelError as error:
        return error


def float_operators(subject: Subject) -> list[FloatOperator]:
    """Operators that a user would expect in int8 and that run in float, with the first reason that is found."""
    found = subject.shared(proof)
    if isinstance(found, ModelError) or not subject.quantizers:
        return []
    in_float = []
    for node in subject.nodes:
        if not _is_expected(node, subject) or (found is not None and id(node) not in found.in_float):
            continue
        why = _why_float(node, subject)
        if why is None and found is not None:
            why = "ORT029", "onnxruntime does not fuse it, for a reason that is not known"
        if why is not None:
            in_float.append(FloatOperator(node, *why))
    return in_float


def _is_expected(node: gs.Node, subject: Subject) -> bool:
    """Whether a user would expect an operator in int8: it gains there, or stands between a DQ and a Q."""
    if node.domain not in (None, "", "ai.onnx") or node.op in ("QuantizeLinear", "DequantizeLinear", "Constant"):
        return False
    computed = [tensor for tensor in present(node.inputs) if not is_constant(tensor)]
    found = [dequantizer_of(tensor) for tensor in computed]
    if not computed or all(each is not None and is_weight(each) for each in found):
        return False
    if weight_in_blocks(node) is not None:
        return True
    rule = subject.target.rules.get(node.op)
    if node.op in subject.target.stays_float or (rule is not None and rule.role is Role.GAINS):
        return True
    reads_int8 = any(each is not None and not is_weight(each) for each in found)
    if rule is not None and rule.role is Role.JOINS:  # without a Q behind, it may well be where int8 ends
        return reads_int8 and group_of(node, subject).quantizer is not None
    return reads_int8 and any(any(quantizers_after(tensor)) for tensor in node.outputs)


def _why_float(node: gs.Node, subject: Subject) -> tuple[str, str] | None:
    """The id of the rule that is broken, and the reason."""
    if (weight := weight_in_blocks(node)) is not None:
        reason = _form_of_blocks(node, weight, subject)
        return None if reason is None else ("ORT023", reason)
    if node.op not in subject.target.rules:
        reason = subject.target.stays_float.get(node.op, f"onnxruntime has no int8 kernel for {node.op}")
        if all(dequantizer_of(tensor) is None for tensor in present(node.inputs)):
            return "ORT017", reason
        advice = _INSTEAD.get(node.op, "the pairs around it only cost time, remove them")
        return "ORT017", f"{reason}: {advice}"
    group = group_of(node, subject)
    for name, guard in _GUARDS.items():
        if (found := guard(group)) is not None:
            return name, found
    return None


def weight_in_blocks(node: gs.Node) -> Quantizer | None:
    """The DequantizeLinear of a weight in blocks that a matrix product of a float activation reads."""
    if node.op not in ("MatMul", "Gemm") or dequantizer_of(node.inputs[0]) is not None:
        return None
    weight = dequantizer_of(node.inputs[1])
    return weight if weight is not None and weight.block_size and is_weight(weight) else None


def _form_of_blocks(node: gs.Node, weight: Quantizer, subject: Subject) -> str | None:
    """Why MatMulNBits cannot stand for a product; tests/test_weight_blocks.py holds the forms against onnxruntime."""
    advice = "it is dequantized again in every run: "
    if not is_constant(weight.data) or len(weight.output.shape or ()) != 2:
        return f"{advice}its weight must be a stored matrix"
    if weight.axis != 0 or node.attrs.get("transB", 0):
        return f"{advice}its weight must be stored as [K, N] with blocks along axis 0"
    if weight.block_size < _LEAST_BLOCK or weight.block_size & (weight.block_size - 1):
        return f"{advice}blocks of {weight.block_size} must be a power of two from {_LEAST_BLOCK} on"
    constants = [tensor for tensor in present(weight.node.inputs) if len(tensor.outputs) > 1]
    if len(weight.output.outputs) > 1 or subject.is_output(weight.output) or constants:
        return f"{advice}several nodes read its weight or scale, give each its own"
    if node.op != "Gemm":
        return None
    if any(node.attrs.get(name, default) != default for name, default in _GEMM_DEFAULTS.items()):
        return f"{advice}kernels need a Gemm with transA = 0, alpha = 1 and beta = 1"
    if has_input(node, 2) and (shape := node.inputs[2].shape) is not None and len(shape) != 1:
        return f"{advice}its bias must be a vector"
    return None


_LEAST_BLOCK = 16
_GEMM_DEFAULTS = {"transA": 0, "alpha": 1.0, "beta": 1.0}


def group_of(node: gs.Node, subject: Subject) -> Group:
    """The quantizers around an operator of the target's table."""
    rule = subject.target.rules[node.op]
    indices = range(len(node.inputs)) if rule.inputs is None else rule.inputs
    inputs = {index: dequantizer_of(node.inputs[index]) for index in indices if has_input(node, index)}
    result, activation = node.outputs[0], None
    add = _only_reader(result, {"Add"}, subject) if rule.fuses_bias else None
    if add is not None and any(is_constant(tensor) for tensor in add.inputs):
        result = add.outputs[0]
    if rule.role is not Role.COMMUTES and (found := _only_reader(result, subject.target.absorbed, subject)):
        activation, result = found, found.outputs[0]
    exposed = tuple(tensor for tensor in (node.outputs[0], result) if subject.is_output(tensor))
    return Group(node, rule, inputs, result, activation, next(quantizers_after(result), None), exposed)


def _only_reader(tensor: gs.Tensor, operators: frozenset[str] | set[str], subject: Subject) -> gs.Node | None:
    if len(tensor.outputs) != 1 or subject.is_output(tensor) or tensor.outputs[0].op not in operators:
        return None
    return tensor.outputs[0]


def _around(group: Group) -> Iterator[Quantizer]:
    yield from (each for each in group.inputs.values() if each is not None)
    if group.quantizer is not None:
        yield group.quantizer


def _scale_is_computed(group: Group) -> str | None:
    """Kernels take scales as inputs; only those that onnxruntime compares before and behind must be constant."""
    if group.rule.role is not Role.COMMUTES:
        return None
    for each in _around(group):
        if each.scale is None or each.zero_point is None:
            return f"scale or zero point of {each.label} is computed at run time: make both constants"
    return None


def _input_is_float(group: Group) -> str | None:
    lacking = [group.node.inputs[index].name for index, each in group.inputs.items() if each is None]
    if not lacking:
        return None
    if len(lacking) == len(group.inputs):
        return f"none of its inputs is quantized: put Q/DQ pairs on {', '.join(lacking)}, or leave it float"
    return f"its input {lacking[0]} comes from no DequantizeLinear: quantize it too"


def _output_is_graph_output(group: Group) -> str | None:
    if not group.exposed or not (group.rule.needs_output or group.quantizer is not None):
        return None
    return (
        f"its output {group.exposed[0].name} is a graph output, with no pair before it: put one there, or accept it "
        "where the operator is small"
    )


def _output_has_no_quantizer(group: Group) -> str | None:
    if group.quantizer is not None:
        return None
    if not group.rule.needs_output and group.result is group.node.outputs[0]:
        return None
    readers = [f"{label_of(reader)} ({reader.op})" for reader in group.result.outputs]
    verb = "reads" if len(readers) == 1 else "read"
    return f"its output {group.result.name} has no Q: {', '.join(readers[:2])} {verb} it as float"


def _output_has_other_readers(group: Group) -> str | None:
    readers = group.result.outputs
    if group.quantizer is None or len(readers) == 1:
        return None
    others = [label_of(reader) for reader in readers if reader is not group.quantizer.node]
    return (
        f"its output {group.result.name} is read by {', '.join(others[:2])} besides {group.quantizer.label}: "
        "one Q must be its only reader, let the others read the DQ behind"
    )


def _bias_has_another_scale(group: Group) -> str | None:
    if group.node.op not in ("Conv", "Gemm") or not has_input(group.node, 2):
        return None
    bias, values, weight = dequantizer_of(group.node.inputs[2]), group.inputs.get(0), group.inputs.get(1)
    if bias is None or values is None or weight is None:
        return None
    if bias.stored_dtype != np.int32:
        return f"its bias is {bias.stored_dtype}: store it as float, or as int32 with the scale x * w"
    if bias.scale is None or values.scale is None or weight.scale is None:
        return None
    expected = np.broadcast_to(values.scale * weight.scale, bias.scale.shape or weight.scale.shape)
    if not np.array_equal(np.broadcast_to(bias.scale, expected.shape), expected):
        return "its bias is int32 with a scale other than that of x times that of w: store the bias as float"
    return None


def _activation_stays(group: Group) -> str | None:
    if group.activation is None or group.quantizer is None or group.quantizer.zero_point is None:
        return None
    dtype = group.quantizer.stored_dtype
    if dtype is None or dtype.kind not in "iu":
        return None
    lowest = int(np.iinfo(dtype).min)
    if int(np.max(group.quantizer.zero_point)) == lowest:
        return _activation_hides_quantizer(group)
    return (
        f"the {group.activation.op} behind it stays, since the zero point of {group.quantizer.label} is not {lowest}, "
        f"the lowest {dtype.name}: quantize asymmetrically"
    )


def _activation_hides_quantizer(group: Group) -> str | None:
    """Why a stack of matrices times a matrix plus a bias, which becomes Reshape, Gemm, Reshape, finds no Q."""
    assert group.activation is not None
    shape, has_bias = fixed_shape(group.node.inputs[0]), group.activation.inputs[0] is not group.node.outputs[0]
    if group.node.op != "MatMul" or not has_bias or shape is None or len(shape) < 3:
        return None
    return (
        f"onnxruntime makes a Gemm of it and its bias, with a Reshape behind, and looks for the Q before it drops the "
        f"{group.activation.op}: put a pair before the {group.activation.op} too"
    )


def _types_differ(group: Group) -> str | None:
    values, weight = group.inputs.get(0), group.inputs.get(1)
    stored = [each.stored_dtype for each in _around(group) if each is not weight or group.rule.role is not Role.GAINS]
    names = [dtype.name for dtype in stored if dtype is not None]
    if any(name not in ("int8", "uint8") for name in names):
        return f"it has no kernel for {next(name for name in names if name not in ('int8', 'uint8'))}: use uint8"
    if len(set(names)) > 1:
        return f"its inputs and its output are stored as {' and '.join(sorted(set(names)))}: use one type"
    if values is None or weight is None or group.rule.role is not Role.GAINS:
        return None
    if values.stored_dtype == np.int8 and weight.stored_dtype == np.uint8:
        return "its weight is uint8 and its activation int8: store the weight as int8"
    return None


def _int8_has_two_readers(group: Group) -> str | None:
    stored = [each.data for each in group.inputs.values() if each is not None and not is_weight(each)]
    stored += [] if group.quantizer is None else [group.quantizer.output]
    for tensor in stored:
        readers = [reader for node in tensor.outputs for reader in node.outputs[0].outputs]
        if dtype_of(tensor) == np.int8 and max(len(tensor.outputs), len(readers)) > 1:
            return (
                f"{tensor.name} is int8 and read by several nodes, which onnxruntime does not turn into uint8 on x86: "
                "quantize activations as uint8"
            )
    return None


def _scales_differ(group: Group) -> str | None:
    before = group.inputs.get(0)
    if group.rule.role is not Role.COMMUTES or before is None or group.quantizer is None:
        return None
    if group.rule.why_not(group.node.op, group.node.attrs) is not None:
        return None  # the scales would change nothing
    if before.has_scale_of(group.quantizer):
        return None
    return "its input and output have different scales, and it only moves values: give both the input's"


def _has_another_form(group: Group) -> str | None:
    node, weight = group.node, group.inputs.get(1)
    if (reason := group.rule.why_not(node.op, node.attrs)) is not None:
        return reason
    axis = None if weight is None else scale_axis(node, weight)
    if weight is None or axis is None or weight.is_per_tensor or weight.axis == axis:
        return None
    return f"its weight has scales along axis {weight.axis}; they must run along axis {axis}, the output channels"


def scale_axis(node: gs.Node, weight: Quantizer) -> int | None:
    """The axis of a weight along which int8 kernels take scales; None where they take one scale."""
    if node.op == "Gemm":
        return 0 if node.attrs.get("transB", 0) else 1
    if node.op == "MatMul" and weight.data.shape is not None:
        return len(weight.data.shape) - 1
    return 0 if node.op == "Conv" else None


Guard = Callable[[Group], str | None]
_GUARDS: dict[str, Guard] = {
    "ORT018": _scale_is_computed,
    "ORT010": _input_is_float,
    "ORT012": _output_is_graph_output,
    "ORT011": _output_has_no_quantizer,
    "ORT013": _output_has_other_readers,
    "ORT014": _bias_has_another_scale,
    "ORT015": _activation_stays,
    "ORT019": _types_differ,
    "ORT016": _int8_has_two_readers,
    "ORT020": _scales_differ,
    "ORT021": _has_another_form,
}
