"""Q/DQ graphs of this and other tools, turned back into float ones."""

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from comparing import assert_equal_outputs, build, ops
from zoo import zoo_feeds, zoo_model

import graphopt
from graphopt.cli import main
from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.passes import StripQdq
from graphopt.passes.strip_qdq import Clips
from graphopt.quantization import INT8_WEIGHT, params_of_weight
from graphopt.runtime import open_session

MODELS = Path(__file__).resolve().parent.parent / "models"
CALIBRATION = str(MODELS / "fashion_mnist_calibration.npz")

CONSTANTS = {
    "s": np.float32(0.05),
    "t": np.float32(0.1),
    "z": np.int8(0),
    "low": np.int8(-128),
    "high": np.int8(127),
    "u0": np.uint8(0),
    "u128": np.uint8(128),
    "sc": np.linspace(0.1, 0.4, 4).astype(np.float32),
    "sx": np.full((2, 2, 3, 3), 0.1, np.float32),
    "zx": np.zeros((2, 2, 3, 3), np.int8),
    "w": np.arange(-32, 32).reshape(4, 4, 2, 2).astype(np.int8),
    "wf": np.linspace(-1, 1, 64).reshape(4, 4, 2, 2).astype(np.float32),
    "b": np.arange(4).astype(np.int32),
    "six": np.float32(6),
    "three": np.float32(3),
    "zero": np.float32(0),
}


def model_with(body, opset=21, inputs="float[2,4,3,3] x", output="float[A,B,C,D] y", constants=CONSTANTS):
    header = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    text = f"{header} g ({inputs}) => ({output}) {{ {body} }}"
    model = build(text)
    graphs = [model.graph, *(a.g for node in model.graph.node for a in node.attribute if a.HasField("g"))]
    read = {name for graph in graphs for node in graph.node for name in node.input}
    known = CONSTANTS | constants
    for name in known.keys() & read:
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(known[name]), name))
    return model


def stripped(model, **options):
    loaded = load_model(model)
    result = StripQdq(**options).apply(loaded.graph, Context())
    after = loaded.to_proto()
    onnx.checker.check_model(after, full_check=True)
    return after, result


def assert_strips_to(body, float_body, tolerance=1e-6, **arguments):
    after, result = stripped(model_with(body, **arguments))
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(ops(after))
    assert_equal_outputs(model_with(float_body, **arguments), after, tolerance=tolerance)
    return after, result


PAIR = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"


def test_a_pair_on_an_activation_goes():
    after, result = assert_strips_to(f"{PAIR} y = Sigmoid(d)", "y = Sigmoid(x)")
    assert list(ops(after)) == ["Sigmoid"]
    assert result.parts["activations"] == 1


def test_several_dequantizers_behind_one_quantizer_go():
    body = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) e = DequantizeLinear(q, s, z) y = Add(d, e)"
    assert_strips_to(body, "y = Add(x, x)")


def test_the_pair_of_a_graph_output_goes_and_the_output_keeps_its_name():
    after, _ = assert_strips_to(
        "c = Sigmoid(x) q = QuantizeLinear(c, s, z) y = DequantizeLinear(q, s, z)", "y = Sigmoid(x)"
    )
    assert list(ops(after)) == ["Sigmoid"]
    after, _ = assert_strips_to("q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)", "y = Identity(x)")


def test_stored_weights_become_what_they_stand_for():
    after, _ = assert_strips_to(
        "v = DequantizeLinear<axis=0>(w, sc) c = DequantizeLinear(b, s) y = Conv(x, v, c)",
        "wc = Cast<to=1>(w) r = Constant<value_ints=[4,1,1,1]>() sr = Reshape(sc, r) v = Mul(wc, sr) "
        "bc = Cast<to=1>(b) c = Mul(bc, s) y = Conv(x, v, c)",
    )
    assert list(ops(after)) == ["Conv"]


def test_a_negative_axis_and_a_zero_point_are_read():
    text = "wc = Cast<to=1>(w) k = Constant<value_float=128.0>() m = Add(wc, k) v = Mul(m, s) y = Conv(x, v)"
    assert_strips_to("v = DequantizeLinear<axis=-4>(w, s, low) y = Conv(x, v)", text)


