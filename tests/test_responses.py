"""graphopt/responses.py: functions of a tensor that the rest of a graph sees, and ranges that are judged by them."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from graphopt.histogram import Histogram
from graphopt.quantization import INT8_SYMMETRIC, UINT8, params_of_range
from graphopt.responses import POINTS, Response, responses
from graphopt.thresholds import Method, choose_range


def scalar(value, *, rank=0):
    return gs.Constant(f"c{value}_{rank}", np.full([1] * rank, value, np.float32))


def hard_swish_written_out(x, graph_nodes):
    names = [gs.Variable(f"{x.name}_{index}", np.float32, x.shape) for index in range(4)]
    graph_nodes += [
        gs.Node("Add", inputs=[x, scalar(3, rank=1)], outputs=[names[0]]),
        gs.Node("Clip", inputs=[names[0], scalar(0), scalar(6)], outputs=[names[1]]),
        gs.Node("Mul", inputs=[x, names[1]], outputs=[names[2]]),
        gs.Node("Div", inputs=[names[2], scalar(6, rank=4)], outputs=[names[3]]),
    ]
    return names[3]


def graph_of(build, *, outputs=1):
    """x -> Identity -> y, what `build` makes of y -> GlobalAveragePool each -> graph outputs."""
    x, y = gs.Variable("x", np.float32, [1, 2, 4, 4]), gs.Variable("y", np.float32, [1, 2, 4, 4])
    nodes = [gs.Node("Identity", inputs=[x], outputs=[y])]
    seen = build(y, nodes)
    pooled = []
    for tensor in seen if isinstance(seen, list) else [seen]:
        pooled.append(gs.Variable(f"{tensor.name}_pooled", np.float32, [1, 2, 1, 1]))
        nodes.append(gs.Node("GlobalAveragePool", inputs=[tensor], outputs=[pooled[-1]]))
    return gs.Graph(nodes, inputs=[x], outputs=pooled, opset=17)


def node_behind(op, x, nodes, *others, **attributes):
    result = gs.Variable(f"{x.name}_{op}", np.float32, x.shape)
    nodes.append(gs.Node(op, inputs=[x, *others], outputs=[result], attrs=attributes))
    return result


def test_hard_swish_written_out_is_one_function():
    found = responses(graph_of(hard_swish_written_out), ["y"])["y"]
    x = np.array([-100.0, -3, -1, 0, 0.5, 2, 3, 1000])
    expected = x * np.clip(x + 3, 0, 6) / 6
    assert found.at(x) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ("op", "attributes", "expected"),
    [
        ("Sigmoid", {}, lambda x: 1 / (1 + np.exp(-x))),
        ("LeakyRelu", {"alpha": 0.25}, lambda x: np.where(x < 0, x / 4, x)),
        ("Tanh", {}, np.tanh),
    ],
)
def test_one_operator_is_a_function(op, attributes, expected):
    found = responses(graph_of(lambda y, nodes: node_behind(op, y, nodes, **attributes)), ["y"])["y"]
    x = np.linspace(-20, 20, 101)
    assert found.at(x) == pytest.approx(expected(x), abs=2e-3)


def test_functions_of_functions_end_where_two_tensors_are_seen():
    def build(y, nodes):
        first = node_behind("Tanh", y, nodes)
        return [first, node_behind("Exp", first, nodes)]

    graph = graph_of(build)
    assert responses(graph, ["y"])["y"].at(np.array([50.0])) == pytest.approx(1)  # Tanh alone, not Exp of it
    assert not responses(graph, ["y_Tanh"])  # it and Exp of it are seen


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda y, _: y, id="nothing elementwise"),
        pytest.param(lambda y, nodes: [y, node_behind("Tanh", y, nodes)], id="seen itself"),
        pytest.param(
            lambda y, nodes: node_behind("Mul", y, nodes, gs.Constant("k", np.ones((2, 1, 1), np.float32))),
            id="a constant by channel",
        ),
        pytest.param(
            lambda y, nodes: node_behind("Add", y, nodes, node_behind("GlobalMaxPool", y, nodes)), id="another tensor"
        ),
    ],
)
def test_no_function_of_a_tensor_alone(build):
    assert not responses(graph_of(build), ["y"])


def test_graph_outputs_and_bodies_see_the_tensor_itself():
    graph = graph_of(lambda y, nodes: node_behind("Tanh", y, nodes))
    graph.outputs.append(graph.nodes[0].outputs[0])
    assert not responses(graph, ["y"])

    graph = graph_of(lambda y, nodes: node_behind("Tanh", y, nodes))
    y = graph.nodes[0].outputs[0]
    inner = gs.Variable("inner", np.float32)
    body = gs.Graph([gs.Node("Neg", inputs=[y], outputs=[inner])], outputs=[inner], opset=17)
    chosen = gs.Variable("chosen", np.float32)
    condition = gs.Constant("condition", np.array(True))
    graph.nodes.append(
        gs.Node("If", inputs=[condition], outputs=[chosen], attrs={"then_branch": body, "else_branch": body})
    )
    graph.outputs.append(chosen)
    assert not responses(graph, ["y"])


def test_tensors_in_branches_have_responses_too():
    def branch(op):
        y = gs.Variable("y", np.float32, [1, 2, 4, 4])
        nodes = [gs.Node("Identity", inputs=[x], outputs=[y])]
        pooled = gs.Variable(f"pooled_{op}", np.float32)
        nodes.append(gs.Node("GlobalMaxPool", inputs=[node_behind(op, y, nodes)], outputs=[pooled]))
        return gs.Graph(nodes, outputs=[pooled], opset=17)

    x = gs.Variable("x", np.float32, [1, 2, 4, 4])
    condition, chosen = gs.Variable("condition", np.bool_, []), gs.Variable("chosen", np.float32)
    branches = {"then_branch": branch("Tanh"), "else_branch": branch("Neg")}
    node = gs.Node("If", "choice", inputs=[condition], outputs=[chosen], attrs=branches)
    graph = gs.Graph([node], inputs=[x, condition], outputs=[chosen], opset=17)
    found = responses(graph, ["choice/then_branch/y", "choice/else_branch/y", "x"])
    assert {name: float(each.at(np.array(50.0))) for name, each in found.items()} == pytest.approx(
        {"choice/then_branch/y": 1, "choice/else_branch/y": -50}, rel=1e-5
    )


def histogram_of(values):
    histogram = Histogram()
    histogram.add(np.asarray(values, np.float32))
    return histogram


@pytest.mark.parametrize("quant_type", [UINT8, INT8_SYMMETRIC], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize(
    "function", [np.tanh, lambda x: x * np.clip(x + 3, 0, 6) / 6, lambda x: np.where(x < 0, x / 8, x)]
)
def test_the_range_is_judged_by_what_others_see(function, quant_type):
    values = (np.random.default_rng(0).standard_normal(50_000) * 20).astype(np.float32)
    response = Response(function(POINTS))

    def error(low, high):
        params = params_of_range(low, high, quant_type)
        return float(((function(params.dequantize(params.quantize(values))) - function(values)) ** 2).mean())

    low, high, _ = choose_range(histogram_of(values), Method.MSE, quant_type, response=response)
    without = choose_range(histogram_of(values), Method.MSE, quant_type)[:2]
    shares = np.geomspace(0.02, 1, 30)
    best = min(error(one * values.min(), other * values.max()) for one in shares for other in shares)
    assert error(low, high) <= min(1.25 * best, 1.05 * error(*without))


def test_what_a_hard_swish_makes_zero_takes_no_codes():
    values = np.random.default_rng(0).uniform(-50, 10, 100_000)
    response = Response(POINTS * np.clip(POINTS + 3, 0, 6) / 6)
    low, high, _ = choose_range(histogram_of(values), Method.MSE, UINT8, response=response)
    assert -3.2 < low <= -2.95
    assert high == pytest.approx(10, abs=0.2)


def test_a_function_that_is_not_finite_on_the_values_is_left_alone():
    histogram = histogram_of(np.linspace(-2, 2, 10_000))
    with np.errstate(invalid="ignore"):
        response = Response(np.sqrt(POINTS))
    assert choose_range(histogram, Method.MSE, UINT8, response=response) == choose_range(histogram, Method.MSE, UINT8)


def test_a_response_survives_its_text_and_damage_is_told():
    response = Response(np.tanh(POINTS).astype(np.float32).astype(np.float64))
    assert (Response.from_text(response.to_text()).values == response.values).all()
    with pytest.raises(ValueError, match="its response is damaged"):
        Response.from_text(response.to_text()[:-8])
    with pytest.raises(ValueError, match="its response is damaged"):
        Response.from_text("no base64!")
