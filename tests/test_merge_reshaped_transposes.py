"""Transposes with Reshapes between them, merged; against numpy on all that hypothesis thinks of."""

import math
from itertools import accumulate, pairwise

import numpy as np
import pytest
from comparing import apply_and_compare, ops
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.passes.merge_reshaped_transposes import MergeReshapedTransposes

ROWS_OF_A_MATRIX = (
    "float[2,3,4,5] x",
    "r = Transpose<perm=[0,2,3,1]>(x) s = Reshape(r, a) y = Transpose<perm=[0,2,1]>(s)",
)


def _apply(inputs, body, rank, more="", feed=None, **constants):
    y = f"float[{','.join('ABCDEF'[:rank])}] y"
    text = f'<ir_version: 8, opset_import: ["" : 17]> g ({inputs}) => ({y}{more}) {{ {body} }}'
    arrays = {name: np.array(values, np.int64) for name, values in constants.items()}
    result, model = apply_and_compare(text, MergeReshapedTransposes(), constants=arrays, feed=feed)
    assert MergeReshapedTransposes().apply(load_model(model).graph, Context()).rewrites == 0
    return result, model


def _left(inputs, body, rank, **options):
    return [node.op_type for node in _apply(inputs, body, rank, **options)[1].graph.node]


def test_attention_moves_one_axis_once():
    body = "r = Transpose<perm=[0,2,1,3]>(x) s = Reshape(r, a) y = Transpose<perm=[0,2,1]>(s)"
    _, model = _apply("float[1,7,4,6] x", body, 3, a=[4, 7, 6])
    assert [node.op_type for node in model.graph.node] == ["Transpose", "Squeeze"]
    assert list(model.graph.node[0].attribute[0].ints) == [0, 2, 3, 1]


def test_what_comes_back_is_one_reshape():
    body = "r = Transpose<perm=[0,3,1,2]>(x) s = Reshape(r, a) y = Transpose<perm=[0,2,1]>(s)"
    assert _left("float[N,3,4,5] x", body, 3, a=[0, 5, -1]) == ["Reshape"]


def test_what_comes_back_but_for_an_axis_is_an_unsqueeze():
    body = "r = Transpose<perm=[1,0]>(x) s = Unsqueeze(r, a) t = Transpose<perm=[1,2,0]>(s) y = Abs(t)"
    assert _left("float[N,M] x", body, 3, a=[1]) == ["Unsqueeze", "Abs"]


def test_open_sizes_keep_their_symbols():
    body = "r = Transpose<perm=[0,2,1,3]>(x) s = Flatten<axis=2>(r) t = Reshape(s, a) y = Transpose<perm=[0,2,1]>(t)"
    feed = {"x": np.random.default_rng(0).standard_normal((1, 5, 4, 6)).astype(np.float32)}
    assert _left("float[1,T,4,6] x", body, 3, feed=feed, a=[4, -1, 6]) == ["Transpose", "Squeeze"]


def test_two_rows_moved_stay_where_one_transpose_would_move_single_elements():
    """[A, B, C, D E] -> [A, C, B, D E] -> [A, E, C, B, D]: each moves one axis."""
    body = "r = Transpose<perm=[0,2,1,3]>(x) s = Reshape(r, a) y = Transpose<perm=[0,4,1,2,3]>(s)"
    inputs = "float[2,3,4,10] x"
    result, _ = _apply(inputs, body, 5, a=[2, 4, 3, 5, 2])
    assert (result.rewrites, [skip.reason for skip in result.skipped]) == (
        0,
        ["not merged with r: one Transpose would move more than one axis, which takes longer than both"],
    )


REFUSED = {
    "the Reshape cuts across axes": ("float[2,6,4] x", "s = Reshape(r, a)", [2, 3, 8], "cut across|stands for"),
    "something else reads the Reshape": ("float[2,6,4] x", "s = Reshape(r, a) z = Abs(s)", [2, 4, 6], None),
    "something else reads the Transpose": ("float[2,6,4] x", "s = Reshape(r, a) z = Abs(r)", [2, 4, 6], None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_where(name):
    inputs, between, target, reason = REFUSED[name]
    body = f"r = Transpose<perm=[0,2,1]>(x) {between} y = Transpose<perm=[0,2,1]>(s)"
    more = ", float[D,E,F] z" if "z =" in between else ""
    result, model = _apply(inputs, body, 3, more=more, a=target)
    assert ops(model)["Transpose"] == 2
    assert (result.rewrites, len(result.skipped)) == (0, 0 if reason is None else 1)


def test_refuses_a_target_that_is_computed():
    body = "r = Transpose<perm=[0,2,1]>(x) s = Reshape(r, a) y = Transpose<perm=[0,2,1]>(s)"
    result, _ = _apply("float[2,6,4] x, int64[3] a", body, 3, feed={"a": np.array([2, 4, 6])})
    assert (result.rewrites, [skip.reason for skip in result.skipped]) == (
        0,
        ["not merged with r: a is computed at run time"],
    )


@st.composite
def _chains(draw):
    """Sizes, a permutation, a target that joins and splits neighbours, and another permutation."""
    fine = draw(st.lists(st.sampled_from([1, 2, 3, 5]), min_size=1, max_size=5))

    def view():
        cuts = sorted(draw(st.sets(st.integers(1, max(1, len(fine) - 1)), max_size=len(fine))))
        ends = [0, *(cut for cut in cuts if cut < len(fine)), len(fine)]
        return [math.prod(fine[one:other]) for one, other in pairwise(ends)]

    split, joined = view(), view()
    inner, outer = (draw(st.permutations(range(len(sizes)))) for sizes in (split, joined))
    given_sizes = [0] * len(split)
    for axis, source in enumerate(inner):
        given_sizes[source] = split[axis]
    return given_sizes, list(inner), joined, list(outer)


@settings(max_examples=150, deadline=None)
@given(_chains(), st.booleans())
def test_any_chain_computes_the_same_with_no_more_nodes(chain, is_open):
    sizes, inner, target, outer = chain
    dimensions = ["N" if is_open and axis == 0 else str(size) for axis, size in enumerate(sizes)]
    body = (
        f"r = Transpose<perm={inner}>(x) s = Reshape(r, a) t = Transpose<perm={outer}>(s) y = Abs(t)"  # no name stays
    )
    x = np.arange(math.prod(sizes), dtype=np.float32).reshape(sizes)
    _, model = _apply(f"float[{','.join(dimensions)}] x", body, len(target), feed={"x": x}, a=target)
    assert len(model.graph.node) <= 4
    assert list(accumulate(node.op_type == "Transpose" for node in model.graph.node))[-1] <= 2
