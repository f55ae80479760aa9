import numpy as np
import onnx
import pytest
from comparing import apply_and_compare, assert_equal_outputs, build, constant, ops
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.passes.fold_constants import FoldConstants
from graphopt.passes.remove_dead_nodes import RemoveDeadNodes


def _text(body, x="float[N,3,4]", y="float[A,B,C]", opset=17):
    return f'<ir_version: 8, opset_import: ["" : {opset}]> agraph ({x} x) => ({y} y) {{ {body} }}'


def _folded(body, *, constants=None, max_growth=4096, **text):
    result, model = apply_and_compare(_text(body, **text), FoldConstants(max_growth=max_growth), constants=constants)
    apply_and_compare(model, RemoveDeadNodes())
    dead = load_model(model)
    RemoveDeadNodes().apply(dead.graph, Context())
    return result, dead.to_proto()


@pytest.mark.parametrize("opset", [9, 13, 21])
def test_folds_a_chain_of_constants(opset):
    body = "a = Add (k, k) b = Transpose <perm = [1, 0]> (a) c = MatMul (b, k) y = Add (x, c)"
    k = np.arange(9, dtype=np.float32).reshape(3, 3)
    result, model = _folded(body, x="float[N,3,3]", opset=opset, constants={"k": k})
    assert result.parts["evaluated"] == 3
    assert ops(model) == {"Add": 1}
    np.testing.assert_array_equal(constant(model, "c"), (2 * k).T @ k)


def test_constant_nodes_become_initializers():
    body = (
        "a = Constant <value = float[1] {2.0}> () b = Constant <value_float = 3.0> ()"
        " c = Constant <value_floats = [1.0, 2.0, 3.0, 4.0]> () p = Mul (x, a) q = Mul (p, b) y = Mul (q, c)"
    )
    result, model = _folded(body)
    assert result.parts["constants"] == 3
    assert ops(model) == {"Mul": 3}
    assert {each.name for each in model.graph.initializer} == {"a", "b", "c"}


def test_constant_nodes_in_branches_become_initializers():
    body = (
        "s = ReduceMax <keepdims = 0> (x) c = Greater (s, zero) y = If (c) <"
        " then_branch = t () => (float[A,B,C] p) { k = Constant <value_float = 3.0> () p = Mul (x, k) },"
        " else_branch = e () => (float[A,B,C] q) { k2 = Constant <value_float = 2.0> ()"
        " k3 = Mul (k2, zero) q = Mul (x, k3) } >"
    )
    result, model = _folded(body, constants={"zero": np.float32(0)})
    assert result.parts["constants"] == 2
    assert result.parts["evaluated"] == 1
    assert ops(model) == {"ReduceMax": 1, "Greater": 1, "If": 1, "Mul": 2}


def test_folds_inside_a_loop_body():
    body = (
        "y = Loop (trips, yes, x) < body = b (int64 i, bool go, float[A,B,C] v) => (bool next, float[A,B,C] w)"
        " { next = Identity (go) k = Constant <value_float = 3.0> () k2 = Add (k, k) w = Mul (v, k2) } >"
    )
    result, model = _folded(body, constants={"trips": np.int64(2), "yes": np.array(True)})
    assert ops(model) == {"Loop": 1, "Identity": 1, "Mul": 1}
    assert result.parts["evaluated"] == 1


def test_a_constant_graph_output_keeps_its_name():
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> agraph (float[N] x) => (float[N] y, float[2] z)'
        " { y = Relu (x) a = Constant <value = float[2] {1.0, 2.0}> () z = Add (a, a) }"
    )
    _, model = apply_and_compare(text, FoldConstants())
    assert ops(model) == {"Relu": 1, "Constant": 1}


def test_a_constant_that_a_branch_returns_by_name_keeps_its_node():
    # neither the checker nor onnxruntime takes such a model, but exporters write them
    body = (
        "k = Constant <value = float[1,1,1] {5.0}> () s = ReduceMax <keepdims = 0> (x) c = Greater (s, s)"
        " y = If (c) < then_branch = t () => (float[1,1,1] k) { },"
        " else_branch = e () => (float[1,1,1] q) { q = Neg (k) } >"
    )
    loaded = load_model(build(_text(body)))
    FoldConstants().apply(loaded.graph, Context())
    main = loaded.to_proto().graph
    assert "k" in {name for node in main.node for name in node.output if node.op_type == "Constant"}


