"""Which int8 islands a graph has, which are too small to pay, and what measuring them decides."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_placement import CONV, graph_of
from texts import model_of

import graphopt
from graphopt.autotune import tune
from graphopt.errors import PipelineError
from graphopt.islands import _Trade, islands_of, too_small
from graphopt.model_io import load_model
from graphopt.placement import place, place_all
from graphopt.runtime import optimized_ops
from graphopt.shapes import infer_shapes
from graphopt.targets import Costs, Kind
from graphopt.targets.ort_cpu import ORT_CPU

TWO_ISLANDS = f"c = {CONV}(x, w, b) t = Tanh(c) d = {CONV}(t, w, b) r = Relu(d) y = {CONV}(r, w, b)"
COSTS = Costs(saved_ns_per_mac={"Conv": 0.01}, border_ns=1000, border_ns_per_element=0.0)


def islands(body):
    graph = graph_of(body)
    return graph, islands_of(place(graph, ORT_CPU))


def test_a_float_operator_between_them_parts_two_islands():
    _, found = islands(TWO_ISLANDS)
    assert [[node.outputs[0].name for node in island.nodes] for island in found] == [["c"], ["d", "y"]]
    assert [[tensor.name for tensor in island.borders] for island in found] == [["x", "c"], ["t", "y"]]


def test_an_absorbed_activation_and_a_residual_join_an_island():
    body = f"c = {CONV}(x, w, b) r = Relu(c) d = {CONV}(r, w, b) a = Add(d, x) s = Relu(a) y = {CONV}(s, w, b)"
    assert len(islands(body)[1]) == 1


def test_a_factor_joins_an_island():
    graph = graph_of(f"c = {CONV}(x, w, b) m = Mul(c, k) y = {CONV}(m, w, b)", weights="float k = {2}")
    assert len(islands_of(place(graph, ORT_CPU))) == 1


@pytest.mark.parametrize(("spent", "stays"), [(1000, False), (2_000_000, True)])
def test_an_island_that_saves_less_than_its_conversions_cost_is_named(spent, stays):
    graph, found = islands(TWO_ISLANDS)
    costs = Costs(saved_ns_per_mac={"Conv": 1.0}, border_ns=spent, border_ns_per_element=0.0)
    reasons = too_small(graph, place_all(graph, ORT_CPU), costs)
    assert set(reasons) == ({id(node) for island in found for node in island.nodes} if stays else set())
    assert all("MACs between float operators" in reason for reason in reasons.values())


def test_the_sizes_of_the_inputs_decide_what_is_too_small():
    graph, _ = islands(f"y = {CONV}(x, w, b)")
    placements = place_all(graph, ORT_CPU)
    assert too_small(graph, placements, COSTS, {"x": (1, 16, 8, 8)})
    assert not too_small(graph, placements, COSTS, {"x": (64, 16, 8, 8)})


@pytest.mark.parametrize(("body", "borders"), [(f"c = {CONV}(x, w, b) y = Relu(c)", 2), ("y = MatMul(x, m)", 1)])
@pytest.mark.parametrize(("values", "stays"), [(None, False), (650, True), (700, False)])
def test_what_calibration_saw_decides_where_no_shape_is_known(body, borders, values, stays):
    """Of each value that the Conv computes, or the product reads, 144 MACs of 0.01 ns; a border takes 1 us."""
    graph = graph_of(body, weights="float[8,144] m")
    costs = replace(COSTS, saved_ns_per_mac={"Conv": 0.01, "MatMul": 0.01})
    observed = None if values is None else borders * values
    losing = too_small(graph, place_all(graph, ORT_CPU), costs, {}, lambda tensor: observed)
    assert bool(losing) == stays


@pytest.mark.parametrize(("turns", "stays"), [(1, True), (50, True), (0.5, True), (None, False)])
def test_what_calibration_saw_in_a_loop_is_shared_by_its_turns(turns, stays):
    """A product of a state of unknown size saves 256 ns a turn, its border costs 1 us; k has 32 values in a turn."""
    body = """y = Loop (n, yes, x) <body = t (int64 i, bool go, float[A,8] z) => (bool on, float[B,8] u)
        { on = Identity(go)  p = MatMul(z, m)  k = Reshape(p, known)  u = Tanh(k) }>"""
    weights = "float[8,8] m, int64 n = {3}, bool yes = {1}, int64[2] known = {4, 8}"
    graph = graph_of(body, inputs="float[N,8] x", outputs="float[M,8] y", weights=weights)
    costs = Costs(saved_ns_per_mac={"MatMul": 1.0}, border_ns=1000, border_ns_per_element=0.0)
    seen = {"z": 32, "p": 32, "k": 32, "u": 32}
    observed = None if turns is None else lambda tensor: seen.get(tensor.name, 0) * turns or None
    losing = too_small(graph, place_all(graph, ORT_CPU), costs, {"x": (4, 8)}, observed or (lambda tensor: None))
    assert bool(losing) == stays


def test_a_depthwise_conv_alone_saves_nothing():
    graph = graph_of("y = Conv<pads=[1,1,1,1], group=16>(x, k, b)", weights="float[16,1,3,3] k")
    assert too_small(graph, place_all(graph, ORT_CPU), COSTS, {"x": (1000, 16, 8, 8)})


@pytest.mark.parametrize(
    ("channels", "outputs", "kernel", "stays"),
    [(1, 1, 3, True), (3, 15, 3, True), (3, 16, 3, False), (4, 15, 3, False), (1, 1, 1, False)],
)
def test_a_conv_of_few_channels_loses_what_its_copies_cost(channels, outputs, kernel, stays):
    text = f"""<ir_version: 8, opset_import: ["" : 17]> g (float[1,{channels},64,64] x) => (float[1,{outputs},A,B] y)
        <float[{outputs},{channels},{kernel},{kernel}] w> {{ y = Conv(x, w) }}"""
    graph = load_model(model_of(text)).graph
    infer_shapes(graph)
    costs = replace(COSTS, border_ns=0, copied_ns=1.0)
    assert bool(too_small(graph, place_all(graph, ORT_CPU), costs)) == stays


@pytest.mark.parametrize(("fixed", "per_mac", "stays"), [(-1000, 0.0, False), (-7000, 0.0, True), (-7000, 1.0, False)])
def test_a_product_of_two_activations_has_costs_of_its_own(fixed, per_mac, stays):
    """8,192 MACs between products by weights; where they are float, a conversion of 1 us stands at each end."""
    body = "q = MatMul(x, p) k = MatMul(x, r) t = Transpose<perm=[1,0]>(k) a = MatMul(q, t) y = MatMul(a, m)"
    weights = "float[8,8] p, float[8,8] r, float[32,8] m"
    graph = graph_of(body, inputs="float[32,8] x", outputs="float[32,8] y", weights=weights)
    costs = replace(
        COSTS,
        saved_ns_per_mac={"MatMul": 10.0, Kind.OF_ACTIVATIONS: per_mac},
        saved_ns_and_per_value={Kind.OF_ACTIVATIONS: (fixed, 0)},
    )
    losing = too_small(graph, place_all(graph, ORT_CPU), costs)
    assert {node.outputs[0].name for node in graph.nodes if id(node) in losing and node.op == "MatMul"} == (
        {"a"} if stays else set()
    )


@pytest.mark.parametrize(("axis", "kept"), [(1, True), (-2, True), (2, True), (3, False), (-1, False)])
def test_a_softmax_of_an_inner_axis_saves_more_than_one_of_the_last(axis, kept):
    """The last Conv saves next to nothing, and a conversion stands behind the first one or behind the last one."""
    body = f"c = {CONV}(x, w, b) s = Softmax<axis={axis}>(c) y = Conv(s, k)"
    graph = graph_of(body, outputs="float[N,1,8,8] y", weights="float[1,16,1,1] k")
    costs = replace(COSTS, saved_ns_and_per_value={"Softmax": (-100, 0.0), Kind.INNER_SOFTMAX: (0.0, 1.0)})
    losing = too_small(graph, place_all(graph, ORT_CPU), costs, {"x": (4, 16, 8, 8)})
    assert {node.op for node in graph.nodes if id(node) in losing} == (set() if kept else {"Softmax", "Conv"})


@pytest.mark.parametrize(("layout", "stays"), [(0, True), (2000, False)])
def test_a_float_conv_between_int8_ones_costs_two_changes_of_layout(layout, stays):
    body = f"c = {CONV}(x, w, b) d = Conv<pads=[1,1,1,1], group=16>(c, k, b) y = {CONV}(d, w, b)"
    graph = graph_of(body, weights="float[16,1,3,3] k")
    saved = {"Conv": 0.1, Kind.DEPTHWISE: -0.3}  # 59 us for each of the two, and 11 us lost between them
    costs = Costs(saved_ns_per_mac=saved, border_ns=5000, border_ns_per_element=0.0, layout_ns=layout)
    losing = too_small(graph, place_all(graph, ORT_CPU), costs, {"x": (4, 16, 8, 8)})
    assert {node.outputs[0].name for node in graph.nodes if id(node) in losing} == ({"d"} if stays else set())


def test_an_island_whose_depthwise_convs_lose_what_the_others_save_is_named():
    body = f"c = {CONV}(x, w, b) d = Conv<pads=[1,1,1,1], group=16>(c, k, b) y = {CONV}(d, w, b)"
    graph = graph_of(body, weights="float[16,1,3,3] k")
    costs = {
        loss: Costs(saved_ns_per_mac={"Conv": 0.01, Kind.DEPTHWISE: -loss}, border_ns=4000, border_ns_per_element=0.0)
        for loss in (0.0, 0.2)
    }
    placements, shapes = place_all(graph, ORT_CPU), {"x": (4, 16, 8, 8)}
    assert not too_small(graph, placements, costs[0.0], shapes)
    (reason,) = set(too_small(graph, placements, costs[0.2], shapes).values())
    assert reason == (
        "1,216,512 MACs between float operators: int8 would save some 11.8 us, lose 7.4 us in slower kernels, spend "
        "8.0 us on conversions (qdq:small_islands=true quantizes it)"
    )


def test_what_saves_too_little_at_the_edge_of_an_island_stays_float():
    body = f"c = {CONV}(x, w, b) p = GlobalAveragePool(c) y = Conv(p, k) z = Conv(p, k)"
    graph = graph_of(body, outputs="float[N,4,1,1] y, float[N,4,1,1] z", weights="float[4,16,1,1] k")
    reasons = too_small(graph, place_all(graph, ORT_CPU), COSTS, {"x": (4, 16, 8, 8)})
    by_name = {node.outputs[0].name: reasons.get(id(node)) for node in graph.nodes}
    assert by_name["c"] is None
    assert (
        by_name["y"]
        == by_name["z"]
        == (
            "512 MACs at an edge: int8 would save some 0.0 us, spend 1.0 us more on conversions "
            "(qdq:small_islands=true quantizes it)"
        )
    )


@pytest.mark.parametrize(("fused", "losing"), [((), {"c"}), (("LeakyRelu",), {"c", "r"})])
def test_what_is_fused_into_a_float_operator_saves_nothing_behind_it(fused, losing):
    graph = graph_of(f"c = {CONV}(x, w, b) r = LeakyRelu(c) y = {CONV}(r, w, b)")
    costs = Costs(
        saved_ns_per_mac={"Conv": 0.01},
        border_ns=0,
        border_ns_per_element=1.0,
        saved_ns_and_per_value={} if fused else {"LeakyRelu": (0.0, 1.0)},
        fused_in_float=dict.fromkeys(fused, (0.0, 1.0)),
    )
    first, second = (node for node in graph.nodes if node.op == "Conv")
    trade = _Trade(place(graph, ORT_CPU), graph, costs, lambda _: None)
    trade.macs = {first.outputs[0].name: 1_000, second.outputs[0].name: 1_000_000}
    trade.shapes = dict.fromkeys("xcry", (1, 1, 1, 100))
    trade.shapes |= {"x": (1, 1, 1, 120), "r": (1, 1, 1, 90)}
    (island,) = islands_of(place(graph, ORT_CPU))
    assert {node.outputs[0].name for node in graph.nodes if id(node) in trade.losing(island)} == losing


@pytest.mark.parametrize(("before", "fused"), [("Conv<pads=[1,1,1,1]>(x, w, b)", True), ("Tanh(x)", False)])
def test_what_is_fused_costs_nothing_in_float_behind_a_conv_alone(before, fused):
    """Behind a float Conv nothing is saved by an operator in int8, behind another what it costs in float."""
    graph = graph_of(f"c = {before} h = HardSwish(c) y = {CONV}(h, w, b)")
    own, in_float = {"HardSwish": (-10.0, 0.0)}, {"HardSwish": (100.0, 0.0)}
    costs = replace(COSTS, saved_ns_per_mac={}, border_ns=10.0, saved_ns_and_per_value=own, fused_in_float=in_float)
    losing = too_small(graph, place_all(graph, ORT_CPU), costs, {"x": (1, 16, 8, 8)})
    assert ({node.op for node in graph.nodes if id(node) in losing} >= {"HardSwish"}) == fused


@pytest.mark.parametrize(
    ("squeezed", "stays"), [("GlobalAveragePool(c)", True), ("MaxPool<kernel_shape=[1,1]>(c)", False)]
)
def test_a_mul_by_a_value_a_channel_costs_for_each_pixel(squeezed, stays):
    body = f"c = {CONV}(x, w, b) p = {squeezed} g = Conv(p, k) m = Mul(c, g) y = {CONV}(m, w, b)"
    graph = graph_of(body, weights="float[16,16,1,1] k")
    costs = replace(COSTS, border_ns=0, pixel_ns=1000)
    losing = too_small(graph, place_all(graph, ORT_CPU), costs, {"x": (1, 16, 8, 8)})
    reasons = {node.op: losing[id(node)] for node in graph.nodes if id(node) in losing}
    assert ("Mul" in reasons) == stays
    assert not stays or "lose 64.0 us in slower kernels" in reasons["Mul"]


@given(
    st.lists(st.integers(1, 40), min_size=4, max_size=4),
    st.integers(0, 30),
    st.integers(-30, 30),
    st.integers(0, 20),
    st.integers(0, 40),
)
@settings(max_examples=120, deadline=None)
def test_no_other_choice_saves_more(savings, border, depthwise, layout, fused):
    """Against all choices, on a net with a residual, a bypass in float and two outputs."""
    body = (
        f"c = {CONV}(x, w, b) t = Tanh(c) d = Conv<pads=[1,1,1,1], group=16>(c, k, b) "
        f"a = Add(d, x) y = {CONV}(a, w, b) z = MatMul(a, m)"
    )
    outputs = "float[N,16,8,8] y, float[N,16,8,8] t, float[N,16,8,8] z"
    graph = graph_of(body, outputs=outputs, weights="float[16,1,3,3] k, float[8,8] m")
    placements = place_all(graph, ORT_CPU)
    costs = Costs(
        saved_ns_per_mac={"Conv": savings[0] / 147456, Kind.DEPTHWISE: depthwise / 9216, "MatMul": savings[1] / 8192},
        border_ns=border,
        border_ns_per_element=0.0,
        layout_ns=layout,
        saved_ns_and_per_value={"Add": (savings[2] - savings[3], 0.0)},
        fused_in_float={"Add": (fused, 0.0)},
    )
    gains = {"c": savings[0], "d": depthwise, "y": savings[0], "z": savings[1], "a": savings[2] - savings[3]}
    islands_found = islands_of(placements[0])
    named = {id(node): node.outputs[0].name for island in islands_found for node in island.nodes}

    of_convs = {key for key, name in named.items() if name in "cday"}

    def worth(int8):
        links = [link for island in islands_found for link in island.links]
        spent = sum(border * link.is_converted(int8) + layout * link.changes_layout(int8, of_convs) for link in links)
        kept = {named[key] for key in int8}
        return sum(map(gains.get, kept)) - spent - fused * ("d" in kept and "a" not in kept)

    losing = too_small(graph, placements, costs, {"x": (1, 16, 8, 8)})
    choices = [set(kept) for size in range(len(named) + 1) for kept in combinations(named, size)]
    assert worth(set(named) - set(losing)) == pytest.approx(max(map(worth, choices)))


def test_small_islands_stay_float_with_the_reason_unless_asked_for():
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        small (float[1,16] x) => (float[1,4] y) <float[16,4] w> { y = Gemm(x, w) }
    """
    data = [{"x": np.ones((1, 16), np.float32)}]
    result = graphopt.optimize(model_of(text), "calibrate,qdq", data=data)
    (skip,) = result.report.passes[-1].skipped
    assert "qdq:small_islands=true" in skip.reason
    assert "QGemm" not in optimized_ops(result.model)
    asked = graphopt.optimize(model_of(text), "calibrate,qdq:small_islands=true", data=data)
    assert optimized_ops(asked.model)["QGemm"] == 1