def test_float_weights_behind_q_and_dq_stay_bit_for_bit():
    after, result = assert_strips_to(
        "q = QuantizeLinear<axis=0>(wf, sc) v = DequantizeLinear<axis=0>(q, sc) y = Conv(x, v)", "y = Conv(x, wf)"
    )
    (kept,) = [each for each in after.graph.initializer if each.name == "wf"]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(kept), CONSTANTS["wf"])
    assert result.parts["weights"] == 1


def test_quantizers_of_onnxruntimes_own_domain_go_too():
    body = "q = com.microsoft.QuantizeLinear(x, s, u128) d = com.microsoft.DequantizeLinear(q, s, u128) y = Sigmoid(d)"
    loaded = load_model(model_with(body))
    StripQdq().apply(loaded.graph, Context())
    assert [node.op for node in loaded.graph.nodes] == ["Sigmoid"]


@pytest.mark.parametrize("zero_point", ["low", "u0"])
def test_a_quantizer_that_clips_at_zero_leaves_a_clip_of_its_range(zero_point):
    body = f"n = Neg(x) q = QuantizeLinear(n, s, {zero_point}) d = DequantizeLinear(q, s, {zero_point}) y = Neg(d)"
    assert_strips_to(body, "n = Neg(x) top = Constant<value_float=12.75>() c = Clip(n, zero, top) y = Neg(c)")
    after, _ = stripped(model_with(body), clips=Clips.RELU)
    assert_equal_outputs(model_with("n = Neg(x) r = Relu(n) y = Neg(r)"), after)
    assert ops(after) == {"Neg": 2, "Relu": 1}


def test_a_quantizer_that_clips_above_zero_leaves_a_clip():
    body = "n = Neg(x) q = QuantizeLinear(n, s, high) d = DequantizeLinear(q, s, high) y = Neg(d)"
    expected = "n = Neg(x) least = Constant<value_float=-12.75>() c = Clip(n, least, zero) y = Neg(c)"
    assert_strips_to(body, expected)
    after, _ = stripped(model_with(body), clips=Clips.RELU)
    assert_equal_outputs(model_with("n = Neg(x) c = Clip(n, , zero) y = Neg(c)"), after)


def test_a_graph_input_stands_for_no_activation_function():
    body = "q = QuantizeLinear(x, s, low) d = DequantizeLinear(q, s, low) y = Neg(d)"
    assert_strips_to(body, "y = Neg(x)")


@pytest.mark.parametrize("before", ["Relu(x)", "Sigmoid(x)", "Clip(x, zero, six)"])
def test_no_relu_is_added_where_nothing_is_negative(before):
    body = f"r = {before} q = QuantizeLinear(r, s, low) d = DequantizeLinear(q, s, low) y = Neg(d)"
    _, result = assert_strips_to(body, f"r = {before} y = Neg(r)")
    assert result.parts["clips kept"] == 0
    moved = body.replace("q =", "p = MaxPool<kernel_shape=[2,2]>(r) q =").replace("(r, s", "(p, s")
    assert stripped(model_with(moved))[1].parts["clips kept"] == 0


def test_clips_can_all_go_or_all_stay():
    body = "n = Neg(x) q = QuantizeLinear(n, s, low) d = DequantizeLinear(q, s, low) y = Neg(d)"
    assert list(ops(stripped(model_with(body), clips=Clips.NONE)[0])) == ["Neg"]
    after, _ = stripped(model_with(f"{PAIR} y = Neg(d)"), clips=Clips.ALL)
    expected = "lo = Constant<value_float=-6.4>() hi = Constant<value_float=6.35>() c = Clip(x, lo, hi) y = Neg(c)"
    assert_equal_outputs(model_with(expected), after)


def test_the_clip_of_an_old_opset_has_attributes():
    body = "n = Neg(x) q = QuantizeLinear(n, s, high) d = DequantizeLinear(q, s, high) y = Neg(d)"
    after, _ = stripped(model_with(body, opset=10))
    assert ops(after) == {"Clip": 1, "Neg": 2}


def test_the_scales_of_hard_swish_stay_as_a_clip_and_a_factor():
    constants = {"a": np.float32(6 / 255), "c": np.float32(1 / 255)}
    model = model_with("p = Add(x, three) q = QuantizeLinear(p, a, u0) d = DequantizeLinear(q, c, u0) y = Mul(x, d)")
    for name, value in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    after, result = stripped(model)
    assert result.parts["factors kept"] == 1
    assert_equal_outputs(model_with("y = HardSwish(x)"), after, tolerance=1e-6)


