"""What verification takes for rounding, and what for a change."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from graphopt.model_io import load_model
from graphopt.pass_base import Effect
from graphopt.verification import Verdict, inferred_shapes, judge, reordered_outputs

PROBABILITIES = np.array([3e-5, 1e-6, 0], np.float32)


def verdict(values):
    return Verdict(checker=None, shapes=None, outputs=[{"y": np.asarray(values)}])


def test_a_model_whose_own_rounding_is_as_large_is_not_changed():
    """A detector on an image without text: onnxruntime's Sigmoid has the absolute precision of values near 1."""
    before, after = verdict(PROBABILITIES), verdict(PROBABILITIES + np.float32(2.1e-7))
    assert judge(before, after, Effect.REASSOCIATES) is not None
    assert (
        judge(before, after, Effect.REASSOCIATES, lambda: verdict(PROBABILITIES + np.float32(1.8e-7)).outputs) is None
    )


@pytest.mark.parametrize("reordered", [PROBABILITIES, PROBABILITIES + np.float32(1e-8), np.zeros(4, np.float32)])
def test_a_change_beyond_the_models_own_rounding_is_one(reordered):
    before, after = verdict(PROBABILITIES), verdict(PROBABILITIES + np.float32(2.1e-7))
    assert "differs by 2.1e-07" in judge(before, after, Effect.REASSOCIATES, lambda: verdict(reordered).outputs)


def test_a_model_that_cannot_be_reordered_has_no_rounding_to_excuse_a_change():
    before, after = verdict(PROBABILITIES), verdict(2 * PROBABILITIES)
    assert judge(before, after, Effect.REASSOCIATES, lambda: None) is not None


def test_classes_may_move_as_often_as_rounding_moves_them():
    before, after = verdict(np.arange(100)), verdict(np.append(np.arange(99), 0))
    again = verdict(np.arange(100)).outputs
    assert judge(before, after, Effect.EXACT, lambda: again) is not None
    again[0]["y"][3] = 7
    assert judge(before, after, Effect.EXACT, lambda: again) is None


def test_outputs_that_agree_ask_for_no_other_order():
    def refuse():
        raise AssertionError

    assert judge(verdict(PROBABILITIES), verdict(PROBABILITIES), Effect.EXACT, refuse) is None


def test_another_order_has_the_outputs_of_the_model():
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
    model = load_model(onnx.parser.parse_model(text))
    (outputs,) = reordered_outputs(model, [{"x": np.array([-1, 2], np.float32)}])
    assert outputs["y"].tolist() == [0, 2]


def test_a_lossy_pass_may_change_sizes_that_follow_from_values():
    before, after = verdict(np.zeros((2, 7), np.float32)), verdict(np.ones((3, 7), np.float32))
    assert judge(before, after, Effect.LOSSY, inferred=lambda number: {"y": ["boxes", 7]}) is None
    assert judge(before, after, Effect.LOSSY, inferred=lambda number: {"y": None}) is None
    for effect in (Effect.EXACT, Effect.REASSOCIATES):
        assert judge(before, after, effect, inferred=lambda number: {"y": ["boxes", 7]}) is not None


@pytest.mark.parametrize(
    "after",
    [np.zeros((2, 6), np.float32), np.zeros((3, 6), np.float32), np.zeros(2, np.float32), np.zeros((2, 7), int)],
)
def test_a_lossy_pass_may_change_no_other_sizes(after):
    before = verdict(np.zeros((2, 7), np.float32))
    reason = judge(before, verdict(after), Effect.LOSSY, inferred=lambda number: {"y": ["boxes", 7]})
    assert reason == f"output 'y' of sample 0 was float32 (2, 7) and is {after.dtype} {after.shape}"
    assert judge(before, verdict(after), Effect.LOSSY) is not None


def test_a_lossy_pass_may_make_no_nan():
    before, after = verdict(np.zeros(2, np.float32)), verdict(np.array([0, np.nan], np.float32))
    assert "NaN" in judge(before, after, Effect.LOSSY)


def test_shape_inference_leaves_sizes_open_that_follow_from_values():
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x) => (int64[a,b] i, float[c,d] y)
        { i = NonZero(x) y = Relu(x) }"""
    found = inferred_shapes(load_model(onnx.parser.parse_model(text)), {"x": np.zeros((3, 4), np.float32)})
    assert (found["i"][0], found["y"]) == (2, [3, 4])
    assert not isinstance(found["i"][1], int)