@pytest.mark.parametrize("condition", [True, False])
def test_an_if_with_a_constant_condition_gives_way_to_its_branch(condition):
    body = (
        "y = If (c) < then_branch = t () => (float[A,B,C] p) { a = Neg (x) p = Relu (a) },"
        " else_branch = e () => (float[A,B,C] p) { a = Abs (x) p = Relu (a) } >"
    )
    result, model = _folded(body, constants={"c": np.array(condition)})
    assert result.parts["branches"] == 1
    assert ops(model) == {"Neg" if condition else "Abs": 1, "Relu": 1, "Identity": 1}


def test_inlined_names_stay_unique():
    branch = "then_branch = t () => (float[A,B,C] p) { a = Neg (x) p = Relu (a) }"
    other = "else_branch = e () => (float[A,B,C] p) { a = Abs (x) p = Relu (a) }"
    result, model = _folded(
        f"u = If (c) < {branch}, {other} > v = If (d) < {branch}, {other} > y = Add (u, v)",
        constants={"c": np.array(True), "d": np.array(False)},
    )
    assert result.parts["branches"] == 2
    names = [name for node in model.graph.node for name in node.output]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_inlines_nested_branches_and_outer_values_that_they_return_by_name(outer, inner):
    nested = (
        "p = If (d) < then_branch = t2 () => (float[A,B,C] a) { },"
        " else_branch = e2 () => (float[A,B,C] r) { r = Exp (a) } >"
    )
    body = (
        "z = Abs (x) y = If (c) < then_branch = t () => (float[A,B,C] p)"
        f" {{ a = Neg (z) {nested} }}, else_branch = e () => (float[A,B,C] z) {{ }} >"
    )
    loaded = load_model(build(_text(body), {"c": np.array(outer), "d": np.array(inner)}))
    result = FoldConstants().apply(loaded.graph, Context())
    assert result.parts["branches"] == 2 if outer else 1
    expected = ("z = Abs (x) a = Neg (z) y = " + ("Identity" if inner else "Exp") + " (a)") if outer else "y = Abs (x)"
    assert_equal_outputs(build(_text(expected)), loaded.to_proto())


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        ("RandomNormalLike", "random"),
        ("RandomUniformLike", "random"),
        ("Bernoulli", "random"),
        ("Dropout", "remove-identities decides"),
    ],
)
def test_keeps_random_operators(op, reason):
    model = build(_text(f"r = {op} (k) y = Add (x, r)"), {"k": np.full((1, 3, 4), 0.5, np.float32)})
    loaded = load_model(model)
    result = FoldConstants().apply(loaded.graph, Context())
    assert result.rewrites == 0, reason
    assert ops(loaded.to_proto()) == {op: 1, "Add": 1}


def test_keeps_quantize_and_dequantize():
    body = "w = DequantizeLinear (q, s, z) t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t)"
    constants = {"q": np.ones((5, 4), np.int8), "s": np.float32(0.1), "z": np.int8(0)}
    result, model = _folded(body, constants=constants)
    assert result.rewrites == 0
    assert ops(model) == {"DequantizeLinear": 1, "Transpose": 1, "MatMul": 1}


def test_keeps_operators_of_other_domains():
    text = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> agraph (float[3] x) => (float[3] y)'
    model = build(text + "{ g = com.microsoft.Gelu (k) y = Add (x, g) }", {"k": np.ones(3, np.float32)})
    loaded = load_model(model)
    assert FoldConstants().apply(loaded.graph, Context()).rewrites == 0


def test_keeps_default_values_that_a_caller_may_override():
    model = build(_text("a = Add (k, k) y = Add (x, a)"), {"k": np.float32(1)})
    model.graph.input.append(helper.make_tensor_value_info("k", TensorProto.FLOAT, []))
    result, _ = apply_and_compare(model, FoldConstants())
    assert result.rewrites == 0


def test_keeps_a_node_that_cannot_be_evaluated_and_says_why():
    body = "g = Gather (k, far) n = Neg (g) a = Add (k, k) b = Mul (a, x) y = Add (b, n)"
    model = build(_text(body), {"k": np.ones(4, np.float32), "far": np.array([7], np.int64)})
    loaded = load_model(model)
    result = FoldConstants().apply(loaded.graph, Context())
    assert result.parts["evaluated"] == 1
    (skip,) = result.skipped
    assert skip.reason.startswith("onnxruntime cannot evaluate it: ")
    assert ops(loaded.to_proto()) == {"Gather": 1, "Neg": 1, "Mul": 1, "Add": 1}


