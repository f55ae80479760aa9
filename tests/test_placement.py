"""Where each target wants quantizers, on graphs that are visible here."""

import pytest
from texts import model_of

from graphopt.model_io import load_model
from graphopt.placement import place, place_all
from graphopt.shapes import infer_shapes
from graphopt.targets.ort_cpu import ORT_CPU
from graphopt.targets.tensorrt import TENSORRT


def graph_of(body: str, inputs: str = "float[N,16,8,8] x", outputs: str = "float[N,16,8,8] y", weights: str = ""):
    """A graph at opset 17 with the 3x3 weight `w` and the bias `b`, both of 16 channels."""
    text = f"""
        <ir_version: 8, opset_import: ["" : 17]>
        example ({inputs}) => ({outputs})
        <float[16,16,3,3] w, float[16] b{"," if weights else ""} {weights}>
        {{ {body} }}
    """
    graph = load_model(model_of(text)).graph
    infer_shapes(graph)
    return graph


CONV = "Conv<pads=[1,1,1,1]>"


def quantized(placement):
    return set(placement.activations)


def operators(placement):
    return sorted(node.op for node in placement.nodes)


def test_ort_quantizes_a_conv_on_both_sides_and_absorbs_its_activation():
    graph = graph_of(f"c = {CONV}(x, w, b) y = Relu(c)")
    placement = place(graph, ORT_CPU)
    assert quantized(placement) == {"x", "y"}
    assert [(edge.tensor.name, axis) for edge, axis in placement.weights] == [("w", 0)]


def test_tensorrt_quantizes_only_what_goes_into_a_conv():
    graph = graph_of(f"c = {CONV}(x, w, b) y = Relu(c)")
    placement = place(graph, TENSORRT)
    assert quantized(placement) == {"x"}
    assert [(edge.tensor.name, axis) for edge, axis in placement.weights] == [("w", 0)]


def test_an_activation_with_a_second_reader_of_its_input_is_not_absorbed():
    graph = graph_of(f"c = {CONV}(x, w, b) r = Relu(c) y = Sub(c, r)")
    assert quantized(place(graph, ORT_CPU)) == {"x", "c"}


def test_ort_runs_a_residual_add_in_int8_between_convs():
    graph = graph_of(
        f"c = {CONV}(x, w, b) r = Relu(c) d = {CONV}(r, w, b) a = Add(d, x) s = Relu(a) y = {CONV}(s, w, b)"
    )
    placement = place(graph, ORT_CPU)
    assert operators(placement) == ["Add", "Conv", "Conv", "Conv"]
    assert quantized(placement) == {"x", "r", "d", "s", "y"}


def test_tensorrt_quantizes_the_bypass_of_a_residual_add_and_fuses_the_other_branch():
    graph = graph_of(f"c = {CONV}(x, w, b) r = Relu(c) d = {CONV}(r, w, b) a = Add(d, x) y = Relu(a)")
    placement = place(graph, TENSORRT)
    assert quantized(placement) == {"x", "r"}
    assert {(edge.node.op, edge.index) for edge in placement.readers["x"]} == {("Conv", 0), ("Add", 1)}


def test_tensorrt_leaves_what_is_added_to_a_matrix_product_float():
    """TensorRT fuses Adds of branches into Convs; the mask that is added to attention's scores may be -infinity."""
    graph = graph_of(
        "m = MatMul(x, v) y = Add(m, mask)",
        inputs="float[4,32] x, float[4,32] mask",
        outputs="float[4,32] y",
        weights="float[32,32] v",
    )
    assert quantized(place(graph, TENSORRT)) == {"x"}


@pytest.mark.parametrize(("features", "placed"), [(12, set()), (16, {"x", "k"})])
def test_tensorrt_leaves_products_of_small_heads_float(features, placed):
    inputs = f"float[2,32,{features}] x, float[2,{features},32] k"
    graph = graph_of("y = MatMul(x, k)", inputs=inputs, outputs="float[2,32,32] y")
    placement = place(graph, TENSORRT)
    assert quantized(placement) == placed
    assert [skip.reason for skip in placement.skipped] == (
        [] if placed else ["12 channels in and 32 out: under 16, int8 is no faster"]
    )


@pytest.mark.parametrize("swapped", [False, True])
def test_tensorrt_takes_the_shorter_branch_of_a_projection_as_the_bypass(swapped):
    operands = "p, d" if swapped else "d, p"
    graph = graph_of(
        f"c = {CONV}(x, w, b) r = Relu(c) d = {CONV}(r, w, b) p = {CONV}(x, w, b) a = Add({operands}) y = Relu(a)"
    )
    assert quantized(place(graph, TENSORRT)) == {"x", "r", "p"}


def test_silu_stays_in_int8_between_convs_on_ort():
    graph = graph_of(f"c = {CONV}(x, w, b) s = Sigmoid(c) m = Mul(c, s) y = {CONV}(m, w, b)")
    placement = place(graph, ORT_CPU)
    assert operators(placement) == ["Conv", "Conv", "Mul", "Sigmoid"]
    assert quantized(placement) == {"x", "c", "s", "m", "y"}


