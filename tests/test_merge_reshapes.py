import re

import numpy as np
import pytest
from comparing import apply_and_compare, build, constant, ops

from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.passes.merge_reshapes import MergeReshapes


def _int64(*values):
    return np.array(values, np.int64)


CONSTANTS = {
    "zero": _int64(0),
    "one": _int64(1),
    "last": _int64(-1),
    "ends": _int64(0, 2),
    "flat": _int64(-1),
    "rows": _int64(0, -1),
    "wide": _int64(-1, 12),
    "back": _int64(-1, 3, 4),
    "back0": _int64(0, 3, 4),
    "split": _int64(0, 3, 2, 2),
    "fixed": _int64(2, 3, 4),
}


def _apply(body, x="float[N,3,4] x", opset=17, rank=3, more="", feed=None, **constants):
    constants = {name: value for name, value in (CONSTANTS | constants).items() if re.search(rf"\b{name}\b", body)}
    y = f"float[{','.join('ABCDE'[:rank])}] y"
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> g ({x}) => ({y}{more}) {{ {body} }}'
    result, model = apply_and_compare(text, MergeReshapes(), constants=constants, feed=feed)
    again = MergeReshapes().apply(load_model(model).graph, Context())
    assert again.rewrites == 0
    return result, model


def _left(step, rank, **options):
    """Operators that are left of a step between two others."""
    _, model = _apply(f"a = Abs (x) {step} y = Neg (b)", rank=rank, **options)
    return [node.op_type for node in model.graph.node][1:-1]


MERGED = {
    "r = Reshape (a, wide) b = Reshape (r, back)": (3, []),
    "r = Reshape (a, rows) b = Reshape (r, back0)": (3, []),
    "r = Flatten (a) b = Reshape (r, back0)": (3, []),
    "r = Flatten <axis = 2> (a) b = Reshape (r, back)": (3, []),
    "r = Reshape (a, flat) b = Reshape (r, back)": (3, []),
    "r = Unsqueeze (a, one) b = Squeeze (r, one)": (3, []),
    "r = Unsqueeze (a, ends) b = Squeeze (r, ends)": (3, []),
    "r = Unsqueeze (a, one) s = Unsqueeze (r, last) t = Squeeze (s, last) b = Squeeze (t, one)": (3, []),
    "r = Reshape (a, flat) b = Reshape (r, wide)": (2, ["Reshape"]),
    "r = Reshape (a, rows) b = Reshape (r, split)": (4, ["Reshape"]),
    "r = Flatten (a) b = Reshape (r, split)": (4, ["Reshape"]),
    "r = Unsqueeze (a, one) b = Flatten (r)": (2, ["Reshape"]),
    "r = Unsqueeze (a, zero) b = Unsqueeze (r, last)": (5, ["Unsqueeze"]),
    "r = Reshape (a, rows) s = Reshape (r, split) t = Flatten (s) u = Reshape (t, back0) b = Unsqueeze (u, one)": (
        4,
        ["Unsqueeze"],
    ),
}


@pytest.mark.parametrize("opset", [13, 17, 21, 23])
@pytest.mark.parametrize("step", MERGED)
def test_merges(step, opset):
    rank, left = MERGED[step]
    assert _left(step, rank, opset=opset) == left


@pytest.mark.parametrize("opset", [9, 11])
def test_merges_where_axes_are_attributes(opset):
    step = "r = Unsqueeze <axes = [1]> (a) b = Unsqueeze <axes = [0]> (r)"
    body = f"c = Squeeze <axes = [1]> (x) a = Abs (c) {step} y = Neg (b)"
    _, model = _apply(body, "float[N,1,3,4] x", opset, rank=5)
    assert ops(model) == {"Squeeze": 1, "Abs": 1, "Unsqueeze": 1, "Neg": 1}


