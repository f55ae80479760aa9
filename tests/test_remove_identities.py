import re
from collections import Counter

import numpy as np
import onnx
import pytest
from comparing import apply_and_compare, build, ops

from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.passes.remove_dead_nodes import RemoveDeadNodes
from graphopt.passes.remove_identities import RemoveIdentities


def _text(body, x="float[N,3,4]", y="float[A,B,C]", opset=17):
    return f'<ir_version: 8, opset_import: ["" : {opset}]> agraph ({x} x) => ({y} y) {{ {body} }}'


def _remaining(step, constants=None, **text):
    """Operators that are left of a step between two Abs."""
    body = f"a = Abs (x) {step} y = Abs (b)"
    _, model = apply_and_compare(_text(body, **text), RemoveIdentities(), constants=constants, tolerance=0)
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
    "x ** 1": ("b = Pow (a, k)", {"k": _ONES}),
    "x ** 1 of another type": ("b = Pow (a, k)", {"k": np.array(1, np.int64)}),
    "Expand to 1": ("b = Expand (a, s)", {"s": _int64(1, 1, 1)}),
    "Expand to its own size": ("b = Expand (a, s)", {"s": _int64(3, 1)}),
    "Tile by 1": ("b = Tile (a, s)", {"s": _int64(1, 1, 1)}),
    "Concat with nothing": ("b = Concat <axis = -2> (k, a, k)", {"k": np.ones((2, 0, 4), np.float32)}),
    "Split into one": ("b = Split <axis = 1> (a)", {}),
    "Split into one of a stated size": ("b = Split <axis = 1> (a, s)", {"s": _int64(3)}),
    "Unsqueeze of no axis": ("b = Unsqueeze (a, s)", {"s": _int64()}),
    "Gather in order": ("b = Gather <axis = 1> (a, s)", {"s": _int64(0, 1, 2)}),
    "ReduceSum of no axis": ("b = ReduceSum <noop_with_empty_axes = 1> (a)", {}),
    "Where that is true": ("b = Where (c, a, k)", {"c": np.array([True]), "k": _ONES}),
    "Where that is false": ("b = Where (c, k, a)", {"c": np.zeros((3, 4), bool), "k": _ONES}),
    "Relu of Relu": ("c = Relu (a) d = Relu (c) b = Mul (c, d)", {}),
    **{f"Relu of {op}": (f"c = {op} (a) b = Relu (c)", {}) for op in ("Sigmoid", "Softmax", "Exp", "Softplus")},
    "Relu of Clip": ("c = Clip (a, k) b = Relu (c)", {"k": np.float32(0.5)}),
    "a slope of 1": ("b = LeakyRelu <alpha = 1.0> (a)", {}),
    "Neg of Neg": ("c = Neg (a) d = Neg (c) b = Mul (c, d)", {}),
    "Resize by 1": ("b = Resize (a, , s)", {"s": np.ones(3, np.float32)}),
}


_FROM, _UNTIL = {"CastLike": 15}, {"Split into one": 17}


