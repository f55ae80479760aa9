import numpy as np
import onnx
import onnx.inliner
import onnx.reference
import pytest
from comparing import apply_and_compare, assert_equal_outputs, build, ops
from onnx import TensorProto, helper, numpy_helper

from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.passes.inline_functions import InlineFunctions
from graphopt.runtime import open_session

_HEADER = '<ir_version: 10, opset_import: ["" : {opset}, "local" : 1{more}]>'


def _text(body, *functions, x="float[N,4]", y="float[N,D]", opset=17, function_opset=None, more=""):
    """A model of a body from x to y, with functions such as `f (a) => (b) { ... }`."""
    header = f'<domain: "local", opset_import: ["" : {function_opset or opset}, "local" : 1{more}]>'
    parts = [_HEADER.format(opset=opset, more=more), f"agraph ({x} x) => ({y} y) {{ {body} }}"]
    return "\n".join([*parts, *(f"{header} {function}" for function in functions)])


def _inline(text, constants=None, **feed):
    result, model = apply_and_compare(text, InlineFunctions(), constants=constants, feed=feed, tolerance=0)
    return result, model


def _inline_and_evaluate(text, constants=None, **feed):
    """The same with ONNX's reference evaluator, for functions that onnxruntime does not take as they are."""
    before = build(text, constants)
    loaded = load_model(before)
    result = InlineFunctions().apply(loaded.graph, Context(frame=loaded.frame))
    after = loaded.to_proto()
    onnx.checker.check_model(after, full_check=True)
    expected, found = (onnx.reference.ReferenceEvaluator(each).run(None, feed)[0] for each in (before, after))
    np.testing.assert_array_equal(found, expected)
    return result, after


_RELU = "f (a) => (b) { n = Neg (a) b = Relu (n) }"
_LEAK = (
    "f <slope: float = 0.5> (a) => (b) { k = Constant <value_float: float = @slope> () m = Mul (a, k) b = Max (a, m) }"
)


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 21, 23])
def test_inlines_a_call(opset):
    result, model = _inline(_text("y = local.f (x)", _RELU, opset=opset))
    assert ops(model) == {"Neg": 1, "Relu": 1}
    assert not model.functions
    assert result.parts == {"calls": 1, "functions dropped": 1}


def test_leaves_a_model_without_functions_alone():
    result, model = _inline('<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[N] y) { y = Neg (x) }')
    assert result.rewrites == 0
    assert ops(model) == {"Neg": 1}


def test_a_second_run_finds_nothing():
    result, _ = apply_and_compare(_text("y = local.f (x)", _RELU), InlineFunctions(), InlineFunctions())
    assert result.rewrites == 0


def test_drops_functions_that_nothing_calls_and_their_domain():
    result, model = _inline(_text("y = Neg (x)", _RELU))
    assert result.rewrites == 1
    assert [each.domain for each in model.opset_import] == [""]


def test_each_call_has_names_of_its_own():
    result, model = _inline(_text("n = local.f (x) m = local.f (n) y = local.f (m)", _RELU))
    assert result.parts["calls"] == 3
    assert ops(model) == {"Neg": 3, "Relu": 3}
    assert model.graph.output[0].name == "y"


def test_inlines_functions_that_call_others():
    outer = "g <slope: float> (a) => (b) { c = local.f <slope: float = @slope> (a) b = local.f (c) }"
    result, model = _inline(_text("y = local.g <slope = 0.25> (x)", outer, _LEAK))
    assert result.parts == {"calls": 3, "functions dropped": 2}
    values = [value.f for node in model.graph.node for value in node.attribute if value.name == "value_float"]
    assert values == [0.25, 0.5]


@pytest.mark.parametrize(("given", "expected"), [("", 0.5), ("<slope = 0.125>", 0.125)])
def test_an_attribute_takes_what_the_call_says_or_its_default(given, expected):
    _, model = _inline(_text(f"y = local.f {given} (x)", _LEAK))
    assert model.graph.node[0].attribute[0].f == expected
    assert not model.graph.node[0].attribute[0].ref_attr_name


def test_an_attribute_that_neither_call_nor_function_states_is_left_out():
    function = "f <axes> (a) => (b) { b = Transpose <perm: ints = @axes> (a) }"
    _, model = _inline(_text("y = local.f (x)", function, y="float[D,N]"))
    assert not model.graph.node[0].attribute


def test_an_attribute_in_a_branch_of_a_function_is_resolved():
    function = (
        "f <slope: float = 0.5> (a, c) => (b) { b = If (c) <"
        " then_branch = t () => (p) { k = Constant <value_float: float = @slope> () p = Mul (a, k) },"
        " else_branch = e () => (q) { q = local.g (a) } > }"
    )
    text = _text(
        "m = ReduceMax <keepdims = 0> (x) c = Greater (m, zero) y = local.f <slope = 2.0> (x, c)",
        function,
        "g (a) => (b) { b = Neg (a) }",
    )
    for value in (1, -1):
        result, model = _inline(text, {"zero": np.float32(0)}, x=np.full((2, 4), value, np.float32))
        assert result.parts["calls"] == 2
        assert ops(model) == {"ReduceMax": 1, "Greater": 1, "If": 1, "Constant": 1, "Mul": 1, "Neg": 1}


