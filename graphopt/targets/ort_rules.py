"""What keeps a Q/DQ graph from running in int8 in onnxruntime's CPU provider, and what makes int8 slow there.

On the machine that the target is for, the rules about operators in float rest on a proof: the model is loaded, and the
optimized graph tells what runs in float (`graphopt.int8_proof`); `graphopt.targets.ort_float` finds the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.errors import ModelError
from graphopt.graph import constant_of, label_of
from graphopt.int8_proof import Int8Proof
from graphopt.lint_rule import LintRule, Places, Severity, Subject, rule
from graphopt.quantizers import Quantizer, dequantizer_of, is_weight
from graphopt.saturation import LARGEST_PAIR, largest_pairs
from graphopt.targets.int8_share import MACS_IN_INT8, share_of_macs
from graphopt.targets.ort_float import float_operators, proof, scale_axis, weight_in_blocks
from graphopt.targets.target import Role
from graphopt.targets.tensorrt_errors import places_of_early_axes

_MEASURED = "Source: onnxruntime's optimizer (core/optimizer/qdq_transformer), held against the installed version."


@rule("ORT001", Severity.ERROR)
def scales_by_channel_have_opset_13(subject: Subject) -> Places:
    """Scales for each channel need opset 13.

    Source: https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html; onnxruntime does not load the file.
    """
    yield from places_of_early_axes(subject)


@rule("ORT002", Severity.ERROR)
def the_model_loads(subject: Subject) -> Places:
    """Onnxruntime loads the model.

    Source: the installed onnxruntime.
    """
    found = subject.shared(proof)
    if isinstance(found, ModelError):
        yield "", f"it is refused: {found}"


@rule("ORT022", Severity.ERROR)
def scales_of_weights_follow_output_channels(subject: Subject) -> Places:
    """Scales of a Conv's or a Gemm's weight run along its output channels.

    Source: onnxruntime 1.32 fuses others too, and applies them to the output channels: its result is wrong.
    """
    for node in subject.nodes:
        weight = _weight_of(subject, node.op, node.inputs)
        if node.op not in ("Conv", "Gemm") or weight is None or weight.is_per_tensor or weight.block_size:
            continue
        axis = scale_axis(node, weight)
        if weight.axis != axis:
            yield (
                label_of(node),
                (
                    f"its weight has scales along axis {weight.axis}, which onnxruntime applies to axis {axis} "
                    f"in silence: quantize the weight along axis {axis}"
                ),
            )


@rule("ORT003", Severity.INFO)
def the_model_is_quantized(subject: Subject) -> Places:
    """The model holds quantizers.

    Source: without any, all operators run in float.
    """
    if any(node.op.startswith(("Q", "DynamicQuantize", "MatMulNBits")) for node in subject.nodes) or subject.quantizers:
        return
    rules = subject.target.rules
    gaining = [node for node in subject.nodes if node.op in rules and rules[node.op].role is Role.GAINS]
    counts = Counter(node.op for node in gaining).most_common()
    listed = ", ".join(f"{number} {op}" for op, number in counts) or "all operators"
    yield "", f"float: the model is not quantized ({listed}); graphopt optimize --passes fold,calibrate,qdq does it"


def _reason(name: str, title: str) -> LintRule:
    """The rule that lists the operators which run in float for one reason."""

    def check(subject: Subject) -> Places:
        for found in subject.shared(float_operators):
            if found.rule == name:
                yield label_of(found.node), f"{found.node.op} in float: {found.reason}"

    return LintRule(id=name, severity=Severity.WARNING, title=title, source=_MEASURED, check=check)


@rule("ORT030", Severity.WARNING)
def activations_are_uint8(subject: Subject) -> Places:
    """On x86, activations are uint8.

    Source: measured: one residual net took 1.7 ms with uint8 activations, 7.6 with int8 and 9.5 in float.
    """
    if found := _activations(subject, np.int8):
        places = f"{len(found)} Q and DQ nodes store activations as int8"
        yield "", f"{places}, for which x86 has no fast kernels: quantize activations as uint8 (--target ort-cpu)"


@rule("ORT033", Severity.WARNING)
def activations_are_int8(subject: Subject) -> Places:
    """On Arm, activations are int8.

    Source: onnxruntime's documentation on quantization; Arm's instructions multiply signed by signed.
    """
    if found := _activations(subject, np.uint8):
        places = f"{len(found)} Q and DQ nodes store activations as uint8"
        yield "", f"{places}; Arm multiplies int8 by int8: quantize activations as int8 (--target ort-arm)"


@rule("ORT031", Severity.WARNING)
def weights_are_int8(subject: Subject) -> Places:
    """Weights are int8.

    Source: measured: uint8 weights took about four times as long as int8 weights.
    """
    for node in subject.nodes:
        weight = _weight_of(subject, node.op, node.inputs)
        if weight is not None and weight.stored_dtype == np.uint8:
            yield label_of(node), "its weight is uint8, for which there are no fast kernels: store it as int8"


@rule("ORT032", Severity.WARNING)
def sums_do_not_saturate(subject: Subject) -> Places:
    """On x86 without VNNI, weights are small enough that two products fit 16 bits.

    Source: onnxruntime's documentation on quantization (reduce_range). 255 * (a + b) must stay below 2**15 for any two
    weights that a kernel adds up in 16 bits (`graphopt.saturation`).
    """
    for node in subject.nodes:
        weight = _weight_of(subject, node.op, node.inputs)
        values = None if weight is None or weight.stored_dtype != np.int8 else constant_of(weight.data)
        if values is not None and values.size and largest_pairs(node, values).max() > LARGEST_PAIR:
            yield label_of(node), "its int8 sums may saturate on this CPU, which has no VNNI: quantize with 7 bits"


@rule("ORT040", Severity.INFO)
def few_quantizers_are_left(subject: Subject) -> Places:
    """Q and DQ nodes that are fused with no operator only cost time.

    Source: the optimized graph.
    """
    found = subject.shared(proof)
    needed = len(subject.model.graph.inputs) + len(subject.model.graph.outputs)
    if isinstance(found, Int8Proof) and subject.quantizers and found.quantizers_left > needed:
        message = (
            f"{found.quantizers_left} Q and DQ nodes are left in the optimized graph, where inputs and outputs need "
            f"{needed}: each reads and writes a whole tensor; the warnings say which operators to mend"
        )
        yield "", message


def figures(subject: Subject) -> Mapping[str, int | float]:
    """Shares of MACs in int8 and with weights in blocks; how many Q and DQ nodes file and optimized graph hold."""
    found = subject.shared(proof)
    counted: dict[str, int | float] = {"Q and DQ nodes in the file": len(subject.quantizers)}
    if isinstance(found, ModelError):
        return counted
    if found is not None:
        counted["Q and DQ nodes that onnxruntime runs"] = found.quantizers_left
    in_blocks = _in_blocks(subject)
    if (share := share_of_macs(subject, _in_int8(subject) - in_blocks)) is not None:
        counted[MACS_IN_INT8] = share
        if in_blocks:
            counted["share of MACs with weights in blocks"] = share_of_macs(subject, in_blocks) or 0.0
    return counted


def _in_int8(subject: Subject) -> frozenset[int]:
    """The nodes that run in int8."""
    found = subject.shared(proof)
    if isinstance(found, Int8Proof):
        return found.in_int8
    in_float = {id(each.node) for each in subject.shared(float_operators)}
    rules = subject.target.rules
    return frozenset(
        id(node)
        for node in subject.nodes
        if node.op.startswith("QLinear") or (node.op in rules and id(node) not in in_float and subject.quantizers)
    )


def _in_blocks(subject: Subject) -> frozenset[int]:
    """The products whose weights are in blocks, and whose activations are float."""
    found = subject.shared(proof)
    if isinstance(found, Int8Proof):
        return found.in_blocks
    in_float = {id(each.node) for each in subject.shared(float_operators)}
    return frozenset(
        id(node)
        for node in subject.nodes
        if node.op == "MatMulNBits" or (weight_in_blocks(node) is not None and id(node) not in in_float)
    )


def _activations(subject: Subject, dtype: type[np.generic]) -> list[Quantizer]:
    return [each for each in subject.quantizers if each.stored_dtype == dtype and not is_weight(each)]


def _weight_of(subject: Subject, op: str, inputs: list[gs.Tensor]) -> Quantizer | None:
    table = subject.target.rules
    if op not in table or table[op].role is not Role.GAINS or len(inputs) < 2:
        return None
    found = dequantizer_of(inputs[1])
    return found if found is not None and is_weight(found) else None


_FLOAT_REASONS = (
    _reason("ORT010", "Every input of an int8 operator comes from a DequantizeLinear"),
    _reason("ORT011", "The output of an int8 operator goes to a QuantizeLinear"),
    _reason("ORT012", "The output of an int8 operator is no graph output"),
    _reason("ORT013", "The output of an int8 operator has one reader, the QuantizeLinear"),
    _reason("ORT014", "A bias is float, or int32 with the scale of x times that of w"),
    _reason("ORT015", "The Q behind an activation function makes it redundant"),
    _reason("ORT016", "Activations that several operators read are uint8"),
    _reason("ORT017", "Pairs stand around operators that have an int8 kernel"),
    _reason("ORT018", "Scales that onnxruntime has to compare are constant"),
    _reason("ORT019", "Stored types fit together"),
    _reason("ORT020", "Operators that only move values keep the scale"),
    _reason("ORT021", "Operators have the attributes and the axis of scales that int8 kernels take"),
    _reason("ORT023", "Weights in blocks have the form that MatMulNBits takes"),
    _reason("ORT029", "Every operator with quantizers around it runs in int8"),
)

_COMMON: tuple[LintRule, ...] = (
    scales_by_channel_have_opset_13,
    the_model_is_quantized,
    scales_of_weights_follow_output_channels,
    *_FLOAT_REASONS,
    weights_are_int8,
)
ORT_X86_RULES: tuple[LintRule, ...] = (*_COMMON, the_model_loads, activations_are_uint8, few_quantizers_are_left)
ORT_ARM_RULES: tuple[LintRule, ...] = (*_COMMON, activations_are_int8)
