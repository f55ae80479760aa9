"""Formulas against Monte Carlo samples, one operator after the other, and every place where nothing is told."""

import numpy as np
import onnx.parser
import pytest

from graphopt.model_io import load_model
from graphopt.normalization_ranges import BOUNDS, REACH, STORED, predicted_distributions
from graphopt.runtime import open_session

GAMMA, BETA = np.array([0.5, -2.0, 1.0]), np.array([3.0, 4.0, -1.0])
DRAWS = 200_000


def predicted(nodes, inputs="float[N, 3, 8, 8] x", output="float[] y", weights="", opset=17):
    """The distributions of a graph that begins with b = BatchNormalization (x)."""
    text = f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        net ({inputs}) => ({output})
        <float[3] gamma = {{0.5, -2, 1}}, float[3] beta = {{3, 4, -1}}, float[3] mean = {{7, 0, 1}},
         float[3] var = {{100, 100, 100}} {weights}>
        {{ b = BatchNormalization (x, gamma, beta, mean, var) {nodes} }}
    """
    return predicted_distributions(load_model(onnx.parser.parse_model(text)))


def drawn(seed=0):
    """[3, DRAWS] values of b."""
    return BETA[:, None] + GAMMA[:, None] * np.random.default_rng(seed).standard_normal((3, DRAWS))


def assert_like(distribution, values, tolerance=0.02):
    """Compare means, deviations and the middle 99 % with draws [C, DRAWS], relative to the deviation."""
    scale = values.std(axis=1) + 1e-3
    assert distribution.values.shape[0] == len(values)
    np.testing.assert_allclose(distribution.mean / scale, values.mean(axis=1) / scale, atol=tolerance)
    np.testing.assert_allclose(distribution.deviation / scale, values.std(axis=1) / scale, atol=tolerance)


def test_behind_batch_norm_the_mean_is_beta_and_the_deviation_is_gamma():
    b = predicted("y = Identity (b)")["b"]
    assert_like(b, drawn())
    assert (b.axis, b.told_by) == (-3, STORED)
    assert b.range == pytest.approx((4 - 11, 4 + 11))


def test_a_channel_without_variance_has_no_range():
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[N, 1, 8, 8] x) => (float[N, 1, 8, 8] b)
        <float[1] gamma = {3}, float[1] beta = {2}, float[1] mean = {0}, float[1] var = {0}>
        { b = BatchNormalization (x, gamma, beta, mean, var) }
    """
    assert predicted_distributions(load_model(onnx.parser.parse_model(text)))["b"].range == (2, 2)


ELEMENTWISE = {
    "Relu": ("y = Relu (b)", lambda b: np.maximum(b, 0)),
    "Clip": ("y = Clip (b, low, high)", lambda b: np.clip(b, 0, 6)),
    "LeakyRelu": ("y = LeakyRelu <alpha = 0.2> (b)", lambda b: np.where(b < 0, 0.2 * b, b)),
    "PRelu": ("y = PRelu (b, slope)", lambda b: np.where(b < 0, np.array([[0.5], [1], [-1]]) * b, b)),
    "Sigmoid": ("y = Sigmoid (b)", lambda b: 1 / (1 + np.exp(-b))),
    "Tanh": ("y = Tanh (b)", np.tanh),
    "HardSigmoid": ("y = HardSigmoid (b)", lambda b: np.clip(0.2 * b + 0.5, 0, 1)),
    "HardSwish": ("y = HardSwish (b)", lambda b: b * np.clip(b / 6 + 0.5, 0, 1)),
    "SiLU": ("s = Sigmoid (b) y = Mul (b, s)", lambda b: b / (1 + np.exp(-b))),
    "spelled-out hard-swish": (
        "p = Add (b, three) c = Clip (p, low, high) m = Mul (b, c) y = Div (m, high)",
        lambda b: b * np.clip(b + 3, 0, 6) / 6,
    ),
    "Mul by channel": ("y = Mul (slope, b)", lambda b: np.array([[0.5], [1], [-1]]) * b),
    "twice itself": ("y = Add (b, b)", lambda b: 2 * b),
    "less itself": ("y = Sub (b, b)", lambda b: 0 * b),
}
WEIGHTS = """, float low = {0}, float high = {6}, float three = {3}, float[3, 1, 1] slope = {0.5, 1, -1}"""


@pytest.mark.parametrize("case", ELEMENTWISE)
def test_elementwise_operators_act_on_each_channel_as_they_do_on_draws(case):
    nodes, formula = ELEMENTWISE[case]
    y = predicted(nodes, weights=WEIGHTS)["y"]
    assert_like(y, formula(drawn()))
    grid = BETA[:, None] + GAMMA[:, None] * np.linspace(-REACH, REACH, 10_001)
    assert y.range == pytest.approx((formula(grid).min(), formula(grid).max()), abs=0.01)
    assert y.axis == -3


