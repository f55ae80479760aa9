import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.least_squares import Moments
from graphopt.patches import Patches
from graphopt.runtime import open_session

EVERY = 10**9
RANDOM = np.random.default_rng(5)
CONVOLUTIONS = [
    ("Conv", (1, 4, 9), (6, 4, 3), {}),
    ("Conv", (2, 4, 9, 8), (6, 4, 3, 2), {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
    ("Conv", (1, 4, 9, 8), (6, 2, 3, 3), {"group": 2, "dilations": [2, 1], "pads": [2, 1, 2, 1]}),
    ("Conv", (2, 6, 7, 7), (6, 1, 3, 3), {"group": 6, "pads": [1, 1, 1, 1], "strides": [2, 2]}),
    ("Conv", (1, 6, 7, 7), (12, 1, 5, 5), {"group": 6, "auto_pad": "SAME_UPPER", "strides": [2, 3]}),
    ("Conv", (1, 4, 7, 6), (3, 4, 2, 2), {"auto_pad": "SAME_LOWER"}),
    ("Conv", (1, 4, 7, 6), (3, 4, 3, 3), {"auto_pad": "VALID"}),
    ("Conv", (1, 3, 5, 4, 6), (4, 3, 2, 3, 3), {"pads": [0, 1, 1, 1, 1, 1], "strides": [1, 2, 2]}),
    ("ConvTranspose", (1, 4, 6), (4, 3, 3), {"strides": [2]}),
    ("ConvTranspose", (2, 4, 5, 4), (4, 3, 4, 4), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("ConvTranspose", (1, 4, 5, 4), (4, 3, 3, 2), {"strides": [3, 2], "output_padding": [1, 0], "dilations": [1, 2]}),
    ("ConvTranspose", (1, 4, 5, 4), (4, 2, 3, 3), {"group": 2, "strides": [2, 1], "pads": [1, 0, 0, 1]}),
    ("ConvTranspose", (1, 4, 5, 4), (4, 2, 3, 3), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ("ConvTranspose", (1, 4, 5, 4), (4, 2, 3, 3), {"strides": [2, 2], "output_shape": [10, 8]}),
    ("ConvTranspose", (1, 2, 3, 4, 3), (2, 2, 2, 2, 3), {"strides": [2, 1, 2]}),
]
PRODUCTS = [
    ("Gemm", (5, 4), (4, 3), {"alpha": 0.5}),
    ("Gemm", (5, 4), (3, 4), {"transB": 1}),
    ("Gemm", (4, 5), (4, 3), {"transA": 1}),
    ("MatMul", (2, 3, 4), (4, 5), {}),
]


def run(op, x, weight, bias, attrs):
    inputs = ["x", "w"] + (["b"] if op != "MatMul" else [])
    node = helper.make_node(op, inputs, ["y"], **attrs)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")][: len(inputs) - 1],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return open_session(model, optimize=False, threads=1).run({"x": x})["y"]


def rows_of(patches, x, y, most=EVERY, **options):
    blocks = list(patches.rows(x, y, most, np.random.default_rng(0), **options))
    return tuple(np.concatenate(part, axis=1) for part in zip(*blocks, strict=True))


def operator_of(op, x_shape, weight_shape, attrs):
    x, weight = (RANDOM.standard_normal(shape).astype(np.float32) for shape in (x_shape, weight_shape))
    patches = Patches(gs.Node(op, attrs=attrs), weight_shape)
    bias = RANDOM.standard_normal(patches.groups * patches.outputs).astype(np.float32)
    if op == "MatMul":
        bias[:] = 0
    return patches, x, weight, bias, run(op, x, weight, bias, attrs)


@pytest.mark.parametrize(("op", "x_shape", "weight_shape", "attrs"), CONVOLUTIONS + PRODUCTS)
def test_rows_times_the_weight_are_what_the_operator_returns(op, x_shape, weight_shape, attrs):
    patches, x, weight, bias, y = operator_of(op, x_shape, weight_shape, attrs)
    inputs, outputs = rows_of(patches, x, y)
    affinity = patches.affinity(weight, bias, attrs.get("alpha", 1.0))
    assert inputs.shape == (patches.groups, y.size // bias.size, patches.features)
    np.testing.assert_allclose(inputs @ affinity.weight + affinity.bias[:, np.newaxis], outputs, atol=2e-5)


@pytest.mark.parametrize(("op", "x_shape", "weight_shape", "attrs"), CONVOLUTIONS + PRODUCTS)
def test_a_weight_comes_back_from_its_matrix(op, x_shape, weight_shape, attrs):
    patches, _, weight, bias, _ = operator_of(op, x_shape, weight_shape, attrs)
    alpha = attrs.get("alpha", 1.0)
    np.testing.assert_array_equal(patches.weight(patches.affinity(weight, bias, alpha), alpha), weight)


def test_a_bias_of_one_number_serves_all_channels():
    patches = Patches(gs.Node("Gemm"), (4, 3))
    assert patches.affinity(np.ones((4, 3)), np.array([2.0])).bias.tolist() == [[2, 2, 2]]


def test_blocks_are_bounded_and_hold_each_row_once():
    patches, x, _, _, y = operator_of(*CONVOLUTIONS[1])
    whole = rows_of(patches, x, y)
    blocks = list(patches.rows(x, y, EVERY, np.random.default_rng(0), block_nbytes=600))
    assert max(inputs.size + outputs.size for inputs, outputs in blocks) * 8 <= 600
    for part, joined in zip(zip(*blocks, strict=True), whole, strict=True):
        np.testing.assert_array_equal(np.concatenate(part, axis=1), joined)


def test_chosen_rows_are_rows_seeded_and_not_repeated():
    patches, x, _, _, y = operator_of(*CONVOLUTIONS[1])
    whole, some = rows_of(patches, x, y), rows_of(patches, x, y, most=7)
    assert some[0].shape[1] == some[1].shape[1] == 7
    every = {row.tobytes(): other.tobytes() for row, other in zip(whole[0][0], whole[1][0], strict=True)}
    found = {row.tobytes(): other.tobytes() for row, other in zip(some[0][0], some[1][0], strict=True)}
    assert len(found) == 7
    assert found.items() <= every.items()
    np.testing.assert_array_equal(some[0], rows_of(patches, x, y, most=7)[0])


@pytest.mark.parametrize(("op", "x_shape", "weight_shape", "attrs"), CONVOLUTIONS)
def test_least_squares_on_rows_finds_the_kernel_that_made_them(op, x_shape, weight_shape, attrs):
    patches, _, weight, bias, _ = operator_of(op, x_shape, weight_shape, attrs)
    moments = Moments(patches.groups, patches.features, patches.outputs)
    for _ in range(20):
        x = RANDOM.standard_normal(x_shape).astype(np.float32)
        moments.add(*rows_of(patches, x, run(op, x, weight, bias, attrs)))
    start = patches.affinity(np.zeros_like(weight), None)
    found = moments.ridge(start, 1e-12)
    np.testing.assert_allclose(patches.weight(found), weight, atol=1e-4)
    np.testing.assert_allclose(found.bias.reshape(-1), bias, atol=1e-4)
