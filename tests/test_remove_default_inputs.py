import numpy as np
import pytest
from comparing import apply_and_compare, build

from graphopt.passes.remove_dead_nodes import RemoveDeadNodes
from graphopt.passes.remove_default_inputs import RemoveDefaultInputs

HIDDEN = 3
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
# zeros for any batch size, the way exporters write them: [4, batch, hidden], of which a cell takes one
STATE = """
    s = Shape (x) i = Constant <value = int64[1] {1}> () b = Gather (s, i)
    f = Constant <value = int64[1] {4}> () h = Constant <value = int64[1] {3}> ()
    shape = Concat <axis = 0> (f, b, h) all = ConstantOfShape (shape)
    o = Constant <value = int64[1] {0}> () e = Constant <value = int64[1] {1}> () z = Slice (all, o, e, o)
"""


def _remove(steps, opset=17, kind="float", inputs=None, outputs=None, **constants):
    text = (
        f'<ir_version: 8, opset_import: ["" : {opset}]> g ({inputs or kind + "[N,2,8,8] x"}) => '
        f"({outputs or kind + '[A,B,C,D] y'}) {{ {steps} }}"
    )
    used = {name: value for name, value in constants.items() if value is not None}
    result, model = apply_and_compare(text, RemoveDefaultInputs(), constants=used)
    _, cleared = apply_and_compare(text, RemoveDefaultInputs(), RemoveDeadNodes(), constants=used)
    assert apply_and_compare(model, RemoveDefaultInputs())[0].rewrites == 0
    return result.rewrites, [list(node.input) for node in cleared.graph.node]


@pytest.mark.parametrize("opset", [9, 11, 14, 17, 22])
@pytest.mark.parametrize("op", GATES)
def test_removes_zero_states_and_bias_of_a_recurrent_cell(op, opset):
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.standard_normal((1, GATES[op] * HIDDEN, 5)).astype(np.float32),
        "r": rng.standard_normal((1, GATES[op] * HIDDEN, HIDDEN)).astype(np.float32),
        "bias": np.zeros((1, 2 * GATES[op] * HIDDEN), np.float32),
        "p": np.zeros((1, 3 * HIDDEN), np.float32) if op == "LSTM" else None,
    }
    more = ", z, p" if op == "LSTM" else ""
    steps = STATE if opset > 9 else STATE.replace("Slice (all, o, e, o)", "Slice <starts = [0], ends = [1]> (all)")
    steps += f"y = {op} <hidden_size = {HIDDEN}> (x, w, r, bias, , z{more})"
    count, left = _remove(steps, opset, inputs="float[S,N,5] x", outputs="float[A,B,C,D] y", **constants)
    assert left == [["x", "w", "r"]]
    assert count == (4 if op == "LSTM" else 2)


def test_keeps_a_place_before_an_input_that_stays():
    rng = np.random.default_rng(0)
    w, r = (rng.standard_normal((1, 4 * HIDDEN, size)).astype(np.float32) for size in (5, HIDDEN))
    cell = np.ones((1, 2, HIDDEN), np.float32)
    steps = f"{STATE} y = LSTM <hidden_size = {HIDDEN}> (x, w, r, , , z, c)"
    _, left = _remove(steps, inputs="float[S,2,5] x", w=w, r=r, c=cell)
    assert left == [["x", "w", "r", "", "", "", "c"]]


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_removes_a_bias_of_zeros(op):
    constants = {"w": np.ones((2, 2, 3, 3), np.float32), "b": np.zeros(2, np.float32)}
    assert _remove(f"y = {op} (x, w, b)", **constants) == (1, [["x", "w"]])


