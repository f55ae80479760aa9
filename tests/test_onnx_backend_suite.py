"""Fold against the conformance suite of ONNX: what onnxruntime gets right before, it gets right after.

Each case is folded twice: as it is, and with all its inputs as initializers, where constant folding evaluates
everything that it can.
"""

import onnx
import pytest
from backend_suite import Case, cases, why_not_right, with_constant_inputs
from onnx import ModelProto

from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.passes.fold import Fold


def _why_not_folded_right(case: Case) -> str | None:
    try:
        model = load_model(case.model)
        Fold().apply(model.graph, Context(frame=model.frame))
        folded = model.to_proto()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if [each.name for each in folded.graph.output] != [each.name for each in case.model.graph.output]:
        return "its outputs have other names"
    return _why_not_valid(folded, case.model) or why_not_right(folded, case)


def _why_not_valid(folded: ModelProto, original: ModelProto) -> str | None:
    try:
        onnx.checker.check_model(folded, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        try:
            onnx.checker.check_model(original, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
            return None
        return f"the checker refuses it: {error}"
    return None


def _check(every: int, constant: bool, least: int) -> None:
    """Fold every n-th case; at least `least` of them must be cases that onnxruntime gets right."""
    total, right, failures = 0, 0, []
    for case in cases(every):
        variant = with_constant_inputs(case) if constant else case
        total += 1
        if why_not_right(variant.model, variant) is not None:
            continue
        right += 1
        reason = _why_not_folded_right(variant)
        if reason is not None:
            failures.append(f"{variant.name}: {reason}")
    print(f"{total} cases, {right} right in onnxruntime, {right - len(failures)} right after fold")
    assert not failures, f"{len(failures)} of {right}:\n" + "\n".join(failures)
    assert right >= least


@pytest.mark.parametrize("constant", [False, True], ids=["as it is", "constant inputs"])
def test_a_tenth_of_the_suite_is_right_after_fold(constant):
    _check(every=10, constant=constant, least=100)


@pytest.mark.slow
@pytest.mark.parametrize("constant", [False, True], ids=["as it is", "constant inputs"])
def test_the_whole_suite_is_right_after_fold(constant):
    _check(every=1, constant=constant, least=1000)