_MEGABYTE = {"shape": np.array([1, 1024, 256], np.int64), "one": np.ones(1, np.int64)}


def test_does_not_fold_what_makes_the_model_grow():
    body = "s = Mul (shape, one) f = ConstantOfShape (s) g = Exp (f) h = ReduceSum <keepdims = 0> (x) y = Add (h, g)"
    result, model = _folded(body, constants=_MEGABYTE)
    assert ops(model) == {"ConstantOfShape": 1, "Exp": 1, "ReduceSum": 1, "Add": 1}
    (skip,) = result.skipped
    assert "would grow the model by 1048" in skip.reason


def test_max_growth_decides():
    body = "f = ConstantOfShape (shape) h = ReduceSum <keepdims = 0> (x) y = Add (h, f)"
    result, model = _folded(body, constants=_MEGABYTE, max_growth=2**21)
    assert ops(model) == {"ReduceSum": 1, "Add": 1}
    assert result.skipped == ()


def test_folds_what_is_large_only_on_the_way():
    body = "f = Expand (k, shape) g = Exp (f) h = ReduceMean <axes = [1, 2]> (g) y = Add (x, h)"
    result, model = _folded(body, constants={**_MEGABYTE, "k": np.float32(2)})
    assert ops(model) == {"Add": 1}
    assert result.skipped == ()


def test_folds_weights_whose_originals_die():
    k = np.random.default_rng(0).standard_normal((4, 4096)).astype(np.float32)
    body = "a = Transpose (k) b = Neg (a) c = Transpose (b) y = MatMul (x, c)"
    result, model = _folded(body, constants={"k": k})
    assert ops(model) == {"MatMul": 1}
    assert result.skipped == ()


def test_folds_slices_that_together_replace_a_large_weight():
    k = np.random.default_rng(0).standard_normal((4, 4096)).astype(np.float32)
    body = (
        "a = Slice (k, zero, half, axis) b = Slice (k, half, end, axis) c = MatMul (x, a) d = MatMul (x, b)"
        " y = Add (c, d)"
    )
    ends = {"zero": 0, "half": 2048, "end": 4096, "axis": 1}
    constants = {"k": k, **{name: np.array([value], np.int64) for name, value in ends.items()}}
    _result, model = _folded(body, constants=constants)
    assert ops(model) == {"MatMul": 2, "Add": 1}


def test_does_not_transpose_a_large_weight_that_is_used_as_it_is_too():
    k = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    body = "a = Transpose (k) b = MatMul (x, a) y = MatMul (b, k)"
    _, model = _folded(body, x="float[N,3,64]", constants={"k": k})
    assert ops(model) == {"Transpose": 1, "MatMul": 2}


def test_folds_static_dimensions_of_a_dynamic_shape():
    body = (
        "s = Shape (x) c = Gather (s, one) h = Slice (s, two, three) p = Mul (c, h) q = Concat <axis = 0> (minus, p)"
        " y = Reshape (x, q)"
    )
    values = {"one": [1], "two": [2], "three": [3], "minus": [-1]}
    constants = {name: np.array(value, np.int64) for name, value in values.items()}
    _result, model = _folded(body, y="float[A,B]", constants=constants)
    assert ops(model) == {"Reshape": 1}
    np.testing.assert_array_equal(constant(model, "q"), [-1, 12])


@pytest.mark.parametrize("batch", [1, 5])
def test_a_reshape_infers_the_one_dimension_that_is_not_known(batch):
    body = (
        "s = Shape (x) n = Gather <axis = 0> (s, zero) u = Unsqueeze (n, axes) q = Concat <axis = 0> (u, rest)"
        " y = Reshape (x, q)"
    )
    constants = {
        "zero": np.int64(0),
        "axes": np.zeros(1, np.int64),
        "rest": np.array([2, 6], np.int64),
    }
    _result, model = apply_and_compare(
        _text(body),
        FoldConstants(),
        RemoveDeadNodes(),
        constants=constants,
        feed={"x": np.zeros((batch, 3, 4), np.float32)},
    )
    assert ops(model) == {"Reshape": 1}


def test_does_not_fold_a_dynamic_dimension():
    body = "s = Shape (x) f = Cast <to = 1> (s) y = Add (x, f)"
    _result, model = _folded(body, x="float[N,M,3]")
    assert ops(model) == {"Shape": 1, "Cast": 1, "Add": 1}


