"""States that no turn of a Loop or Scan changes: the body reads them from outside; where it cannot, they stay."""

import numpy as np
import onnx
import pytest
from comparing import apply_and_compare, build

import graphopt
from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.passes import RemoveInvariantStates
from graphopt.protobuf import all_graph_protos

CONSTANTS = {
    "w": np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32),
    "n": np.array(3, np.int64),
    "yes": np.array(True),
}


def loop(body, outputs="float[2,4] y", states="x, w", results="y, z", given="float[2,4] a, float[4,4] v", after=""):
    """A model with a Loop whose body is given from its states on: `=> (types and names) { nodes }`."""
    return f"""<ir_version: 8, opset_import: ["" : 17]> g (float[2,4] x) => ({outputs}) {{
        {results} = Loop(n, yes, {states}) <body = turns (int64 i, bool go, {given}) {body}> {after}
    }}"""


def loop_of(model):
    (found,) = [node for node in model.graph.node if node.op_type == "Loop"]
    return found, onnx.helper.get_attribute_value(next(each for each in found.attribute if each.name == "body"))


TURN = "on = Identity(go) m = MatMul(a, v) b = Tanh(m)"


@pytest.mark.parametrize(
    "body",
    [
        f"=> (bool on, float[2,4] b, float[4,4] v) {{ {TURN} }}",
        f"=> (bool on, float[2,4] b, float[4,4] u) {{ {TURN} u = Identity(v) }}",
        f"=> (bool on, float[2,4] b, float[4,4] u) {{ {TURN} t = Identity(v) u = Identity(t) }}",
    ],
)
@pytest.mark.parametrize(
    ("outputs", "after"),
    [("float[2,4] y", ""), ("float[2,4] y, float[4,4] z", ""), ("float[2,4] q", "q = MatMul(y, z)")],
)
def test_an_invariant_state_is_read_from_outside(body, outputs, after):
    result, model = apply_and_compare(loop(body, outputs, after=after), RemoveInvariantStates(), constants=CONSTANTS)
    assert result.parts == {"Loop": 1}
    node, inner = loop_of(model)
    assert list(node.input) == ["n", "yes", "x"]
    assert list(node.output) == ["y"]
    assert [each.name for each in inner.input] == ["i", "go", "a"]
    assert next(each for each in inner.node if each.op_type == "MatMul").input[1] == "w"


def test_a_loop_that_never_turns_returns_the_initial_value():
    text = loop(f"=> (bool on, float[2,4] b, float[4,4] v) {{ {TURN} }}", "float[2,4] y, float[4,4] z")
    constants = {**CONSTANTS, "n": np.array(0, np.int64)}
    assert apply_and_compare(text, RemoveInvariantStates(), constants=constants)[0].rewrites == 1


def test_results_of_a_turn_keep_their_places():
    body = f"=> (bool on, float[4,4] v, float[2,4] b, float[2,4] s) {{ {TURN} s = Neg(b) }}"
    text = loop(
        body, "float[2,4] y, float[A,2,4] k", states="w, x", results="z, y, k", given="float[4,4] v, float[2,4] a"
    )
    result, model = apply_and_compare(text, RemoveInvariantStates(), constants=CONSTANTS)
    assert result.rewrites == 1
    assert list(loop_of(model)[0].output) == ["y", "k"]


def test_a_state_that_has_the_name_of_its_initial_value_goes_too():
    body = "=> (bool on, float[2,4] b, float[4,4] w) { on = Identity(go) m = MatMul(a, w) b = Tanh(m) }"
    text = loop(body, given="float[2,4] a, float[4,4] w")
    assert apply_and_compare(text, RemoveInvariantStates(), constants=CONSTANTS)[0].rewrites == 1