def test_inlines_calls_in_branches_of_the_model():
    text = _text(
        "m = ReduceMax <keepdims = 0> (x) c = Greater (m, zero) y = If (c) <"
        " then_branch = t () => (float[N,4] p) { p = local.f (x) },"
        " else_branch = e () => (float[N,4] q) { n = local.f (x) q = local.f (n) } >",
        _RELU,
    )
    result, model = _inline(text, {"zero": np.float32(0)})
    assert result.parts["calls"] == 3
    assert not model.functions


def test_a_branch_of_a_function_may_return_an_outer_tensor():
    function = (
        "f (a, c) => (b) { n = Neg (a) b = If (c) <"
        " then_branch = t () => (n) { }, else_branch = e () => (q) { q = Exp (a) } > }"
    )
    text = _text("m = ReduceMax <keepdims = 0> (x) c = Greater (m, zero) y = local.f (x, c)", function)
    for value in (1, -1):
        x = np.full((2, 4), value, np.float32)
        result, _ = _inline_and_evaluate(text, {"zero": np.float32(0)}, x=x)
        assert result.parts["calls"] == 1


def test_the_body_of_a_loop_in_a_function_keeps_its_states():
    function = (
        "f (a, n, c) => (b) { b = Loop (n, c, a) <body = l (i, go, s) => (on, t)"
        " { on = Identity (go) u = Mul (s, a) t = Add (u, a) }> }"
    )
    text = _text("y = local.f (x, n, c)", function)
    constants = {"n": np.array(3), "c": np.array(True)}
    result, model = _inline_and_evaluate(text, constants, x=np.ones((2, 4), np.float32))
    assert result.parts["calls"] == 1
    assert ops(model)["Loop"] == 1


def test_omitted_inputs_and_outputs_stay_omitted():
    function = "f (a, low, high) => (b, c) { b = Clip (a, low, high) c = Neg (a) }"
    text, constants = _text('y = local.f (x, "", high)', function), {"high": np.float32(0.5)}
    _, model = _inline_and_evaluate(text, constants, x=np.ones((2, 4), np.float32))
    clip = next(node for node in model.graph.node if node.op_type == "Clip")
    assert list(clip.input) == ["x", "", "high"]
    _, model = _inline_and_evaluate(_text('y = local.f (x, "", "")', function), x=np.ones((2, 4), np.float32))
    assert next(node for node in model.graph.node if node.op_type == "Clip").output[0] == "y"


def test_an_input_that_is_returned_and_an_output_that_is_returned_twice_become_identities():
    text = _text("p, q, r = local.f (x) s = Add (p, q) y = Add (s, r)", "f (a) => (a, b, b) { b = Neg (a) }")
    _, model = _inline_and_evaluate(text, x=np.ones((2, 4), np.float32))
    assert ops(model) == {"Neg": 1, "Identity": 2, "Add": 2}


def test_names_never_clash_with_those_of_the_model():
    proto = onnx.parser.parse_model(_text("k = local.f (x) taken = Neg (k) a = Add (taken, k) y = Neg (a)", _RELU))
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = ["k/n" if name == "taken" else name for name in names]  # which the call would take
    _inline(proto)


def test_a_name_of_a_branch_clashes_with_none_outside():
    function = (
        "f (a, c) => (b) { b = If (c) <then_branch = t () => (z) { z = Neg (a) },"
        " else_branch = e () => (z) { z = Exp (a) } > }"
    )
    text = _text(
        "m = ReduceMax <keepdims = 0> (x) c = Greater (m, zero) z = local.f (x, c) w = local.f (z, c) y = Add (w, z)",
        function,
    )
    _inline(text, {"zero": np.float32(0)})


def test_adds_the_opset_imports_of_a_function():
    text = _text("y = local.f (x)", "f (a) => (b) { b = com.microsoft.Gelu (a) }")
    proto = onnx.parser.parse_model(text)
    proto.functions[0].opset_import.add(domain="com.microsoft", version=1)
    loaded = load_model(proto)
    InlineFunctions().apply(loaded.graph, Context(frame=loaded.frame))
    after = loaded.to_proto()
    assert {each.domain: each.version for each in after.opset_import} == {"": 17, "com.microsoft": 1}
    proto.opset_import.add(domain="com.microsoft", version=1)  # onnxruntime asks the model for it
    assert_equal_outputs(proto, after)


