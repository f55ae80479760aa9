import pytest
from comparing import apply_and_compare, build, ops

from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.passes.merge_common_subexpressions import MergeCommonSubexpressions


def _merge(steps, opset=17, outputs="float[A,B] y", declared="", inputs="float[N,4] x"):
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) <{declared}> {{ {steps} }}'
    result, model = apply_and_compare(text, MergeCommonSubexpressions())
    return result, ops(model)


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 21, 23])
@pytest.mark.parametrize("kind", ["float", "float16"])
def test_merges_whole_chains_in_one_run(opset, kind):
    steps = "a = Relu (x) b = Exp (a) c = Relu (x) d = Exp (c) y = Add (b, d)"
    result, left = _merge(steps, opset, f"{kind}[A,B] y", inputs=f"{kind}[N,4] x")
    assert left == {"Relu": 1, "Exp": 1, "Add": 1}
    assert result.parts == {"Relu": 1, "Exp": 1}


def test_merges_nodes_of_many_outputs():
    steps = "v, i = TopK <axis = 1> (x, k) w, j = TopK <axis = 1> (x, k) s = Add (v, w) t = Add (i, j) "
    _, left = _merge(f"{steps} u = Cast <to = 1> (t) y = Add (s, u)", declared="int64[1] k = {2}")
    assert left["TopK"] == 1


def test_compares_attributes_by_type_and_content():
    shapes = "s = Shape (x) "
    one = (
        "a = ConstantOfShape <value = float[1] {1}> (s) b = ConstantOfShape <value = float[1] {%s}> (s) y = Add (a, b)"
    )
    assert _merge(shapes + one % 1)[1]["ConstantOfShape"] == 1
    assert _merge(shapes + one % 2)[1]["ConstantOfShape"] == 2
    softmax = "a = Softmax <axis = 1> (x) b = Softmax <axis = %d> (x) y = Add (a, b)"
    assert _merge(softmax % 1)[1]["Softmax"] == 1
    assert _merge(softmax % 0)[1]["Softmax"] == 2
    elu = "a = Elu <alpha = 0.0> (x) b = Elu <alpha = -0.0> (x) y = Add (a, b)"
    assert _merge(elu)[1]["Elu"] == 2


def test_takes_omitted_inputs_for_those_left_out():
    assert _merge("a = Clip (x, , ) b = Clip (x) y = Add (a, b)")[1]["Clip"] == 1
    assert _merge("a = Clip (x, m) b = Clip (x, , m) y = Add (a, b)", declared="float m = {0}")[1]["Clip"] == 2


def test_the_first_takes_over_the_name_of_an_output():
    result, left = _merge("a = Relu (x) b = Exp (a) y = Relu (x) z = Exp (y)", outputs="float[A,B] y, float[C,D] z")
    assert left == {"Relu": 1, "Exp": 1}
    assert result.skipped == ()


def test_finds_what_follows_the_output_that_took_over():
    steps = "a = Relu (x) b = Exp (a) y = Relu (x) c = Exp (y) z = Add (b, c)"
    assert _merge(steps, outputs="float[A,B] y, float[C,D] z")[1] == {"Relu": 1, "Exp": 1, "Add": 1}


def test_leaves_two_outputs_alone():
    result, left = _merge("y = Relu (x) z = Relu (x)", outputs="float[A,B] y, float[C,D] z")
    assert left["Relu"] == 2
    assert "keep their names" in result.skipped[0].reason


@pytest.mark.parametrize(
    "steps",
    [
        "a = RandomNormalLike (x) b = RandomNormalLike (x) c = Sub (a, b) d = Mul (c, z) y = Add (x, d)",
        "a = Dropout (x) b = Dropout (x) y = Add (a, b)",
        "a = com.microsoft.Gelu (x) b = com.microsoft.Gelu (x) y = Add (a, b)",
        "p = QuantizeLinear (x, o, q) a = DequantizeLinear (p, o, q) b = DequantizeLinear (p, o, q) y = Add (a, b)",
        "a = Relu (x) n = Neg (x) b = Relu (n) y = Add (a, b)",
    ],
)
def test_leaves_alone(steps):
    text = (
        '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> g (float[N,4] x) => (float[A,B] y) '
        f"<float z = {{0}}, float o = {{1}}, uint8 q = {{0}}> {{ {steps} }}"
    )
    result, _ = apply_and_compare(text, MergeCommonSubexpressions())
    assert result.rewrites == 0


IF = (
    "d = Relu (x) r = If (c) <then_branch = h1 () => (float[A,B] p) { e = Relu (x) f = Relu (x) p = Add (e, f) }, "
    "else_branch = h2 () => (float[A,B] q) { q = Neg (x) }> y = Add (d, r)"
)


def test_merges_inside_a_branch_but_not_with_the_graph_around_it():
    result, left = _merge(IF, inputs="bool c, float[N,4] x")
    assert result.parts == {"Relu": 1}
    assert left["Relu"] == 2


def test_a_branch_reads_the_node_that_stays():
    steps = (
        "d = Relu (x) e = Relu (x) r = If (c) <then_branch = h1 () => (float[A,B] p) { p = Neg (e) }, "
        "else_branch = h2 () => (float[A,B] q) { q = Exp (e) }> y = Add (d, r)"
    )
    assert _merge(steps, inputs="bool c, float[N,4] x")[1]["Relu"] == 1


def test_keeps_the_name_that_a_branch_returns():
    before = build(
        '<ir_version: 8, opset_import: ["" : 17]> g (bool c, float[N,4] x) => (float[A,B] y) { d = Relu (x) '
        "e = Relu (x) r = If (c) <then_branch = h1 () => (float[A,B] e) {}, "
        "else_branch = h2 () => (float[A,B] q) { q = Neg (x) }> y = Add (d, r) }"
    )
    graph = load_model(before).graph  # onnx and onnxruntime refuse such branches
    assert MergeCommonSubexpressions().apply(graph, Context()).rewrites == 1
    assert [node.outputs[0].name for node in graph.nodes] == ["e", "r", "y"]


def test_finds_nothing_the_second_time():
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x) => (float[A,B] y, float[C,D] z) '
        "{ a = Relu (x) b = Exp (a) y = Relu (x) c = Exp (y) z = Add (b, c) }"
    )
    result, _ = apply_and_compare(text, MergeCommonSubexpressions(), MergeCommonSubexpressions())
    assert result.rewrites == 0