@pytest.mark.parametrize(
    ("case", "opset"),
    [
        (case, opset)
        for case in _REMOVED
        for opset in (13, 17, 23)
        if _FROM.get(case, 0) <= opset <= _UNTIL.get(case, opset)
    ],
)
def test_removes(case, opset):
    step, constants = _REMOVED[case]
    rest = {"Relu of Relu": ["Relu", "Mul"], "Neg of Neg": ["Neg", "Mul"]}.get(case, re.findall("Relu of (.*)", case))
    assert _remaining(step, constants, opset=opset) == Counter(rest)


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("bool", "c = Not (a) d = Not (c) b = And (c, d)"),
        ("bool", "d = And (a, yes) e = Or (no, d) c = Not (e) b = And (c, e)"),
        ("bool", "c = Not (a) d = Not (c) e = Not (d) b = And (e, d)"),
    ],
)
def test_removes_of_bools(kind, step):
    constants = {"yes": np.array(True), "no": np.zeros((1, 4), bool)} if "yes" in step else {}
    body = f"a = Greater (x, z) {step} y = Cast <to = 1> (b)"
    _, model = apply_and_compare(
        _text(body), RemoveIdentities(), RemoveDeadNodes(), constants=constants | {"z": np.float32(0)}
    )
    assert ops(model) == {"Greater": 1, "Not": 1, "And": 1, "Cast": 1}


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
    "x ** 2": ("b = Pow (a, k)", {"k": 2 * _ONES}),
    "1 ** x": ("b = Pow (k, a)", {"k": _ONES}),
    "Expand of an unknown size": ("b = Expand (a, s)", {"s": _int64(2, 3, 4)}),
    "Expand that adds an axis": ("b = Expand (a, s)", {"s": _int64(1, 1, 1, 1)}),
    "Expand to a computed shape": ("s = Shape (a) b = Expand (a, s)", {}),
    "Tile by 2": ("b = Tile (a, s)", {"s": _int64(1, 2, 1)}),
    "Concat with something": ("b = Concat <axis = 1> (k, a)", {"k": np.ones((2, 1, 4), np.float32)}),
    "Squeeze of unknown axes": ("b = Squeeze (a)", {}),
    "Gather of other order": ("b = Gather <axis = 1> (a, s)", {"s": _int64(0, 2, 1)}),
    "Gather of less": ("b = Gather <axis = 1> (a, s)", {"s": _int64(0, 1)}),
    "Gather of an unknown size": ("b = Gather <axis = 0> (a, s)", {"s": _int64(0, 1)}),
    "ReduceSum of all axes": ("c = ReduceSum (a) b = Add (c, a)", {}),
    "Where that broadcasts": (
        "c = ReduceMax (a) b = Where (t, c, k)",
        {"t": np.array([True]), "k": np.ones((2, 3, 4), np.float32)},
    ),
    "Where that differs": ("b = Where (t, a, k)", {"t": np.array([True] * 3 + [False]), "k": _ONES}),
    "Where of an unknown shape": ("c = Neg (a) b = Where (t, a, c)", {"t": np.array([True])}),
    "Relu of Tanh": ("c = Tanh (a) b = Relu (c)", {}),
    "LeakyRelu of its own slope": ("b = LeakyRelu (a)", {}),
    "Relu of a Clip below zero": ("c = Clip (a, k) b = Relu (c)", {"k": np.float32(-0.5)}),
    "Relu of a Clip without a lowest": ("c = Clip (a, , k) b = Relu (c)", {"k": np.float32(0.5)}),
    "Neg of Abs": ("c = Abs (a) b = Neg (c)", {}),
    "Clip without bounds": ("b = Clip (a)", {}),
    "Resize by 2": ("b = Resize (a, , s)", {"s": np.array([1, 1, 2], np.float32)}),
    "Resize of a crop": (
        'b = Resize <coordinate_transformation_mode = "tf_crop_and_resize"> (a, r, s)',
        {"s": np.ones(3, np.float32), "r": np.array([0, 0, 0, 1, 1, 0.5], np.float32)},
    ),
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


def test_removes_a_squeeze_without_axes_of_size_one():
    assert not _remaining("b = Squeeze (a)", x="float[2,3,4]")
    assert _remaining("b = Squeeze (a)", x="float[2,1,3,4]") == {"Squeeze": 1}


@pytest.mark.parametrize("opset", [9, 10, 11, 13, 18, 23])
def test_removes_what_is_not_negative_in_each_opset(opset):
    clip = "c = Clip <min = 0.0, max = 6.0> (a)" if opset < 11 else "c = Clip (a, low)"
    constants = {} if opset < 11 else {"low": np.float32(0)}
    step = f"{clip} d = Relu (c) e = Relu (d) f = Neg (e) b = Neg (f)"
    _, model = apply_and_compare(
        _text(f"a = Abs (x) {step} y = Abs (b)", opset=opset),
        RemoveIdentities(),
        RemoveDeadNodes(),
        constants=constants,
    )
    assert ops(model) == {"Abs": 2, "Clip": 1}


@pytest.mark.parametrize("opset", [9, 10, 11])
def test_removes_in_old_opsets(opset):
    step = "c = Expand (a, s) d = Tile (c, s) e = Split <axis = 1> (d) f = Pow (e, one) b = Neg (f)"
    constants = {"s": _int64(1, 1, 1), "one": np.float32(1)}
    if opset > 9:
        step += " g = Resize (b, scales)" if opset == 10 else " g = Resize (b, r, scales)"
        step = step.replace("b = Neg (f)", "h = Neg (f)").replace("Resize (b", "Resize (h").replace("g = ", "b = ")
        constants |= {"scales": np.ones(3, np.float32)} | ({"r": np.ones(6, np.float32)} if opset == 11 else {})
    assert _remaining(step, constants, opset=opset) == {"Neg": 1}


def test_removes_reductions_of_no_axis_whose_result_all_opsets_agree_on():
    axes = {"s": _int64()}
    assert not _remaining("b = ReduceMean <noop_with_empty_axes = 1> (a, s)", axes, opset=18)
    square = "b = ReduceSumSquare <noop_with_empty_axes = 1> (a, s)"
    assert _remaining(square, axes, opset=18) == {"ReduceSumSquare": 1}


def test_of_neg_of_neg_that_is_an_output_the_source_computes_it():
    _, model = apply_and_compare(_text("a = Abs (x) b = Neg (a) y = Neg (b)"), RemoveIdentities(), RemoveDeadNodes())
    assert ops(model) == {"Abs": 1}


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
