"""Whether a graph is still valid and still computes the same: what the pass manager asks after every pass.

Four questions: does the ONNX checker accept it, does strict shape inference, does onnxruntime load it, and are its
outputs those from before the pass, within the tolerance of the pass's effect? Real exporters write files that the
checker or shape inference refuse and onnxruntime runs; for those the first two questions become "nothing got worse".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import onnx

from graphopt.errors import ModelError
from graphopt.feeds import Feed, fixed_size, shapes_of
from graphopt.half_precision import computes_in_half
from graphopt.model_io import Model
from graphopt.pass_base import Effect
from graphopt.runtime import Array, Session, arrays_in, open_session
from graphopt.shapes import hollow_model
from graphopt.sizes import tensors_at

Outputs = list[dict[str, Any]]  # by sample, by output name; what a session returns
Shapes = dict[str, Sequence[Any] | None]  # of outputs, as shape inference has them
_Difference = Callable[[int, str, list[Array], list[Array]], str | None]

# Largest difference, relative to the largest magnitude in the output. float32 rounds at 6e-8 an operation, and
# some hundred operations with sums over some thousand products lie between input and output. A probability near 0
# has the absolute precision of one near 1, so that much, one step of float32 beside 1, is allowed in any case.
_TOLERANCE = {Effect.EXACT: 1e-5, Effect.REASSOCIATES: 1e-3}
_HALF_TOLERANCE = 2e-2  # where a model computes in float16, or an output is rounded to it
_STEP_AT_ONE = float(np.finfo(np.float32).eps)
_TIMES_ROUNDING = 8
"""How much further a pass may move outputs than another order of the same operations does."""
_INTEGER_MISMATCH = 1e-3
"""Share of integer outputs (classes, indices) that rounding may move from one side of a tie to the other."""


@dataclass(frozen=True)
class Verdict:
    """What is known of one version of a graph."""

    checker: str | None  # why the ONNX checker refuses it; None: accepted
    shapes: str | None  # why strict shape inference refuses it
    outputs: Outputs
    in_half: bool = False  # whether outputs are as exact as half precision is, whatever their type

    @property
    def refusal(self) -> str | None:
        """The first objection of checker or shape inference."""
        return self.checker or self.shapes


def examine(model: Model, feeds: Sequence[Feed], session: Session | None = None) -> Verdict:
    """Check a model and run it on some feeds, in a session that is open already or in one of its own.

    Raises:
        ModelError: onnxruntime does not load or run it.
    """
    session = session or open_session(model, copy_weights=False)
    outputs = [session.run(feed) for feed in feeds]
    shell = hollow_model(model)
    return Verdict(_checker_objection(shell), _shape_objection(shell), outputs, computes_in_half(model.graph))


def reordered_outputs(model: Model, feeds: Sequence[Feed]) -> Outputs | None:
    """What a model returns where onnxruntime fuses and reorders none of its operators; None where it needs that."""
    try:
        session = open_session(model, optimize=False, copy_weights=False)
        return [session.run(feed) for feed in feeds]
    except ModelError:
        return None


def inferred_shapes(model: Model, feed: Feed) -> Shapes:
    """What shape inference finds for a model's outputs on a feed; sizes that it leaves open follow from values."""
    tensors = tensors_at(model.graph, shapes_of(feed))
    return {tensor.name: tensors[tensor.name].shape for tensor in model.graph.outputs}


def judge(
    before: Verdict,
    after: Verdict,
    effect: Effect,
    reordered: Callable[[], Outputs | None] | None = None,
    inferred: Callable[[int], Shapes] | None = None,
) -> str | None:
    """What a pass broke, as a sentence; None when it broke nothing.

    Args:
        before: the verdict on the graph that the pass was given.
        after: that on what it made of it, on the same feeds.
        effect: what the pass declares.
        reordered: outputs of the graph from before with its operations in another order, which rounds otherwise; asked
            for where the outputs differ by more than most models' rounding.
        inferred: `inferred_shapes` of the graph from before, on the feed of a number; asked for where a lossy pass
            changed an output's size. How many boxes are found, or how many steps a Loop takes, follows from values.
    """
    if after.checker and not before.checker:
        return f"the ONNX checker refuses the result: {after.checker}"
    if after.shapes and not before.shapes:
        return f"strict shape inference refuses the result: {after.shapes}"
    if effect is Effect.LOSSY:
        lossy = partial(_lossy_difference, inferred and cache(inferred))
        return _outputs_difference(before.outputs, after.outputs, lossy)
    tolerance = _HALF_TOLERANCE if before.in_half else _TOLERANCE[effect]
    near = partial(_difference, effect, tolerance)
    reason = _outputs_difference(before.outputs, after.outputs, partial(near, before.outputs))
    if reason is not None and reordered is not None and (again := reordered()) is not None:
        return _outputs_difference(before.outputs, after.outputs, partial(near, again))
    return reason


