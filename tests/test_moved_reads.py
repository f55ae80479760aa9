"""A dequantized tensor that is moved and read in a nested graph, at which onnxruntime ends the process."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
from texts import model_of

import graphopt
from graphopt.errors import ModelError
from graphopt.lint import lint_model
from graphopt.model_io import load_model
from graphopt.moved_reads import moved_read, quantize_moved_reads
from graphopt.runtime import open_session, optimized_ops
from graphopt.targets import target_named

PAIR = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
MOVES = {
    "Transpose": "m = Transpose<perm=[0,2,3,1]>(d)",
    "Reshape": "m = Reshape(d, flat)",
    "Slice": "m = Slice(d, i0, i1)",
    "Squeeze": "u = Unsqueeze(d, i0) m = Squeeze(u, i0)",
    "MaxPool": "m = MaxPool<kernel_shape=[2,2]>(d)",
    "Identity": "t = Transpose(d) m = Identity(t)",
}
STAYS = {
    "nothing": "m = Identity(d)",
    "Relu": "m = Relu(d)",
    "a pair behind it": "t = Transpose(d) r = QuantizeLinear(t, s, z) m = DequantizeLinear(r, s, z)",
}
READ = """
    y = If (flag) <then_branch = t () => (float[A,B,C,D] a) { a = Neg(m) },
                   else_branch = e () => (float[E,F,G,H] b) { b = Abs(m) }>
"""
FEED = {"x": np.linspace(-3, 3, 256, dtype=np.float32).reshape(1, 4, 8, 8), "flag": np.array(True)}


def net(body, read=READ):
    constants = "float s = {0.1}, uint8 z = {128}, int64[1] i0 = {0}, int64[1] i1 = {1}, int64[4] flat = {1, 1, 4, 64}"
    return model_of(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1,4,8,8] x, bool flag) => (float[I,J,K,L] y)
        <{constants}, float[4,4,1,1] w> {{ {body} {read} }}
    """)


def loads_by_default(proto, tmp_path):
    """Whether onnxruntime loads a model, which may end the process."""
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    program = f"import onnxruntime; onnxruntime.InferenceSession({str(path)!r})"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("body", MOVES.values(), ids=MOVES)
def test_a_moved_tensor_that_a_branch_reads_gets_a_pair_of_its_own(body, tmp_path):
    float_model, found = net(body.replace("(d", "(x")), net(f"{PAIR} {body}")
    assert not loads_by_default(found, tmp_path)  # else this workaround has had its day
    assert moved_read(found.graph) == "m"
    mended = load_model(found)
    assert quantize_moved_reads(mended.graph) == 1
    proto = mended.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert loads_by_default(proto, tmp_path)
    assert moved_read(proto.graph) is None
    expected, ours = (open_session(each).run(FEED)["y"] for each in (found, mended))
    assert np.array_equal(ours, expected)
    assert np.abs(ours - open_session(float_model).run(FEED)["y"]).max() < 0.051


@pytest.mark.parametrize("body", STAYS.values(), ids=STAYS)
def test_others_are_left_alone(body, tmp_path):
    found = net(f"{PAIR} {body}")
    assert loads_by_default(found, tmp_path)
    assert moved_read(found.graph) is None
    assert quantize_moved_reads(load_model(found).graph) == 0


def test_a_moved_tensor_that_the_main_graph_reads_is_left_alone():
    found = net(f"{PAIR} {MOVES['Transpose']}", read="y = Neg(m)")
    assert moved_read(found.graph) is None
    assert quantize_moved_reads(load_model(found).graph) == 0


def test_scales_by_channel_are_left_and_sessions_do_without_the_optimizer():
    by_channel = f"{PAIR} {MOVES['Transpose']}".replace(", s, z)", ", sc, zc)")
    found = net(by_channel)
    found.graph.initializer.append(onnx.numpy_helper.from_array(np.full(4, 0.1, np.float32), "sc"))
    found.graph.initializer.append(onnx.numpy_helper.from_array(np.full(4, 128, np.uint8), "zc"))
    assert quantize_moved_reads(load_model(found).graph) == 0
    assert moved_read(found.graph) == "m"
    assert open_session(found).run(FEED)["y"].shape == (1, 8, 8, 4)


def test_what_onnxruntime_would_end_the_process_at_is_an_error_and_a_finding():
    found = net(f"{PAIR} {MOVES['Transpose']}")
    with pytest.raises(ModelError, match=r"would end the process: .* that moves m behind its DequantizeLinear"):
        optimized_ops(found)
    report = lint_model(load_model(found), target_named("ort-cpu"))
    assert any("would end the process" in each.message for each in report.findings)


def test_an_encoder_in_int8_whose_features_a_loop_reads(tmp_path):
    read = """
        y = Loop (turns, flag, m) <body = b (int64 i, bool go, float[A,B,C,D] h) => (bool on, float[E,F,G,H] k)
            { on = Identity(go) n = Add(h, m) k = Tanh(n) }>
    """
    float_model = net("c = Conv(x, w) r = Relu(c) m = Transpose<perm=[0,2,3,1]>(r)", read.replace("turns", "i1"))
    result = graphopt.optimize(float_model, "calibrate,qdq:small_islands=true", data=[FEED] * 2)
    assert [each.failure for each in result.report.passes] == [None, None]
    assert loads_by_default(result.model, tmp_path)
    assert sum(node.op_type == "QuantizeLinear" for node in result.model.graph.node) == 3
