import json
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from comparing import ops
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import model_of
from zoo import zoo_feeds, zoo_model

import graphopt
from graphopt import bias_correction
from graphopt.bias_correction import Correctable, correct, correctable, shrunk_mean
from graphopt.cli import OK, main
from graphopt.errors import DataError, PipelineError
from graphopt.feeds import Samples
from graphopt.graph import Names, constant_of, set_input
from graphopt.graph_copy import copy_graph
from graphopt.held_out import Judge
from graphopt.model_io import Model, load_model
from graphopt.pass_base import Context
from graphopt.passes import correct_bias as module
from graphopt.passes.calibrate import Calibrate
from graphopt.passes.correct_bias import CorrectBias
from graphopt.passes.insert_qdq import InsertQdq
from graphopt.runtime import open_session
from graphopt.shapes import infer_shapes
from graphopt.thresholds import Method

MODELS = Path(__file__).resolve().parent.parent / "models"
HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
PAIR = "<float s = {0.01}, uint8 z = {0}> { q = QuantizeLinear (x, s, z)  d = DequantizeLinear (q, s, z)"


def loaded(text, seed=0):
    model = load_model(model_of(f"{HEAD} {text}", seed))
    infer_shapes(model.graph)
    return model


def both(signature, weights, body):
    """A graph, and the same with x clipped to [0, 2.55] by a pair before it; `body` reads d."""
    original = loaded(f"g {signature} <{weights}> {{ d = Identity (x) {body} }}")
    quantized = loaded(f"g {signature} <{weights}, {PAIR[1:]} {body} }}")
    return original, quantized


