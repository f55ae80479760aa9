"""A Resize that repeats pixels, written as copies: to the same bits, and only between int8 Convs."""

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_insert_qdq import quantized, ranges_of
from texts import model_of

from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.passes import StripQdq
from graphopt.repeated_pixels import factors_of
from graphopt.runtime import open_session
from graphopt.targets.ort_cpu import ORT_CPU

RANGES = ranges_of(**dict.fromkeys("xcrstuy", (-3, 3)))
WITHOUT = replace(ORT_CPU, repeats_pixels=False)
FLOOR = 'coordinate_transformation_mode="asymmetric", nearest_mode="floor"'
CONV = "Conv<pads=[1,1,1,1]>"


def net(body, *, shape="N,8,H,W", scales="1, 1, 2, 2"):
    return model_of(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[{shape}] x) => (float[A,B,C,D] y)
        <float[8,8,3,3] w, float[4] scales = {{{scales}}}, int64[4] sizes = {{1, 8, 12, 30}}, float[8,8,3,3] v>
        {{ {body} }}
    """)


def between_convs(resize=f"Resize<{FLOOR}>(c, , scales)", **options):
    return net(f"c = {CONV}(x, w) r = {resize} y = {CONV}(r, w)", **options)


def operators(proto):
    return Counter(node.op_type for node in proto.graph.node)


def outputs_of(proto, shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return open_session(proto).run({"x": x})["y"]


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    mode=st.sampled_from([FLOOR, 'mode="nearest"', 'coordinate_transformation_mode="pytorch_half_pixel"']),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    known=st.tuples(*[st.booleans()] * 3),
)
@settings(max_examples=40, deadline=None)
def test_copies_are_the_resize_to_the_bit(rows, columns, mode, sizes, known):
    declared = [str(size) if is_known else name for size, is_known, name in zip(sizes, known, "NHW", strict=True)]
    batch, height, width = declared
    model = between_convs(
        f"Resize<{mode}>(c, , scales)", shape=f"{batch},8,{height},{width}", scales=f"1, 1, {rows}, {columns}"
    )
    copies, result = quantized(model, ranges=RANGES)
    resized, expected = quantized(model, WITHOUT, RANGES)
    assert operators(copies)["Resize"] == (rows == columns == 1)
    assert operators(resized)["Resize"] == 1
    assert result.parts == expected.parts | ({"Resizes as copies": 1} if rows * columns > 1 else {})
    assert result.rewrites == expected.rewrites
    shape = (sizes[0], 8, *sizes[1:])
    np.testing.assert_array_equal(outputs_of(copies, shape), outputs_of(resized, shape))


@pytest.mark.parametrize(
    ("attributes", "scales", "factors"),
    [
        (FLOOR, [1, 1, 2, 2], (2, 2)),
        (FLOOR, [1, 1, 1, 3], (1, 3)),
        (FLOOR, [1, 1, 1, 1], None),
        (FLOOR, [1, 1, 1.5, 2], None),
        (FLOOR, [1, 1, 0.5, 2], None),
        (FLOOR, [2, 1, 2, 2], None),
        (FLOOR, [1, 2, 2, 2], None),
        (FLOOR, [1, 2, 2], None),
        (FLOOR.replace("floor", "ceil"), [1, 1, 2, 2], None),
        (FLOOR.replace("floor", "round_prefer_floor"), [1, 1, 2, 2], (2, 2)),
        (FLOOR.replace("floor", "round_prefer_floor"), [1, 1, 3, 3], None),
        (FLOOR.replace("asymmetric", "half_pixel"), [1, 1, 2, 2], None),
        (FLOOR.replace("asymmetric", "align_corners"), [1, 1, 2, 2], None),
        ('mode="nearest"', [1, 1, 7, 4], (7, 4)),
        ('nearest_mode="round_prefer_ceil"', [1, 1, 2, 2], (2, 2)),
        ('mode="linear"', [1, 1, 2, 2], None),
        (f"{FLOOR}, axes=[0,1,2,3]", [1, 1, 2, 2], None),
    ],
)
def test_what_repeats_pixels(attributes, scales, factors):
    """Held against onnxruntime, which must move the places of a picture as the factors say."""
    declared = ",".join(map(str, scales))
    text = f"""<ir_version: 8, opset_import: ["" : 18]> g (float[1,2,6,10] x) => (float[A,B,C,D] y)
        <float[{len(scales)}] scales = {{{declared}}}> {{ y = Resize<{attributes}>(x, , scales) }}"""
    proto = onnx.parser.parse_model(text)
    (node,) = load_model(proto).graph.nodes
    assert factors_of(node) == factors
    if factors is not None:
        x = np.random.default_rng(0).standard_normal((1, 2, 6, 10)).astype(np.float32)
        expected = x.repeat(factors[0], axis=2).repeat(factors[1], axis=3)
        np.testing.assert_array_equal(open_session(proto).run({"x": x})["y"], expected)


def test_sizes_say_the_factors_of_what_has_a_shape():
    resize = f"Resize<{FLOOR}>(c, , , sizes)"
    assert not operators(quantized(between_convs(resize, shape="1,8,6,10"), ranges=RANGES)[0])["Resize"]
    assert operators(quantized(between_convs(resize, shape="1,8,6,15"), ranges=RANGES)[0])["Resize"] == 0
    assert operators(quantized(between_convs(resize, shape="1,8,5,10"), ranges=RANGES)[0])["Resize"] == 1
    assert operators(quantized(between_convs(resize, shape="1,8,H,W"), ranges=RANGES)[0])["Resize"] == 1


@pytest.mark.parametrize(
    "body",
    [
        f"c = {CONV}(x, w) s = MaxPool<kernel_shape=[2,2]>(c) r = Resize<{FLOOR}>(s, , scales) y = {CONV}(r, w)",
        f"c = {CONV}(x, w) r = Resize<{FLOOR}>(c, , scales) t = Concat<axis=2>(r, r) y = {CONV}(t, w)",
    ],
)
def test_copies_stand_where_other_operators_are_between_the_convs(body):
    assert not operators(quantized(net(body), ranges=RANGES)[0])["Resize"]


@pytest.mark.parametrize(
    "body",
    [
        f"r = Resize<{FLOOR}>(x, , scales) y = {CONV}(r, w)",
        f"c = {CONV}(x, w) s = Transpose<perm=[0,1,3,2]>(c) r = Resize<{FLOOR}>(s, , scales) y = {CONV}(r, w)",
        f"c = {CONV}(x, w) r = Resize<{FLOOR}>(c, , scales) t = Transpose<perm=[0,1,3,2]>(r) y = {CONV}(t, w)",
        f"c = {CONV}(x, w) y = Resize<{FLOOR}>(c, , scales)",
    ],
)
def test_a_resize_that_is_not_between_convs_stays(body):
    assert operators(quantized(net(body), ranges=RANGES)[0])["Resize"] == 1


def test_what_others_read_too_keeps_its_pair():
    body = (
        f"c = {CONV}(x, w) r = Resize<{FLOOR}>(c, , scales) s = {CONV}(r, w) t = {CONV}(c, w) "
        "u = MaxPool<kernel_shape=[2,2], strides=[2,2]>(s) y = Concat<axis=2>(u, t)"
    )
    copies, resized = (quantized(net(body), target, RANGES)[0] for target in (ORT_CPU, WITHOUT))
    assert not operators(copies)["Resize"]
    np.testing.assert_array_equal(outputs_of(copies, (1, 8, 4, 4)), outputs_of(resized, (1, 8, 4, 4)))


def test_two_of_one_tensor_are_replaced_both():
    body = (
        f"c = {CONV}(x, w) r = Resize<{FLOOR}>(c, , scales) s = Resize<{FLOOR}>(c, , scales) "
        f"t = {CONV}(r, w) u = {CONV}(s, w) y = Concat<axis=1>(t, u)"
    )
    copies, resized = (quantized(net(body), target, RANGES)[0] for target in (ORT_CPU, WITHOUT))
    assert not operators(copies)["Resize"]
    np.testing.assert_array_equal(outputs_of(copies, (1, 8, 4, 4)), outputs_of(resized, (1, 8, 4, 4)))


def test_stripped_of_its_quantizers_it_repeats_pixels_still():
    stripped, original = load_model(quantized(between_convs(), ranges=RANGES)[0]), between_convs()
    StripQdq().apply(stripped.graph, Context())
    proto = stripped.to_proto()
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(operators(proto))
    np.testing.assert_allclose(outputs_of(proto, (2, 8, 4, 5)), outputs_of(original, (2, 8, 4, 5)), atol=0.1)