SECOND = "c = Conv (x, kernel) d = BatchNormalization (c, beta, gamma, mean, var)"
KERNEL = ", float[3, 3, 1, 1] kernel = {1, 0, 0, 0, 1, 0, 0, 0, 1}"
TWO_VARIABLES = {
    "Add": ("y = Add (b, d)", lambda b, d: b + d),
    "of rectified": ("e = Relu (b) f = Relu (d) y = Add (e, f)", lambda b, d: np.maximum(b, 0) + np.maximum(d, 0)),
    "Mul": ("y = Mul (b, d)", lambda b, d: b * d),
    "gate": ("g = Sigmoid (d) y = Mul (b, g)", lambda b, d: b / (1 + np.exp(-d))),
    "Max": ("y = Max (b, d)", np.maximum),
}


@pytest.mark.parametrize("case", TWO_VARIABLES)
def test_two_branches_count_as_independent(case):
    nodes, formula = TWO_VARIABLES[case]
    y = predicted(SECOND + nodes, weights=KERNEL)["y"]
    other = GAMMA[:, None] + BETA[:, None] * np.random.default_rng(1).standard_normal((3, DRAWS))
    values = formula(drawn(), other)
    assert_like(y, values, tolerance=0.05)
    low, high = y.range
    assert low <= values.min()
    assert high >= values.max()
    spread = values.max(axis=1) - values.min(axis=1)
    assert high - low < 2 * spread.sum()


def test_in_a_sum_variances_add():
    y = predicted(SECOND + "y = Add (b, d)", weights=KERNEL)["y"]
    np.testing.assert_allclose(y.deviation, np.sqrt(GAMMA**2 + BETA**2), rtol=0.03)
    np.testing.assert_allclose(y.mean, GAMMA + BETA, atol=0.03)


MOVING = {
    "Transpose": ("y = Transpose <perm = [0, 2, 3, 1]> (b)", [0, 1, 2], -1),
    "Reshape": ("y = Reshape (b, rows)", [0, 1, 2], -2),
    "Slice of channels": ("y = Slice (b, from, to, axis)", [1, 2], -3),
    "Gather": ("y = Gather <axis = 1> (b, chosen)", [2, 0], -3),
    "Concat": ("r = Neg (b) y = Concat <axis = 1> (b, r)", [0, 1, 2, "-0", "-1", "-2"], -3),
    "MaxPool": ("y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (b)", [0, 1, 2], -3),
    "AveragePool": ("y = AveragePool <kernel_shape = [3, 3]> (b)", [0, 1, 2], -3),
    "Resize": ('y = Resize <mode = "linear"> (b, , scales)', [0, 1, 2], -3),
    "Flatten": ("y = Flatten <axis = 2> (b)", [0, 1, 2, 0, 1, 2], -2),
}
INDICES = """, int64[3] rows = {0, 3, -1}, int64[1] from = {1}, int64[1] to = {3}, int64[1] axis = {1},
    int64[2] chosen = {2, 0}, float[4] scales = {1, 1, 2, 2}"""


@pytest.mark.parametrize("case", MOVING)
def test_operators_that_move_elements_take_the_distributions_of_their_channels_along(case):
    nodes, channels, axis = MOVING[case]
    inputs = "float[2, 3, 8, 8] x"
    y = predicted(nodes, inputs=inputs, weights=INDICES)["y"]
    assert y.axis == axis
    assert len(y.values) == len(channels)
    for row, channel in zip(y.values, channels, strict=True):
        number, sign = int(str(channel).strip("-")), -1 if str(channel).startswith("-") else 1
        assert row.mean() == pytest.approx(sign * BETA[number])
        assert (row.max() - row.min()) / 11 == pytest.approx(abs(GAMMA[number]))


def test_split_gives_each_part_its_channels():
    found = predicted("p, y = Split <axis = 1> (b, sizes)", weights=", int64[2] sizes = {1, 2}")
    np.testing.assert_allclose(found["p"].mean, BETA[:1], atol=1e-6)
    np.testing.assert_allclose(found["y"].mean, BETA[1:], atol=1e-6)


def test_pixels_flattened_with_their_channels_keep_these():
    y = predicted("y = Flatten (b)", inputs="float[N, 3, 8, 8] x")["y"]
    np.testing.assert_allclose(y.mean, np.repeat(BETA, 64), atol=1e-6)


def test_moved_elements_no_longer_go_with_those_in_their_old_places():
    nodes = "s = Slice (b, from, to, axis) t = Slice (b, zero, seven, axis) y = Sub (s, t)"
    weights = ", int64[1] from = {1}, int64[1] to = {8}, int64[1] axis = {3}, int64[1] zero = {0}, int64[1] seven = {7}"
    np.testing.assert_allclose(predicted(nodes, weights=weights)["y"].deviation, np.sqrt(2) * np.abs(GAMMA), rtol=0.03)