def test_autotune_leaves_what_is_slower_in_float_and_says_what_it_measured(monkeypatch):
    _, found = islands(TWO_ISLANDS)
    monkeypatch.setattr("graphopt.autotune.open_session", lambda model: model)
    monkeypatch.setattr(
        "graphopt.autotune.measure_latency",
        lambda models, feed, **_: [{(): 2e-3, (0,): 1e-3, (1,): 3e-3, (0, 1): 1.5e-3}[each] for each in models],
    )
    tuned = tune(found, lambda left_out: tuple(sorted(left_out)), {})
    assert tuned.reasons == {0: "measured: 1 ms without it, 2 ms with it"}
    assert (tuned.float_seconds, tuned.int8_seconds, tuned.seconds) == (1.5e-3, 2e-3, 1e-3)
    assert str(tuned) == (
        "measured on this machine: 1.5 ms in float, 2 ms in int8, 1 ms with 1 of 2 islands left in float"
    )


def test_autotune_keeps_the_float_graph_where_nothing_beats_it(monkeypatch):
    _, found = islands(f"y = {CONV}(x, w, b)")
    monkeypatch.setattr("graphopt.autotune.open_session", lambda model: model)
    monkeypatch.setattr(
        "graphopt.autotune.measure_latency", lambda models, feed, **_: [{(): 2e-3, (0,): 1e-3}[each] for each in models]
    )
    tuned = tune(found, lambda left_out: tuple(left_out), {})
    assert tuned.reasons == {0: "measured: 1 ms in float, 2 ms in int8"}
    assert str(tuned).endswith("1 ms in float, 2 ms in int8, 1 ms with 1 of 1 island left in float")


