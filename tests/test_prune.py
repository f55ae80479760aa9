"""The options of `prune`: budgets, rounding, scope, importance, steps, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from comparing import assert_equal_outputs, constant
from test_channels import NETS, SCORES, TAIL, Net, P, bn, bn_node, tail
from zeroing import parameters, prune_and_compare

from graphopt.channel_choice import Limits, Scope
from graphopt.channel_groups import Group
from graphopt.channel_importance import Importance, Reduce
from graphopt.errors import PipelineError
from graphopt.feeds import Samples
from graphopt.macs import macs_by_node
from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.pass_manager import PassManager
from graphopt.passes.fold import Fold
from graphopt.passes.prune import Prune
from graphopt.targets import target_named

CHAIN = Net(
    SCORES,
    f"a = Conv{P}(x, w1, b1) b = Relu(a) c = Conv{P}(b, w2, b2) last = Relu(c) {TAIL}",
    {"w1": (32, 3, 3, 3), "b1": (32,), "w2": (24, 32, 3, 3), "b2": (24,), **tail(24)},
)


def pruned(item: Prune, model: onnx.ModelProto | None = None, **context) -> onnx.ModelProto:
    loaded = load_model(CHAIN.model() if model is None else model)
    item.apply(loaded.graph, Context(frame=loaded.frame, **context))
    return loaded.to_proto()


def macs(model: onnx.ModelProto) -> int:
    return sum(macs_by_node(load_model(model).graph).values())


def channels(model: onnx.ModelProto) -> tuple[int, int]:
    return constant(model, "w1").shape[0], constant(model, "w2").shape[0]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_a_budget_of_macs_is_kept_and_used(share):
    result, after = prune_and_compare(CHAIN.model(), Prune(macs=share, round_to=1))
    assert share - 0.08 < macs(after) / macs(CHAIN.model()) <= share
    assert f"({macs(after) / macs(CHAIN.model()):.1%})" in result.notes[0]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_a_budget_of_parameters_is_kept_and_used(share):
    _, after = prune_and_compare(CHAIN.model(), Prune(params=share, round_to=1))
    assert share - 0.08 < parameters(after) / parameters(CHAIN.model()) <= share


def test_what_multiples_leave_of_a_budget_is_given_back_to_the_most_important_channels():
    resnet = Path(__file__).resolve().parent.parent / "models" / "fmnist_resnet.onnx"
    model = load_model(resnet)
    Fold().apply(model.graph, Context(frame=model.frame))
    before = macs(model.to_proto())
    Prune(macs=0.7).apply(model.graph, Context(frame=model.frame))
    assert 0.68 < macs(model.to_proto()) / before <= 0.7


def test_a_budget_of_latency_is_measured(monkeypatch):
    monkeypatch.setattr("graphopt.passes.prune.measure_latency", lambda sessions, feed, seconds: [1.0, 0.4])
    assert parameters(pruned(Prune(latency=0.5))) <= parameters(CHAIN.model())
    monkeypatch.setattr("graphopt.passes.prune.measure_latency", lambda sessions, feed, seconds: [1.0, 0.9])
    with pytest.raises(PipelineError, match=r"latency=0\.5 cannot be met"):
        pruned(Prune(latency=0.5))


def test_a_budget_that_cannot_be_met_is_refused_and_the_least_is_named():
    with pytest.raises(PipelineError, match=r"macs=0\.1 cannot be met with max_ratio 0\.2 .*; 0\.6\d+ is the least"):
        pruned(Prune(macs=0.1, max_ratio=0.2, round_to=1))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ratio": 0.5, "macs": 0.5}, "exactly one of"),
        ({"ratio": 1.0}, "prune:ratio must be above 0 and below 1, not 1.0"),
        ({"macs": 0.0}, "prune:macs must be above 0"),
        ({"ratio": 0.5, "max_ratio": 0.0}, "prune:max_ratio"),
        ({"ratio": 0.5, "steps": 0}, "prune:steps"),
        ({"ratio": 0.5, "round_to": -1}, "prune:round_to"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, reason):
    with pytest.raises(PipelineError, match=reason):
        Prune(**options)


def test_a_budget_must_be_given():
    with pytest.raises(PipelineError, match="exactly one of ratio, macs, params, latency"):
        pruned(Prune())


@pytest.mark.parametrize(("round_to", "kept"), [(1, (16, 12)), (8, (16, 16)), (5, (15, 10)), (16, (16, 16))])
def test_kept_channels_are_a_multiple(round_to, kept):
    assert channels(pruned(Prune(ratio=0.5, round_to=round_to))) == kept


def test_the_target_says_which_multiple_by_default():
    assert channels(pruned(Prune(ratio=0.3), target=target_named("tensorrt"))) == (24, 16)
    assert channels(pruned(Prune(ratio=0.3), target=target_named("ort-arm"))) == (16, 16)


def test_a_group_loses_at_most_the_largest_ratio():
    assert channels(pruned(Prune(ratio=0.9, max_ratio=0.5, round_to=1))) == (16, 12)


def test_excluded_groups_stay_and_are_named():
    loaded = load_model(CHAIN.model())
    result = Prune(ratio=0.5, exclude=("a*",)).apply(loaded.graph, Context())
    assert channels(loaded.to_proto()) == (32, 16)
    assert ("a", "it is excluded by a*") in [tuple(skip) for skip in result.skipped]


def test_the_smallest_filters_go():
    model = CHAIN.model()
    weight = next(each for each in model.graph.initializer if each.name == "w1")
    values = onnx.numpy_helper.to_array(weight).copy()
    values[5:15] *= 1e-3
    weight.CopyFrom(onnx.numpy_helper.from_array(values, "w1"))
    after = constant(pruned(Prune(ratio=0.3, round_to=1, importance=Importance.L1), model), "w1")
    np.testing.assert_array_equal(after, np.delete(values, range(5, 15), axis=0)[: len(after)])


@pytest.mark.parametrize("importance", list(Importance))
@pytest.mark.parametrize("reduce", list(Reduce))
def test_every_importance_cuts_a_valid_model(importance, reduce):
    result, _ = prune_and_compare(CHAIN.model(), Prune(ratio=0.5, importance=importance, reduce=reduce))
    assert result.rewrites == 24
    assert bool(result.warnings) == importance.needs_data


def test_importance_by_activation_spares_what_varies():
    model = CHAIN.model()
    bias = next(each for each in model.graph.initializer if each.name == "b1")
    dead = np.zeros(32, np.float32)
    dead[8:24] = -100  # never active: no variance behind Relu
    bias.CopyFrom(onnx.numpy_helper.from_array(dead, "b1"))
    feeds = [{"x": np.random.default_rng(seed).standard_normal((1, 3, 8, 8)).astype(np.float32)} for seed in range(3)]
    for importance in (Importance.ACTIVATION, Importance.WANDA):
        after = pruned(
            Prune(ratio=0.5, importance=importance), model, samples=Samples(lambda: iter(feeds), "made", count=3)
        )
        assert not constant(after, "b1").any()


def test_importance_by_scale_of_batch_normalization():
    net = Net(
        SCORES,
        f"a = Conv{P}(x, w1) {bn_node('n', 'a', 'n1')} b = Relu(n) last = Conv{P}(b, w2) {TAIL}",
        {"w1": (16, 3, 3, 3), "w2": (16, 16, 3, 3), **bn("n1", 16), **tail(16)},
    )
    before = np.abs(constant(net.model(), "n1_scale"))
    after = np.abs(constant(pruned(Prune(ratio=0.5, importance=Importance.BN_SCALE), net.model()), "n1_scale"))
    np.testing.assert_array_equal(np.sort(after), np.sort(before)[8:])


def test_random_importance_depends_on_the_seed_alone():
    first, second, other = (
        constant(pruned(Prune(ratio=0.5, importance=Importance.RANDOM, seed=seed)), "w1") for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)


def test_the_global_scope_takes_more_from_some_groups():
    model = CHAIN.model()
    weight = next(each for each in model.graph.initializer if each.name == "w1")
    values = onnx.numpy_helper.to_array(weight).copy()
    values[:20] *= 1e-3  # 20 of 32 are nearly nothing
    weight.CopyFrom(onnx.numpy_helper.from_array(values, "w1"))
    options = {"ratio": 0.35, "round_to": 1, "importance": Importance.FPGM}
    assert channels(pruned(Prune(**options), model)) == (21, 16)
    first, second = channels(pruned(Prune(**options, scope=Scope.GLOBAL), model))
    assert first < 21
    assert second > 16


def test_steps_cut_as_much_as_one_and_leave_one_cut():
    loaded = load_model(CHAIN.model())
    context = Context()
    Prune(ratio=0.5, steps=3, round_to=1).apply(loaded.graph, context)
    after = loaded.to_proto()
    assert channels(after) == (16, 12)
    assert context.cut is not None
    kept = context.cut.kept["w2"]
    np.testing.assert_array_equal(constant(CHAIN.model(), "w2")[np.ix_(kept[0], kept[1])], constant(after, "w2"))
    prune_and_compare(CHAIN.model(), Prune(ratio=0.5, steps=3, round_to=1))


def test_the_cut_names_what_is_left_of_every_tensor():
    loaded = load_model(CHAIN.model())
    context = Context()
    Prune(ratio=0.5).apply(loaded.graph, context)
    kept = context.cut.kept
    assert len(kept["a"][1]) == 16
    assert kept["a"][0] is kept["a"][2] is None
    np.testing.assert_array_equal(kept["w2"][1], kept["a"][1])
    assert [node.op for node in context.cut.original.nodes] == [node.op for node in loaded.graph.nodes]
    assert context.cut.original.nodes[0].inputs[1].values.shape[0] == 32


def test_groups_that_stay_are_reported_with_the_reason():
    loaded = load_model(CHAIN.model())
    result = Prune(ratio=0.5).apply(loaded.graph, Context())
    assert ("y", "it is the graph output y") in [tuple(skip) for skip in result.skipped]


def test_of_two_factors_of_one_axis_the_finer_one_is_cut():
    loaded = load_model(NETS["attention with a fused QKV"].model())
    result = Prune(ratio=0.5).apply(loaded.graph, Context())
    assert [skip.where for skip in result.skipped if "which has more units" in skip.reason] == ["f#4"]


DEAD = Net(
    SCORES,
    f"a = Conv{P}(x, w1, b1) b = Relu(a) c = Conv{P}(b, w2, b2) d = Sigmoid(c) e = Conv{P}(d, w3) "
    f"last = Add(e, b) {TAIL}",
    {"w1": (16, 3, 3, 3), "b1": (16,), "w2": (12, 16, 3, 3), "b2": (12,), "w3": (16, 12, 3, 3), **tail(16)},
)


def with_zeros(zeros: dict[str, tuple]) -> onnx.ModelProto:
    """`DEAD` with zeros at an index of some weights."""
    model = DEAD.model()
    for tensor in model.graph.initializer:
        if tensor.name in zeros:
            value = onnx.numpy_helper.to_array(tensor).copy()
            value[zeros[tensor.name]] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    return model


@pytest.mark.parametrize(
    ("zeros", "left"),
    [
        ({"w3": (slice(None), [1, 2])}, (16, 10)),  # read with zeros
        ({"w1": [3, 4], "b1": [3, 4], "w3": [3, 4]}, (14, 12)),  # zero on both branches, and their sum
        ({"w1": [3, 4], "w3": [3, 4]}, (15, 12)),  # two constants: Relu makes one zero, and padding holds the other
        ({"w1": [3, 4], "b1": [3, 4]}, (16, 12)),  # the other branch is not zero
        ({"w2": [0, 1], "b2": [0, 1]}, (16, 11)),  # Sigmoid makes a half of zero: padding holds it, but two are equal
        ({"w2": (slice(None), [5])}, (16, 12)),  # another reader multiplies it by something
        ({"w3": (slice(None), range(12))}, (16, 1)),  # one stays
        ({"w2": (slice(None), [7]), "wf": (slice(None), [7]), "w3": [8]}, (15, 12)),  # read with zeros twice
    ],
)
def test_dead_channels_go_for_nothing(zeros, left):
    model = with_zeros(zeros)
    loaded = load_model(model)
    Prune(dead=True).apply(loaded.graph, Context())
    after = loaded.to_proto()
    assert channels(after) == left
    assert_equal_outputs(model, after)


def test_dead_channels_are_the_first_to_go():
    model = with_zeros({"w3": (slice(None), [1, 2, 3, 4, 5, 6])})
    options = {"ratio": 0.5, "round_to": 1, "importance": Importance.RANDOM}
    values = constant(model, "w2")
    after = constant(pruned(Prune(**options, dead=True, exclude=("a*",)), model), "w2")
    np.testing.assert_array_equal(after, np.delete(values, range(1, 7), axis=0))


def test_the_pass_manager_verifies_and_keeps_what_prune_made():
    result = PassManager([Prune(ratio=0.5)]).run(CHAIN.model())
    assert result.report.passes[0].failure is None
    assert result.report.passes[0].rewrites == 24


@pytest.mark.parametrize(
    ("size", "width", "step"), [(64, 1, 16), (32, 1, 16), (24, 1, 8), (8, 1, 4), (12, 32, 1), (16, 3, 8), (3, 1, 1)]
)
def test_small_groups_take_a_part_of_the_default_multiple(size, width, step):
    group = Group("g", np.arange(size), (), width, 0, 0, None, None)
    assert Limits(16, adapts=True).step(group) == step
    assert Limits(7).step(group) == 7


def test_channels_that_a_norm_counts_stay_although_their_readers_multiply_them_by_zero():
    nodes = f"a = Conv{P}(x, w1, b1) n = LpNormalization<axis=1>(a) last = Conv{P}(n, w2) {TAIL}"
    model = Net(SCORES, nodes, {"w1": (16, 3, 3, 3), "b1": (16,), "w2": (8, 16, 3, 3), **tail(8)}).model()
    for tensor in model.graph.initializer:
        if tensor.name == "w2":
            value = onnx.numpy_helper.to_array(tensor).copy()
            value[:, 3] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    loaded = load_model(model)
    assert Prune(dead=True).apply(loaded.graph, Context()).rewrites == 0


def test_operators_in_branches_say_why_they_stay():
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[2,4] x, bool flag) => (float[2,3] y) <float[4,3] w> {
            y = If (flag) <then_branch = yes () => (float[2,3] a) { a = MatMul(x, w) },
                           else_branch = no () => (float[2,3] b) { b = Gemm(x, w) }>
        }
    """
    loaded = load_model(onnx.parser.parse_model(text))
    result = Prune(ratio=0.5).apply(loaded.graph, Context())
    assert [skip.reason for skip in result.skipped] == [
        "it is in a branch or a body, where channels are not followed"
    ] * 2