def test_shares_the_initializers_of_a_function_between_its_calls():
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    body = helper.make_graph(
        [helper.make_node("MatMul", ["a", "w"], ["p"])],
        "t",
        [],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["N", 64])],
        [weight],
    )
    node = helper.make_node("If", ["c"], ["b"], then_branch=body, else_branch=body)
    imports = [helper.make_opsetid("", 17)]
    proto = onnx.parser.parse_model(
        _text("p = local.f (x, c) q = local.f (p, c) y = local.f (q, c)", x="float[N,64]", more="")
    )
    proto.functions.append(helper.make_function("local", "f", ["a", "c"], ["b"], [node], imports))
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "c"))
    _, model = _inline(proto)
    weights = [
        tensor
        for graph in (model.graph, *(a.g for n in model.graph.node for a in n.attribute if a.HasField("g")))
        for tensor in graph.initializer
        if list(tensor.dims) == [64, 64]
    ]
    assert len(weights) == 2  # one for each branch of the one function


def test_does_what_the_inliner_of_onnx_does():
    outer = "g (a, k) => (b, c) { c = local.f (a) d = local.f <slope = 0.1> (c) b = Add (d, k) }"
    text = _text("p, q = local.g (x, k) r, s = local.g (p, q) t = Add (r, s) y = local.f (t)", outer, _LEAK)
    _, model = _inline(text, {"k": np.ones(4, np.float32)})
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), "k"))
    assert ops(model) == ops(onnx.inliner.inline_local_functions(proto))


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("Elu", {"alpha": 0.25}),
        ("Elu", {}),
        ("HardSigmoid", {"beta": 0.75}),
        ("HardSwish", {}),
        ("ReduceL2", {"keepdims": 1}),
        ("Selu", {"gamma": 1.5}),
        ("Shrink", {"lambd": 0.5}),
        ("Softsign", {}),
        ("ThresholdedRelu", {}),
    ],
)
def test_inlines_the_functions_that_define_operators_of_onnx(op, attributes):
    schema = onnx.defs.get_schema(op, 18, "")
    function = onnx.FunctionProto.FromString(schema.function_body.SerializeToString())
    function.domain, function.name = "local", op
    for fields in (function.attribute, function.attribute_proto):
        del fields[:]
    for name, attribute in schema.attributes.items():
        if attribute.default_value.type:
            function.attribute_proto.append(attribute.default_value)
        else:
            function.attribute.append(name)
    model = onnx.parser.parse_model(_text(f"y = local.{op} (x)", opset=18))
    model.graph.node[0].attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    model.functions.append(function)
    result, _ = _inline(model)
    assert result.parts == {"calls": 1, "functions dropped": 1}


@pytest.mark.parametrize("function_opset", [13, 18])
def test_a_function_of_another_opset_is_inlined_where_its_operators_are_the_same(function_opset):
    text = _text("y = local.f (x)", "f (a) => (b) { n = Neg (a) b = Relu (n) }", function_opset=function_opset)
    loaded = load_model(onnx.parser.parse_model(text))
    assert InlineFunctions().apply(loaded.graph, Context(frame=loaded.frame)).parts["calls"] == 1
    assert ops(loaded.to_proto()) == {"Neg": 1, "Relu": 1}


@pytest.mark.parametrize("opset", [18, 21])
def test_a_function_of_a_lower_opset_is_raised(opset):
    function = "f <where: ints> (a) => (b) { b = ReduceMax <axes: ints = @where> (a) }"
    call = "p = local.f <where = [1]> (x) q = local.f <where = [0]> (x) y = Add (p, q)"
    text = _text(call, function, opset=opset, function_opset=13)
    loaded = load_model(onnx.parser.parse_model(text))
    assert InlineFunctions().apply(loaded.graph, Context(frame=loaded.frame)).parts["calls"] == 2
    after = loaded.to_proto()
    onnx.checker.check_model(after, full_check=True)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    expected = x.max(1, keepdims=True) + x.max(0, keepdims=True)
    np.testing.assert_array_equal(open_session(after).run({"x": x})["y"], expected)


@pytest.mark.parametrize(
    ("function", "opsets", "words"),
    [
        ("f (a) => (b) { b = Unheard (a) }", (17, 13), "ONNX has no such operator"),
        ("f (a) => (b) { b = ReduceMax <axes = [1]> (a) }", (17, 18), "opset 18 of ai.onnx and the model for 17"),
        ("f (a) => (b) { b = local.f (a) }", (17, 17), "calls itself"),
    ],
)
def test_refuses_with_a_reason(function, opsets, words):
    opset, function_opset = opsets
    loaded = load_model(
        onnx.parser.parse_model(_text("y = local.f (x)", function, opset=opset, function_opset=function_opset))
    )
    result = InlineFunctions().apply(loaded.graph, Context(frame=loaded.frame))
    (skip,) = result.skipped
    assert words in skip.reason
    assert [node.op for node in loaded.graph.nodes] == ["f"]
    assert len(loaded.graph.functions) == 1
