import re
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

import graphopt
from graphopt.feeds import Samples
from graphopt.input_checks import input_warnings
from graphopt.model_io import load_model

MODELS = Path(__file__).parents[1] / "models"
NETS = {"fmnist_resnet": "fashion_mnist", "fmnist_mbv2": "fashion_mnist", "fmnist_srunet": "fashion_mnist_small"}


def samples_of(data, change=lambda array: array):
    ((name, array),) = np.load(MODELS / f"{data}_calibration.npz").items()
    feeds = [{name: change(array[index : index + 1]).astype(np.float32)} for index in range(16)]
    return Samples(lambda: iter(feeds), data, len(feeds))


@pytest.mark.parametrize("net", NETS)
def test_the_right_inputs_give_no_warning(net):
    assert input_warnings(load_model(MODELS / f"{net}.onnx"), samples_of(NETS[net])) == ()


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    ("change", "repair"),
    [
        (lambda array: array * 255, "divided by 255"),
        (lambda array: array / 255, "times 255"),
        (lambda array: 2 * array - 1, r"as \(x \+ 1\) / 2"),
        (lambda array: 127.5 * (2 * array - 1 + 1), "divided by 255"),
    ],
)
def test_a_mistake_in_the_preprocessing_is_named(net, change, repair):
    (warning,) = input_warnings(load_model(MODELS / f"{net}.onnx"), samples_of(NETS[net], change))
    assert re.search(repair, warning)


def test_inputs_that_no_simple_mistake_explains_are_only_called_strange():
    strange = samples_of("fashion_mnist", lambda array: 6 * array - 1)
    (warning,) = input_warnings(load_model(MODELS / "fmnist_resnet.onnx"), strange)
    assert "check scale, mean and order of the channels" in warning


def colours(reverse):
    """A net that learned the mean and the variance of each colour, and images of these colours in an order."""
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3, 8, 8] x) => (float[N, 3, 8, 8] y)
        <float[3, 3, 1, 1] w = {1, 0, 0, 0, 1, 0, 0, 0, 1}, float[3] one = {1, 1, 1}, float[3] zero = {0, 0, 0},
         float[3] mean = {0.8, 0.5, 0.1}, float[3] var = {0.04, 0.04, 0.04}>
        { padded = Identity (x)  a = Conv (padded, w)  y = BatchNormalization (a, one, zero, mean, var) }
    """
    rng = np.random.default_rng(0)
    pixels = rng.normal([0.8, 0.5, 0.1], 0.2, (16, 8, 8, 3)).transpose(0, 3, 1, 2).astype(np.float32)
    pixels = np.ascontiguousarray(pixels[:, ::-1]) if reverse else pixels
    feeds = [{"x": pixels[index : index + 1]} for index in range(16)]
    return load_model(onnx.parser.parse_model(text)), Samples(lambda: iter(feeds), "colours", 16)


def test_channels_in_reverse_order_are_suspected():
    assert input_warnings(*colours(reverse=False)) == ()
    (warning,) = input_warnings(*colours(reverse=True))
    assert "may be in reverse order (RGB and BGR)" in warning or "does not look like" in warning


def test_a_model_without_batch_norm_at_its_start_gives_no_warning():
    model, samples = colours(reverse=True)
    for node in model.graph.nodes:
        node.op = {"BatchNormalization": "InstanceNormalization"}.get(node.op, node.op)
        node.inputs = list(node.inputs)[:3]
    assert input_warnings(model, samples) == ()


def test_the_warning_reaches_the_report_though_fold_takes_the_batch_norm_away():
    ((name, array),) = np.load(MODELS / "fashion_mnist_calibration.npz").items()
    data = {name: 255 * array[:32]}
    result = graphopt.optimize(MODELS / "fmnist_resnet.onnx", "fold,calibrate", data=data, verify=False)
    assert any("it would, divided by 255" in warning for warning in result.report.warnings)
