"""Random graphs, quantized for each target, stay close to the float ones, and are the float ones when stripped."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import model_of

from graphopt.data import load_samples
from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.passes import Calibrate, InsertQdq, StripQdq
from graphopt.passes.insert_qdq import Switch
from graphopt.passes.strip_qdq import Clips
from graphopt.runtime import open_session
from graphopt.targets import target_named
from graphopt.thresholds import Method

CONV = "Conv<pads=[1,1,1,1]>"
STEPS = {
    "conv": f"{{out}} = {CONV}({{x}}, w)",
    "conv and relu": f"{{out}}c = {CONV}({{x}}, w) {{out}} = Relu({{out}}c)",
    "factor": "{out} = Mul({x}, two)",
    "quotient": "{out} = Div({x}, two)",
    "negative factor": "{out} = Mul(minus, {x})",
    "hard-swish": "{out} = HardSwish({x})",
    "hard-swish, written out": (
        "{out}s = Add({x}, three) {out}r = Clip({out}s, zero, six) {out}m = Mul({x}, {out}r) {out} = Div({out}m, six)"
    ),
    "hard-sigmoid": "{out} = HardSigmoid({x})",
    "pad and pool": "{out}p = Pad({x}, pads) {out} = MaxPool<kernel_shape=[3,3]>({out}p)",
    "pad one axis": "{out}p = Pad({x}, below) {out} = Slice({out}p, start, end, axes)",
    "residual": f"{{out}}c = {CONV}({{x}}, w) {{out}} = Add({{out}}c, {{x}})",
    "sigmoid": "{out}s = Sigmoid({x}) {out} = Mul({x}, {out}s)",
    "float": "{out} = Tanh({x})",
}


def model_with(steps, outputs, *, inside=False):
    """Steps one after the other; the results at the given places are graph outputs too.

    Inside: all of it is in one branch of an If, with the same steps, backwards, in the other.
    """
    lines, last = [], "x"
    for index, step in enumerate(steps):
        lines.append(STEPS[step].format(x=last, out=f"t{index}"))
        last = f"t{index}"
    names = dict.fromkeys([*(f"t{index}" for index in sorted(outputs)), last])
    if inside:
        other = [STEPS[step].format(x=f"t{index + 1}", out=f"t{index}") for index, step in enumerate(steps)][::-1]
        kind, first = "float[2,8,6,6]", f"t{len(steps)} = Identity(x)"
        then = f"then_branch = t () => ({kind} {last}) {{ {' '.join(lines)} }}"
        lines = [f"y = If (flag) <{then}, else_branch = e () => ({kind} t0) {{ {first} {' '.join(other)} }}>"]
        names = {"y": None}
    return model_of(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[2,8,6,6] x{", bool flag" if inside else ""})
        => ({", ".join(f"float[2,8,6,6] {name}" for name in names)})
        <float two = {{2}}, float minus = {{-0.7}}, float zero = {{0}}, float three = {{3}}, float six = {{6}},
         float[8,8,3,3] w, int64[8] pads = {{0,0,1,1,0,0,1,1}}, int64[8] below = {{0,0,0,0,0,0,2,0}},
         int64[1] start = {{0}}, int64[1] end = {{6}}, int64[1] axes = {{2}}>
        {{ {" ".join(lines)} }}""")


GRAPHS = {
    "steps": st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6),
    "places": st.sets(st.integers(0, 5), max_size=2),
    "target": st.sampled_from(["ort-cpu", "tensorrt"]),
}
FEED = {"x": np.random.default_rng(0).normal(size=(2, 8, 6, 6)).astype(np.float32)}


@settings(deadline=None, max_examples=40)
@given(**GRAPHS)
def test_a_quantized_graph_stays_close_to_the_float_one(steps, places, target):
    check(steps, {place for place in places if place < len(steps)}, target)


@settings(deadline=None, max_examples=40)
@given(
    steps=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6),
    target=st.sampled_from(["ort-cpu", "tensorrt"]),
)
def test_quantized_branches_stay_close_to_the_float_ones(steps, target):
    check_model(model_with(steps, set(), inside=True), target, flags=(True, False))


@settings(deadline=None, max_examples=40)
@given(**GRAPHS)
def test_a_graph_that_is_quantized_and_stripped_is_the_float_one(steps, places, target):
    model = model_with(steps, {place for place in places if place < len(steps)})
    exact = InsertQdq(small_islands=True, int8_weights=Switch.OFF)
    loaded = quantized(model, target, exact, Calibrate(method=Method.MINMAX))
    result = StripQdq(clips=Clips.NONE).apply(loaded.graph, Context())
    assert not result.skipped
    after = loaded.to_proto()
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in after.graph.node}
    expected, found = (open_session(each).run(FEED) for each in (model, after))
    assert list(found) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-5 * np.abs(values).max(), err_msg=name)


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt"])
def test_a_factor_that_is_a_graph_output_keeps_its_name(target):
    check(["conv", "factor", "conv"], {1}, target)


ROUNDING = (4.5 / 255) ** 2 / 12
"""Noise of one rounding of tensors that span 4.5, as those of these nets do, to 8 bits: outputs near 0 have no less."""


def quantized(model, target, insert, calibrate, feeds=(FEED,)):
    loaded = load_model(model)
    context = Context(target=target_named(target))
    context.samples = load_samples(list(feeds), open_session(model).inputs)
    calibrate.apply(loaded.graph, context)
    insert.apply(loaded.graph, context)
    return loaded


def check(steps, places, target):
    check_model(model_with(steps, places), target)


def check_model(model, target, flags=()):
    """The quantized model is close to the float one, on one feed or, for models with a flag, on one for each."""
    feeds = [FEED | {"flag": np.array(flag)} for flag in flags] or [FEED]
    proto = quantized(model, target, InsertQdq(small_islands=True), Calibrate(), feeds).to_proto()
    for feed in feeds:
        expected = open_session(model).run(feed)
        for optimize in (True, False):
            found = open_session(proto, optimize=optimize).run(feed)
            assert list(found) == list(expected)
            for name, values in expected.items():
                noise = float(((values - found[name]) ** 2).mean())
                assert noise <= 0.02 * float((values**2).mean()) + ROUNDING, (name, optimize)
