"""Which int8 MaxPools onnxruntime runs with the channels first: what is foretold is what its optimized graph holds."""

import numpy as np
import pytest
from test_placement import CONV
from texts import model_of

import graphopt
from graphopt.channels_last import pools_with_channels_first
from graphopt.islands import too_small
from graphopt.model_io import load_model
from graphopt.placement import place
from graphopt.runtime import optimized_graph, optimized_ops
from graphopt.shapes import infer_shapes
from graphopt.targets import Costs, Kind
from graphopt.targets.ort_cpu import ORT_CPU

POOL = "MaxPool<kernel_shape=[2,2], strides=[2,2]>"
C = f"c = {CONV}(x, w, b)"
SILU = f"{C} s = Sigmoid(c) m = Mul(c, s)"
CASES = [
    (f"{C} p = {POOL}(c)", False),
    (f"{C} r = Relu(c) p = {POOL}(r)", False),
    (f"{C} t = Mul(c, two) p = {POOL}(t)", False),
    (f"{C} q = {POOL}(c) p = {POOL}(q)", False),
    (f"{C} s = Sigmoid(c) p = {POOL}(s)", True),
    (f"{C} h = HardSigmoid(c) p = {POOL}(h)", True),
    (f"{SILU} p = {POOL}(m)", True),
    (f"{SILU} q = {POOL}(m) p = {CONV}(q, w, b)", False),
    (f"{SILU} q = {POOL}(m) t = Mul(q, two) p = {CONV}(t, w, b)", False),
    (f"{SILU} q = {POOL}(m) v = Reshape(q, known) p = {CONV}(v, w, b)", True),
    (f"{C} d = {CONV}(c, w, b) a = Add(c, d) p = {POOL}(a)", False),
    (f"{C} d = {CONV}(x, w, b) a = Concat<axis=1>(c, d) p = {POOL}(a)", False),
    (f"{SILU} d = {CONV}(x, w, b) a = Add(m, d) p = {POOL}(a)", True),
    (f"{C} g = GlobalAveragePool(c) e = {CONV}(g, w, b) m = Mul(c, e) p = {POOL}(m)", False),
    (f"{C} v = AveragePool<kernel_shape=[2,2]>(c) p = {POOL}(v)", False),
    (f"{C} v = AveragePool<kernel_shape=[2,2]>(c) s = Sigmoid(v) p = {POOL}(s)", True),
]


def model_with(body, channels=16):
    """A net whose tensor p goes on to a matrix product, so that it is wanted in int8."""
    shapes = "int64[4] known = {1, 16, 2, 8}, int64[4] four = {1, 16, 4, 16}"
    weights = f"float[16,16,3,3] w, float[16] b, float two = {{2}}, {shapes}, float[{channels},4] k"
    return load_model(
        model_of(
            f"""<ir_version: 8, opset_import: ["" : 14]> g (float[1,16,8,8] x) => (float[1,4] y) <{weights}>
                {{ {body} o = GlobalAveragePool(p) z = Flatten(o) y = MatMul(z, k) }}"""
        )
    )


def quantized(model, options=""):
    feeds = [{"x": each} for each in np.random.default_rng(0).normal(size=(4, 1, 16, 8, 8)).astype(np.float32)]
    passes = f"calibrate:method=minmax,qdq:small_islands=true{options}"
    return graphopt.optimize(model, passes, data=feeds, verify=False).model


@pytest.mark.parametrize(("body", "first"), CASES)
def test_what_onnxruntime_runs_with_the_channels_first_is_foretold(body, first):
    model = model_with(body, channels=32 if "Concat" in body else 16)
    infer_shapes(model.graph)
    placement = place(model.graph, ORT_CPU)
    pools = [node for node in placement.nodes if node.op == "MaxPool"]
    assert pools
    assert pools_with_channels_first(placement) == (set(map(id, pools)) if first else set())

    ran = optimized_ops(quantized(model))
    assert (ran["MaxPool"], ran["NhwcMaxPool"]) == ((len(pools), 0) if first else (0, len(pools)))


@pytest.mark.parametrize("body", [f"{SILU} p = {POOL}(m)", f"{C} p = {POOL}(c)"])
@pytest.mark.parametrize("lost", [0, 1000])
def test_a_pool_that_loses_more_there_than_conversions_cost_stays_float(body, lost):
    model = model_with(body)
    infer_shapes(model.graph)
    costs = Costs(
        saved_ns_per_mac={"Conv": 1.0, Kind.FEW_ROWS: 1.0},
        border_ns=10,
        border_ns_per_element=0.0,
        saved_ns_and_per_value={Kind.CHANNELS_FIRST_POOL: (0, -lost)},
    )
    found = too_small(model.graph, [place(model.graph, ORT_CPU)], costs)
    losing = {node.op for node in model.graph.nodes if id(node) in found}
    assert ("MaxPool" in losing) == (lost > 0 and body.startswith(SILU))
    assert not losing & {"Conv", "MatMul"}


ELU = f"e = Elu(x) q = {POOL}(e)"


@pytest.mark.parametrize(
    ("readers", "integers"), [(f"p = {CONV}(q, w, b)", True), (f"c = {CONV}(q, w, b) p = Mod<fmod=1>(c, q)", False)]
)
def test_a_q_behind_a_float_pool_moves_before_it_where_nothing_else_reads_it(readers, integers):
    graph = optimized_graph(quantized(model_with(f"{ELU} {readers}"), ":exclude_ops=GlobalAveragePool+MatMul"))
    makers = {name: node.op_type for node in graph.node for name in node.output}
    (pool,) = [node for node in graph.node if node.op_type == "MaxPool"]
    assert (makers[pool.input[0]] == "QuantizeLinear") == integers


@pytest.mark.parametrize(
    ("readers", "stays"), [(f"p = {CONV}(q, w, b)", True), (f"c = {CONV}(q, w, b) p = Mod<fmod=1>(c, q)", False)]
)
def test_what_such_a_pool_loses_counts_against_the_operators_behind_it(readers, stays):
    model = model_with(f"{ELU} {readers}")
    infer_shapes(model.graph)
    costs = Costs(
        saved_ns_per_mac={"Conv": 1.0},
        border_ns=10,
        border_ns_per_element=0.0,
        saved_ns_and_per_value={Kind.CHANNELS_FIRST_POOL: (0, -10_000)},
    )
    found = too_small(model.graph, [place(model.graph, ORT_CPU)], costs)
    assert ("Conv" in {node.op for node in model.graph.nodes if id(node) in found}) == stays


A = f"a = {CONV}(x, w, b)"


@pytest.mark.parametrize(
    ("before", "first"),
    [
        ("e = Elu(x)", True),
        (f"{A} e = Elu(a)", False),
        (f"{A} t = Tanh(a) u = Sub(t, two) e = Elu(u)", False),
        (f"{A} v = Reshape(a, four) e = Elu(v)", True),
    ],
)
def test_behind_an_int8_conv_such_a_pool_has_its_channels_last(before, first):
    model = model_with(f"{before} q = {POOL}(e) p = {CONV}(q, w, b)")
    infer_shapes(model.graph)
    (pool,) = [node for node in model.graph.nodes if node.op == "MaxPool"]
    assert pools_with_channels_first(place(model.graph, ORT_CPU)) == ({id(pool)} if first else set())

    ran = optimized_ops(quantized(model))
    assert (ran["MaxPool"], ran["NhwcMaxPool"]) == ((1, 0) if first else (0, 1))
