import numpy as np
import onnx.parser
import pytest

from graphopt.errors import DataError
from graphopt.feeds import Samples
from graphopt.frame import Frame
from graphopt.graph import constant_of, set_input
from graphopt.model_io import Model, load_model
from graphopt.replay import Piece, Replay
from graphopt.runtime import open_session

SKIP = """
    <ir_version: 8, opset_import: ["" : 17]>
    skip (float[N, 4] x) => (float[N, 4] y)
    <float[4, 4] a = {1,2,0,0, 0,1,1,0, 1,0,0,1, 0,0,2,1}, float[4, 4] b = {0,1,0,0, 0,1,1,0, 1,0,1,0, 0,0,0,1}>
    {
        first = MatMul (x, a)
        positive = Relu (first)
        second = MatMul (positive, b)
        y = Add (second, x)
    }
"""
COUNT = 5
FEEDS = [{"x": np.random.default_rng(seed).standard_normal((2, 4)).astype(np.float32)} for seed in range(COUNT)]


class CountedSamples:
    def __init__(self):
        self.iterations = 0

    def start(self):
        self.iterations += 1
        return iter(FEEDS)


def node_of(graph, output):
    return next(node for node in graph.nodes if node.outputs[0].name == output)


def replay_of(graphs, budget, source=None):
    samples = Samples((source or CountedSamples()).start, "made here", COUNT)
    return Replay(graphs, Frame(), samples, COUNT, budget)


def values_of(graph, tensor):
    session = open_session(Model(graph), extra_outputs=[tensor])
    return [session.run(feed)[tensor] for feed in FEEDS]


@pytest.mark.parametrize("budget", [2**20, 0])
def test_pieces_see_what_the_whole_graph_computes_with_the_weights_set_meanwhile(budget):
    graph, original = (load_model(onnx.parser.parse_model(SKIP)).graph for _ in range(2))
    replay = replay_of((graph, original), budget)
    for output in ("first", "second"):
        node = node_of(graph, output)
        reads = node.inputs[0].name
        here, there = Piece(node, [reads, "x"]), Piece(node_of(original, output), [output])
        found = list(replay.run(here, there))
        np.testing.assert_allclose([now[reads] for now, _ in found], values_of(graph, reads), rtol=1e-6)
        np.testing.assert_array_equal([now["x"] for now, _ in found], [feed["x"] for feed in FEEDS])
        np.testing.assert_allclose([then[output] for _, then in found], values_of(original, output), rtol=1e-6)
        set_input(node, 1, gs_constant(node, 3))


def gs_constant(node, factor):
    constant = node.inputs[1]
    return type(constant)(constant.name, constant_of(constant) * np.float32(factor))


@pytest.mark.parametrize(("budget", "iterations"), [(2**20, 1), (0, 2)])
def test_the_samples_are_read_once_where_what_crosses_fits_into_the_budget(budget, iterations):
    graph, original = (load_model(onnx.parser.parse_model(SKIP)).graph for _ in range(2))
    source = CountedSamples()
    replay = replay_of((graph, original), budget, source)
    for output in ("first", "second"):
        list(replay.run(*(Piece(node_of(each, output), [output]) for each in (graph, original))))
    assert source.iterations == iterations


def test_what_is_kept_stays_within_the_budget():
    graph, original = (load_model(onnx.parser.parse_model(SKIP)).graph for _ in range(2))
    one = 2 * FEEDS[0]["x"].nbytes  # x and the other operand of the second product
    for budget, kept in ((2 * COUNT * one, one), (2 * COUNT * one - 2, one // 2)):
        replay = replay_of((graph, original), budget)
        for output in ("first", "second"):
            list(replay.run(*(Piece(node_of(each, output), [output]) for each in (graph, original))))
        for each in replay._graphs:
            assert [sum(array.nbytes for array in values.values()) for values in each.held] == [kept] * COUNT


def test_arrays_that_a_source_fills_again_are_copied():
    graph, original = (load_model(onnx.parser.parse_model(SKIP)).graph for _ in range(2))
    array = np.empty_like(FEEDS[0]["x"])

    def start():
        for feed in FEEDS:
            array[:] = feed["x"]
            yield {"x": array}

    replay = Replay((graph, original), Frame(), Samples(start, "one array", COUNT), COUNT, 2**20)
    list(replay.run(*(Piece(node_of(each, "second"), []) for each in (graph, original))))
    found = list(replay.run(Piece(node_of(graph, "y"), ["x"]), Piece(node_of(original, "y"), [])))
    np.testing.assert_array_equal([now["x"] for now, _ in found], [feed["x"] for feed in FEEDS])


def test_an_input_with_a_default_value_needs_no_feed():
    text = SKIP.replace("x) =>", "x, float[4, 4] a) =>").replace(
        "<float[4, 4] a = {1,2,0,0, 0,1,1,0, 1,0,0,1, 0,0,2,1},", "<"
    )
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "a"))
    models = [load_model(proto) for _ in range(2)]
    samples = Samples(lambda: iter(FEEDS), "made here", COUNT)
    replay = Replay((models[0].graph, models[1].graph), models[0].frame, samples, COUNT, 2**20)
    pieces = [Piece(node_of(model.graph, "second"), ["first"]) for model in models]
    for (now, then), feed in zip(replay.run(*pieces), FEEDS, strict=True):
        np.testing.assert_allclose(now["first"], feed["x"])
        np.testing.assert_allclose(then["first"], feed["x"])


def test_a_sample_that_a_graph_does_not_run_on_is_named():
    graph, original = (load_model(onnx.parser.parse_model(SKIP)).graph for _ in range(2))
    feeds = [FEEDS[0], {"x": np.ones((2, 3), np.float32)}]
    replay = Replay((graph, original), Frame(), Samples(lambda: iter(feeds), "made here", 2), 2, 2**20)
    with pytest.raises(DataError, match="does not run on sample 1"):
        list(replay.run(*(Piece(node_of(each, "second"), ["first"]) for each in (graph, original))))


def test_what_depends_on_constants_alone_is_computed_again_not_kept_with_each_sample():
    text = SKIP.replace(
        "float[4, 4] b = {0,1,0,0, 0,1,1,0, 1,0,1,0, 0,0,0,1}>",
        "int8[4, 4] q = {0,1,0,0, 0,1,1,0, 1,0,1,0, 0,0,0,1}, float s = {0.5}>",
    )
    text = text.replace("first =", "b = DequantizeLinear (q, s)  first =")
    graphs = tuple(load_model(onnx.parser.parse_model(text)).graph for _ in range(2))
    samples = Samples(CountedSamples().start, "made here", COUNT)
    replay = Replay(graphs, Frame(), samples, COUNT, 2**20, optimize=False)  # else the weight is rounded again
    for output in ("first", "second", "y"):
        (now, then), *_ = replay.run(*(Piece(node_of(each, output), [output]) for each in graphs))
        session = open_session(Model(graphs[0]), optimize=False, extra_outputs=[output])
        np.testing.assert_array_equal(now[output], session.run(FEEDS[0])[output])
        np.testing.assert_array_equal(now[output], then[output])
        assert "b" not in replay._graphs[0].held[0]