def test_minus_one_is_no_dimension():
    model = build(_text("s = Shape (x) f = Cast <to = 1> (s) y = Add (x, f)", x="float[2,3,3]"))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    loaded = load_model(model)
    FoldConstants().apply(loaded.graph, Context())
    assert ops(loaded.to_proto())["Shape"] == 1


@pytest.mark.parametrize(("left", "right"), [(7, 2), (-7, 2), (7, -2), (-7, -2), (2**31, 3)])
def test_shape_arithmetic_divides_as_onnxruntime_does(left, right):
    body = "q = Div (l, r) t = Add (q, one) f = Cast <to = 1> (t) y = Add (x, f)"
    constants = {name: np.array([value], np.int64) for name, value in (("l", left), ("r", right), ("one", 1))}
    _folded(body, constants=constants)


@pytest.mark.parametrize("start", [None, -2, 0, 1])
@pytest.mark.parametrize("end", [None, -1, 2, 9])
def test_shape_with_start_and_end(start, end):
    attributes = ", ".join(f"{key} = {value}" for key, value in (("start", start), ("end", end)) if value is not None)
    body = f"s = Shape {f'<{attributes}>' if attributes else ''} (x) y = ReduceProd <keepdims = 0> (s)"
    _, model = _folded(body, x="float[2,3,4]", y="int64")
    assert ops(model) == {"Constant": 1}


_TARGET = (
    "s = Shape (x) b = Gather (s, zero) n = Gather (s, one) b1 = Unsqueeze (b, first) n1 = Unsqueeze (n, first)"
    " t = Concat <axis = 0> (b1, n1, tail) "
)


def _target_of(body, x, y):
    constants = {"zero": np.int64(0), "one": np.int64(1), "first": np.array([0], np.int64)}
    constants["tail"] = np.array([2, -1], np.int64)
    _, model = _folded(body, x=x, y=y, constants=constants)
    (node,) = [node for node in model.graph.node if node.op_type == "Reshape"]
    shapes = [numpy_helper.to_array(each) for each in model.graph.initializer if each.name == node.input[1]]
    return shapes[0].tolist() if shapes else None


def test_a_reshape_copies_every_size_that_its_input_has_in_the_same_place():
    assert _target_of(f"{_TARGET} y = Reshape (x, t)", "float[batch,words,6]", "float[A,B,C,D]") == [0, 0, 2, -1]
    # names of sizes lead from one tensor to another
    body = f"{_TARGET} r = Relu (x) y = Reshape (r, t)"
    assert _target_of(body, "float[batch,words,6]", "float[A,B,C,D]") == [0, 0, 2, -1]


def test_a_size_in_another_place_is_not_copied():
    body = f"{_TARGET} r = Transpose <perm = [1, 0, 2]> (x) y = Reshape (r, t)"
    assert _target_of(body, "float[batch,words,6]", "float[A,B,C,D]") is None


def test_sizes_without_a_name_are_not_taken_for_equal():
    assert _target_of(f"{_TARGET} r = Relu (x) y = Reshape (r, t)", "float[?,?,6]", "float[A,B,C,D]") is None


def test_a_size_that_is_computed_with_is_no_longer_that_size():
    body = _TARGET.replace("b1 = Unsqueeze (b, first)", "c = Mul (b, one) d = Add (c, zero) b1 = Unsqueeze (d, first)")
    assert _target_of(f"{body} y = Reshape (x, t)", "float[batch,words,6]", "float[A,B,C,D]") == [0, 0, 2, -1]
    body = _TARGET.replace("b1 = Unsqueeze (b, first)", "c = Add (b, one) d = Sub (c, one) b1 = Unsqueeze (d, first)")
    assert _target_of(f"{body} y = Reshape (x, t)", "float[batch,words,6]", "float[A,B,C,D]") is None


_FOREIGN = {
    "BFLOAT16": [1.0, 2.0, -3.0, 4.0],
    "FLOAT8E4M3FN": [1.0, 2.0, -3.0, 4.0],
    "INT4": [1, 2, -3, 4],
    "STRING": ["1", "2", "-3", "4"],
}


@pytest.mark.parametrize("kind", _FOREIGN)
def test_moves_and_casts_types_that_numpy_lacks(kind):
    step = "a = Reshape (k, two) b = Transpose (a) c = Reshape (b, four) d = Cast <to = 1> (c) y = Add (x, d)"
    model = build(_text(step, opset=21), {"two": np.array([2, 2], np.int64), "four": np.array([4], np.int64)})
    model.graph.initializer.append(helper.make_tensor("k", getattr(TensorProto, kind), [4], _FOREIGN[kind]))
    loaded = load_model(model)
    assert FoldConstants().apply(loaded.graph, Context()).parts["evaluated"] == 4
    after = loaded.to_proto()
    assert ops(after) == {"Add": 1}
    np.testing.assert_array_equal(constant(after, "d"), np.float32([1, -3, 2, 4]))