@pytest.mark.parametrize(
    ("nodes", "bounds"),
    [
        ("u = Sigmoid (x) y = Identity (u)", (0, 1)),
        ("y = Tanh (x)", (-1, 1)),
        ("y = HardSigmoid (x)", (0, 1)),
        ("y = Clip (x, low, high)", (0, 6)),
        ("y = Softmax (x)", (0, 1)),
        ("p = Add (x, three) c = Clip (p, low, high) y = Div (c, high)", (0, 1)),
        ("s = Sigmoid (x) y = Mul (s, slope)", (-1, 1)),
    ],
)
def test_bounds_need_no_statistics(nodes, bounds):
    y = predicted(nodes, weights=WEIGHTS)["y"]
    assert y.range == pytest.approx(bounds, abs=1e-6)
    assert y.told_by == BOUNDS


def test_a_gate_between_bounds_leaves_a_tensor_within_its_range():
    y = predicted("g = Sigmoid (x) y = Mul (b, g)")["y"]
    low, high = y.range
    assert y.told_by == STORED
    assert -7 - 1e-3 <= low < -4
    assert 12 < high <= 15 + 1e-3


@pytest.mark.parametrize(
    "nodes",
    [
        "y = Relu (x)",
        "y = Clip (x, low)",
        "y = Exp (x)",
        "y = Add (b, x)",
        "y = Conv (b, kernel)",
        "y = GlobalAveragePool (b)",
        "y = Concat <axis = 1> (b, other)",
        "y = Add (b, pixels)",
        "t = Transpose <perm = [0, 2, 1, 3]> (b) y = Mul (t, slope)",
        "y = Log (b)",
        "y = Sqrt (b)",
        "y = Reshape (b, mixed)",
        "y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (b)",
        'y = Resize <mode = "cubic"> (b, , scales)',
        "h = Cast <to = 10> (b) y = Relu (h)",
    ],
)
def test_where_it_would_not_be_sound_nothing_is_told(nodes):
    weights = WEIGHTS + KERNEL + ", int64[3] mixed = {-1, 4, 32}, float[4] scales = {1, 1, 2, 2}"
    weights += ", float[1, 1, 8, 1] other_row = {1, 2, 3, 4, 5, 6, 7, 8}, float[8] pixels = {1, 2, 3, 4, 5, 6, 7, 8}"
    weights += ", float[2, 1, 8, 8] other = {" + ", ".join(["1"] * 128) + "}"
    found = predicted(nodes, inputs="float[2, 3, 8, 8] x", weights=weights)
    assert "b" in found
    assert "y" not in found


@pytest.mark.parametrize(
    "change",
    [
        ("BatchNormalization (x", "BatchNormalization <training_mode = 1> (x"),
        ("float[N, 3, 8, 8] x", "float[N, 3, 8, 8] x, float[3] gamma"),
    ],
    ids=["training", "computed"],
)
def test_a_batch_norm_whose_statistics_do_not_hold_tells_nothing(change):
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[N, 3, 8, 8] x) => (float[N, 3, 8, 8] b)
        <float[3] gamma = {1, 2, 3}, float[3] beta = {1, 2, 3}, float[3] mean = {1, 2, 3}, float[3] var = {1, 2, 3}>
        { b = BatchNormalization (x, gamma, beta, mean, var) }
    """.replace(*change)
    if "float[3] gamma" in change[1]:
        text = text.replace("<float[3] gamma = {1, 2, 3}, ", "<")
    assert predicted_distributions(load_model(onnx.parser.parse_model(text))) == {}


def test_the_model_is_left_as_it_was():
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[N, 2, H, W] x) => (float[N, 2, H, W] y) { s = Sigmoid (x) y = Mul (x, s) }
    """
    model = load_model(onnx.parser.parse_model(text))
    before = model.to_proto().SerializeToString()
    assert predicted_distributions(model).keys() == {"s"}
    assert model.to_proto().SerializeToString() == before


def test_what_is_told_holds_for_values_that_have_the_statistics():
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[4, 3, 64, 64] x) => (float[4, 3, 32, 32] y)
        <float[3] gamma = {0.5, -2, 1}, float[3] beta = {3, 1, -1}, float[3] mean = {0, 0, 0}, float[3] var = {1, 1, 1}>
        { b = BatchNormalization (x, gamma, beta, mean, var)
          s = Sigmoid (b) z = Mul (b, s) y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (z) }
    """
    proto = onnx.parser.parse_model(text)
    found = predicted_distributions(load_model(proto))
    feed = {"x": np.random.default_rng(0).standard_normal((4, 3, 64, 64)).astype(np.float32)}
    for name, values in open_session(proto, extra_outputs=["b", "z"]).run(feed).items():
        low, high = found[name].range
        assert low - 1e-3 <= values.min()
        assert values.max() <= high + 1e-3
