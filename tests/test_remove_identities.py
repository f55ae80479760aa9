from collections import Counter

import numpy as np
import onnx
import pytest
from comparing import apply_and_compare, build, ops

from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.passes.remove_identities import RemoveIdentities


def _text(body, x="float[N,3,4]", y="float[A,B,C]", opset=17):
    return f'<ir_version: 8, opset_import: ["" : {opset}]> agraph ({x} x) => ({y} y) {{ {body} }}'


def _remaining(step, constants=None, **text):
    """Operators that are left of a step between two Abs."""
    body = f"a = Abs (x) {step} y = Abs (b)"
    _, model = apply_and_compare(_text(body, **text), RemoveIdentities(), constants=constants)
    return ops(model) - Counter({"Abs": 2})


def _int64(*values):
    return np.array(values, np.int64)


_ONES, _ZEROS = np.ones((1, 1, 4), np.float32), np.zeros(4, np.float32)

_REMOVED = {
    "Identity": ("b = Identity (a)", {}),
    "two Identity": ("c = Identity (a) b = Identity (c)", {}),
    "Dropout": ("b = Dropout (a)", {}),
    "Dropout with a ratio": ("b, m = Dropout (a, r)", {"r": np.float32(0.5)}),
    "Dropout told not to train": ("b = Dropout (a, r, t)", {"r": np.float32(0.5), "t": np.array(False)}),
    "Concat of one": ("b = Concat <axis = 1> (a)", {}),
    "Sum of one": ("b = Sum (a)", {}),
    "Max of one": ("b = Max (a)", {}),
    "Cast to the same type": ("b = Cast <to = 1> (a)", {}),
    "CastLike": ("b = CastLike (a, x)", {}),
    "Transpose": ("b = Transpose <perm = [0, 1, 2]> (a)", {}),
    "Pad": ("b = Pad (a, p)", {"p": _int64(0, 0, 0, 0, 0, 0)}),
    "Slice to the end": ("b = Slice (a, s, e, s)", {"s": _int64(0), "e": _int64(2**63 - 1)}),
    "Slice of a known size": ("b = Slice (a, s, e, t, t)", {"s": _int64(0), "e": _int64(3), "t": _int64(1)}),
    "Reshape with 0": ("b = Reshape (a, s)", {"s": _int64(0, 3, -1)}),
    "Reshape with -1": ("b = Reshape (a, s)", {"s": _int64(-1, 3, 4)}),
    "x + 0": ("b = Add (a, k)", {"k": _ZEROS}),
    "0 + x": ("b = Add (k, a)", {"k": _ZEROS}),
    "x - 0": ("b = Sub (a, k)", {"k": _ZEROS}),
    "x * 1": ("b = Mul (a, k)", {"k": _ONES}),
    "1 * x": ("b = Mul (k, a)", {"k": np.float32(1)}),
    "x / 1": ("b = Div (a, k)", {"k": _ONES}),
}


@pytest.mark.parametrize("case", _REMOVED)
def test_removes(case):
    step, constants = _REMOVED[case]
    assert not _remaining(step, constants)


_KEPT = {
    "Concat of two": ("b = Concat <axis = 1> (a, a)", {}),
    "Cast to another type": ("c = Cast <to = 11> (a) b = Cast <to = 1> (c)", {}),
    "Transpose that moves axes": ("b = Transpose <perm = [0, 2, 1]> (a)", {}),
    "Transpose without an order": ("b = Transpose (a)", {}),
    "Pad by something": ("b = Pad (a, p)", {"p": _int64(0, 0, 0, 0, 0, 1)}),
    "Slice of less": ("b = Slice (a, s, e, t)", {"s": _int64(0), "e": _int64(2), "t": _int64(1)}),
    "Slice from later": ("b = Slice (a, s, e, s)", {"s": _int64(1), "e": _int64(9)}),
    "Slice with steps": (
        "b = Slice (a, s, e, t, p)",
        {"s": _int64(0), "e": _int64(9), "t": _int64(1), "p": _int64(2)},
    ),
    "Slice of an unknown size": ("b = Slice (a, s, e, s)", {"s": _int64(0), "e": _int64(4)}),
    "Reshape to another shape": ("b = Reshape (a, s)", {"s": _int64(0, 4, 3)}),
    "Reshape with two unknown": ("b = Reshape (a, s)", {"s": _int64(-1, 6, 2)}),
    "0 - x": ("b = Sub (k, a)", {"k": _ZEROS}),
    "1 / x": ("b = Div (k, a)", {"k": _ONES}),
    "x * 2": ("b = Mul (a, k)", {"k": 2 * _ONES}),
    "x + 0 that adds an axis": ("b = Add (a, k)", {"k": np.zeros((1, 1, 1, 1), np.float32)}),
    "x * 1 that broadcasts": ("c = ReduceMax <axes = [2]> (a) b = Mul (c, k)", {"k": _ONES}),
}


