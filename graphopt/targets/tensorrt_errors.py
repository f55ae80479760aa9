"""Why TensorRT refuses a Q/DQ graph, or builds one without a meaning.

Sources, as rules cite them: H, the comments on IQuantizeLayer and IDequantizeLayer in NvInfer.h; D, the developer
guide's chapter "Explicit quantization"; O, the operators that onnx-tensorrt imports.
"""

from __future__ import annotations

import math

import numpy as np

from graphopt.graph import has_input, label_of
from graphopt.lint_rule import LintRule, Places, Severity, Subject, rule
from graphopt.quantizers import Quantizer, dequantizer_of, dtype_of, is_weight
from graphopt.sizes import fixed_shape

_STORED = frozenset({"int8", "float8_e4m3fn", "int4", "float4_e2m1fn"})
_IN_BLOCKS = _STORED - {"int8"}
_WEIGHT_AXIS = {"Conv": 0}
_SYMMETRIC = "quantize symmetrically (graphopt optimize --target tensorrt)"


@rule("TRT001", Severity.ERROR)
def zero_points_are_zero(subject: Subject) -> Places:
    """The zero point is absent or all zeros, and constant.

    Source: H.
    """
    for each in subject.quantizers:
        if not each.has_zero_point:
            continue
        if each.zero_point is None:
            yield each.label, "its zero point is computed at run time; make it a constant 0, or leave it out"
        elif np.any(each.zero_point.astype(np.float32)):
            found = ", ".join(str(value) for value in np.unique(each.zero_point.astype(np.int64))[:3])
            yield each.label, f"its zero point is {found}, and TensorRT takes 0 alone: {_SYMMETRIC}"


@rule("TRT002", Severity.ERROR)
def stored_types_are_known(subject: Subject) -> Places:
    """Values are stored as INT8, FP8 (E4M3), INT4 or FP4.

    Source: H; that an int32 DequantizeLinear of a bias is refused is in its issues.
    """
    for each in subject.quantizers:
        dtype = each.stored_dtype
        if dtype is None or dtype.name in _STORED:
            continue
        advice = "leave the bias float" if dtype == np.int32 else f"{_SYMMETRIC} in int8"
        yield each.label, f"it stores {dtype.name}, which TensorRT has no quantized type for: {advice}"


@rule("TRT003", Severity.ERROR)
def scales_are_positive_constants(subject: Subject) -> Places:
    """Scales are constant, finite, above zero, and of the zero point's shape.

    Source: H.
    """
    for each in subject.quantizers:
        reason = _what_is_wrong_with_the_scale(each)
        if reason is not None:
            yield each.label, reason


def _what_is_wrong_with_the_scale(each: Quantizer) -> str | None:
    if each.scale is None:
        return "its scale is computed at run time; calibrate and store a constant"
    scale = each.scale.astype(np.float32)
    if not np.isfinite(scale).all() or (scale <= 0).any():
        worst = scale[~np.isfinite(scale) | (scale <= 0)].flat[0]
        return f"a scale is {worst:g}; scales must be finite and above 0: calibrate this tensor again"
    if each.has_zero_point and each.zero_point is not None and each.zero_point.shape != each.scale.shape:
        return (
            f"its zero point has the shape {list(each.zero_point.shape)} and its scale {list(each.scale.shape)}: "
            "give both one shape, or leave the zero point out"
        )
    if scale.ndim > 1 and not each.block_size:
        return f"its scale has the shape {list(scale.shape)}; without blocks it must be a scalar or a vector"
    return None


@rule("TRT004", Severity.ERROR)
def there_is_a_scale_for_each_channel(subject: Subject) -> Places:
    """There are as many scales as the axis is long.

    Source: H.
    """
    for each in subject.quantizers:
        shape = fixed_shape(each.data)
        if shape is None or each.is_per_tensor or each.block_size or each.scale is None or each.scale.ndim != 1:
            continue
        if not 0 <= each.axis < len(shape):
            yield each.label, f"its axis is {each.axis}, and the tensor has {len(shape)} axes"
        elif shape[each.axis] != each.scale.size:
            yield (
                each.label,
                (
                    f"it has {each.scale.size} scales for the {shape[each.axis]} channels of axis {each.axis}: "
                    "set the axis of the output channels"
                ),
            )


@rule("TRT005", Severity.ERROR)
def activations_have_one_scale(subject: Subject) -> Places:
    """Only weights have a scale for each channel.

    Source: H.
    """
    for each in subject.quantizers:
        if not each.is_per_tensor and not each.block_size and not is_weight(each):
            yield each.label, f"it quantizes an activation by channel of axis {each.axis}; give activations one scale"