@pytest.mark.parametrize("kind", ["float", "float16", "double", "int64", "uint8"])
def test_removes_a_pad_value_and_the_steps_of_a_slice(kind):
    dtype = np.dtype({"float": "f4", "float16": "f2", "double": "f8", "int64": "i8", "uint8": "u1"}[kind])
    pads = np.ones(8, np.int64)
    ones = np.ones(2, np.int64)
    steps = "p = Pad (x, pads, v) y = Slice (p, s, e, a, t)"
    count, left = _remove(
        steps, kind=kind, pads=pads, v=np.zeros((), dtype), s=ones, e=ones * 4, a=np.array([2, 3]), t=ones
    )
    assert (count, left) == (2, [["x", "pads"], ["p", "s", "e", "a"]])


@pytest.mark.parametrize(
    ("kind", "opset"), [("float", 11), ("float", 17), ("float16", 17), ("double", 13), ("int8", 13)]
)
def test_removes_the_limits_of_the_type_from_a_clip(kind, opset):
    dtype = np.dtype({"float": "f4", "float16": "f2", "double": "f8", "int8": "i1"}[kind])
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    lowest, largest, zero = (np.array(value, dtype) for value in (limits.min, limits.max, 0))
    assert _remove("y = Clip (x, l, h)", opset, kind, l=lowest, h=zero) == (1, [["x", "", "h"]])
    assert _remove("y = Clip (x, l, h)", opset, kind, l=zero, h=largest) == (1, [["x", "l"]])


@pytest.mark.parametrize(
    ("fill", "removed"),
    [
        ("s = Shape (b) c = ConstantOfShape (s)", 1),
        ("s = Shape (b) c = ConstantOfShape <value = float[1] {2}> (s)", 0),
        ("t = Concat <axis = 0> (b, b) s = Shape (b) z = Constant <value = int64[1] {0}> () c = Slice (t, z, s)", 1),
        ("i = Constant <value = int64[2] {0, 1}> () c = Gather (b, i)", 1),
        ("c = Abs (b)", 0),
    ],
)
def test_follows_what_moves_equal_elements(fill, removed):
    constants = {"w": np.ones((2, 2, 3, 3), np.float32), "b": np.zeros(2, np.float32)}
    assert _remove(f"{fill} y = Conv (x, w, c)", **constants)[0] == removed


@pytest.mark.parametrize("opset", [9, 10, 11, 13])
def test_removes_zeros_from_a_gemm_where_the_opset_allows(opset):
    constants = {"w": np.ones((4, 3), np.float32), "c": np.zeros(3, np.float32)}
    count, _ = _remove("y = Gemm (x, w, c)", opset, inputs="float[N,4] x", outputs="float[A,B] y", **constants)
    assert count == (1 if opset >= 11 else 0)


@pytest.mark.parametrize(
    ("steps", "constants"),
    [
        ("y = Conv (x, w, b)", {"w": np.ones((2, 2, 3, 3), np.float32), "b": np.array([0, 1], np.float32)}),
        ("y = Pad (x, p, v)", {"p": np.ones(8, np.int64), "v": np.float32(1)}),
        ("y = Clip (x, v)", {"v": np.float32(0)}),
        ("y = Clip (x, v)", {"v": np.float32(-np.inf)}),  # the default is the lowest finite value
    ],
)
def test_leaves_other_values_alone(steps, constants):
    assert _remove(steps, **constants)[0] == 0


def test_leaves_a_default_that_a_caller_may_override_alone():
    model = build(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[1,2,8,8] x, float[2] b) => (float[A,B,C,D] y) '
        "{ y = Conv (x, w, b) }",
        {"w": np.ones((2, 2, 3, 3), np.float32), "b": np.zeros(2, np.float32)},
    )
    assert apply_and_compare(model, RemoveDefaultInputs())[0].rewrites == 0


def test_works_inside_branches():
    steps = (
        "y = If (c) <then_branch = h1 () => (float[A,B,C,D] p) { p = Conv (x, w, b) }, "
        "else_branch = h2 () => (float[A,B,C,D] q) { q = Conv (x, w) }>"
    )
    constants = {"w": np.ones((2, 2, 3, 3), np.float32), "b": np.zeros(2, np.float32)}
    assert _remove(steps, inputs="bool c, float[N,2,8,8] x", **constants)[0] == 1
