import numpy as np
import pytest
from comparing import apply_and_compare, build, ops

from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.passes.replace_sum import ReplaceSum


def _apply(body, opset=17, kind="float"):
    inputs = f"{kind}[N,3,4] x, {kind}[3,1] k"
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> g ({inputs}) => ({kind}[A,B,C] y) {{ {body} }}'
    return apply_and_compare(text, ReplaceSum(), tolerance=0)


@pytest.mark.parametrize("opset", [8, 9, 11, 13, 17, 21, 23])
@pytest.mark.parametrize("inputs", ["x, x", "x, k", "k, x"])
def test_two_become_an_add(inputs, opset):
    result, model = _apply(f"a = Abs (x) y = Sum ({inputs})", opset)
    assert (result.rewrites, ops(model)) == (1, {"Abs": 1, "Add": 1})


@pytest.mark.parametrize("kind", ["float", "double"])
def test_keeps_the_result_of_each_dtype(kind):
    assert _apply("y = Sum (x, k)", kind=kind)[0].rewrites == 1


def test_equal_shapes_before_broadcasting():
    assert _apply("y = Sum (x, x)", 7)[0].rewrites == 1


@pytest.mark.parametrize("inputs", ["x", "x, x, k"])
def test_one_and_three_stay(inputs):
    assert _apply(f"y = Sum ({inputs})")[0].rewrites == 0


def test_works_in_branches():
    branches = "then_branch = t () => (float[A,B,C] p) { p = Sum (x, k) }, else_branch = e () => (float[A,B,C] q)"
    body = f"s = ReduceMax <keepdims = 0> (x) c = Greater (s, s) y = If (c) <{branches} {{ q = Sum (x, x) }} >"
    assert _apply(body)[0].rewrites == 2


def test_an_operator_of_another_domain_stays():
    text = '<ir_version: 8, opset_import: ["" : 17, "mine" : 1]> g (float[3] x) => (float[3] y)'
    model = build(text + "{ y = mine.Sum (x, k) }", {"k": np.ones(3, np.float32)})
    assert ReplaceSum().apply(load_model(model).graph, Context()).rewrites == 0
