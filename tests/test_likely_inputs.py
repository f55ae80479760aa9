"""Inputs as the first BatchNormalization remembers them."""

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from graphopt.likely_inputs import likely_samples
from graphopt.model_io import load_model
from graphopt.runtime import open_session
from graphopt.synthetic import synthetic_samples

TEXT = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 3, 32, 32] x) => (float[N, 8, 32, 32] y)
    <float[8] gamma = {1, 1, 1, 1, 1, 1, 1, 1}, float[8] beta = {0, 0, 0, 0, 0, 0, 0, 0}>
    { c = Conv <pads = [1, 1, 1, 1]> (x, kernel, bias)  y = BatchNormalization (c, gamma, beta, mean, var) }
"""


def trained_on(mean, deviation, text=TEXT, seed=0):
    """A model whose BatchNormalization has the statistics of smooth noise of that mean and deviation."""
    rng = np.random.default_rng(seed)
    proto = onnx.parser.parse_model(text)
    weights = {"kernel": rng.standard_normal((8, 3, 3, 3)), "bias": rng.standard_normal(8)}
    weights |= {"mean": np.zeros(8), "var": np.ones(8)}
    for name, values in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    walk = np.cumsum(np.cumsum(rng.standard_normal((64, 1, 32, 32)), axis=2), axis=3)
    grey = (walk - walk.mean()) / walk.std()
    pictures = (mean + deviation * np.repeat(grey, 3, axis=1)).astype(np.float32)
    channels = np.moveaxis(open_session(proto, extra_outputs=["c"]).run({"x": pictures}, ["c"])["c"], 1, 0)
    for tensor in proto.graph.initializer:
        statistics = {"mean": channels.reshape(8, -1).mean(axis=1), "var": channels.reshape(8, -1).var(axis=1)}
        if tensor.name in statistics:
            tensor.CopyFrom(numpy_helper.from_array(statistics[tensor.name], tensor.name))
    return proto


def drawn(proto, seed=0):
    samples = synthetic_samples(open_session(proto).inputs, count=16, seed=0)
    return likely_samples(load_model(proto), samples, seed=seed)


def values_of(samples):
    return np.stack([feed["x"] for feed in samples])


@pytest.mark.parametrize(("mean", "deviation"), [(0.3, 0.35), (0.0, 1.0), (110.0, 60.0), (-4.0, 2.0)])
def test_mean_and_deviation_of_the_training_data_are_found(mean, deviation):
    values = values_of(drawn(trained_on(mean, deviation)))
    assert values.dtype == np.float32
    assert values.std() == pytest.approx(deviation, rel=0.6)
    assert values.mean() == pytest.approx(mean, abs=deviation)


def test_the_description_says_what_was_found():
    assert "; x as BatchNormalization tells: " in drawn(trained_on(0.3, 0.35)).description


def test_inputs_are_smooth_and_the_colours_of_a_place_alike():
    values = values_of(drawn(trained_on(0.0, 1.0)))[:, 0]
    near = np.corrcoef(values[..., 1:].ravel(), values[..., :-1].ravel())[0, 1]
    colours = np.corrcoef(values[:, 0].ravel(), values[:, 1].ravel())[0, 1]
    assert near > 0.5
    assert colours == pytest.approx(0.9, abs=0.05)


def test_the_seed_decides():
    proto = trained_on(0.3, 0.35)
    first = values_of(drawn(proto))
    np.testing.assert_array_equal(first, values_of(drawn(proto)))
    assert not np.array_equal(first, values_of(drawn(proto, seed=1)))


def test_the_last_axis_may_be_that_of_the_channels():
    text = TEXT.replace("float[N, 3, 32, 32] x", "float[N, 32, 32, 3] pixels").replace(
        "{ c =", "{ x = Transpose <perm = [0, 3, 1, 2]> (pixels) c ="
    )
    proto = trained_on(110.0, 60.0)
    rows = onnx.parser.parse_model(text)
    rows.graph.initializer.extend(tensor for tensor in proto.graph.initializer if tensor.name not in ("gamma", "beta"))
    samples = synthetic_samples(open_session(rows).inputs, count=4, seed=0)
    values = np.stack([feed["pixels"] for feed in likely_samples(load_model(rows), samples)])
    assert values.shape == (4, 1, 32, 32, 3)
    assert values.std() == pytest.approx(60, rel=0.6)


@pytest.mark.parametrize(
    "change",
    [
        ("BatchNormalization (c, gamma, beta, mean, var)", "Relu (c)"),
        ("c = Conv", "f = Relu (x) c = Conv"),
    ],
    ids=["no batch norm", "behind an activation"],
)
def test_where_nothing_is_remembered_the_inputs_stay(change):
    text = TEXT.replace(*change).replace("(x, kernel", "(f, kernel" if "Relu (x)" in change[1] else "(x, kernel")
    proto = trained_on(0.3, 0.35)
    other = onnx.parser.parse_model(text)
    other.graph.initializer.extend(tensor for tensor in proto.graph.initializer if tensor.name not in ("gamma", "beta"))
    samples = synthetic_samples(open_session(other).inputs, count=2, seed=0)
    same = likely_samples(load_model(other), samples)
    np.testing.assert_array_equal(values_of(same), values_of(samples))
    assert same.description == samples.description
    assert same.synthetic


def test_statistics_that_no_input_gives_change_nothing():
    proto = trained_on(0.3, 0.35)
    for tensor in proto.graph.initializer:
        if tensor.name == "mean":
            far = np.random.default_rng(5).standard_normal(8) * 1e6
            tensor.CopyFrom(numpy_helper.from_array(far.astype(np.float32), "mean"))
    samples = synthetic_samples(open_session(proto).inputs, count=2, seed=0)
    np.testing.assert_array_equal(values_of(likely_samples(load_model(proto), samples)), values_of(samples))
