"""What makes a Q/DQ graph slower or less exact in TensorRT than it could be.

Sources, as rules cite them: D, the developer guide's chapter "Explicit quantization"; H, the comments in NvInfer.h;
M, where NVIDIA's Model Optimizer puts pairs; I, answers of its maintainers.
"""

from __future__ import annotations

from collections import Counter

import onnx_graphsurgeon as gs

from graphopt.graph import has_input, is_constant, label_of, present
from graphopt.lint_rule import LintRule, Places, Severity, Subject, rule
from graphopt.operators import ELEMENTWISE
from graphopt.quantizers import dequantizer_of, is_weight
from graphopt.shapes import is_name
from graphopt.sizes import fixed_shape
from graphopt.targets.tensorrt_patterns import (
    first_of,
    is_quantized,
    next_quantizer,
    pairs_behind,
    reads_a_quantized_operator,
    residual_adds,
    second_quantizers,
    weighted,
    weighted_before_pair,
    weighted_producer,
)

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
    for node in weighted(subject):
        first, second = (dequantizer_of(tensor) for tensor in node.inputs[:2])
        if second is not None and second.block_size and is_weight(second):
            continue  # weights alone are quantized, for their bytes
        if (first is None) != (second is None):
            lacking = node.inputs[0 if first is None else 1].name
            yield label_of(node), f"it runs in float: {lacking} is not quantized, its other input is; quantize both"


@rule("TRT012", Severity.WARNING)
def no_pair_before_an_activation(subject: Subject) -> Places:
    """No pair stands between an operator with weights and its BatchNormalization or activation function.

    Source: D, I. The Q belongs behind the activation function, at the input of the next operator.
    """
    for node, dequantizer in pairs_behind(weighted(subject)):
        if (reader := first_of(dequantizer.output.outputs, _ACTIVATIONS)) is not None:
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
    for node in weighted(subject):
        if has_input(node, 2) and dequantizer_of(node.inputs[2]) is not None:
            yield (
                label_of(node),
                f"its bias {node.inputs[2].name} is quantized: leave it float (strip-qdq, then qdq)",
            )


@rule("TRT014", Severity.WARNING)
def the_skip_input_is_quantized(subject: Subject) -> Places:
    """Of a residual Add behind a quantized Conv, the skip input is quantized.

    Source: D; M finds that input by the lowest common ancestor of the branches.
    """
    for node in residual_adds(subject):
        sides = [weighted_producer(tensor) for tensor in node.inputs]
        fused = [side for side in sides if side is not None and side.op in subject.target.adds_fused_into]
        if not any(map(is_quantized, fused)):
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
        before, after = dequantizer_of(node.inputs[0]), next_quantizer(node.outputs[0])
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
        if next_quantizer(node.outputs[0]) is None and not reads_a_quantized_operator(node):
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
    for node in residual_adds(subject):
        parted = [weighted_before_pair(tensor) for tensor in node.inputs]
        fused = any(is_quantized(side) for side in map(weighted_producer, node.inputs) if side is not None)
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
    for node in weighted(subject):
        weight = dequantizer_of(node.inputs[1])
        if node.op == "ConvTranspose" or weight is None or not is_weight(weight) or not weight.is_per_tensor:
            continue
        shape = fixed_shape(weight.data)
        is_stack = node.op == "MatMul" and shape is not None and len(shape) > 2  # whose matrices share no channels
        if shape is not None and len(shape) > 1 and max(shape[0], shape[-1]) > 1 and not is_stack:
            yield label_of(node), "its weight has one scale: one for each output channel is more exact and as fast"


@rule("TRT019", Severity.WARNING)
def scales_that_meet_are_equal(subject: Subject) -> Places:
    """Scales that meet are equal: of two quantizers of one tensor, and of the inputs of a Concat.

    Source: D, M.
    """
    for first, other in second_quantizers(subject):
        if not first.has_scale_of(other):
            yield (
                first.data.name,
                f"{first.label} and {other.label} quantize it by different scales: quantize it once, with one scale",
            )
    for node in subject.nodes:
        if node.op != "Concat":
            continue
        found = [each for tensor in node.inputs if (each := dequantizer_of(tensor)) is not None]
        if after := next_quantizer(node.outputs[0]):
            found.append(after)
        if any(not found[0].has_scale_of(each) for each in found[1:]):
            yield label_of(node), "its inputs and its output have different scales: give them one, the largest"


@rule("TRT020", Severity.WARNING)
def batch_normalization_is_folded(subject: Subject) -> Places:
    """BatchNormalization is folded before calibration.

    Source: D.
    """
    for node in subject.nodes:
        before = weighted_producer(node.inputs[0]) if node.op == "BatchNormalization" else None
        before = before or (weighted_before_pair(node.inputs[0]) if node.op == "BatchNormalization" else None)
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
    for node in weighted(subject):
        if is_quantized(node) and (reason := _too_small(node)) is not None:
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
    for first, other in second_quantizers(subject):
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


@rule("TRT034", Severity.WARNING)
def names_of_sizes_say_something(subject: Subject) -> Places:
    """Sizes of inputs that have one name are equal.

    Source: TensorRT for RTX, which refuses a profile that gives two sizes of one name different numbers.
    """
    sizes = [(tensor, size) for tensor in subject.model.graph.inputs for size in tensor.shape or ()]
    counts = Counter(size for _, size in sizes if isinstance(size, str) and not is_name(size))
    for name, count in counts.items():
        if count > 1:
            where = next(tensor.name for tensor, size in sizes if size == name)
            yield where, f"{count} sizes of inputs are called {name!r}, so TensorRT makes them equal: fold opens them"


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
    no_pair_before_a_graph_output,
    a_tensor_is_quantized_once,
    transposed_convolutions_have_one_scale,
    names_of_sizes_say_something,
)