def _outputs_difference(expected: Outputs, found: Outputs, difference: _Difference) -> str | None:
    for number, (before, after) in enumerate(zip(expected, found, strict=True)):
        for name, value in before.items():
            if name not in after:
                return f"output '{name}' is gone"
            ours, theirs = arrays_in(value), arrays_in(after[name])
            if len(ours) != len(theirs):
                reason: str | None = f"held {len(ours)} arrays and holds {len(theirs)}"
            else:
                reason = difference(number, name, ours, theirs)
            if reason is not None:
                return f"output '{name}' of sample {number} {reason}"
    return None


def _difference(
    effect: Effect,
    tolerance: float,
    reordered: Outputs,
    number: int,
    name: str,
    expected: list[Array],
    found: list[Array],
) -> str | None:
    again = arrays_in(reordered[number][name])
    if [array.shape for array in again] != [array.shape for array in expected]:
        again = expected
    reasons = (_array_difference(*arrays, effect, tolerance) for arrays in zip(expected, found, again, strict=True))
    return next((reason for reason in reasons if reason is not None), None)


def _array_difference(expected: Array, found: Array, reordered: Array, effect: Effect, tolerance: float) -> str | None:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return _other_shape(expected, found)
    if expected.size == 0 or expected.dtype.kind not in "fiub":
        return None if np.array_equal(expected, found) else "changed"
    if (reason := _new_nonfinite(expected, found)) is not None:
        return reason
    if expected.dtype.kind != "f":
        moved = float(np.mean(expected != found))
        allowed = 0.0 if effect is Effect.EXACT else _INTEGER_MISMATCH
        allowed = max(allowed, _TIMES_ROUNDING * float(np.mean(expected != reordered)))
        return f"differs in {moved:.2%} of its values" if moved > allowed else None
    finite = np.isfinite(expected) & np.isfinite(reordered)
    wide, other, again = (array[finite].astype(np.float64) for array in (expected, found, reordered))
    largest = float(np.abs(wide).max(initial=0.0))
    difference, rounding = (float(np.abs(wide - each).max(initial=0.0)) for each in (other, again))
    tolerance = _HALF_TOLERANCE if expected.dtype == np.float16 else tolerance
    if difference > max(tolerance * largest + _STEP_AT_ONE, _TIMES_ROUNDING * rounding):
        return f"differs by {difference:.3g}, where its largest value is {largest:.3g}"
    return None


def _lossy_difference(
    inferred: Callable[[int], Shapes] | None, number: int, name: str, expected: list[Array], found: list[Array]
) -> str | None:
    """Of values a lossy pass may change all, but none to NaN; of sizes those that follow from values."""
    for ours, theirs in zip(expected, found, strict=True):
        if ours.dtype != theirs.dtype or ours.ndim != theirs.ndim:
            return _other_shape(ours, theirs)
        if ours.shape == theirs.shape:
            if (reason := _new_nonfinite(ours, theirs)) is not None:
                return reason
        elif inferred is None or not _follows_from_values(ours, theirs, inferred(number)[name]):
            return _other_shape(ours, theirs)
    return None


def _follows_from_values(ours: Array, theirs: Array, inferred: Sequence[Any] | None) -> bool:
    """Whether shape inference leaves every size open that differs."""
    if inferred is None:
        return True
    sizes = zip(ours.shape, theirs.shape, inferred, strict=True)
    return all(one == other or fixed_size(known) is None for one, other, known in sizes)


def _new_nonfinite(expected: Array, found: Array) -> str | None:
    if expected.dtype.kind == "f" and not np.array_equal(np.isfinite(expected), np.isfinite(found)):
        return "has become NaN or infinite in places where it was not"
    return None


def _other_shape(expected: Array, found: Array) -> str:
    return f"was {expected.dtype} {expected.shape} and is {found.dtype} {found.shape}"


def _checker_objection(shell: onnx.ModelProto) -> str | None:
    try:
        onnx.checker.check_model(shell)
    except onnx.checker.ValidationError as error:
        return _first_line(error)
    return None


def _shape_objection(shell: onnx.ModelProto) -> str | None:
    try:
        onnx.shape_inference.infer_shapes(shell, check_type=True, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