@pytest.mark.parametrize("kind", ["BFLOAT16", "STRING"])
def test_keeps_a_type_that_numpy_lacks_as_the_result(kind):
    model = build(_text("a = Reshape (k, two) b = Transpose (a) c = Cast <to = 1> (b) y = Mul (x, c)"))
    model.graph.initializer.append(helper.make_tensor("k", getattr(TensorProto, kind), [4], _FOREIGN[kind]))
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 2], np.int64), "two"))
    model.graph.output.append(helper.make_tensor_value_info("b", getattr(TensorProto, kind), [2, 2]))
    loaded = load_model(model)
    FoldConstants().apply(loaded.graph, Context())
    after = loaded.to_proto()
    assert ops(after) == {"Constant": 1, "Mul": 1}
    onnx.checker.check_model(after)


def test_does_not_compute_with_types_that_numpy_lacks():
    model = onnx.parser.parse_model(_text("a = Neg (k) b = Cast <to = 1> (a) y = Add (x, b)"))
    model.graph.initializer.append(helper.make_tensor("k", TensorProto.BFLOAT16, [4], _FOREIGN["BFLOAT16"]))
    assert FoldConstants().apply(load_model(model).graph, Context()).rewrites == 0


_STEPS = {
    "Add": "{o} = Add ({a}, {b})",
    "Mul": "{o} = Mul ({a}, {b})",
    "Neg": "{o} = Neg ({a})",
    "Transpose": "{o} = Transpose <perm = [0, 1]> ({a})",
    "Identity": "{o} = Identity ({a})",
    "Max": "{o} = Max ({a}, {b}, {a})",
    "Tile": "u{o} = Tile ({a}, twice) {o} = Slice (u{o}, zeros, size)",
    "Shape": "s{o} = Shape ({a}) c{o} = Cast <to = 1> (s{o}) {o} = Add ({a}, c{o})",
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(_STEPS)), st.integers(0, 99), st.integers(0, 99)),
        min_size=1,
        max_size=12,
    )
)
def test_outputs_stay_equal_for_random_graphs(steps):
    names, body = ["x", "k", "m"], ""
    for number, (step, first, second) in enumerate(steps):
        output = f"t{number}"
        body += _STEPS[step].format(o=output, a=names[first % len(names)], b=names[second % len(names)]) + " "
        names.append(output)
    constants = {
        "k": np.float32([[0.5, -1], [0.25, 2]]),
        "m": np.float32([[1, 0], [0.125, -0.5]]),
        "twice": np.array([2, 1], np.int64),
        "zeros": np.zeros(2, np.int64),
        "size": np.array([2, 2], np.int64),
    }
    text = _text(f"{body} y = Add (x, {names[-1]})", x="float[2,2]", y="float[A,B]")
    _, model = apply_and_compare(text, FoldConstants(), RemoveDeadNodes(), constants=constants)
    assert ops(model)["Shape"] == 0


@pytest.mark.parametrize("nodes", [20_000])
def test_twenty_thousand_nodes_of_shape_arithmetic_fold_in_seconds(nodes):
    body = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "one"], ["t0"]),
        *(helper.make_node("Add", [f"t{index}", "one"], [f"t{index + 1}"]) for index in range(nodes)),
        helper.make_node("Cast", [f"t{nodes}"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "f"], ["y"]),
    ]
    graph = helper.make_graph(
        body,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(np.ones(1, np.int64), "one")],
    )
    loaded = load_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    FoldConstants().apply(loaded.graph, Context())
    assert ops(loaded.to_proto())["Add"] == 1


def test_reads_a_constant_that_a_branch_returns_too():
    body = (
        "s = ReduceMax <keepdims = 0> (x) c = Greater (s, zero) y = If (c) <"
        " then_branch = t () => (float[1,1,1] k)"
        " { k = Constant <value = float[1,1,1] {5.0}> () d = Exp (k) e = Add (d, x) },"
        " else_branch = e () => (float[A,B,C] q) { q = Identity (x) } >"
    )
    result, _ = apply_and_compare(_text(body), FoldConstants(), constants={"zero": np.float32(0)})
    assert result.parts["evaluated"] == 1