def test_states_of_a_loop_in_a_loop_and_in_a_branch_go():
    inner = """p, q = Loop(n, yes, a, v) <body = inner (int64 j, bool h, float[2,4] c, float[4,4] u)
        => (bool k, float[2,4] d, float[4,4] u) { k = Identity(h) o = MatMul(c, u) d = Tanh(o) }>"""
    chosen = f"""b = If(go) <
        then_branch = t () => (float[2,4] p) {{ {inner} }}, else_branch = e () => (float[2,4] f) {{ f = Abs(a) }}>"""
    text = loop(f"=> (bool on, float[2,4] b, float[4,4] v) {{ on = Identity(go) {chosen} }}")
    result, _ = apply_and_compare(text, RemoveInvariantStates(), constants=CONSTANTS)
    assert result.parts == {"Loop": 2}


def test_states_of_a_scan_go():
    """One that is returned without Identity is no case: onnxruntime 1.32 computes nonsense of it."""
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[2,4] x) => (float[4] y, float[4,4] z, float[2,4] k) {
        y, z, k = Scan(s, w, x) <num_scan_inputs = 1, body = turns (float[4] a, float[4,4] v, float[4] e)
            => (float[4] b, float[4,4] u, float[4] o) { c = Add(a, e) b = MatMul(c, v) o = Neg(b) u = Identity(v) }>
    }"""
    constants = {"s": np.zeros(4, np.float32), "w": CONSTANTS["w"]}
    result, model = apply_and_compare(text, RemoveInvariantStates(), constants=constants)
    assert result.parts == {"Scan": 1}
    (node,) = [each for each in model.graph.node if each.op_type == "Scan"]
    assert (list(node.input), list(node.output)) == (["s", "x"], ["y", "k"])


@pytest.mark.parametrize(
    "text",
    [
        loop("=> (bool on, float[2,4] b, float[4,4] u) { on = Identity(go) b = MatMul(a, v) u = Neg(v) }"),
        loop(f"=> (bool on, float[2,4] b, float[4,4] v, float[4,4] v) {{ {TURN} }}", results="y, z, k"),
        loop(
            "=> (bool on, float[4,4] v) { on = Identity(go) }",
            "float[4,4] z",
            states="w",
            results="z",
            given="float[4,4] v",
        ),
    ],
    ids=["changed", "returned twice", "no other result"],
)
def test_a_state_stays(text):
    result, _ = apply_and_compare(text, RemoveInvariantStates(), constants=CONSTANTS)
    assert result.rewrites == 0


@pytest.mark.parametrize(
    "turn",
    [
        "w = Neg(v) b = MatMul(a, w)",
        (
            "u = If(go) <then_branch = t () => (float[4,4] v) { k = Abs(a) }, "
            "else_branch = e () => (float[4,4] f) { f = Neg(v) }> b = MatMul(a, u)"
        ),
    ],
    ids=["its initial value is hidden", "a branch returns it by name"],
)
def test_a_state_stays_in_graphs_that_the_checker_refuses(turn):
    text = loop(f"=> (bool on, float[2,4] b, float[4,4] v) {{ on = Identity(go) {turn} }}")
    assert RemoveInvariantStates().apply(load_model(build(text, CONSTANTS)).graph, Context()).rewrites == 0


def test_a_weight_that_was_a_state_is_quantized_as_a_weight():
    """As TensorFlow's exporter hands the kernels of an LSTM to the body."""
    wide = {**CONSTANTS, "w": np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32) / 16}
    body = f"=> (bool on, float[2,256] b, float[256,256] v) {{ {TURN} }}"
    text = loop(body, "float[2,256] y", given="float[2,256] a, float[256,256] v").replace("[2,4] x", "[2,256] x")
    feeds = [{"x": values} for values in np.random.default_rng(1).standard_normal((4, 2, 256)).astype(np.float32)]
    model = graphopt.optimize(build(text, wide), "fold,calibrate,qdq:small_islands=true", data=feeds).model
    stored = [each for graph in all_graph_protos(model.graph) for each in graph.initializer if len(each.dims) == 2]
    assert [(list(each.dims), each.data_type) for each in stored] == [([256, 256], onnx.TensorProto.INT8)]