def rows_in_any_order(shape, count=16):
    """Feeds with the same values in each channel, half of them above what the pair passes, in another order."""
    rng = np.random.default_rng(3)
    channels = shape[1] if len(shape) == 4 else shape[-1]
    rows = rng.integers(0, 510, (int(np.prod(shape)) // channels, channels)).astype(np.float32) / np.float32(100)
    orders = [rng.permutation(rows) for _ in range(count)]
    return [{"x": each.T.reshape(shape) if len(shape) == 4 else each.reshape(shape)} for each in orders]


def samples_of(feeds):
    return Samples(lambda: iter(feeds), "made here", len(feeds))


def corrected(original, quantized, feeds, item=None, **fields):
    context = Context(samples=samples_of(feeds), unquantized=original.graph, frame=quantized.frame, **fields)
    return (item or CorrectBias()).apply(quantized.graph, context)


def mean_shift(original, model, feeds):
    """The largest mean difference of a channel of y, over all feeds."""
    before, after = (open_session(Model(each.graph, each.frame), optimize=False) for each in (original, model))
    shifts = np.mean([before.run(feed)["y"] - after.run(feed)["y"] for feed in feeds], axis=0)
    others = (0, 2, 3) if shifts.ndim == 4 else tuple(range(shifts.ndim - 1))
    return np.abs(shifts.mean(axis=others)).max()


CONV = "(float[1, 3, 4, 4] x) => (float[1, 5, 4, 4] y)"
KINDS = {
    "Conv": (CONV, "float[5, 3, 1, 1] w, float[5] b", "y = Conv (d, w, b)"),
    "Conv without a bias": (CONV, "float[5, 3, 1, 1] w", "y = Conv (d, w)"),
    "Conv before an activation": (CONV, "float[5, 3, 1, 1] w", "h = Conv (d, w)  y = Identity (h)"),
    "ConvTranspose": (CONV, "float[3, 5, 1, 1] w, float[5] b", "y = ConvTranspose (d, w, b)"),
    "Gemm": (
        "(float[6, 7] x) => (float[6, 3] y)",
        "float[7, 3] w, float[3] b",
        "y = Gemm <alpha = 0.5, beta = 2.0> (d, w, b)",
    ),
    "Gemm with one number as bias": (
        "(float[6, 7] x) => (float[6, 3] y)",
        "float[7, 3] w, float[1] b = {1}",
        "y = Gemm (d, w, b)",
    ),
    "Gemm without a bias": ("(float[6, 7] x) => (float[6, 3] y)", "float[3, 7] w", "y = Gemm <transB = 1> (d, w)"),
    "MatMul and Add": (
        "(float[2, 3, 7] x) => (float[2, 3, 4] y)",
        "float[7, 4] w, float[4] b",
        "p = MatMul (d, w)  y = Add (b, p)",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_shift_that_clipping_makes_is_corrected(kind):
    original, quantized = both(*KINDS[kind])
    nodes = ops(quantized.to_proto())
    feeds = rows_in_any_order(tuple(original.graph.inputs[0].shape))
    assert mean_shift(original, quantized, feeds) > 0.1
    result = corrected(original, quantized, feeds)
    assert result.rewrites == 1
    assert not result.skipped
    assert result.parts == {"operators": 1, "samples": 16}
    assert mean_shift(original, quantized, feeds) < 1e-5
    assert ops(quantized.to_proto()) == nodes
    assert "error on 4 held-out samples: " in result.notes[0]


def test_a_bias_that_another_node_reads_stays_what_it_is_there():
    original, quantized = both(
        CONV, "float[5, 3, 1, 1] w, float[5] b", "y = Conv (d, w, b)  other = Conv (x, w, b)  sink = Relu (other)"
    )
    feeds = rows_in_any_order((1, 3, 4, 4))
    other = next(node for node in quantized.graph.nodes if node.outputs[0].name == "other")
    bias, values = other.inputs[2], constant_of(other.inputs[2]).copy()
    assert corrected(original, quantized, feeds).rewrites == 1
    assert other.inputs[2] is bias
    np.testing.assert_array_equal(constant_of(bias), values)
    assert mean_shift(original, quantized, feeds) < 1e-5


def test_a_graph_output_that_carries_a_pair_is_found_behind_it():
    original, quantized = both(*KINDS["Conv"])
    conv = quantized.graph.nodes[-1]
    inner = gs.Variable("y_float", np.float32, conv.outputs[0].shape)
    output, scale, zero_point = (
        conv.outputs[0],
        gs.Constant("t", np.array(1, "f4")),
        gs.Constant("u", np.array(0, "i1")),
    )
    stored = gs.Variable("stored", np.int8, output.shape)
    conv.outputs[0] = inner
    quantized.graph.nodes += [
        gs.Node("QuantizeLinear", inputs=[inner, scale, zero_point], outputs=[stored]),
        gs.Node("DequantizeLinear", inputs=[stored, scale, zero_point], outputs=[output]),
    ]
    operators, _ = correctable(quantized.graph, original.graph, Context())
    assert [(each.output, each.target) for each in operators] == [("y_float", "y")]


GUARDS = {
    "no Add of a constant per channel": (
        "(float[2, 7] x) => (float[2, 3] y)",
        "float[7, 3] w",
        "y = MatMul (d, w)",
    ),
    "its bias is computed by DequantizeLinear": (
        CONV,
        "float[5, 3, 1, 1] w, int32[5] i = {1, 2, 3, 4, 5}, float t = {0.1}",
        "b = DequantizeLinear (i, t)  y = Conv (d, w, b)",
    ),
    "its bias is graph input b": (
        "(float[1, 3, 4, 4] x, float[5] b) => (float[1, 5, 4, 4] y)",
        "float[5, 3, 1, 1] w",
        "y = Conv (d, w, b)",
    ),
}


@pytest.mark.parametrize("reason", GUARDS)
def test_leaves_alone_with_the_reason(reason):
    original, quantized = both(*GUARDS[reason])
    result = corrected(original, quantized, [])
    assert result.rewrites == 0
    assert [reason in skip.reason for skip in result.skipped] == [True]


def test_leaves_alone_what_the_float_graph_does_not_have():
    original, quantized = both(*KINDS["Conv before an activation"])
    next(node for node in original.graph.nodes if node.op == "Conv").outputs[0].name = "renamed"
    result = corrected(original, quantized, [])
    assert [skip.where for skip in result.skipped] == ["h"]
    assert "put correct-bias behind qdq" in result.skipped[0].reason


def test_a_product_of_two_activations_has_no_bias_and_needs_no_reason():
    original, quantized = both("(float[4, 4] x) => (float[4, 4] y)", "float[1] n", "y = MatMul (d, d)")
    assert correctable(quantized.graph, original.graph, Context()) == ([], [])


CHAIN = """chain (float[1, 4, 8, 8] x) => (float[1, 8, 8, 8] y) <float[8, 4, 3, 3] w0, float[8] b0, {weights}>
    {{ c0 = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)  r0 = Relu (c0)  {nodes} y = Identity (r{last}) }}"""


def chain(depth, seed):
    """A chain of Convs with Relu."""
    steps = range(1, depth)
    nodes = "".join(f"c{n} = Conv <pads = [1, 1, 1, 1]> (r{n - 1}, w{n}, b{n})  r{n} = Relu (c{n})  " for n in steps)
    weights = ", ".join(f"float[8, 8, 3, 3] w{n}, float[8] b{n}" for n in steps)
    return loaded(CHAIN.format(nodes=nodes, weights=weights, last=depth - 1), seed)


def quantized_chain(depth, seed, percent=97.0, count=16):
    """The graph with pairs whose ranges clip much, and the context that qdq leaves."""
    model = chain(depth, seed)
    rng = np.random.default_rng(seed)
    feeds = [{"x": rng.standard_normal((1, 4, 8, 8)).astype("f4")} for _ in range(count)]
    context = Context(samples=samples_of(feeds), frame=model.frame)
    Calibrate(method=Method.PERCENTILE, percent=percent).apply(model.graph, context)
    InsertQdq(small_islands=True).apply(model.graph, context)
    infer_shapes(model.graph)
    return model, context


def held_out_error(graph, context):
    judge = Judge(open_session(Model(context.unquantized, context.frame)), context.samples)
    return judge.error(open_session(Model(graph, context.frame), optimize=False))


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), depth=st.integers(2, 4), percent=st.sampled_from([90.0, 97.0, 99.9]))
def test_the_held_out_error_never_rises(seed, depth, percent):
    model, context = quantized_chain(depth, seed, percent)
    before = held_out_error(model.graph, context)
    result = CorrectBias().apply(model.graph, context)
    after = held_out_error(model.graph, context)
    assert after < before if result.rewrites else after == before


def test_one_operator_after_another_is_better_than_all_at_once(monkeypatch):
    model, context = quantized_chain(12, seed=1, count=32)
    one_by_one, at_once = copy_graph(model.graph), copy_graph(model.graph)
    correct(one_by_one, context.unquantized, context.samples, 32, context)
    operators, _ = correctable(at_once, context.unquantized, context)
    monkeypatch.setattr(Correctable, "move", lambda *_: None)
    gained = correct(copy_graph(model.graph), context.unquantized, context.samples, 32, context)
    monkeypatch.undo()
    for operator in operators:
        if operator.output in gained:
            operator.move(gained[operator.output], Names(at_once))
    before, all_at_once, in_turn = (held_out_error(graph, context) for graph in (model.graph, at_once, one_by_one))
    assert in_turn < 0.95 * before
    assert in_turn < 0.7 * all_at_once


def test_operators_are_taken_in_the_order_of_the_float_graph_whatever_the_order_of_the_other():
    body = "a = Conv (d, v)  b = Relu (a)  e = Conv (b, w)  f = Conv (d, u)  y = Add (e, f)"
    weights = "float[5, 3, 1, 1] v, float[5, 5, 1, 1] w, float[5, 3, 1, 1] u"
    original, quantized = both(CONV, weights, body)
    quantized.graph.nodes.sort(key=lambda node: "xqdfabey".index(node.outputs[0].name))
    context = Context(frame=quantized.frame)
    samples = samples_of(rows_in_any_order((1, 3, 4, 4)))
    gained = correct(quantized.graph, original.graph, samples, 16, context)
    assert list(gained) == ["a", "e", "f"]
    assert [node.outputs[0].name for node in quantized.graph.nodes] == list("qdabefy")


def test_changes_nothing_where_the_held_out_error_does_not_fall(monkeypatch):
    def worse(graph, *rest):
        gained = correct(graph, *rest)
        conv = next(node for node in graph.nodes if node.op == "Conv")
        set_input(conv, 2, gs.Constant("worse", constant_of(conv.inputs[2]) + np.float32(9)))
        return gained

    monkeypatch.setattr(module, "correct", worse)
    original, quantized = both(*KINDS["Conv"])
    before = quantized.to_proto().SerializeToString()
    result = corrected(original, quantized, rows_in_any_order((1, 3, 4, 4)))
    assert result.rewrites == 0
    assert "nothing is corrected" in result.notes[0]
    assert quantized.to_proto().SerializeToString() == before


def test_changes_nothing_where_one_held_out_sample_decides_alone(monkeypatch):
    monkeypatch.setattr(Judge, "prefers", lambda *_: False)
    original, quantized = both(*KINDS["Conv"])
    result = corrected(original, quantized, rows_in_any_order((1, 3, 4, 4)))
    assert result.rewrites == 0
    assert "most of them are no closer" in result.notes[0]


def test_a_judge_counts_samples_not_errors():
    def scaled(factor):
        return open_session(
            model_of(f"{HEAD} g (float[2] x) => (float[2] y) <float f = {{{factor}}}> {{ y = Mul (x, f) }}")
        )

    def wrong_above(limit, factor):
        text = f"""g (float[2] x) => (float[2] y) <float f = {{{factor}}}, float n = {{{limit}}}>
            {{ m = Mul (x, f)  c = Greater (x, n)  y = Where (c, m, x) }}"""
        return open_session(model_of(f"{HEAD} {text}"))

    feeds = [{"x": np.full(2, 100 if index == 3 else 1, "f4")} for index in range(16)]
    judge = Judge(scaled(1), samples_of(feeds))
    rarely_wrong, always_wrong = wrong_above(50, 1.5), scaled(1.1)
    assert judge.error(always_wrong) < judge.error(rarely_wrong)
    assert judge.prefers(rarely_wrong, always_wrong)
    assert not judge.prefers(always_wrong, rarely_wrong)
    assert not judge.prefers(always_wrong, always_wrong)


def test_a_mean_that_all_samples_share_stays():
    values = np.tile([2.0, -3.0, 0.0], (5, 1))
    np.testing.assert_allclose(shrunk_mean(values, np.ones(5, int)), [2, -3, 0])


def test_samples_count_by_their_size():
    found = shrunk_mean(np.array([[1.0], [1.0], [1.3]]), np.array([1, 1, 2]))
    variance = 3 / 2 * (0.15**2 / 16 * 2 + 0.15**2 / 4)
    np.testing.assert_allclose(found, 1.15 * (1 - variance / 1.15**2))


def test_one_sample_proves_nothing():
    np.testing.assert_array_equal(shrunk_mean(np.array([[2.0, 3.0]]), np.array([4])), [0, 0])


@given(seed=st.integers(0, 2**31), count=st.integers(2, 20))
def test_a_mean_is_drawn_to_zero_and_never_beyond(seed, count):
    values = np.random.default_rng(seed).standard_normal((count, 50))
    mean, found = values.mean(axis=0), shrunk_mean(values, np.ones(count, int))
    assert (np.abs(found) <= np.abs(mean)).all()
    assert (found * mean >= 0).all()
    assert np.square(found).sum() < 0.9 * np.square(mean).sum()  # they are nothing but chance


def test_a_value_that_is_no_number_leaves_its_operator_alone():
    original, quantized = both(*KINDS["Conv"])
    feeds = rows_in_any_order((1, 3, 4, 4))
    feeds[0]["x"][0, 0, 0, 0] = np.inf
    samples = samples_of(feeds)
    assert bias_correction.correct(quantized.graph, original.graph, samples, 16, Context(frame=quantized.frame)) == {}


def test_refuses_to_run_before_qdq():
    model = loaded(f"g {CONV} <float[5, 3, 1, 1] w> {{ y = Conv (x, w) }}")
    with pytest.raises(PipelineError, match="put qdq before it"):
        CorrectBias().apply(
            model.graph, Context(frame=model.frame, samples=samples_of(rows_in_any_order((1, 3, 4, 4))))
        )


def test_refuses_to_run_without_data():
    original, quantized = both(*KINDS["Conv"])
    with pytest.raises(DataError, match="give --data"):
        CorrectBias().apply(quantized.graph, Context(unquantized=original.graph))


def test_refuses_samples_that_leave_none_to_hold_out():
    original, quantized = both(*KINDS["Conv"])
    with pytest.raises(DataError, match=r"correct-bias needs 4 samples at least.*there are 3"):
        corrected(original, quantized, rows_in_any_order((1, 3, 4, 4), count=3))
    with pytest.raises(PipelineError, match="correct-bias:samples must be at least 4, not 3"):
        CorrectBias(samples=3)


def test_says_so_where_qdq_quantized_nothing():
    model = loaded("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    feeds = [{"x": np.ones(2, "f4")}] * 8
    result = graphopt.optimize(model.to_proto(), "calibrate,qdq,correct-bias", data=feeds)
    assert result.report.passes[-1].notes == ("nothing is quantized, so there is nothing to correct",)


def test_the_command_corrects_a_net_and_says_what_that_gave(tmp_path, capsys):
    out = tmp_path / "out.onnx"
    command = [
        "optimize",
        str(MODELS / "fmnist_srunet.onnx"),
        "--passes",
        "fold,calibrate:method=minmax,qdq,correct-bias:samples=32",
    ]
    data = ["--data", str(MODELS / "fashion_mnist_small_calibration.npz")]
    assert main([*command, *data, "-o", str(out), "--json"]) == OK
    *_, record = json.loads(capsys.readouterr().out)["passes"]
    assert record["parts"] == {"operators": record["rewrites"], "samples": 32}
    assert record["rewrites"] >= 5
    assert "error on 8 held-out samples: " in record["notes"][0]
    assert out.exists()


def test_the_command_refuses_in_one_line_without_data(tmp_path, capsys):
    out = tmp_path / "out.onnx"
    command = ["optimize", str(MODELS / "fmnist_srunet.onnx"), "--passes", "fold,calibrate,qdq,correct-bias"]
    assert main([*command, "-o", str(out)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "correct-bias measures what quantization changes on real inputs: give --data" in error
    assert not out.exists()


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("name", "target", "least"), [("blazeface_front", "tensorrt", 2), ("waifu2x_upconv7_x2", "ort-cpu", 0.5)]
)
def test_real_nets_come_closer_on_feeds_that_were_not_used(name, target, least):
    passes = "freeze-inputs,fold,calibrate:method=mse,qdq:reduce_range=off"  # search leaves less to correct
    scores = []
    for more in ("", ",correct-bias"):
        data = zoo_feeds(name, "calibration")
        result = graphopt.optimize(zoo_model(name), passes + more, data=data, target=target, verify=False)
        compared = graphopt.check(zoo_model(name), result.model, data=zoo_feeds(name, "evaluation"), exact=True)
        scores.append(min(each.sqnr_db for each in compared.comparison.outputs))
    assert scores[1] >= scores[0] + least
