"""Which weights kernels without VNNI add up in 16 bits, and that with `reduce_range` no two of them saturate."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from test_insert_qdq import ANY_CPU, quantized, ranges_of
from texts import model_of

from graphopt.graph import producer
from graphopt.model_io import load_model
from graphopt.passes.insert_qdq import Switch
from graphopt.quantizers import dequantizer_of
from graphopt.runtime import open_session
from graphopt.saturation import LARGEST_PAIR, largest_pairs

OPERATORS = {  # by name, the shape of x, the operator, the shape of its weight
    "1x1": ("1,16,5,5", "Conv(x, w)", (16, 16, 1, 1)),
    "3x3": ("1,16,5,5", "Conv<pads=[1,1,1,1]>(x, w)", (16, 16, 3, 3)),
    "few channels": ("1,3,9,9", "Conv<strides=[2,2]>(x, w)", (20, 3, 3, 3)),
    "one channel": ("1,1,9,9", "Conv(x, w)", (8, 1, 5, 5)),
    "odd channels": ("1,7,6,6", "Conv<dilations=[2,2]>(x, w)", (16, 7, 2, 2)),
    "1-D": ("2,6,20", "Conv<pads=[2,2]>(x, w)", (16, 6, 5)),
    "3-D": ("1,5,4,4,4", "Conv(x, w)", (16, 5, 2, 2, 2)),
    "groups": ("1,12,5,5", "Conv<group=2>(x, w)", (16, 6, 3, 3)),
    "depthwise": ("1,16,5,5", "Conv<group=16>(x, w)", (16, 1, 3, 3)),
    "Gemm": ("3,33", "Gemm(x, w)", (33, 20)),
    "transposed Gemm": ("3,33", "Gemm<transB=1>(x, w)", (20, 33)),
    "MatMul": ("2,5,24", "MatMul(x, w)", (24, 40)),
    "stacked MatMul": ("2,5,24", "MatMul(x, w)", (2, 24, 40)),
}


def net(name):
    shape, operator, _ = OPERATORS[name]
    result = ",".join("ABCDE"[: len(shape.split(","))])
    return model_of(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[{shape}] x) => (float[{result}] y) {{ y = {operator} }}'
    )


@pytest.mark.parametrize("name", OPERATORS)
@given(seed=st.integers(0, 2**32 - 1), tail=st.sampled_from([1, 2, 30]))
@settings(max_examples=8, deadline=None)
def test_no_sum_saturates_where_that_is_asked(name, seed, tail):
    """Activations of 0 and 255 alone; without VNNI the kernels of this machine would tell."""
    rng = np.random.default_rng(seed)
    shape, _, weight_shape = OPERATORS[name]
    model = net(name)
    weight = (rng.standard_t(tail, weight_shape) * rng.choice([-1, 1, 1], weight_shape)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    feed = {"x": rng.choice([0.0, 1.0, 1.0], [int(size) for size in shape.split(",")]).astype(np.float32)}
    expected = open_session(model).run(feed)["y"]
    ends = float(expected.min()), float(expected.max())
    proto, _ = quantized(model, ranges=ranges_of(x=(0, 1), y=ends), **ANY_CPU)
    found, exact = open_session(proto).run(feed)["y"], open_session(proto, exact=True).run(feed)["y"]
    step = (max(ends[1], 0.0) - min(ends[0], 0.0)) / 255
    assert np.abs(found - exact).max() <= 1.01 * step


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("switch", Switch)
def test_stored_pairs_fit_where_that_is_asked(name, switch):
    weight = np.random.default_rng(0).standard_normal(OPERATORS[name][2]).astype(np.float32)
    model = net(name)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    proto, _ = quantized(model, ranges=ranges_of(x=(0, 1), y=(-3, 3)), reduce_range=switch)
    (node,) = (node for node in load_model(proto).graph.nodes if node.op in ("Conv", "Gemm", "MatMul"))
    stored = dequantizer_of(node.inputs[1]).data
    assert producer(stored) is None
    fits = largest_pairs(node, stored.values).max() <= LARGEST_PAIR
    assert fits or switch is not Switch.ON
    assert not fits or switch is not Switch.OFF or name == "depthwise"


@pytest.mark.parametrize(
    ("op", "attributes", "weight", "expected"),
    [
        ("MatMul", {}, [[1], [2], [3], [4]], [7]),
        ("MatMul", {}, [[1], [2], [30]], [30]),  # the third has no other
        ("MatMul", {}, [[[1], [2]], [[5], [-6]]], [3, 6]),
        ("Gemm", {"transB": 0}, [[1, -5], [2, -6], [9, 9]], [9, 11]),
        ("Gemm", {"transB": 1}, [[1, 2, 3], [-7, 6, -8]], [3, 8]),
        ("Conv", {}, [[[1, 20], [3, 4]]], [24]),  # the channels of one place are side by side
        ("Conv", {}, [[[1, 20], [3, 4], [5, 6]]], [25]),  # 5 and 20; with a fourth channel of zeros 20 and 4
        ("Conv", {"group": 2}, [[[1, 20]], [[3, 4]]], [0]),
        ("ConvTranspose", {}, [[[1, 20]], [[3, 4]]], [0]),
    ],
)
def test_which_weights_are_added_in_16_bits(op, attributes, weight, expected):
    node = SimpleNamespace(op=op, attrs=attributes)
    assert largest_pairs(node, np.array(weight)).tolist() == expected


def test_a_weight_beside_others_of_its_size_keeps_its_bits():
    """127 and 127 stand in one channel, but no kernel adds them up."""
    weight = np.array([[127.0], [-100.0], [0.5], [127.0], [-127.0], [0.5]], np.float32)
    model = model_of('<ir_version: 8, opset_import: ["" : 17]> g (float[3,6] x) => (float[3,1] y) { y = Gemm(x, w) }')
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    proto, _ = quantized(model, ranges=ranges_of(x=(0, 1), y=(-300, 300)), **ANY_CPU)
    (stored,) = (numpy_helper.to_array(each) for each in proto.graph.initializer if each.name == "w_quantized")
    assert np.abs(stored).max() > 127 / 1.11
