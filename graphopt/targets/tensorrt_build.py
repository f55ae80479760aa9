"""What TensorRT's compiler makes of a Q/DQ graph, where it is installed: a proof beside the rules that read the file.

Source of all: TensorRT for RTX, which builds without a GPU (`graphopt.tensorrt_proof`).
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_graphsurgeon as gs

from graphopt.errors import ModelError
from graphopt.graph import label_of
from graphopt.input_values import can_be_filled
from graphopt.lint_rule import LintRule, Places, Severity, Subject, rule
from graphopt.targets.int8_share import MACS_IN_FLOAT8, MACS_IN_INT8, share_of_macs
from graphopt.targets.tensorrt_patterns import is_quantized, weighted
from graphopt.tensorrt_proof import TensorRTProof, compiler_name, has_compiler, prove


@rule("TRT031", Severity.ERROR)
def the_model_builds(subject: Subject) -> Places:
    """TensorRT builds the model.

    Source: TensorRT for RTX, where graphopt[tensorrt] is installed.
    """
    found = subject.shared(proof)
    if isinstance(found, ModelError):
        yield "", f"{compiler_name()} refuses it: {found}{_advice(subject.model.graph)}"


def _advice(graph: gs.Graph) -> str:
    """What leaves a single branch of each If, where numbers that the model is given choose it."""
    waiting = [node.inputs[0] for node in graph.nodes if node.op == "If"]
    seen: dict[int, gs.Tensor] = {}
    while waiting:
        tensor = waiting.pop()
        if id(tensor) not in seen:
            seen[id(tensor)] = tensor
            waiting += [each for node in tensor.inputs for each in node.inputs]
    names = [tensor.name for tensor in graph.inputs if id(tensor) in seen and can_be_filled(tensor)]
    if not names:
        return ""
    values = "+".join(f"{name}=NUMBER" for name in names)
    return f"; branches follow from {' and '.join(names)}: freeze-inputs:values={values} before fold leaves one"


@rule("TRT032", Severity.INFO)
def quantized_operators_run_in_int8(subject: Subject) -> Places:
    """Operators with weights and quantized inputs run in int8.

    Source: TensorRT for RTX, where graphopt[tensorrt] is installed.
    """
    found = subject.shared(proof)
    if not isinstance(found, TensorRTProof):
        return
    for node in weighted(subject):
        if is_quantized(node) and id(node) in found.in_float:
            yield label_of(node), f"{compiler_name()} runs this {node.op} in float, and its pairs only cost accuracy"


@rule("TRT033", Severity.INFO)
def the_compiler_is_installed(subject: Subject) -> Places:
    """TensorRT's compiler is installed, so that what it makes of the model is known.

    Source: graphopt.
    """
    if subject.shared(proof) is None:
        yield "", "TensorRT was not asked to build it: pip install 'graphopt[tensorrt]' for the proof, without a GPU"


def figures(subject: Subject) -> Mapping[str, int | float]:
    """How many Q and DQ nodes the file holds, and the share of MACs that TensorRT's compiler puts in int8."""
    counted: dict[str, int | float] = {"Q and DQ nodes in the file": len(subject.quantizers)}
    found = subject.shared(proof)
    if isinstance(found, TensorRTProof) and (share := share_of_macs(subject, found.in_int8)) is not None:
        stored = {each.stored_dtype.name for each in subject.quantizers if each.stored_dtype is not None}
        counted[MACS_IN_FLOAT8 if "float8_e4m3fn" in stored else MACS_IN_INT8] = share
    return counted


def proof(subject: Subject) -> TensorRTProof | ModelError | None:
    """What TensorRT makes of the model, or why it refuses it; None: its compiler is not installed."""
    if not has_compiler():
        return None
    try:
        return prove(subject.model, subject.input_shapes)
    except ModelError as error:
        return error


TENSORRT_BUILD: tuple[LintRule, ...] = (the_model_builds, quantized_operators_run_in_int8, the_compiler_is_installed)
