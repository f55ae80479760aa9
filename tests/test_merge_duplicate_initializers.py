import numpy as np
import onnx
import pytest
from comparing import apply_and_compare, build
from onnx import TensorProto, helper

from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.passes.merge_duplicate_initializers import MergeDuplicateInitializers
from graphopt.stored_values import StoredTensor

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
STEPS = "t = Add (x, a) y = Add (t, b)"
A = np.arange(4, dtype=np.float32)


def _merge(steps=STEPS, kind="float", **constants):
    text = f"{HEAD} g ({kind}[4] x) => ({kind}[4] y) {{ {steps} }}"
    result, model = apply_and_compare(text, MergeDuplicateInitializers(), constants=constants)
    return result, [each.name for each in model.graph.initializer]


@pytest.mark.parametrize(
    ("kind", "dtype"), [("float", np.float32), ("float16", np.float16), ("double", np.float64), ("int64", np.int64)]
)
def test_merges_equal_initializers_of_any_type(kind, dtype):
    values = np.arange(4).astype(dtype)
    result, left = _merge(kind=kind, a=values, b=values.copy())
    assert left == ["a"]
    assert (result.rewrites, result.notes) == (1, (f"{values.nbytes} bytes of duplicate initializers removed",))


def test_merges_many_and_keeps_the_first():
    result, left = _merge(
        "t = Add (x, a) u = Mul (t, b) v = Sub (u, c) w = Add (v, d) y = Add (w, w)", a=A, b=A + 1, c=A, d=A
    )
    assert left == ["a", "b"]
    assert result.rewrites == 2


@pytest.mark.parametrize(
    "other",
    [A + 1, A.astype(np.float32).reshape(1, 4)[:, :1].reshape(1), np.concatenate([A[:3], A[:1]])],
    ids=["values", "shape", "last value"],
)
def test_leaves_different_ones_alone(other):
    assert _merge(a=A, b=other)[0].rewrites == 0


def test_tells_zero_from_minus_zero_and_takes_nan_for_itself():
    zeros = np.zeros(4, np.float32)
    assert _merge(a=zeros, b=-zeros)[0].rewrites == 0
    nan = np.full(4, np.nan, np.float32)
    model = build(f"{HEAD} g (float[4] x) => (float[4] y) {{ {STEPS} }}", {"a": nan, "b": nan})
    assert MergeDuplicateInitializers().apply(load_model(model).graph, Context()).rewrites == 1


def test_tells_types_of_the_same_bytes_apart():
    steps = "s = Cast <to = 1> (b) t = Add (x, a) y = Add (t, s)"
    assert _merge(steps, a=np.zeros(4, np.float32), b=np.zeros(4, np.int32))[0].rewrites == 0


def test_leaves_an_input_with_a_default_value_alone():
    model = build(f"{HEAD} g (float[4] x, float[4] b) => (float[4] y) {{ {STEPS} }}", {"a": A, "b": A})
    assert apply_and_compare(model, MergeDuplicateInitializers())[0].rewrites == 0


def test_merges_into_the_one_that_is_an_output():
    model = build(f"{HEAD} g (float[4] x) => (float[4] y, float[4] b) {{ {STEPS} }}", {"a": A, "b": A})
    result, after = apply_and_compare(model, MergeDuplicateInitializers())
    assert result.rewrites == 1
    assert [each.name for each in after.graph.initializer] == ["b"]


def test_leaves_two_outputs_alone():
    text = f"{HEAD} g (float[4] x) => (float[4] y, float[4] a, float[4] b) {{ {STEPS} }}"
    assert apply_and_compare(build(text, {"a": A, "b": A}), MergeDuplicateInitializers())[0].rewrites == 0


def _branch(name, values, output=None):
    tensor = helper.make_tensor(name, TensorProto.FLOAT, [4], values)
    made = helper.make_tensor_value_info(f"{name}_sum", TensorProto.FLOAT, [4])
    return helper.make_graph([helper.make_node("Add", ["x", name], [f"{name}_sum"])], name, [], [made], [tensor])


def test_merges_over_branches():
    node = helper.make_node("If", ["c"], ["y"], then_branch=_branch("p", A), else_branch=_branch("q", A))
    inputs = [
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [4]),
    ]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    result, after = apply_and_compare(model, MergeDuplicateInitializers())
    assert result.rewrites == 1
    assert len(after.graph.initializer) == 1


def test_keeps_what_a_branch_returns_by_name():
    text = (
        f"{HEAD} g (bool c, float[4] x) => (float[4] y) {{ t = Add (x, a) u = Add (t, b) "
        "v = If (c) <then_branch = h1 () => (float[4] b) {}, else_branch = h2 () => (float[4] e) { e = Neg (x) }> "
        "y = Add (u, v) }"
    )
    graph = load_model(build(text, {"a": A, "b": A})).graph  # onnx and onnxruntime refuse such branches
    assert MergeDuplicateInitializers().apply(graph, Context()).rewrites == 1
    assert [node.inputs[1].name for node in graph.nodes if node.op == "Add"] == ["b", "b", "v"]


def test_reads_weights_in_a_file_without_keeping_them(tmp_path):
    large = np.ones(2000, np.float32)
    model = build(f"{HEAD} g (float[2000] x) => (float[2000] y) {{ {STEPS} }}", {"a": large, "b": large})
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)
    graph = load_model(tmp_path / "m.onnx").graph
    assert MergeDuplicateInitializers().apply(graph, Context()).rewrites == 1
    assert isinstance(graph.nodes[0].inputs[1]._values, StoredTensor)


def test_finds_nothing_the_second_time():
    model = build(f"{HEAD} g (float[4] x) => (float[4] y) {{ {STEPS} }}", {"a": A, "b": A})
    assert apply_and_compare(model, MergeDuplicateInitializers(), MergeDuplicateInitializers())[0].rewrites == 0
