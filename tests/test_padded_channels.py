"""Channels of zeros for first Convs: what is computed stays the same, and where they gain nothing there are none."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_insert_qdq import ANY_CPU, quantized, ranges_of
from texts import model_of

from graphopt.passes.insert_qdq import ActivationType
from graphopt.runtime import open_session
from graphopt.targets.ort_cpu import ORT_ARM, ORT_CPU

RANGES = ranges_of(x=(-3, 3), y=(-3, 3), z=(-3, 3), r=(0, 4))
UNPADDED = replace(ORT_CPU, dense_convs=None)


def net(*, channels=3, outputs=16, kernel="3,3", attributes="strides=[2,2]", before="", sizes="H,W", result=""):
    read = "t" if before else "x"
    result = result or ",".join("ABC"[: len(sizes.split(","))])
    weight = f"{outputs},{channels},{kernel}"
    return f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N,{channels},{sizes}] x) => (float[N,{outputs},{result}] y)
        <float[{weight}] w, float[{outputs}] b> {{ {before} y = Conv<{attributes}>({read}, w, b) }}
    """


def pads_of(proto):
    return [node for node in proto.graph.node if node.op_type == "Pad"]


def outputs_of(proto, shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return open_session(proto).run({"x": x})


@given(channels=st.integers(1, 9), outputs=st.sampled_from([16, 20, 32]), spatial=st.integers(1, 3))
def test_padded_convs_compute_the_same_to_the_bit(channels, outputs, spatial):
    sizes, kernel = ",".join("HWD"[:spatial]), ",".join(["3"] * spatial)
    strides = f"strides=[{','.join(['2'] * spatial)}]"
    text = net(channels=channels, outputs=outputs, kernel=kernel, attributes=strides, sizes=sizes)
    padded, result = quantized(model_of(text), ranges=RANGES, **ANY_CPU)
    plain, expected = quantized(model_of(text), UNPADDED, RANGES, **ANY_CPU)
    assert len(pads_of(padded)) == (channels % 4 > 0)
    assert result.parts == expected.parts | ({"Convs with channels of zeros": 1} if channels % 4 else {})
    shape = (2, channels, *[9] * spatial)
    np.testing.assert_array_equal(outputs_of(padded, shape)["y"], outputs_of(plain, shape)["y"])


def test_convs_that_read_the_same_share_a_pad():
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N,3,H,W] x) => (float[N,16,A,B] y, float[N,32,A,B] z, float[N,3,A,B] r)
        <float[16,3,3,3] w, float[32,3,3,3] v>
        { y = Conv(x, w)  z = Conv(x, v)  r = MaxPool<kernel_shape=[3,3]>(x) }
    """
    padded, _ = quantized(model_of(text), ranges=RANGES, **ANY_CPU)
    plain, _ = quantized(model_of(text), UNPADDED, RANGES, **ANY_CPU)
    assert len(pads_of(padded)) == 1
    expected = outputs_of(plain, (1, 3, 12, 10))
    for name, values in outputs_of(padded, (1, 3, 12, 10)).items():
        np.testing.assert_array_equal(values, expected[name])


def test_a_weight_that_is_read_with_and_without_zeros_is_stored_both_ways():
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N,3,H,W] x, float[N,H,W,3] last) => (float[N,16,A,B] y, float[N,16,A,B] z)
        <float[16,3,3,3] w> { y = Conv(x, w)  t = Transpose<perm=[0,3,1,2]>(last)  z = Conv(t, w) }
    """
    proto, _ = quantized(model_of(text), ranges=ranges_of(x=(-3, 3), t=(-3, 3), y=(-3, 3), z=(-3, 3)))
    stored = [tuple(each.dims) for each in proto.graph.initializer if each.name.startswith("w_quantized")]
    assert sorted(stored) == [(16, 3, 3, 3), (16, 4, 3, 3)]
    assert len(pads_of(proto)) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 4},
        {"outputs": 12},
        {"outputs": 18},
        {"kernel": "11,11"},
        {"sizes": "28,28", "result": "13,13"},
        {"before": "s = Transpose<perm=[0,1,3,2]>(x) t = Mul(s, s)"},
        {"before": "u = Conv<pads=[1,1,1,1]>(x, u_w) t = Relu(u)", "channels": 3},
    ],
)
def test_there_are_no_zeros_where_they_gain_nothing(changes):
    text = net(**changes).replace("float[16] b>", "float[16] b, float[3,3,3,3] u_w>")
    proto, result = quantized(model_of(text), ranges=ranges_of(x=(-3, 3), y=(-3, 3), t=(-3, 3), s=(-3, 3)))
    assert result.parts["operators"]
    assert not pads_of(proto)


def test_a_conv_of_groups_is_left_as_it_is():
    text = net(channels=6, attributes="group=2").replace("float[16,6,3,3]", "float[16,3,3,3]")
    proto, _ = quantized(model_of(text), ranges=RANGES)
    assert not pads_of(proto)


@pytest.mark.parametrize("activations", [ActivationType.INT8, ActivationType.UINT16])
def test_other_kernels_are_not_padded_for(activations):
    proto, _ = quantized(model_of(net()), ranges=RANGES, activations=activations)
    assert not pads_of(proto)
    proto, _ = quantized(model_of(net()), ORT_ARM, RANGES)
    assert not pads_of(proto)