def test_different_zero_points_stay_as_a_shift():
    body = "q = QuantizeLinear(x, t, z) d = DequantizeLinear(q, t, low) y = Sigmoid(d)"
    assert_strips_to(body, "k = Constant<value_float=12.8>() a = Add(x, k) y = Sigmoid(a)", tolerance=1e-5)


def test_a_pair_with_a_scale_for_each_channel_goes_unless_the_axes_differ():
    body = "q = QuantizeLinear<axis=1>(x, sc) d = DequantizeLinear<axis=1>(q, sc) y = Sigmoid(d)"
    assert_strips_to(body, "y = Sigmoid(x)")
    other = model_with(
        body.replace("d = DequantizeLinear<axis=1>", "d = DequantizeLinear<axis=2>"), inputs="float[2,4,4,3] x"
    )
    assert any("another axis" in skip.reason for skip in stripped(other)[1].skipped)


def test_pairs_in_branches_go():
    body = (
        "keep = If(flag) <then_branch = g1 () => (a) { q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z) },"
        " else_branch = g2 () => (e) { e = Neg(x) }> y = Sigmoid(keep)"
    )
    after, _ = stripped(model_with(body, inputs="float[2,4,3,3] x, bool flag"))
    assert "QuantizeLinear" not in ops(after)
    for flag, expected in ((True, "y = Sigmoid(x)"), (False, "n = Neg(x) y = Sigmoid(n)")):
        x = np.random.default_rng(0).standard_normal((2, 4, 3, 3)).astype(np.float32)
        found = open_session(after).run({"x": x, "flag": np.asarray(flag)})["y"]
        wanted = open_session(model_with(expected)).run({"x": x})["y"]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_a_quantizer_outside_of_two_branches_goes_with_the_dequantizers_in_them():
    body = (
        "n = Neg(x) q = QuantizeLinear(n, s, low) keep = If(flag) <"
        "then_branch = g1 () => (a) { d = DequantizeLinear(q, s, low) a = Neg(d) },"
        "else_branch = g2 () => (e) { f = DequantizeLinear(q, s, low) e = Abs(f) }> y = Sigmoid(keep)"
    )
    after, result = stripped(model_with(body, inputs="float[2,4,3,3] x, bool flag"), clips=Clips.RELU)
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(ops(after))
    assert result.parts["clips kept"] == 2  # a branch cannot read the Relu that is in the other
    for flag, operator in ((True, "Neg"), (False, "Abs")):
        x = np.random.default_rng(0).standard_normal((2, 4, 3, 3)).astype(np.float32)
        found = open_session(after).run({"x": x, "flag": np.asarray(flag)})["y"]
        wanted = open_session(model_with(f"n = Neg(x) r = Relu(n) k = {operator}(r) y = Sigmoid(k)")).run({"x": x})["y"]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "m = ReduceMax<keepdims=0>(x) q = QuantizeLinear(x, m, z) d = DequantizeLinear(q, m, z) y = Neg(d)",
            "run time",
        ),
        (
            "q = QuantizeLinear(x, s, z) p = Abs(q) d = DequantizeLinear(p, s, z) y = Neg(d)",
            "p, which it reads, is computed in integers",
        ),
        (
            "q = QuantizeLinear(x, s, z) p = Abs(q) n = Transpose(p) y = DequantizeLinear(n, s, z)",
            "p, which it reads, is computed in integers",
        ),
        (
            "q = QuantizeLinear(x, s, z) p, i = MaxPool<kernel_shape=[1,1]>(q) y = DequantizeLinear(p, s, z)",
            "p, which it reads, is computed in integers",
        ),
        (
            "q = QuantizeLinear<axis=1>(x, sc) n = Transpose<perm=[0,1,3,2]>(q) y = DequantizeLinear<axis=1>(n, sc)",
            "moved between Q and DQ",
        ),
        ("q, qs, qz = DynamicQuantizeLinear(x) y = DequantizeLinear(q, qs, qz)", "computes with what it stores"),
        ("q = QuantizeLinear(x, s, z) i = Cast<to=6>(q) y = Cast<to=1>(i)", "computes with what it stores"),
        (
            "q = QuantizeLinear<axis=1, block_size=2>(x, sx, zx) y = DequantizeLinear<axis=1, block_size=2>(q, sx, zx)",
            "each block",
        ),
    ],
)
def test_what_is_no_plain_pair_is_left_alone_with_the_reason(body, reason):
    model = model_with(body)
    after, result = stripped(model)
    assert any(reason in skip.reason for skip in result.skipped), result.skipped
    assert {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"} & set(ops(after))
    assert_equal_outputs(model, after, tolerance=1e-6)


@pytest.mark.parametrize("scale", [np.nan, np.inf, 0.0, -0.1])
def test_a_scale_that_is_no_positive_number_is_left_alone(scale):
    """As onnxruntime's tool writes where a tensor was NaN in calibration."""
    body = "q = QuantizeLinear(x, odd, z) d = DequantizeLinear(q, odd, z) y = Neg(d)"
    _, result = stripped(model_with(body, constants={"odd": np.float32(scale)}))
    assert result.rewrites == 0
    assert "no positive number" in result.skipped[0].reason


# ---------------------------------------------------------------- operators that move integers between Q and DQ

MOVES = {
    "Pad": ("Pad(q, pads, z)", "Pad(x, pads, zero)"),
    "Pad by another value": ("Pad(q, pads, seven)", "Pad(x, pads, k)"),  # 0.35 = 7 * 0.05
    "Pad by copies": ('Pad<mode="reflect">(q, pads)', 'Pad<mode="reflect">(x, pads)'),
    "MaxPool": ("MaxPool<kernel_shape=[2,2]>(q)", "MaxPool<kernel_shape=[2,2]>(x)"),
    "Reshape": ("Reshape(q, shape)", "Reshape(x, shape)"),
    "Transpose": ("Transpose<perm=[3,0,2,1]>(q)", "Transpose<perm=[3,0,2,1]>(x)"),
    "Resize": ("Resize(q, , ones)", "Resize(x, , ones)"),
    "Concat": ("Concat<axis=1>(q, border, q)", "Concat<axis=1>(x, k3, x)"),
    "Where": ("Where(flags, q, seven)", "Where(flags, x, k)"),
    "ReduceMax": ("ReduceMax(q)", "ReduceMax(x)"),
    "Min": ("Min(q, seven)", "Min(x, k)"),
    "Slice": ("Slice(q, from, to, axes)", "Slice(x, from, to, axes)"),
    "DepthToSpace": ("DepthToSpace<blocksize=2>(q)", "DepthToSpace<blocksize=2>(x)"),
}
MOVED = {
    "pads": np.array([0, 0, 1, 0, 0, 0, 1, 2]),
    "seven": np.int8(7),
    "k": np.float32(0.35),
    "shape": np.array([3, 2, 3, -1]),
    "ones": np.ones(4, np.float32),
    "border": np.full((2, 1, 3, 3), 7, np.int8),
    "k3": np.full((2, 1, 3, 3), 0.35, np.float32),
    "flags": np.array([True, False, True]),
    "from": np.array([1]),
    "to": np.array([3]),
    "axes": np.array([2]),
}


@pytest.mark.parametrize("name", MOVES)
def test_an_operator_that_moves_integers_is_the_same_one_on_floats(name):
    integers, floats = MOVES[name]
    body = f"q = QuantizeLinear(x, s, z) [mover] m = {integers} y = DequantizeLinear(m, s, z)"
    after, result = assert_strips_to(body, f"y = {floats}", constants=MOVED)
    assert list(ops(after)) == [floats.split("(")[0].split("<")[0]]
    assert [node.name for node in after.graph.node] == ["mover"]
    assert result.parts["integer operators"] == 1
    assert result.parts["activations"] == 1


@pytest.mark.parametrize("moved", ["q", "MaxPool<kernel_shape=[2,2]>(q)"])
def test_sizes_of_integers_are_those_of_floats(moved):
    real = moved.replace("q", "x")
    p, f = ("q", "") if moved == "q" else ("p", f"p = {real} ")
    integers = "" if moved == "q" else f"p = {moved} "
    body = f"q = QuantizeLinear(x, s, z) {integers} n = Shape({p}) m = Reshape({p}, n) y = DequantizeLinear(m, s, z)"
    assert_strips_to(body, f"{f} n = Shape({p.replace('q', 'x')}) y = Reshape({p.replace('q', 'x')}, n)")


def test_the_integer_zero_that_a_pad_adds_becomes_what_it_stands_for():
    body = "r = Relu(x) q = QuantizeLinear(r, s, low) m = Pad(q, pads) y = DequantizeLinear(m, s, low)"
    assert_strips_to(body, "r = Relu(x) k = Constant<value_float=6.4>() y = Pad(r, pads, k)", constants=MOVED)


def test_another_scale_behind_what_moves_integers_is_a_factor():
    body = "q = QuantizeLinear(x, s, z) m = Pad(q, pads, seven) y = DequantizeLinear(m, t, z)"
    _, result = assert_strips_to(
        body,
        "lo = Constant<value_float=-6.4>() hi = Constant<value_float=6.35>() c = Clip(x, lo, hi) "
        "p = Pad(c, pads, k) two = Constant<value_float=2.0>() y = Mul(p, two)",
        constants=MOVED,
    )
    assert result.parts["factors kept"] == 1


def test_several_moves_several_outputs_and_several_dequantizers_are_followed():
    body = (
        "q = QuantizeLinear(x, s, z) n = Transpose<perm=[0,1,3,2]>(q) e, f = Split<axis=1, num_outputs=2>(n) "
        "c = Concat<axis=1>(f, e) u = DequantizeLinear(c, s, z) v = DequantizeLinear(c, s, z) "
        "d = DequantizeLinear(e, s, z) g = Concat<axis=1>(d, d) m = Add(u, v) y = Add(m, g)"
    )
    floats = (
        "n = Transpose<perm=[0,1,3,2]>(x) e, f = Split<axis=1, num_outputs=2>(n) "
        "c = Concat<axis=1>(f, e) g = Concat<axis=1>(e, e) m = Add(c, c) y = Add(m, g)"
    )
    after, result = assert_strips_to(body, floats)
    assert ops(after) == {"Transpose": 1, "Split": 1, "Concat": 2, "Add": 2}
    assert result.parts["integer operators"] == 3


def test_integers_that_a_graph_output_shows_stay_beside_the_floats():
    header = '<ir_version: 10, opset_import: ["" : 21]> g (float[1,4,3,3] x)'
    model = build(
        f"{header} => (int8[1,4,2,2] m, float[1,4,2,2] y) <float s = {{0.5}}, int8 z = {{0}}> "
        "{ q = QuantizeLinear(x, s, z) m = MaxPool<kernel_shape=[2,2]>(q) y = DequantizeLinear(m, s, z) }"
    )
    after, result = stripped(model)
    assert ops(after) == {"QuantizeLinear": 1, "MaxPool": 2}
    assert [skip.reason for skip in result.skipped] == ["m computes with what it stores"]
    feed = {"x": np.random.default_rng(0).standard_normal((1, 4, 3, 3)).astype(np.float32)}
    found = open_session(after).run(feed)
    pooled = build(f"{header} => (float[1,4,2,2] y) {{ y = MaxPool<kernel_shape=[2,2]>(x) }}")
    np.testing.assert_array_equal(found["y"], open_session(pooled).run(feed)["y"])
    np.testing.assert_array_equal(found["m"], open_session(model).run(feed)["m"])


def test_branches_that_move_the_integers_of_the_graph_around_them_are_stripped():
    branch = "{name} = g{name} () => (a{name}) {{ m{name} = {op} a{name} = DequantizeLinear(m{name}, s, z) }}"
    body = (
        "q = QuantizeLinear(x, s, z) keep = If(flag) <"
        + branch.format(name="then_branch", op="Transpose<perm=[0,1,3,2]>(q)")
        + ", "
        + branch.format(name="else_branch", op="Identity(q)")
        + "> y = Sigmoid(keep)"
    )
    model = model_with(body, inputs="float[2,4,3,3] x, bool flag")
    after, result = stripped(model)
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(ops(after))
    assert not result.skipped
    for flag, expected in ((True, "n = Transpose<perm=[0,1,3,2]>(x) y = Sigmoid(n)"), (False, "y = Sigmoid(x)")):
        x = np.random.default_rng(0).standard_normal((2, 4, 3, 3)).astype(np.float32)
        found = open_session(after).run({"x": x, "flag": np.asarray(flag)})["y"]
        np.testing.assert_allclose(found, open_session(model_with(expected)).run({"x": x})["y"], rtol=0, atol=1e-6)


# ---------------------------------------------------------------- whole models


def sqnr(reference, other):
    return min(row.sqnr_db for row in graphopt.check(reference, other, data=CALIBRATION, samples=8).comparison.outputs)


@pytest.mark.parametrize("target", ["ort-cpu", "ort-arm", "tensorrt"])
def test_what_qdq_quantized_comes_back_within_the_rounding_of_weights(target, tmp_path):
    folded = graphopt.optimize(MODELS / "fmnist_resnet.onnx", "fold", verify=False)
    passes = "calibrate:method=minmax,qdq:reduce_range=off"
    quantized = graphopt.optimize(folded.model, passes, data=CALIBRATION, samples=8, target=target, verify=False)
    quantized.save(tmp_path / "q.onnx")
    out = tmp_path / "f.onnx"
    assert main(["optimize", str(tmp_path / "q.onnx"), "--passes", "strip-qdq,fold-pad", "-o", str(out)]) == 0
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(ops(onnx.load(out)))
    if target == "tensorrt":  # float weights in the file
        assert_equal_outputs(folded.model, onnx.load(out), feed=None)
    assert sqnr(folded.model, out) > max(40, sqnr(folded.model, quantized.model))
    before, after = conv_weights(folded.model), conv_weights(onnx.load(out))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        covering = params_of_weight(weight, 0, INT8_WEIGHT)
        noises = [
            each.reshape(len(weight), -1) - weight.reshape(len(weight), -1)
            for each in (after[name], covering.dequantize(covering.quantize(weight)))
        ]
        found, plain = ((noise**2).sum(axis=1) for noise in noises)
        assert (found <= 1.001 * plain).all()
        largest = np.abs(weight).max(axis=(1, 2, 3), keepdims=True)  # scales are 0.9 to 1.1 times it over 127
        most = np.where(np.abs(weight) < 0.89 * largest, 0.501 * 1.1 * largest / 127, 0.11 * largest)
        assert (np.abs(weight - after[name]) <= most).all()


def conv_weights(model):
    """Weights by the name of their Conv."""
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    return {node.name: stored[node.input[1]] for node in model.graph.node if node.op_type == "Conv"}


@pytest.mark.parametrize(
    ("per_channel", "activation", "symmetric"),
    [(True, "QUInt8", False), (True, "QInt8", True), (False, "QInt8", False)],
)
def test_what_onnxruntimes_tool_quantized_comes_back(per_channel, activation, symmetric, tmp_path):
    quantization = pytest.importorskip("onnxruntime.quantization")
    source = tmp_path / "folded.onnx"
    graphopt.optimize(MODELS / "fmnist_resnet.onnx", "fold", verify=False).save(source)
    images = np.load(CALIBRATION)
    (name,) = images.files

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.feeds = iter([{name: images[name][:8]}])

        def get_next(self):
            return next(self.feeds, None)

    other = tmp_path / "q.onnx"
    quantization.quantize_static(
        source,
        other,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=per_channel,
        activation_type=getattr(quantization.QuantType, activation),
        weight_type=quantization.QuantType.QInt8,
        extra_options={"ActivationSymmetric": symmetric},
    )
    after, _ = stripped(onnx.load(other))
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(ops(after))
    assert sqnr(source, after) > max(40 if per_channel else 35, sqnr(source, other))


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["blazeface_front", "ppocr_cls_mobile_v2", "ppocrv4_det"])
def test_a_real_model_that_qdq_quantized_comes_back_but_for_rounded_weights(name, tmp_path):
    data = str(zoo_feeds(name, "calibration"))
    options = ["--data", data, "--samples", "2", "--no-verify", "-o"]
    passes = ["fold", "fold,calibrate:method=minmax,qdq:int8_weights=off:small_islands=true", "strip-qdq:clips=none"]
    folded, quantized, after = (tmp_path / f"{step}.onnx" for step in ("folded", "quantized", "after"))
    for source, text, out in zip(
        (zoo_model(name), zoo_model(name), quantized), passes, (folded, quantized, after), strict=True
    ):
        assert main(["optimize", str(source), "--passes", text, *options, str(out)]) == 0
    assert "QuantizeLinear" in ops(onnx.load(quantized))
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(ops(onnx.load(after)))
    outputs = graphopt.check(folded, after, data=data, samples=2).comparison.outputs
    assert min(row.sqnr_db for row in outputs) > 100