def test_an_operator_that_no_int8_operator_reads_stays_float():
    graph = graph_of(f"c = {CONV}(x, w, b) y = Sigmoid(c)")
    assert operators(place(graph, ORT_CPU)) == ["Conv"]


@pytest.mark.parametrize(("op", "joins"), [("LeakyRelu", True), ("Sigmoid", False)])
def test_ort_runs_a_last_operator_in_int8_where_its_float_kernel_is_slow(op, joins):
    placement = place(graph_of(f"c = {CONV}(x, w, b) s = {op}(c) y = Tanh(s)"), ORT_CPU)
    assert operators(placement) == (["Conv", op] if joins else ["Conv"])
    assert quantized(placement) == ({"x", "c", "s"} if joins else {"x", "c"})


def test_an_operator_that_only_moves_values_shares_the_range_of_its_input():
    graph = graph_of(
        f"c = {CONV}(x, w, b) r = Relu(c) p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r) y = {CONV}(p, w, b)",
        outputs="float[N,16,4,4] y",
    )
    placement = place(graph, ORT_CPU)
    assert placement.activations["p"].source.name == "r"
    assert "p" not in placement.observed


def test_a_constant_operand_is_quantized_like_an_activation():
    graph = graph_of(f"c = {CONV}(x, w, b) m = Mul(c, k) y = {CONV}(m, w, b)", weights="float[16,1,1] k")
    placement = place(graph, ORT_CPU)
    assert [edge.tensor.name for edge in placement.operands] == ["k"]


def test_matmul_without_an_int8_reader_keeps_a_float_output():
    graph = graph_of("y = MatMul(x, k)", "float[N,16] x", "float[N,4] y", "float[16,4] k")
    placement = place(graph, ORT_CPU)
    assert quantized(placement) == {"x"}
    assert [(edge.tensor.name, axis) for edge, axis in placement.weights] == [("k", 1)]


@pytest.mark.parametrize(
    ("value", "result", "bias", "quantized_tensors"),
    [
        ("N,16", "N,4", "4", {"x", "y"}),
        ("N,16", "N,4", "1,4", {"x", "y"}),
        ("2,3,16", "2,3,4", "4", {"x", "y"}),
        ("N,3,16", "N,3,4", "4", {"x"}),  # onnxruntime fuses no bias into stacks of unknown size
        ("N,16", "N,4", "1", {"x"}),
    ],
)
def test_ort_quantizes_behind_the_bias_that_it_fuses_into_a_matmul(value, result, bias, quantized_tensors):
    graph = graph_of(
        "m = MatMul(x, k) y = Add(m, c)", f"float[{value}] x", f"float[{result}] y", f"float[16,4] k, float[{bias}] c"
    )
    assert quantized(place(graph, ORT_CPU)) == quantized_tensors


@pytest.mark.parametrize(("attributes", "shape", "axis"), [("", "16,4", 1), ("<transB=1>", "4,16", 0)])
def test_the_scale_axis_of_gemm_runs_along_its_output_features(attributes, shape, axis):
    graph = graph_of(f"y = Gemm{attributes}(x, k)", "float[N,16] x", "float[N,4] y", f"float[{shape}] k")
    assert [found for _, found in place(graph, ORT_CPU).weights] == [axis]


@pytest.mark.parametrize(
    ("body", "inputs", "outputs", "weights", "words"),
    [
        ("y = Conv(x, k)", "float[N,16,8,8] x, float[16,16,1,1] k", "float[N,16,8,8] y", "", "freeze-inputs"),
        ("k = Exp(w) y = Conv<pads=[1,1,1,1]>(x, k)", "float[N,16,8,8] x", "float[N,16,8,8] y", "", None),
        (
            "y = Gemm<transA=1>(x, k)",
            "float[16,N] x",
            "float[N,4] y",
            "float[16,4] k",
            "transA = 0",
        ),
        ("y = MatMul(x, k)", "float[16] x", "float[4] y", "float[16,4] k", "vector"),
        (
            "y = ConvTranspose(x, k)",
            "float[N,16,8,8] x",
            "float[N,16,8,8] y",
            "float[16,16,1,1] k",
            "no int8 kernel for ConvTranspose",
        ),
        ("y = MatMul(x, z)", "float16[N,16] x, float16[16,16] z", "float16[N,16] y", "", "only float32"),
    ],
)
def test_ort_refuses_with_a_reason(body, inputs, outputs, weights, words):
    placement = place(graph_of(body, inputs, outputs, weights), ORT_CPU)
    assert not placement.nodes
    (skip,) = placement.skipped
    assert (words or "computed at run time") in skip.reason


def test_tensorrt_leaves_a_thin_conv_in_float():
    graph = graph_of("y = Conv(x, k)", "float[N,4,8,8] x", "float[N,4,8,8] y", "float[4,4,1,1] k")
    (skip,) = place(graph, TENSORRT).skipped
    assert "under 16" in skip.reason


