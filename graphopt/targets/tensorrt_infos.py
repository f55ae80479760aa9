"""What is good to know of a Q/DQ graph for TensorRT; the letters of sources are those of `tensorrt_warnings`."""

from __future__ import annotations

import numpy as np

from graphopt.graph import constant_of, label_of
from graphopt.lint_rule import LintRule, Places, Severity, Subject, rule
from graphopt.quantizers import dequantizer_of, dtype_of
from graphopt.targets.tensorrt_patterns import next_quantizer


@rule("TRT023", Severity.INFO)
def plugins_read_and_write_int8(subject: Subject) -> Places:
    """A plugin takes in the DQ before it and the Q behind it.

    Source: D. Whether a plugin has an int8 kernel is not in the file, so this is only pointed out.
    """
    for node in subject.nodes:
        if node.domain in (None, "", "ai.onnx", "ai.onnx.ml", "com.microsoft"):
            continue
        before = any(dequantizer_of(tensor) is not None for tensor in node.inputs)
        after = any(next_quantizer(tensor) is not None for tensor in node.outputs)
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


TENSORRT_INFOS: tuple[LintRule, ...] = (
    plugins_read_and_write_int8,
    weights_are_symmetric,
    the_float_part_is_half,
    the_model_is_quantized,
)
