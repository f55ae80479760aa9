"""Made-up inputs, tried on the model."""

from __future__ import annotations

import onnx
import pytest

from graphopt.made_up import made_up_samples
from graphopt.model_io import load_model
from graphopt.runtime import open_session


def first_shape(last_axis_from):
    text = f"""<ir_version: 8, opset_import: ["" : 17]> g (float[N,T] x) => (float[A,B] y)
        <int64[1] start = {{{last_axis_from}}}, int64[1] end = {{100000}}, int64[1] axis = {{1}}>
        {{ y = Slice(x, start, end, axis) }}"""
    model = load_model(onnx.parser.parse_model(text))
    return next(iter(made_up_samples(open_session(model), model.graph)))["x"].shape


@pytest.mark.parametrize(("start", "shape"), [(0, (1, 16)), (40, (1, 128)), (50_000, (1, 16))])
def test_sizes_that_leave_nothing_of_an_output_are_the_last_resort(start, shape):
    assert first_shape(start) == shape


@pytest.mark.parametrize(("start", "shape"), [(4, (1, 16)), (40, (1, 128))])
def test_sizes_with_which_an_input_goes_without_effect_come_after_others(start, shape):
    text = f"""<ir_version: 8, opset_import: ["" : 17]> g (float[N,T] x, float[N] state, float unused) => (float[N] y)
        <int64[1] start = {{{start}}}, int64[1] end = {{100000}}, int64[1] axis = {{1}}>
        {{ rest = Slice(x, start, end, axis) sum = ReduceSum<keepdims=0>(rest, axis) y = Add(sum, state) }}"""
    model = load_model(onnx.parser.parse_model(text))
    assert next(iter(made_up_samples(open_session(model), model.graph)))["x"].shape == shape


def length_of(body):
    text = f"""<ir_version: 8, opset_import: ["" : 17]> g (float[N,T,8] x, int64[N] lengths) => (float[A,B] y)
        <int64[1] first = {{0}}, float one = {{1}}> {{ {body} }}"""
    model = load_model(onnx.parser.parse_model(text))
    feed = next(iter(made_up_samples(open_session(model), model.graph)))
    return feed["lengths"].tolist(), feed["x"].shape


@pytest.mark.parametrize(
    ("body", "lengths"),
    [
        # of 0 and 1 NaN and -infinity
        ("f = Cast<to=1>(lengths) m = Sub(f, one) l = Log(m) y = Unsqueeze(l, first)", [16]),
        ("f = Cast<to=1>(lengths) n = Sub(f, f) q = Div(n, n) y = Unsqueeze(q, first)", None),  # NaN of any length
        ("f = Cast<to=1>(lengths) y = Unsqueeze(f, first)", None),
    ],
)
def test_integers_are_lengths_where_outputs_are_not_finite_else(body, lengths):
    found, shape = length_of(f"{body} k = Identity(x)")
    assert shape == (1, 16, 8)
    assert found == lengths if lengths else found in ([0], [1])