def test_autotune_tells_its_progress_to_the_end(monkeypatch):
    _, found = islands(TWO_ISLANDS)
    monkeypatch.setattr("graphopt.autotune.open_session", lambda model: model)
    monkeypatch.setattr("graphopt.autotune.measure_latency", lambda models, feed, **_: [1e-3 for _ in models])
    told = []
    tune(found, lambda left_out: left_out, {}, progress=lambda *each: told.append(each))
    assert told == [("measure int8 islands", done, 3) for done in range(4)]


def test_autotune_measures_a_real_graph():
    rng = np.random.default_rng(0)
    x = gs.Variable("x", np.float32, [1, 512])
    middle, y = gs.Variable("m", np.float32, [1, 512]), gs.Variable("y", np.float32, [1, 512])
    weights = [gs.Constant(f"w{i}", rng.normal(size=(512, 512)).astype(np.float32)) for i in range(2)]
    hidden = gs.Variable("h", np.float32, [1, 512])
    nodes = [
        gs.Node("MatMul", "first", inputs=[x, weights[0]], outputs=[middle]),
        gs.Node("Tanh", "between", inputs=[middle], outputs=[hidden]),
        gs.Node("MatMul", "second", inputs=[hidden, weights[1]], outputs=[y]),
    ]
    graph = gs.Graph(nodes, [x], [y], opset=17)
    data = [{"x": rng.normal(size=(1, 512)).astype(np.float32)}]
    result = graphopt.optimize(graph, "calibrate,qdq:autotune=true", data=data)
    last = result.report.passes[-1]
    operators = last.parts.get("operators", 0)
    assert operators + len(last.skipped) == 2
    assert all("measured" in skip.reason for skip in last.skipped)
    (note,) = [note for note in result.report.to_json()["passes"][-1]["notes"] if "measured" in note]
    assert "of 2 islands left in float" in note


def test_autotune_is_refused_for_a_target_elsewhere():
    model = load_model(
        model_of(
            """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[2,16] x) => (float[2,16] y) <float[16,16] w> { y = MatMul(x, w) }
        """
        )
    )
    data = [{"x": np.ones((2, 16), np.float32)}]
    with pytest.raises(PipelineError, match="runs elsewhere"):
        graphopt.optimize(model.graph, "calibrate,qdq:autotune=true", data=data, target="tensorrt")