@rule("TRT006", Severity.ERROR)
def blocks_are_for_small_types(subject: Subject) -> Places:
    """Blocks are of FP8, INT4 or FP4, along one of the last two axes.

    Source: H.
    """
    for each in subject.quantizers:
        if not each.block_size:
            continue
        dtype, shape = each.stored_dtype, each.data.shape
        if dtype is not None and dtype.name not in _IN_BLOCKS:
            yield each.label, f"it has blocks of {dtype.name}; TensorRT has blocks of FP8, INT4 and FP4 alone"
        elif shape is not None and each.axis < len(shape) - 2:
            yield (
                each.label,
                f"its blocks run along axis {each.axis}; TensorRT takes one of the last two",
            )


@rule("TRT007", Severity.ERROR)
def no_scalar_is_quantized(subject: Subject) -> Places:
    """What is quantized has at least one axis.

    Source: H.
    """
    for each in subject.quantizers:
        if each.data.shape is not None and len(each.data.shape) == 0:
            yield each.label, "it quantizes a scalar; leave the scalar float, or give it the shape [1]"


@rule("TRT008", Severity.ERROR)
def scales_have_the_type_that_is_computed_in(subject: Subject) -> Places:
    """The scale has the float type of the data.

    Source: H. The output of DequantizeLinear is what its consumer computes in.
    """
    for each in subject.quantizers:
        scale = dtype_of(each.node.inputs[1])
        real = dtype_of(each.data if each.quantizes else each.output)
        if scale is None or real is None or scale == real:
            continue
        yield each.label, f"its scale is {scale.name} and its values {real.name}: cast the scale to {real.name}"


_REFUSED = frozenset({"MatMulInteger", "ConvInteger", "DynamicQuantizeLinear"})


@rule("TRT009", Severity.ERROR)
def operators_are_those_of_explicit_quantization(subject: Subject) -> Places:
    """Quantization is written as Q/DQ of ONNX's own domain, not as integer operators.

    Source: O. MatMulInteger and the QLinear operators have no importer.
    """
    for node in subject.nodes:
        quantizing = node.op.startswith(("QLinear", "QGemm")) or node.op in _REFUSED
        if quantizing:
            yield label_of(node), f"TensorRT has no {node.op}: write the model in Q/DQ format (QuantFormat.QDQ)"
        elif node.op in ("QuantizeLinear", "DequantizeLinear") and node.domain == "com.microsoft":
            yield label_of(node), f"its {node.op} is onnxruntime's own; write it in ONNX's domain, opset 13 or later"


@rule("TRT010", Severity.ERROR)
def quantized_weights_are_constant(subject: Subject) -> Places:
    """Quantized weights of convolutions are constant, with scales along the output channels.

    Source: H. Scales of a Conv's weight run along its axis 0.
    """
    for node in subject.nodes:
        if node.op not in ("Conv", "ConvTranspose") or not has_input(node, 1):
            continue
        weight = dequantizer_of(node.inputs[1])
        if weight is None:
            continue
        if not is_weight(weight):
            yield label_of(node), f"its quantized weight {node.inputs[1].name} is computed at run time: leave it float"
        elif node.op in _WEIGHT_AXIS and not weight.is_per_tensor and weight.axis != _WEIGHT_AXIS[node.op]:
            yield label_of(node), f"its weight has scales along axis {weight.axis}; a Conv takes them along axis 0"


@rule("TRT028", Severity.ERROR)
def scales_by_channel_have_opset_13(subject: Subject) -> Places:
    """Scales for each channel need opset 13.

    Source: https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html; the axis came with version 13.
    """
    yield from places_of_early_axes(subject)


def places_of_early_axes(subject: Subject) -> Places:
    """Quantizers with a scale for each channel in an opset that has no axis for them."""
    if subject.opset >= 13:
        return
    for each in subject.quantizers:
        if not each.is_per_tensor and each.node.domain != "com.microsoft":
            count = math.prod(size for size in each.node.inputs[1].shape if isinstance(size, int))
            yield (
                each.label,
                (
                    f"it has {count} scales in opset {subject.opset}, where there is one: raise the model to opset 13 "
                    "before it is quantized (onnx.version_converter), or quantize per tensor"
                ),
            )


TENSORRT_ERRORS: tuple[LintRule, ...] = (
    zero_points_are_zero,
    stored_types_are_known,
    scales_are_positive_constants,
    there_is_a_scale_for_each_channel,
    activations_have_one_scale,
    blocks_are_for_small_types,
    no_scalar_is_quantized,
    scales_have_the_type_that_is_computed_in,
    operators_are_those_of_explicit_quantization,
    quantized_weights_are_constant,
    scales_by_channel_have_opset_13,
)
