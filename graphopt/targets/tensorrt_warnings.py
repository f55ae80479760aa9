"""What makes a Q/DQ graph slower or less exact in TensorRT than it could be.

Sources, as rules cite them: D, the developer guide's chapter "Explicit quantization"; H, the comments in NvInfer.h;
M, where NVIDIA's Model Optimizer puts pairs; I, answers of its maintainers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.graph import constant_of, has_input, is_constant, label_of, present, producer
from graphopt.lint_rule import LintRule, Places, Severity, Subject, rule
from graphopt.operators import ELEMENTWISE
from graphopt.quantizers import Quantizer, dequantizer_of, dtype_of, is_weight, quantizer_of, quantizers_after
from graphopt.sizes import fixed_shape

_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_ACTIVATIONS = frozenset(
    {"BatchNormalization", "Clip", "Elu", "HardSigmoid", "HardSwish", "LeakyRelu", "PRelu", "Relu", "Sigmoid", "Tanh"}
)
_COMMUTING = frozenset(
    {
        *("Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "MaxPool", "Reshape", "Slice", "SpaceToDepth"),
        *("Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
    }
)
_POOLS = frozenset({"AveragePool", "GlobalAveragePool"})
_SENSITIVE = frozenset({"Erf", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "Softmax"})
_LEAST_CHANNELS = 16


@rule("TRT011", Severity.WARNING)
def all_inputs_are_quantized_or_none(subject: Subject) -> Places:
    """An operator with weights has both inputs quantized, or none.

    Source: D.
    """
    for node in _weighted(subject):
        first, second = (dequantizer_of(tensor) for tensor in node.inputs[:2])
        if (first is None) != (second is None):
            lacking = node.inputs[0 if first is None else 1].name
            yield label_of(node), f"it runs in float: {lacking} is not quantized, its other input is; quantize both"


@rule("TRT012", Severity.WARNING)
def no_pair_before_an_activation(subject: Subject) -> Places:
    """No pair stands between an operator with weights and its BatchNormalization or activation function.

    Source: D, I. The Q belongs behind the activation function, at the input of the next operator.
    """
    for node, dequantizer in _pairs_behind(_weighted(subject)):
        if (reader := _first(dequantizer.output.outputs, _ACTIVATIONS)) is not None:
            yield (
                label_of(node),
                (
                    f"a pair parts it from {label_of(reader)} ({reader.op}), which is then not fused into it: "
                    f"quantize the output of the {reader.op} instead"
                ),
            )


@rule("TRT013", Severity.WARNING)
def biases_are_float(subject: Subject) -> Places:
    """The bias is float.

    Source: H, M.
    """
    for node in _weighted(subject):
        if has_input(node, 2) and dequantizer_of(node.inputs[2]) is not None:
            yield (
                label_of(node),
                f"its bias {node.inputs[2].name} is quantized: leave it float (strip-qdq, then qdq)",
            )


@rule("TRT014", Severity.WARNING)
def the_skip_input_is_quantized(subject: Subject) -> Places:
    """Of a residual Add behind a quantized operator, the skip input is quantized.

    Source: D; M finds that input by the lowest common ancestor of the branches.
    """
    for node in _residual_adds(subject):
        sides = [_weighted_producer(tensor) for tensor in node.inputs]
        if not any(map(_is_quantized, filter(None, sides))):
            continue
        if all(dequantizer_of(tensor) is None for tensor in node.inputs):
            skip = node.inputs[1 if sides[0] is not None else 0].name
            yield label_of(node), f"no input is quantized, so it stays float behind int8: quantize {skip}"


@rule("TRT015", Severity.WARNING)
def moving_operators_have_no_pair_of_their_own(subject: Subject) -> Places:
    """Operators that commute with quantization have no pair of their own.

    Source: D. TensorRT moves quantizers over them.
    """
    for node in subject.nodes:
        if node.op not in _COMMUTING:
            continue
        before, after = dequantizer_of(node.inputs[0]), _next_quantizer(node.outputs[0])
        if before is not None and after is not None:
            cost = "" if before.has_scale_of(after) else ", and its scale differs, so that values are rounded twice"
            yield label_of(node), f"a pair stands on either side of this {node.op}{cost}: remove one of them"


@rule("TRT016", Severity.WARNING)
def pointwise_operators_are_int8_on_both_sides(subject: Subject) -> Places:
    """Pooling and elementwise operators have int8 in and out, or neither.

    Source: D.
    """
    for node in subject.nodes:
        if node.op not in _POOLS and node.op not in ELEMENTWISE:
            continue
        computed = [tensor for tensor in present(node.inputs) if not is_constant(tensor)]
        if not computed or any(dequantizer_of(tensor) is None for tensor in computed):
            continue
        if _next_quantizer(node.outputs[0]) is None and not _reads_a_quantized_operator(node):
            yield (
                label_of(node),
                (
                    f"this {node.op} reads int8 and writes float, so it runs in float: quantize its output, "
                    "or remove the pair before it"
                ),
            )


@rule("TRT017", Severity.WARNING)
def no_pair_between_an_operator_and_its_add(subject: Subject) -> Places:
    """No pair stands between an operator with weights and the residual Add that is fused into it.

    Source: D.
    """
    for node in _residual_adds(subject):
        parted = [_weighted_before_pair(tensor) for tensor in node.inputs]
        fused = any(_is_quantized(side) for side in map(_weighted_producer, node.inputs) if side is not None)
        if not fused and (found := next(filter(None, parted), None)) is not None:
            yield (
                label_of(node),
                (
                    f"a pair parts it from {label_of(found)}, which it would be fused into: remove that pair and keep "
                    "one on the other input"
                ),
            )


@rule("TRT018", Severity.WARNING)
def weights_have_a_scale_for_each_channel(subject: Subject) -> Places:
    """Weights have a scale for each output channel.

    Source: D.
    """
    for node in _weighted(subject):
        weight = dequantizer_of(node.inputs[1])
        if node.op == "ConvTranspose" or weight is None or not is_weight(weight) or not weight.is_per_tensor:
            continue
        shape = fixed_shape(weight.data)
        if shape is not None and len(shape) > 1 and max(shape[0], shape[-1]) > 1:
            yield label_of(node), "its weight has one scale: one for each output channel is more exact and as fast"


@rule("TRT019", Severity.WARNING)
def scales_that_meet_are_equal(subject: Subject) -> Places:
    """Scales that meet are equal: of two quantizers of one tensor, and of the inputs of a Concat.

    Source: D, M.
    """
    for first, other in _second_quantizers(subject):
        if not first.has_scale_of(other):
            yield (
                first.data.name,
                f"{first.label} and {other.label} quantize it by different scales: quantize it once, with one scale",
            )
    for node in subject.nodes:
        if node.op != "Concat":
            continue
        found = [each for tensor in node.inputs if (each := dequantizer_of(tensor)) is not None]
        if after := _next_quantizer(node.outputs[0]):
            found.append(after)
        if any(not found[0].has_scale_of(each) for each in found[1:]):
            yield label_of(node), "its inputs and its output have different scales: give them one, the largest"


@rule("TRT020", Severity.WARNING)
def batch_normalization_is_folded(subject: Subject) -> Places:
    """BatchNormalization is folded before calibration.

    Source: D.
    """
    for node in subject.nodes:
        before = _weighted_producer(node.inputs[0]) if node.op == "BatchNormalization" else None
        before = before or (_weighted_before_pair(node.inputs[0]) if node.op == "BatchNormalization" else None)
        if before is not None and dequantizer_of(before.inputs[1]) is not None:
            yield label_of(node), f"it is not folded into {label_of(before)}: fold the float model, then calibrate it"


@rule("TRT021", Severity.WARNING)
def sensitive_operators_are_float(subject: Subject) -> Places:
    """Normalization, Softmax and the inside of GELU stay float.

    Source: M.
    """
    for node in subject.nodes:
        if node.op in _SENSITIVE and dequantizer_of(node.inputs[0]) is not None:
            yield label_of(node), f"this {node.op} reads int8, which costs accuracy: remove the pair before it"


@rule("TRT022", Severity.WARNING)
def small_operators_are_float(subject: Subject) -> Places:
    """Operators with few channels stay float.

    Source: M, which quantizes no Conv with under 16 channels on a side, but for first layers and grouped Convs whose
    kernels TensorRT has, no product with under 16 rows or columns of the weight, and no product of a vector.
    """
    for node in _weighted(subject):
        if _is_quantized(node) and (reason := _too_small(node)) is not None:
            yield label_of(node), f"{reason}: int8 is no faster there; leave it float"


def _too_small(node: gs.Node) -> str | None:
    shape, least = fixed_shape(node.inputs[1]), _LEAST_CHANNELS
    if shape is None or len(shape) < 2:
        return None
    if node.op in ("Gemm", "MatMul"):
        rows = fixed_shape(node.outputs[0])
        if min(shape[-2:]) < least:
            return f"its weight is {shape[-2]} x {shape[-1]}, and one side is under {least}"
        is_vector = rows is not None and len(rows) > 1 and all(size == 1 for size in rows[:-1])
        return "it multiplies a vector" if is_vector else None
    group, kernel = int(node.attrs.get("group", 1)), shape[2:]
    if node.op == "Conv":
        channels_in, channels_out = shape[1] * group, shape[0]
    else:
        channels_in, channels_out = shape[0], shape[1] * group
    if min(channels_in, channels_out) >= least:
        return None
    if node.op == "Conv" and channels_out % 8 == 0:
        if group == 1 and len(set(kernel)) == 1 and max(channels_in, channels_out) >= least:
            return None
        if group > 1 and min(kernel, default=0) >= 3:
            return None
    return f"it has {channels_in} channels in and {channels_out} out"


@rule("TRT024", Severity.WARNING)
def no_pair_before_a_graph_output(subject: Subject) -> Places:
    """No pair stands before an output of the model.

    Source: M.
    """
    for each in subject.quantizers:
        if not each.quantizes and not is_weight(each) and subject.is_output(each.output):
            yield (
                each.label,
                f"it gives the output {each.output.name}, where int8 saves nothing: remove the pair",
            )


@rule("TRT025", Severity.WARNING)
def a_tensor_is_quantized_once(subject: Subject) -> Places:
    """A tensor has one QuantizeLinear; its DequantizeLinear may be shared.

    Source: M.
    """
    for first, other in _second_quantizers(subject):
        if first.has_scale_of(other):
            yield first.data.name, f"{first.label} and {other.label} quantize it alike: let all readers share one"


@rule("TRT030", Severity.WARNING)
def transposed_convolutions_have_one_scale(subject: Subject) -> Places:
    """Weights of ConvTranspose have one scale.

    Source: the sources disagree: M has scales along axis 1, I says that they are not supported.
    """
    for node in subject.nodes:
        if node.op != "ConvTranspose" or not has_input(node, 1):
            continue
        weight = dequantizer_of(node.inputs[1])
        if weight is not None and not weight.is_per_tensor:
            yield label_of(node), "its weight has a scale for each channel, which some versions refuse: give it one"


@rule("TRT023", Severity.INFO)
def plugins_read_and_write_int8(subject: Subject) -> Places:
    """A plugin takes in the DQ before it and the Q behind it.

    Source: D. Whether a plugin has an int8 kernel is not in the file, so this is only pointed out.
    """
    for node in subject.nodes:
        if node.domain in (None, "", "ai.onnx", "ai.onnx.ml", "com.microsoft"):
            continue
        before = any(dequantizer_of(tensor) is not None for tensor in node.inputs)
        after = any(_next_quantizer(tensor) is not None for tensor in node.outputs)
        if before or after:
            yield label_of(node), f"TensorRT hands int8 to the plugin {node.op}: make sure that it takes it"


@rule("TRT026", Severity.INFO)
def weights_are_symmetric(subject: Subject) -> Places:
    """Stored weights are within +-127.

    Source: H. How a value is rounded, half to even, is not in the file.
    """
    for each in subject.quantizers:
        stored = None if each.quantizes or each.stored_dtype != np.int8 else constant_of(each.data)
        if stored is not None and stored.size and int(stored.min()) == -128:
            yield each.label, "its weight holds -128, beyond the customary +-127: quantize weights symmetrically"


@rule("TRT027", Severity.INFO)
def the_float_part_is_half(subject: Subject) -> Places:
    """The float part of a model that is built for speed is float16.

    Source: D. Networks are strongly typed: what the file calls float32 runs in float32.
    """
    if any(not each.quantizes and dtype_of(each.output) == np.float32 for each in subject.quantizers):
        yield "", "the float part is float32: TensorRT runs it so; convert it to float16 where the accuracy allows"


@rule("TRT029", Severity.INFO)
def the_model_is_quantized(subject: Subject) -> Places:
    """The model holds quantizers.

    Source: D. Calibrators are gone; Q/DQ in the file is the only way to int8.
    """
    if not subject.quantizers:
        yield "", "it holds no QuantizeLinear: it runs in float; quantize it (graphopt optimize --target tensorrt)"


def _weighted(subject: Subject) -> list[gs.Node]:
    return [node for node in subject.nodes if node.op in _WEIGHTED and not node.domain and len(node.inputs) > 1]


def _is_quantized(node: gs.Node) -> bool:
    return all(dequantizer_of(tensor) is not None for tensor in node.inputs[:2])


def _first(nodes: list[gs.Node], operators: frozenset[str]) -> gs.Node | None:
    return next((node for node in nodes if node.op in operators), None)


def _next_quantizer(tensor: gs.Tensor) -> Quantizer | None:
    return next(quantizers_after(tensor), None)


def _pairs_behind(nodes: list[gs.Node]) -> Iterator[tuple[gs.Node, Quantizer]]:
    """Nodes with the DequantizeLinear of each pair behind."""
    for node in nodes:
        for quantizer in quantizers_after(node.outputs[0]):
            for reader in quantizer.output.outputs:
                found = quantizer_of(reader)
                if found is not None and not found.quantizes:
                    yield node, found


def _residual_adds(subject: Subject) -> Iterator[gs.Node]:
    for node in subject.nodes:
        if node.op == "Add" and not any(is_constant(tensor) or _is_weight(tensor) for tensor in node.inputs):
            yield node


def _is_weight(tensor: gs.Tensor) -> bool:
    found = dequantizer_of(tensor)
    return found is not None and is_weight(found)


def _weighted_producer(tensor: gs.Tensor) -> gs.Node | None:
    """The operator with weights that computes a tensor which nothing else reads."""
    node = producer(tensor)
    return node if node is not None and node.op in _WEIGHTED and len(tensor.outputs) == 1 else None


def _weighted_before_pair(tensor: gs.Tensor) -> gs.Node | None:
    """The operator with weights before a pair that nothing else reads."""
    dequantizer = dequantizer_of(tensor)
    quantizer = None if dequantizer is None else quantizer_of(producer(dequantizer.data))
    if quantizer is None or not quantizer.quantizes or len(tensor.outputs) != 1 or len(quantizer.output.outputs) != 1:
        return None
    return _weighted_producer(quantizer.data)


def _reads_a_quantized_operator(node: gs.Node) -> bool:
    """Whether it is a residual Add with a pair on a Conv's side: another rule speaks of it."""
    return node.op == "Add" and any(_weighted_before_pair(tensor) is not None for tensor in node.inputs)


def _second_quantizers(subject: Subject) -> Iterator[tuple[Quantizer, Quantizer]]:
    """The first quantizer of a tensor with each other one."""
    first: dict[int, Quantizer] = {}
    for each in subject.quantizers:
        if each.quantizes and first.setdefault(id(each.data), each) is not each:
            yield first[id(each.data)], each


TENSORRT_WARNINGS: tuple[LintRule, ...] = (
    all_inputs_are_quantized_or_none,
    no_pair_before_an_activation,
    biases_are_float,
    the_skip_input_is_quantized,
    moving_operators_have_no_pair_of_their_own,
    pointwise_operators_are_int8_on_both_sides,
    no_pair_between_an_operator_and_its_add,
    weights_have_a_scale_for_each_channel,
    scales_that_meet_are_equal,
    batch_normalization_is_folded,
    sensitive_operators_are_float,
    small_operators_are_float,
    plugins_read_and_write_int8,
    no_pair_before_a_graph_output,
    a_tensor_is_quantized_once,
    weights_are_symmetric,
    the_float_part_is_half,
    the_model_is_quantized,
    transposed_convolutions_have_one_scale,
)