@pytest.mark.parametrize("case", _KEPT)
def test_keeps(case):
    step, constants = _KEPT[case]
    rank = "float[A,B,C,D]" if "axis" in case else "float[A,B,C]"
    assert _remaining(step, constants, y=rank)


def test_keeps_flatten_of_more_than_two_axes():
    assert _remaining("b = Flatten (a)", y="float[A,B]") == {"Flatten": 1}


def test_removes_flatten_of_a_matrix():
    assert not _remaining("b = Flatten (a)", x="float[N,4]", y="float[A,B]")


def test_keeps_a_reshape_that_could_mean_another_shape_when_a_dimension_is_zero():
    constants = {"s": _int64(0, 2)}
    assert _remaining("b = Reshape (a, s)", constants, x="float[N,M]", y="float[A,B]") == {"Reshape": 1}


def test_keeps_a_dropout_that_trains_or_whose_mask_is_used():
    constants = {"r": np.float32(0.0), "t": np.array(True)}
    assert _remaining("b = Dropout (a, r, t)", constants) == {"Dropout": 1}
    step = "c, m = Dropout (a, r) n = Cast <to = 1> (m) b = Mul (c, n)"
    assert _remaining(step, {"r": constants["r"]}) == {"Dropout": 1, "Cast": 1, "Mul": 1}


@pytest.mark.parametrize("opset", [9, 10])
def test_reads_attributes_of_old_operators(opset):
    step = "c = Pad <pads = [0, 0, 0, 0, 0, 0]> (a)" + (
        " b = Slice <starts = [0], ends = [2147483647], axes = [0]> (c)" if opset == 9 else " b = Identity (c)"
    )
    assert not _remaining(step, opset=opset)


def test_a_graph_output_takes_over_from_the_identity_that_computed_it():
    result, model = apply_and_compare(_text("a = Abs (x) b = Neg (a) y = Identity (a)"), RemoveIdentities())
    assert result.parts == {"Identity": 1}
    assert [node.output[0] for node in model.graph.node if node.op_type == "Abs"] == ["y"]


def test_an_identity_from_input_to_output_stays():
    result, model = apply_and_compare(_text("y = Identity (x)"), RemoveIdentities())
    assert (result.rewrites, ops(model)) == (0, {"Identity": 1})


def test_an_identity_between_two_outputs_stays():
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> agraph (float[N] x) => (float[N] y, float[N] z)'
        " { y = Abs (x) z = Identity (y) }"
    )
    result, _ = apply_and_compare(text, RemoveIdentities())
    assert result.rewrites == 0


def test_removes_identities_between_weights_and_their_users_in_branches():
    body = (
        "s = ReduceMax <keepdims = 0> (x) c = Greater (s, zero) i = Identity (k) y = If (c) <"
        " then_branch = t () => (float[A,B,C] p) { a = Mul (x, i) p = Identity (a) },"
        " else_branch = e () => (float[A,B,C] q) { q = Identity (x) } >"
    )
    constants = {"zero": np.float32(0), "k": np.float32(3)}
    result, model = apply_and_compare(_text(body), RemoveIdentities(), constants=constants)
    assert result.rewrites == 2  # the last one returns an outer tensor, which a branch may not do directly
    assert ops(model)["Identity"] == 1


def test_keeps_an_operator_of_another_domain_with_the_same_name():
    text = '<ir_version: 8, opset_import: ["" : 17, "mine" : 1]> agraph (float[3] x) => (float[3] y)'
    model = build(text + "{ a = mine.Identity (x) y = Abs (a) }")
    loaded = load_model(model)
    assert RemoveIdentities().apply(loaded.graph, Context()).rewrites == 0


def test_an_overridable_input_is_no_neutral_constant():
    model = build(_text("a = Abs (x) b = Mul (a, k) y = Abs (b)"), {"k": np.float32(1)})
    model.graph.input.append(onnx.helper.make_tensor_value_info("k", onnx.TensorProto.FLOAT, []))
    result, _ = apply_and_compare(model, RemoveIdentities())
    assert result.rewrites == 0