@pytest.mark.parametrize("dtype", ["float16", "float", "double", "int32", "bool"])
def test_merges_any_dtype(dtype):
    text = f'<ir_version: 8, opset_import: ["" : 17]> g ({dtype}[N,3,4] x) => ({dtype}[A,B,C] y)'
    body = "{ a = Identity (x) r = Flatten (a) b = Reshape (r, back) y = Identity (b) }"
    _, model = apply_and_compare(text + body, MergeReshapes(), constants={"back": CONSTANTS["back"]})
    assert ops(model) == {"Identity": 2}


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_holds_for_empty_batches(batch):
    feed = {"x": np.ones((batch, 3, 4), np.float32)}
    step = "r = Reshape (a, wide) s = Unsqueeze (r, one) b = Squeeze (s, one)"
    assert _left(step, 2, feed=feed) == ["Reshape"]


def test_needs_no_shape_where_the_target_names_all_sizes():
    body = "q = Reshape (x, s) r = Flatten (q) y = Reshape (r, back)"
    _, model = _apply(body, "float[N,3,4] x, int64[R] s", feed={"s": _int64(6, 2, 2)})
    assert ops(model) == {"Reshape": 1}


def test_squeezing_a_size_that_is_not_known_says_that_it_is_one():
    step = "r = Squeeze (a, one) b = Unsqueeze (r, one)"
    assert _left(step, 3, x="float[N,M,4] x", feed={"x": np.ones((3, 1, 4), np.float32)}) == []


TRANSPOSES = {
    "r = Reshape (a, heads) b = Transpose <perm = [0, 2, 1, 3]> (r)": ("float[1,1,12] x", 4, ["Reshape"]),
    "r = Transpose <perm = [0, 2, 3, 1]> (a) b = Flatten (r)": ("float[N,12,1,1] x", 2, ["Squeeze"]),
    "r = Transpose (a) b = Squeeze (r, zero)": ("float[3,1] x", 1, ["Squeeze"]),
    "r = Unsqueeze (a, one) b = Transpose <perm = [1, 0, 2, 3]> (r)": ("float[N,3,4] x", 4, ["Unsqueeze"]),
    "r = Unsqueeze (a, one) b = Transpose <perm = [1, 0, 3, 2]> (r)": ("float[N,3,4] x", 4, ["Unsqueeze", "Transpose"]),
    "r = Transpose <perm = [0, 2, 3, 1]> (a) c = Flatten (r) b = Abs (c)": (
        "float[N,12,M,1] x",
        2,
        ["Transpose", "Flatten", "Abs"],
    ),
}


@pytest.mark.parametrize("step", TRANSPOSES)
def test_a_transpose_of_axes_of_size_1_reshapes(step):
    x, rank, left = TRANSPOSES[step]
    assert _left(step, rank, x=x, heads=_int64(1, -1, 4, 3)) == left


def test_copies_sizes_that_stay_in_their_places():
    step = "r = Unsqueeze (a, last) b = Reshape (r, s)"
    assert _left(step, 4, x="float[N,M,8] x", s=_int64(0, 0, 2, 4)) == ["Reshape"]


def test_a_copied_size_beside_a_minus_one_only_where_the_chain_needs_it_too():
    x = "float[N,M,K] x"
    assert _left("r = Unsqueeze (a, one) b = Reshape (r, s)", 2, x=x, s=_int64(0, -1)) == ["Reshape"]
    assert _left("r = Unsqueeze (a, one) b = Flatten (r)", 2, x=x) == ["Unsqueeze", "Flatten"]


def test_a_zero_with_allowzero_copies_nothing():
    body = "r = Flatten (x) y = Reshape <allowzero = 1> (r, s)"
    _, model = _apply(body, rank=2, s=_int64(0, 5), feed={"x": np.ones((0, 3, 4), np.float32)})
    assert ops(model) == {"Reshape": 1}


