"""Each TensorRT rule on a graph that breaks it and on one that does not."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from zoo import zoo_feeds, zoo_model

import graphopt
from graphopt.lint import Severity
from graphopt.model_io import load_model
from graphopt.targets import target_named

MODELS = Path(__file__).resolve().parent.parent / "models"
RULES = {rule.id: rule for rule in target_named("tensorrt").lint_rules}

CONSTANTS = {
    "s": np.float32(0.1),
    "t": np.float32(0.2),
    "z": np.int8(0),
    "z3": np.int8(3),
    "u": np.uint8(0),
    "z1": np.zeros(1, np.int8),
    "zero": np.float32(0),
    "half": np.float16(0.1),
    "sc": np.full(16, 0.1, np.float32),
    "sc8": np.full(8, 0.1, np.float32),
    "zc": np.zeros(16, np.int8),
    "sb": np.full((2, 16, 4, 4), 0.1, np.float32),
    "sb0": np.full((1, 16, 4, 4), 0.1, np.float32),
    "sm": np.full((8, 16), 0.1, np.float32),
    "w": np.ones((16, 16, 3, 3), np.int8),
    "w128": np.full((16, 16, 3, 3), -128, np.int8),
    "wt": np.ones((16, 16, 3, 3), np.int8),
    "w8": np.ones((8, 8, 3, 3), np.int8),
    "wm": np.ones((16, 16), np.int8),
    "w44": np.ones((16, 4, 4), np.int8),
    "b": np.ones(16, np.float32),
    "b32": np.ones(16, np.int32),
    "mean": np.zeros(16, np.float32),
    "k": np.float32(2),
}

X = "xq = QuantizeLinear(x, s, z) xd = DequantizeLinear(xq, s, z)"
W = "wd = DequantizeLinear<axis=0>(w, sc, zc)"
CONV = f"{X} {W} c = Conv<pads=[1,1,1,1]>(xd, wd, b)"
GOOD = f"{CONV} y = Relu(c)"
PAIR = "cq = QuantizeLinear(c, s, z) cd = DequantizeLinear(cq, s, z)"
SKIP = "rq = QuantizeLinear(x, t, z) rd = DequantizeLinear(rq, t, z)"
BATCH_NORM = "BatchNormalization({}, b, b, mean, b)"

# by rule: a graph from x [2,16,4,4] to y that breaks it, and one that does not
CASES = {
    "TRT001": ("q = QuantizeLinear(x, s, z3) y = DequantizeLinear(q, s, z3)", GOOD),
    "TRT002": ("q = QuantizeLinear(x, s, u) y = DequantizeLinear(q, s, u)", GOOD),
    "TRT003": ("q = QuantizeLinear(x, zero, z) y = DequantizeLinear(q, zero, z)", GOOD),
    "TRT004": ("wd = DequantizeLinear<axis=0>(w, sc8) y = Conv<pads=[1,1,1,1]>(x, wd)", GOOD),
    "TRT005": ("q = QuantizeLinear<axis=1>(x, sc, zc) y = DequantizeLinear<axis=1>(q, sc, zc)", GOOD),
    "TRT006": (
        "q = QuantizeLinear<axis=0, block_size=2>(x, sb0) y = DequantizeLinear<axis=0, block_size=2>(q, sb0)",
        GOOD,
    ),
    "TRT007": ("q = QuantizeLinear(k, s, z) d = DequantizeLinear(q, s, z) y = Mul(x, d)", GOOD),
    "TRT008": ("h = Cast<to=10>(x) q = QuantizeLinear(h, s, z) y = DequantizeLinear(q, s, z)", GOOD),
    "TRT009": ("q, qs, qz = DynamicQuantizeLinear(x) y = DequantizeLinear(q, qs, qz)", GOOD),
    "TRT010": (
        f"{X} wx = Expand(wr, ws) wq = QuantizeLinear(wx, s, z) v = DequantizeLinear(wq, s, z) y = Conv(xd, v)",
        GOOD,
    ),
    "TRT011": (f"{W} y = Conv<pads=[1,1,1,1]>(x, wd)", GOOD),
    "TRT012": (
        f"{CONV} {PAIR} y = Relu(cd)",
        f"{CONV} r = Relu(c) rq = QuantizeLinear(r, s, z) y = DequantizeLinear(rq, s, z)",
    ),
    "TRT013": (f"{X} {W} bd = DequantizeLinear<axis=0>(b32, sc) y = Conv<pads=[1,1,1,1]>(xd, wd, bd)", GOOD),
    "TRT014": (f"{CONV} y = Add(c, x)", f"{CONV} {SKIP} y = Add(c, rd)"),
    "TRT015": (
        f"{X} p = MaxPool<kernel_shape=[1,1]>(xd) q = QuantizeLinear(p, t, z) y = DequantizeLinear(q, t, z)",
        "p = MaxPool<kernel_shape=[1,1]>(x) q = QuantizeLinear(p, t, z) y = DequantizeLinear(q, t, z)",
    ),
    "TRT016": (f"{X} y = AveragePool<kernel_shape=[2,2]>(xd)", "y = AveragePool<kernel_shape=[2,2]>(x)"),
    "TRT017": (f"{CONV} {PAIR} {SKIP} y = Add(cd, rd)", f"{CONV} {SKIP} y = Add(c, rd)"),
    "TRT018": (f"{X} v = DequantizeLinear(w, s, z) y = Conv<pads=[1,1,1,1]>(xd, v)", GOOD),
    "TRT019": (f"{X} {SKIP} y = Concat<axis=0>(xd, rd)", f"{X} y = Concat<axis=0>(xd, xd)"),
    "TRT020": (f"{CONV} y = {BATCH_NORM.format('c')}", GOOD),
    "TRT021": (f"{X} y = Softmax(xd)", "y = Softmax(x)"),
    "TRT022": (
        (
            "a, e = Split<axis=1, num_outputs=2>(x) q = QuantizeLinear(a, s, z) d = DequantizeLinear(q, s, z) "
            "v = DequantizeLinear<axis=0>(w8, sc8) y = Conv(d, v)"
        ),
        GOOD,
    ),
    "TRT023": (f"{X} y = mine.Plugin(xd)", "y = mine.Plugin(x)"),
    "TRT024": (X.replace("xd", "y"), GOOD),
    "TRT025": (f"{X} {SKIP.replace(', t,', ', s,')} y = Add(xd, rd)", f"{X} y = Add(xd, xd)"),
    "TRT026": (GOOD.replace("(w,", "(w128,"), GOOD),
    "TRT027": (GOOD, "y = Relu(x)"),
    "TRT028": ("wd = DequantizeLinear<axis=0>(w, sc, zc) y = Conv(x, wd)", GOOD),
    "TRT029": ("y = Relu(x)", GOOD),
    "TRT030": (
        f"{X} wd = DequantizeLinear<axis=1>(w, sc, zc) y = ConvTranspose(xd, wd)",
        f"{X} wd = DequantizeLinear(w, s, z) y = ConvTranspose(xd, wd)",
    ),
}
PROVEN = {"TRT031", "TRT032", "TRT033"}  # what TensorRT's compiler says: tests/test_tensorrt_proof.py
OPSETS = {("TRT028", 0): 11}


def model_with(body, opset=21):
    """A model from x to y with those of the constants that it reads; `mine` is a domain of plugins."""
    text = f"""<ir_version: 10, opset_import: ["" : {opset}, "mine" : 1, "com.microsoft" : 1]>
        g (float[2,16,4,4] x, float[16,16,1,1] wr, int64[4] ws) => (y) {{ {body} }}"""
    model = onnx.parser.parse_model(text.replace("=> (y)", "=> (float[A,B,C,D] y)"))
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in CONSTANTS.items() if name in read
    )
    return model


def broken(body, opset=21):
    return {finding.rule for finding in graphopt.lint(model_with(body, opset), "tensorrt").findings}


def test_every_rule_has_both_graphs():
    assert set(CASES) == set(RULES) - PROVEN - {"TRT034"}
    assert all(rule.title and rule.source for rule in RULES.values())


@pytest.mark.parametrize("name", CASES)
def test_a_graph_that_breaks_the_rule_is_found(name):
    assert name in broken(CASES[name][0], OPSETS.get((name, 0), 21))


@pytest.mark.parametrize("name", CASES)
def test_a_graph_that_keeps_the_rule_is_not_found(name):
    assert name not in broken(CASES[name][1])


def test_what_is_added_to_a_matrix_product_need_not_be_quantized():
    assert "TRT014" not in broken(f"{X} m = MatMul(xd, xd) y = Add(m, x)")


def test_a_stack_of_matrices_has_one_scale():
    assert "TRT018" not in broken("v = DequantizeLinear(w44, s, z) y = MatMul(x, v)")


@pytest.mark.parametrize(("names", "found"), [("??", True), ("?A", False), ("AA", False), ("AB", False)])
def test_sizes_that_share_a_name_without_a_meaning_are_found(names, found):
    model = model_with("y = Relu(x)")
    for size, name in zip(model.graph.input[0].type.tensor_type.shape.dim[2:], names, strict=True):
        size.dim_param = name
    messages = [each.message for each in graphopt.lint(model, "tensorrt").findings if each.rule == "TRT034"]
    assert bool(messages) == found
    assert all("fold" in message for message in messages)


def test_a_good_graph_breaks_no_rule_but_that_it_could_be_half_precision():
    assert broken(GOOD) - PROVEN == {"TRT027"}


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("TRT001", "zx = Cast<to=3>(k) q = QuantizeLinear(x, s, zx) y = DequantizeLinear(q, s, zx)"),
        ("TRT002", f"{X} {W} bd = DequantizeLinear<axis=0>(b32, sc) y = Conv<pads=[1,1,1,1]>(xd, wd, bd)"),
        ("TRT003", "q = QuantizeLinear(x, s, z1) y = DequantizeLinear(q, s, z1)"),
        ("TRT003", "sx = ReduceMax<keepdims=0>(x) q = QuantizeLinear(x, sx, z) y = DequantizeLinear(q, sx, z)"),
        (
            "TRT006",
            (
                "q = QuantizeLinear<axis=0, block_size=1, output_dtype=17>(x, sb) "
                "y = DequantizeLinear<axis=0, block_size=1>(q, sb)"
            ),
        ),
        ("TRT009", "q = com.microsoft.QuantizeLinear(x, s, z) y = com.microsoft.DequantizeLinear(q, s, z)"),
        ("TRT010", f"{X} v = DequantizeLinear<axis=1>(w, sc, zc) y = Conv(xd, v)"),
        ("TRT012", f"{CONV} {PAIR} y = {BATCH_NORM.format('cd')}"),
        ("TRT020", f"{CONV} {PAIR} y = {BATCH_NORM.format('cd')}"),
        ("TRT019", f"{X} {SKIP} y = Add(xd, rd)"),
    ],
)
def test_other_ways_to_break_a_rule_are_found_too(name, body):
    assert name in broken(body)


@pytest.mark.parametrize(
    "body",
    [
        "one = Constant<value_float=0.1>() q = QuantizeLinear(x, one, z3) y = DequantizeLinear(q, one, z3)",
        (
            "keep = If(flag) <"
            "then_branch = g1 () => (t) { q = QuantizeLinear(x, s, z3) t = DequantizeLinear(q, s, z3) },"
            " else_branch = g2 () => (e) { e = Identity(x) }> y = Identity(keep)"
        ),
    ],
)
def test_scales_in_constant_nodes_and_quantizers_in_branches_are_seen(body):
    model = model_with(body)
    if "flag" in body:
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(True), "flag"))
        model.graph.initializer.extend(
            onnx.numpy_helper.from_array(np.asarray(CONSTANTS[name]), name) for name in ("s", "z3")
        )
    assert "TRT001" in {finding.rule for finding in graphopt.lint(model, "tensorrt").findings}


def test_negative_axes_and_missing_zero_points_are_read_as_onnx_means_them():
    good = f"{X} v = DequantizeLinear<axis=-4>(w, sc) y = Conv<pads=[1,1,1,1]>(xd, v)"
    assert not {"TRT004", "TRT010", "TRT001"} & broken(good)


def test_half_precision_scales_and_blocks_of_int4_are_fine():
    half = "h = Cast<to=10>(x) q = QuantizeLinear(h, half, z) d = DequantizeLinear(q, half, z) y = Cast<to=1>(d)"
    assert not {"TRT008", "TRT027"} & broken(half)
    blocks = (
        "q = QuantizeLinear<axis=-1, block_size=1, output_dtype=22>(x, sb) "
        "y = DequantizeLinear<axis=-1, block_size=1>(q, sb)"
    )
    assert "TRT006" not in broken(blocks)


def test_the_model_is_left_as_it_is():
    model = model_with(GOOD)
    before = model.SerializeToString()
    graphopt.lint(model, "tensorrt")
    assert model.SerializeToString() == before
    loaded = load_model(model_with(GOOD))
    names = [(tensor.name, tensor.shape) for node in loaded.graph.nodes for tensor in node.outputs]
    graphopt.lint(loaded, "tensorrt")
    assert [(tensor.name, tensor.shape) for node in loaded.graph.nodes for tensor in node.outputs] == names


def test_errors_fail_the_report_and_come_first():
    report = graphopt.lint(
        model_with(f"{X} q = QuantizeLinear(x, s, z3) d = DequantizeLinear(q, s, z3) y = Softmax(d)"), "tensorrt"
    )
    assert report.failed
    assert report.findings[0].severity is Severity.ERROR
    found = report.to_json()
    json.dumps(found)
    assert found["counts"]["error"] == report.count(Severity.ERROR)
    assert "refuses" in report.verdict


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["mtcnn_onet", "blazeface_front", "ppocr_cls_mobile_v2", "efficientnet_lite0_bn"])
def test_what_qdq_writes_for_tensorrt_breaks_no_rule_of_severity_error(name):
    data = str(zoo_feeds(name, "calibration"))
    result = graphopt.optimize(
        str(zoo_model(name)), "fold,calibrate:method=minmax,qdq", data=data, samples=4, target="tensorrt", verify=False
    )
    report = graphopt.lint(result.model, "tensorrt")
    assert not report.failed, report.findings[:3]
