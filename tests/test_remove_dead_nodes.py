import numpy as np
from comparing import apply_and_compare, ops

from graphopt.passes.remove_dead_nodes import RemoveDeadNodes


def _text(body):
    return f'<ir_version: 8, opset_import: ["" : 17]> agraph (float[N] x, float[N] unused) => (float[N] y) {{ {body} }}'


def test_removes_a_dead_chain_and_its_weights():
    constants = {"k": np.float32(2), "k2": np.float32(1)}
    result, model = apply_and_compare(
        _text("y = Mul (x, k) a = Neg (x) b = Mul (a, k) c = Add (k2, b)"),
        RemoveDeadNodes(),
        constants=constants,
    )
    assert result.rewrites == 3
    assert ops(model) == {"Mul": 1}
    assert [each.name for each in model.graph.initializer] == ["k"]


def test_keeps_unused_graph_inputs():
    _, model = apply_and_compare(_text("y = Neg (x)"), RemoveDeadNodes())
    assert [each.name for each in model.graph.input] == ["x", "unused"]


def test_keeps_a_node_with_one_output_in_use():
    result, model = apply_and_compare(_text("y, i = TopK (x, k)"), RemoveDeadNodes(), constants={"k": np.array([1])})
    assert (result.rewrites, ops(model)) == (0, {"TopK": 1})


def test_keeps_what_branches_read_and_removes_what_is_dead_in_them():
    body = (
        "a = Neg (x) b = Exp (x) s = ReduceMax <keepdims = 0> (x) c = Greater (s, zero) y = If (c) <"
        " then_branch = t () => (float[N] p) { p = Abs (a) d = Mul (p, b) },"
        " else_branch = e () => (float[N] q) { q = Identity (x) } >"
    )
    result, model = apply_and_compare(_text(body), RemoveDeadNodes(), constants={"zero": np.float32(0)})
    assert result.rewrites == 2  # Mul in the branch, and the Exp that only it read
    assert ops(model) == {"Neg": 1, "ReduceMax": 1, "Greater": 1, "If": 1, "Abs": 1, "Identity": 1}


def test_removes_a_dead_if_and_what_only_its_branches_read():
    body = (
        "y = Neg (x) a = Exp (x) s = ReduceMax <keepdims = 0> (x) c = Greater (s, zero) z = If (c) <"
        " then_branch = t () => (float[N] p) { p = Abs (a) },"
        " else_branch = e () => (float[N] q) { q = Identity (a) } >"
    )
    result, model = apply_and_compare(_text(body), RemoveDeadNodes(), constants={"zero": np.float32(0)})
    assert ops(model) == {"Neg": 1}
    assert result.rewrites == 4


def test_a_live_graph_stays_as_it_is():
    result, _ = apply_and_compare(_text("a = Neg (x) b = Abs (x) y = Add (a, b)"), RemoveDeadNodes())
    assert result.rewrites == 0