def test_the_first_stays_for_another_reader():
    body = "r = Flatten (x) s = Reshape (r, back) y = Neg (s) z = Abs (r)"
    result, model = _apply(body, more=", float[D,E] z")
    assert (result.rewrites, ops(model)) == (1, {"Flatten": 1, "Neg": 1, "Abs": 1})
    result, model = _apply("r = Flatten (x) y = Reshape (r, split) z = Abs (r)", rank=4, more=", float[D,E] z")
    assert result.rewrites == 0
    assert "something else uses" in result.skipped[0].reason


def test_outputs_keep_their_names():
    body = "c = Abs (x) r = Flatten (c) y = Reshape (r, back)"
    _, model = _apply(body)
    assert ops(model) == {"Abs": 1, "Identity": 1}
    result, _ = _apply("r = Flatten (x) y = Reshape (r, split)", rank=4, more=", float[D,E] r")
    assert result.rewrites == 0


@pytest.mark.parametrize(
    ("step", "rank", "x", "words"),
    [
        ("r = Flatten (a) q = Shape (a) b = Reshape (r, q)", 3, "float[N,3,4] x", "q is computed at run time"),
        ("r = Unsqueeze (a, zero) b = Reshape (r, three)", 3, "float[N,M,4] x", "more than one size"),
        ("r = Flatten (a) b = Reshape (r, cols)", 2, "float[N,M,4] x", "fails where the other is 0"),
        ("r = Reshape (a, wide) b = Squeeze (r)", 1, "float[N,3,4] x", "drops every axis of size 1"),
        ("q = Shape (a) p = Reshape (a, q) r = Flatten (p) b = Reshape (r, rows)", 2, "float[N,3,4] x", "run time"),
    ],
)
def test_refuses_with_a_reason(step, rank, x, words):
    body = f"a = Abs (x) {step} y = Neg (b)"
    constants = {"cols": _int64(-1, 0), "three": _int64(0, 0, -1)}
    result, _ = _apply(body, x, rank=rank, feed={"x": np.ones((1, 3, 4), np.float32)}, **constants)
    assert any(words in skip.reason for skip in result.skipped), result.skipped


def test_a_default_that_may_be_overridden_is_no_constant():
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N,3,4] x, int64[3] s) => (float[A,B,C] y)'
    model = build(text + "{ r = Flatten (x) y = Reshape (r, s) }", {"s": CONSTANTS["back"]})
    assert apply_and_compare(model, MergeReshapes())[0].rewrites == 0


def test_a_reshaped_weight_is_for_folding():
    body = "a = Reshape (w, flat) b = Reshape (a, s) y = Add (x, b)"
    result, _ = _apply(body, w=np.ones((4, 3), np.float32), s=_int64(3, 4))
    assert (result.rewrites, result.skipped) == (0, ())


def test_works_in_branches_and_not_across_them():
    body = """f = Flatten (x) s = ReduceMax <keepdims = 0> (x) c = Greater (s, half) y = If (c) <
        then_branch = t () => (float[A,B,C] p) { a = Flatten (x) p = Reshape (a, back) },
        else_branch = e () => (float[D,E,F] q) { q = Reshape (f, back) } >"""
    result, model = _apply(body, half=np.float32(0.5))
    assert (result.rewrites, ops(model)["Identity"], ops(model)["Reshape"]) == (1, 1, 1)


def test_the_new_target_is_an_initializer():
    _, model = _apply("r = Unsqueeze (x, one) y = Flatten (r)", rank=2)
    assert constant(model, "y_shape").tolist() == [-1, 12]


def test_an_operator_of_another_domain_stays():
    text = '<ir_version: 8, opset_import: ["" : 17, "mine" : 1]> g (float[3,4] x) => (float[3,4] y)'
    model = build(text + "{ a = Flatten (x) b = mine.Flatten (a) y = Flatten (b) }")
    assert MergeReshapes().apply(load_model(model).graph, Context()).rewrites == 0