@pytest.mark.parametrize(("rows", "gains"), [("1", False), ("2", True), ("N", True)])
@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_tensorrt_leaves_the_product_of_a_vector_in_float(op, rows, gains):
    graph = graph_of(f"y = {op}(x, k)", f"float[{rows},16] x", f"float[{rows},32] y", "float[16,32] k")
    placement = place(graph, TENSORRT)
    assert operators(placement) == ([op] if gains else [])
    assert ["vector" in skip.reason for skip in placement.skipped] == ([] if gains else [True])


def test_tensorrt_takes_a_first_layer_with_few_input_channels():
    graph = graph_of("y = Conv<pads=[1,1,1,1]>(x, k)", "float[N,3,8,8] x", "float[N,16,8,8] y", "float[16,3,3,3] k")
    assert operators(place(graph, TENSORRT)) == ["Conv"]


@pytest.mark.parametrize(("kernel", "operator_types"), [(3, ["Conv"]), (1, [])])
def test_tensorrt_takes_thin_groups_where_their_kernels_are_large(kernel, operator_types):
    graph = graph_of(
        "y = Conv<group=8>(x, k)", "float[N,8,8,8] x", "float[A,B,C,D] y", f"float[8,1,{kernel},{kernel}] k"
    )
    assert operators(place(graph, TENSORRT)) == operator_types


@pytest.mark.parametrize(("mode", "joins"), [("nearest", True), ("linear", False)])
def test_a_resize_that_computes_new_values_stays_float(mode, joins):
    body = f'c = {CONV}(x, w, b) d = Resize<mode="{mode}">(c, , k) y = {CONV}(d, w, b)'
    graph = graph_of(body, outputs="float[A,B,C,D] y", weights="float[4] k = {1,1,2,2}")
    assert ("Resize" in operators(place(graph, ORT_CPU))) is joins


def test_an_excluded_node_stays_float_with_the_reason_given():
    graph = graph_of(f"c = {CONV}(x, w, b) y = {CONV}(c, w, b)")
    placement = place(graph, ORT_CPU, {id(graph.nodes[0]): "because"})
    assert [skip.reason for skip in placement.skipped] == ["because"]
    assert quantized(placement) == {"c", "y"}


def test_a_branch_is_placed_as_a_graph_of_its_own():
    graph = graph_of(
        """y = If (flag) <
             then_branch = yes () => (float[N,16,8,8] t) { t = Conv<pads=[1,1,1,1]>(x, w, b) },
             else_branch = no () => (float[N,16,8,8] e) { e = Identity(x) }>""",
        inputs="float[N,16,8,8] x, bool flag",
    )
    outside, yes, no = place_all(graph, ORT_CPU)
    assert not outside.nodes and not outside.skipped and not no.nodes
    assert (yes.label, operators(yes), quantized(yes)) == ("y/then_branch", ["Conv"], {"x", "t"})
    assert not place(graph, ORT_CPU).nodes


def test_a_positive_factor_costs_ort_a_scale_and_no_quantizer():
    graph = graph_of(f"c = {CONV}(x, w, b) m = Mul(c, k) y = {CONV}(m, w, b)", weights="float k = {2}")
    placement = place(graph, ORT_CPU)
    assert quantized(placement) == {"x", "c", "y"}
    ((activation, before),) = placement.rescaled
    assert (activation.tensor.name, activation.source.name, activation.factor, before.name) == ("m", "c", 2.0, "c")


@pytest.mark.parametrize("operator", ["HardSwish", "HardSigmoid"])
def test_nothing_is_absorbed_into_an_operator_that_is_decomposed(operator):
    graph = graph_of(f"c = {CONV}(x, w, b) h = {operator}(c) r = Relu(h) a = Add(h, r) y = {CONV}(a, w, b)")
    assert "h" in quantized(place(graph, ORT_CPU))
    alone = graph_of(f"c = {CONV}(x, w, b) h = {operator}(c) r = Relu(h) y = {CONV}(r, w, b)")
    assert operators(place(alone, ORT_CPU)) == ["Conv", "Conv"]


@pytest.mark.parametrize("constant", ["float k = {-2}", "float k = {0}", "float[16,1,1] k"])
def test_a_factor_that_is_not_one_positive_number_is_an_int8_operand(constant):
    graph = graph_of(f"c = {CONV}(x, w, b) m = Mul(c, k) y = {CONV}(m, w, b)", weights=constant)
    placement = place(graph, ORT_CPU)
    assert not placement.rescaled
    assert "m" in quantized(placement)


def test_a_pad_with_another_value_than_zero_stays_float():
    body = f"c = {CONV}(x, w, b) d = Pad(c, pads, k) y = {CONV}(d, w, b)"
    weights = "int64[8] pads = {0,0,1,1,0,0,1,1}, float k = {1}"
    graph = graph_of(body, outputs="float[N,16,10,10] y", weights=weights)
    assert "Pad" not in operators(place(graph, ORT_CPU))
