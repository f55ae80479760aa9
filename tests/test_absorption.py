"""Constant and duplicate channels go for nothing, with `prune:dead=true`, and only where that is exact."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from comparing import assert_equal_outputs, constant, ops
from onnx import numpy_helper
from test_channels import SCORES, TAIL, Net, P, bn, bn_node, tail

from graphopt.channel_importance import Importance
from graphopt.model_io import load_model
from graphopt.pass_base import Context, PassResult
from graphopt.passes.prune import Prune

K = "<kernel_shape=[3,3]>"


def with_values(net: Net, **values: object) -> onnx.ModelProto:
    """The model with functions of them in place of some weights."""
    model = net.model()
    for tensor in model.graph.initializer:
        if tensor.name in values:
            value = numpy_helper.to_array(tensor).copy()
            values[tensor.name](value)  # type: ignore[operator]
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return model


def rows(places: list[int], to: float | None = None):
    """Set rows to a number, or all of them to what the first is."""

    def change(value: np.ndarray) -> None:
        value[places] = value[places[0]] if to is None else to

    return change


def columns(places: list[int], to: float):
    def change(value: np.ndarray) -> None:
        value[:, places] = to

    return change


def without_dead(model: onnx.ModelProto, **options: object) -> tuple[PassResult, onnx.ModelProto]:
    loaded = load_model(model)
    result = Prune(dead=True, **options).apply(loaded.graph, Context(frame=loaded.frame))  # type: ignore[arg-type]
    after = loaded.to_proto()
    onnx.checker.check_model(after, full_check=True)
    assert_equal_outputs(model, after)
    return result, after


def chain(between: str = "b = Relu(a)", reader: str = f"last = Conv{K}(b, w2, b2)", **shapes: tuple[int, ...]) -> Net:
    weights = {"w1": (16, 3, 3, 3), "b1": (16,), "w2": (8, 16, 3, 3), "b2": (8,), **tail(8)}
    return Net(SCORES, f"a = Conv{P}(x, w1, b1) {between} {reader} {TAIL}", {**weights, **shapes})


CONSTANT = {"w1": rows([3, 5], 0), "b1": rows([3, 5], 0.7)}


@pytest.mark.parametrize(
    "between",
    [
        "b = Relu(a)",
        "s = Sigmoid(a) b = Mul(s, a)",
        f"{bn_node('n', 'a', 'n')} b = Clip(n, low, high)",
        "p = PRelu(a, slope) b = MaxPool<kernel_shape=[3,3], strides=[1,1], pads=[1,1,1,1]>(p)",
        "b = AveragePool<kernel_shape=[3,3], strides=[1,1], pads=[1,1,1,1]>(a)",
        "b = Conv<group=16, kernel_shape=[3,3]>(a, d)",
        "r = Transpose<perm=[0,2,3,1]>(a) t = Tanh(r) b = Transpose<perm=[0,3,1,2]>(t)",
    ],
)
def test_constant_channels_go_into_the_bias_of_their_reader(between):
    extra = {**bn("n", 16), "low": (), "high": (), "slope": (16, 1, 1), "d": (16, 1, 3, 3)}
    model = with_values(chain(between, **extra), high=lambda value: value.fill(2.0), **CONSTANT)
    result, after = without_dead(model)
    assert result.parts["constant"] == 2
    assert constant(after, "w1").shape[0] == 14
    assert constant(after, "w2").shape == (8, 14, 3, 3)


def test_a_reader_without_a_bias_gets_one():
    model = with_values(chain(reader=f"last = Conv{K}(b, w2)"), **CONSTANT)
    _, after = without_dead(model)
    assert constant(after, "w1").shape[0] == 14
    assert len(after.graph.node[2].input) == 3


def test_a_constant_goes_into_an_add_behind_matmul():
    nodes = f"a = Conv{P}(x, w1, b1) g = GlobalAveragePool(a) f = Flatten(g) h = Softsign(f) y = MatMul(h, wm)"
    net = Net(SCORES, nodes, {"w1": (16, 3, 3, 3), "b1": (16,), "wm": (16, 5)})
    _, after = without_dead(with_values(net, **CONSTANT))
    assert constant(after, "wm").shape == (14, 5)
    assert ops(after)["Add"] == 1


def test_a_constant_goes_into_gemm_with_its_factors():
    nodes = f"a = Conv{P}(x, w1, b1) g = GlobalAveragePool(a) f = Flatten(g) y = Gemm<alpha=0.5, beta=2.0>(f, wg, bg)"
    net = Net(SCORES, nodes, {"w1": (16, 3, 3, 3), "b1": (16,), "wg": (16, 5), "bg": (5,)})
    _, after = without_dead(with_values(net, **CONSTANT))
    assert constant(after, "wg").shape == (14, 5)


def test_constants_follow_from_constants():
    net = chain(f"r = Relu(a) c = Conv{K}(r, w3, b3) b = Sigmoid(c)", w3=(16, 16, 3, 3), b3=(16,))

    def only_constants(value: np.ndarray) -> None:
        value[7, [place for place in range(16) if place not in (3, 5)]] = 0

    model = with_values(net, w3=only_constants, **CONSTANT)
    result, after = without_dead(model)
    assert result.parts["constant"] == 3
    assert constant(after, "w3").shape == (15, 14, 3, 3)


def test_a_reader_that_pads_keeps_a_constant_and_says_so():
    model = with_values(chain(reader=f"last = Conv{P}(b, w2, b2)"), w1=rows([3], 0), b1=rows([3], 0.7))
    result, after = without_dead(model)
    assert constant(after, "w1").shape[0] == 16
    assert any("1 of the channels that it reads are constant, but" in skip.reason for skip in result.skipped)
    assert any("pads with zeros" in skip.reason for skip in result.skipped)


def test_a_reader_that_pads_does_without_what_is_zero_behind_relu():
    model = with_values(chain(reader=f"last = Conv{P}(b, w2, b2)"), w1=rows([3, 5], 0), b1=rows([3, 5], -0.7))
    assert constant(without_dead(model)[1], "w1").shape[0] == 14


@pytest.mark.parametrize(
    "between",
    [
        "b = Conv<group=16, pads=[1,1,1,1]>(a, d)",
        "b = AveragePool<kernel_shape=[3,3], strides=[1,1], pads=[1,1,1,1], count_include_pad=1>(a)",
        "b = Pad(a, around)",
        "m = ReduceMax<keepdims=1>(x, channel) b = Mul(a, m)",
    ],
)
def test_what_is_constant_no_longer_at_the_border_or_elsewhere_stays(between):
    net = chain(between, d=(16, 1, 3, 3))._replace(constants={"around": [0, 0, 1, 1, 0, 0, 1, 1], "channel": [1]})
    model = with_values(net, w1=rows([3], 0), b1=rows([3], 0.7))
    assert constant(without_dead(model)[1], "w1").shape[0] == 16


def test_a_conv_transpose_keeps_constants_and_merges_duplicates():
    net = chain(reader="last = ConvTranspose<kernel_shape=[3,3]>(b, w2, b2)", w2=(16, 8, 3, 3))
    assert constant(without_dead(with_values(net, w1=rows([3], 0), b1=rows([3], 0.7)))[1], "w1").shape[0] == 16
    model = with_values(net, w1=rows([3, 5, 9]), b1=rows([3, 5, 9]))
    assert constant(without_dead(model)[1], "w2").shape == (14, 8, 3, 3)


EQUAL = {"w1": rows([3, 5, 9]), "b1": rows([3, 5, 9])}


@pytest.mark.parametrize(
    ("between", "equal", "left"),
    [
        ("b = Relu(a)", {}, 14),
        (
            f"{bn_node('n', 'a', 'n')} b = Relu(n)",
            {f"n_{part}": rows([3, 5]) for part in ["scale", "bias", "mean", "var"]},
            15,
        ),
        (f"{bn_node('n', 'a', 'n')} b = Relu(n)", {}, 16),
        ("b = PRelu(a, slope)", {"slope": rows([5, 9])}, 15),
        ("b = Conv<group=16, pads=[1,1,1,1]>(a, d)", {"d": rows([3, 9])}, 15),
        ("b = Conv<group=16, pads=[1,1,1,1]>(a, d)", {}, 16),
        (f"c = Conv{P}(x, w4) b = Add(a, c)", {"w4": rows([3, 5])}, 15),
        (f"c = Conv{P}(x, w4) b = Add(a, c)", {}, 16),
        ("b = Pad(a, around)", {}, 16),
        ("b = LpNormalization<axis=1>(a)", {}, 16),
    ],
)
def test_duplicate_channels_are_merged_where_all_that_they_pass_is_equal(between, equal, left):
    extra = {**bn("n", 16), "slope": (16, 1, 1), "d": (16, 1, 3, 3), "w4": (16, 3, 3, 3)}
    net = chain(between, reader=f"last = Conv{P}(b, w2, b2)", **extra)
    net = net._replace(constants={"around": [0, 0, 1, 1, 0, 0, 1, 1]})
    result, after = without_dead(with_values(net, **EQUAL, **equal))
    assert constant(after, "w1").shape[0] == left
    assert result.parts.get("duplicate", 0) == 16 - left


def test_rows_with_another_bias_are_no_duplicates():
    assert constant(without_dead(with_values(chain(), w1=rows([3, 5])))[1], "w1").shape[0] == 16


def test_duplicates_are_merged_behind_flatten_with_spatial_extent():
    nodes = f"a = Conv{P}(x, w1, b1) r = Relu(a) f = Flatten(r) y = Gemm<transB=1>(f, wg, bg)"
    net = Net(SCORES, nodes, {"w1": (8, 3, 3, 3), "b1": (8,), "wg": (5, 512), "bg": (5,)})
    _, after = without_dead(with_values(net, w1=rows([1, 6]), b1=rows([1, 6])))
    assert constant(after, "wg").shape == (5, 448)


def test_channels_that_meet_in_a_concat_are_not_equal_for_what_they_were_elsewhere():
    nodes = f"a = Conv{P}(x, w1, b1) p = MaxPool<kernel_shape=[3,3], strides=[1,1], pads=[1,1,1,1]>(a) "
    nodes += f"c = Concat<axis=1>(a, p) last = Conv{P}(c, w2) {TAIL}"
    net = Net(SCORES, nodes, {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 16, 3, 3), **tail(8)})
    assert constant(without_dead(net.model())[1], "w2").shape[1] == 16
    _, after = without_dead(with_values(net, w1=rows([1, 6]), b1=rows([1, 6])))
    assert constant(after, "w2").shape[1] == 14


def test_duplicates_at_one_of_two_readers_stay_where_the_other_differs():
    net = chain(f"r = Relu(a) c = Conv{P}(x, w4) s = Add(r, c) t = Conv{K}(r, w3) b = Sigmoid(s)", w4=(16, 3, 3, 3))
    net = net._replace(
        nodes=net.nodes.replace("b2) ", "b2) ", 1).replace(
            f"last = Conv{K}(b, w2, b2)", f"u = Conv{K}(b, w2, b2) last = Add(u, t)"
        ),
        shapes={**net.shapes, "w3": (8, 16, 3, 3)},
    )
    assert constant(without_dead(with_values(net, **EQUAL))[1], "w1").shape[0] == 16
    assert constant(without_dead(with_values(net, **EQUAL, w4=rows([3, 9])))[1], "w1").shape[0] == 15


def test_a_shared_weight_changes_for_its_own_reader_alone():
    net = chain(reader=f"u = Conv{K}(b, w2) v = Conv{K}(e, w2) last = Add(u, v)")
    net = net._replace(
        nodes=net.nodes.replace("b = Relu(a)", f"b = Relu(a) e = Conv{P}(x, w5)"),
        shapes={**net.shapes, "w5": (16, 3, 3, 3)},
    )
    without_dead(with_values(net, **EQUAL))


def test_sums_that_float16_cannot_hold_are_refused():
    net = Net("(float16[N,16] x) => (float16[N,5] y)", "a = Gemm(x, w1, b1) b = Relu(a) y = Gemm(b, w2, b2)", {})
    rng = np.random.default_rng(0)
    shapes = {"w1": (16, 8), "b1": (8,), "w2": (8, 5), "b2": (5,)}
    values = {name: (rng.standard_normal(shape) / 64).astype(np.float16) for name, shape in shapes.items()}
    values["w1"][:, 5], values["b1"][5] = values["w1"][:, 2], values["b1"][2]
    values["w2"][[2, 5]] = 60000
    model = net.model()
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    result, after = without_dead(model)
    assert constant(after, "w1").shape == (16, 8)
    assert any("cannot hold the sum" in skip.reason for skip in result.skipped)


def test_excluded_groups_keep_their_constants():
    result, after = without_dead(with_values(chain(), **CONSTANT), exclude=("a*",))
    assert constant(after, "w1").shape[0] == 16
    assert result.rewrites == 0


def test_constants_and_duplicates_go_first_under_a_budget():
    result, after = without_dead(
        with_values(chain(), **EQUAL), ratio=0.125, round_to=1, importance=Importance.RANDOM, exclude=("last*",)
    )
    assert result.rewrites == 2
    assert constant(after, "w1").shape[0] == 14
