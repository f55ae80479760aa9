"""Each onnxruntime rule on a graph that breaks it and one that does not; what is in float is held against the proof."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from comparing import build

import graphopt
from graphopt.api import _lint_warnings
from graphopt.cli import main
from graphopt.lint import lint_model
from graphopt.model_io import load_model
from graphopt.quantization import INT4_WEIGHT
from graphopt.runtime import open_session, optimized_graph, optimized_ops
from graphopt.targets import target_named
from graphopt.targets.ort_cpu import ORT_CPU
from graphopt.targets.ort_rules import sums_do_not_saturate

MODELS = Path(__file__).resolve().parent.parent / "models"
X86 = replace(ORT_CPU, lint_rules=(*ORT_CPU.lint_rules, sums_do_not_saturate))
ARM = target_named("ort-arm")
RULES = {rule.id: rule for target in (X86, ARM) for rule in target.lint_rules}

CONSTANTS = {
    "s": np.float32(0.05),
    "t": np.float32(0.1),
    "twice": np.array([1, 1, 2, 2], np.float32),
    "u": np.uint8(0),
    "u128": np.uint8(128),
    "z": np.int8(0),
    "low": np.int8(-128),
    "h": np.uint16(0),
    "s4": np.full(4, 0.01, np.float32),
    "sc": np.full(16, 0.01, np.float32),
    "zc": np.zeros(16, np.int8),
    "uc": np.full(16, 128, np.uint8),
    "sb": np.full(16, np.float32(0.05) * np.float32(0.01), np.float32),
    "w": (np.arange(16 * 16 * 9) % 100 - 50).reshape(16, 16, 3, 3).astype(np.int8),
    "w7": (np.arange(16 * 16 * 9) % 64 - 32).reshape(16, 16, 3, 3).astype(np.int8),
    "w127": np.full((16, 16, 3, 3), 100, np.int8),
    "w_one": np.tile(np.where(np.arange(144) == 7, 127, -1), 16).reshape(16, 16, 3, 3).astype(np.int8),
    "wu": np.full((16, 16, 3, 3), 130, np.uint8),
    "m": np.ones((4, 4), np.int8),
    "m4": np.eye(4).astype(INT4_WEIGHT.dtype),
    "s14": np.full((1, 4), 0.01, np.float32),
    "b32": np.ones(16, np.int32),
    "k": np.float32(0.1),
}


def pair(tensor, zero_point="u128", scale="s", to=None):
    return (
        f"{tensor}_q = QuantizeLinear({tensor}, {scale}, {zero_point}) "
        f"{to or tensor + '_d'} = DequantizeLinear({tensor}_q, {scale}, {zero_point})"
    )


X = pair("x")
W = "v = DequantizeLinear<axis=0>(w7, sc, zc)"
CONV = f"{X} {W} c = Conv<pads=[1,1,1,1]>(x_d, v)"
GOOD = f"{CONV} {pair('c', to='y')}"
INT8 = GOOD.replace("u128", "low")

# by rule: a graph from x [2,16,4,4] to y that breaks it, and one that does not
CASES = {
    "ORT001": (GOOD, GOOD),
    "ORT002": (X.replace("x_d", "e") + " y = Conv<pads=[1,1,1,1]>(e, m)", GOOD),
    "ORT003": ("y = Conv(x, wr)", GOOD),
    "ORT010": (f"{W} c = Conv<pads=[1,1,1,1]>(x, v) {pair('c', to='y')}", GOOD),
    "ORT011": (f"{CONV} y = Neg(c)", GOOD),
    "ORT012": (f"{X} {W} y = Conv<pads=[1,1,1,1]>(x_d, v)", GOOD),
    "ORT013": (f"{CONV} {pair('c')} n = Neg(c) y = Add(n, c_d)", f"{CONV} {pair('c')} n = Neg(c_d) y = Add(n, c_d)"),
    "ORT014": (
        f"{X} {W} bd = DequantizeLinear<axis=0>(b32, sc) c = Conv<pads=[1,1,1,1]>(x_d, v, bd) {pair('c', to='y')}",
        f"{X} {W} bd = DequantizeLinear<axis=0>(b32, sb) c = Conv<pads=[1,1,1,1]>(x_d, v, bd) {pair('c', to='y')}",
    ),
    "ORT015": (f"{CONV} r = Relu(c) {pair('r', to='y')}", f"{CONV} r = Relu(c) {pair('r', 'u', to='y')}"),
    "ORT016": (
        (
            f"{pair('x', 'z')} {W} c = Conv<pads=[1,1,1,1]>(x_d, v) e = Conv<pads=[1,1,1,1]>(x_d, v) {pair('c', 'z')} "
            f"{pair('e', 'z')} a = Add(c_d, e_d) {pair('a', 'z', to='y')}"
        ),
        (
            f"{X} {W} c = Conv<pads=[1,1,1,1]>(x_d, v) e = Conv<pads=[1,1,1,1]>(x_d, v) {pair('c')} "
            f"{pair('e')} a = Add(c_d, e_d) {pair('a', to='y')}"
        ),
    ),
    "ORT017": (f"{X} a = Tanh(x_d) {pair('a', to='y')}", f"{X} a = Sigmoid(x_d) {pair('a', to='y')}"),
    "ORT018": (
        f"{pair('x', scale='sx')} p = MaxPool<kernel_shape=[2,2]>(x_d) {pair('p', scale='sx', to='y')}",
        f"{pair('x', scale='sx')} {W} c = Conv<pads=[1,1,1,1]>(x_d, v) {pair('c', scale='sx', to='y')}",
    ),
    "ORT019": (f"{pair('x', 'h')} a = Add(x_d, x_d) {pair('a', 'h', to='y')}", GOOD),
    "ORT020": (
        f"{X} p = MaxPool<kernel_shape=[2,2]>(x_d) {pair('p', scale='t', to='y')}",
        f"{X} p = MaxPool<kernel_shape=[2,2]>(x_d) {pair('p', to='y')}",
    ),
    "ORT021": (
        f"{pair('x')} v = DequantizeLinear<axis=0>(m, s4) c = MatMul(x_d, v) {pair('c', to='y')}",
        f"{pair('x')} v = DequantizeLinear<axis=1>(m, s4) c = MatMul(x_d, v) {pair('c', to='y')}",
    ),
    "ORT022": (
        f"{X} v = DequantizeLinear<axis=1>(w7, sc, zc) c = Conv<pads=[1,1,1,1]>(x_d, v) {pair('c', to='y')}",
        GOOD,
    ),
    "ORT023": (
        "v = DequantizeLinear<axis=0, block_size=8>(m4, s14) y = MatMul(x, v)",
        "v = DequantizeLinear<axis=0, block_size=16>(m4, s14) y = MatMul(x, v)",
    ),
    "ORT029": (  # no guard knows of activations with a scale for each channel
        f"{pair('x', 'uc', 'sc')} p = MaxPool<kernel_shape=[2,2]>(x_d) {pair('p', 'uc', 'sc', to='y')}",
        f"{X} p = MaxPool<kernel_shape=[2,2]>(x_d) {pair('p', to='y')}",
    ),
    "ORT030": (INT8, GOOD),
    "ORT031": (f"{X} v = DequantizeLinear(wu, s, u128) c = Conv<pads=[1,1,1,1]>(x_d, v) {pair('c', to='y')}", GOOD),
    "ORT032": (GOOD.replace("w7", "w127"), GOOD.replace("w7", "w_one")),  # it is pairs that saturate
    "ORT033": (GOOD, INT8),
    "ORT040": (f"{X} a = Tanh(x_d) {pair('a', to='y')}", GOOD),
}
OPSETS = {"ORT001": 12, "ORT019": 21, "ORT023": 21}  # 17 for the others


def model_with(body, opset=17):
    inputs = "float[2,16,4,4] x" + ", float sx" * ("sx" in body) + ", float[4,16,3,3] wr" * ("wr" in body)
    model = build(f'<ir_version: 8, opset_import: ["" : {opset}]> g ({inputs}) => (float[A,B,C,D] y) {{ {body} }}')
    read = {name for node in model.graph.node for name in node.input}
    for name in CONSTANTS.keys() & read:
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(CONSTANTS[name]), name))
    return model


def report_on(body, opset=17, target=X86):
    return lint_model(load_model(model_with(body, opset)), target)


def broken(body, opset=17, target=X86):
    return {finding.rule for finding in report_on(body, opset, target).findings}


def test_every_rule_has_both_graphs():
    assert set(CASES) == set(RULES)
    assert all(rule.title and rule.source for rule in RULES.values())


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_graph_that_breaks_the_rule_is_found(name):
    target = ARM if name == "ORT033" else X86
    assert name in broken(CASES[name][0], OPSETS.get(name, 17), target)


@pytest.mark.parametrize("name", CASES)
def test_a_graph_that_keeps_the_rule_is_not_found(name):
    assert name not in broken(CASES[name][1], max(17, OPSETS.get(name, 17)), target=ARM if name == "ORT033" else X86)


def test_a_good_graph_breaks_no_rule_and_is_in_int8_throughout():
    report = report_on(GOOD)
    assert report.findings == ()
    assert report.figures["share of MACs in int8"] == 1
    assert report.figures["Q and DQ nodes that onnxruntime runs"] == 2


FLOAT_REASONS = sorted(name for name in CASES if "ORT010" <= name <= "ORT029" and name != "ORT022")


@pytest.mark.parametrize("name", FLOAT_REASONS)
def test_the_operator_that_a_reason_is_given_for_is_in_float_in_the_optimized_graph(name):
    body = CASES[name][0]
    (first, *_) = [finding for finding in report_on(body, OPSETS.get(name, 17)).findings if finding.rule == name]
    op = first.message.split(" in float")[0]
    after = optimized_ops(model_with(body, OPSETS.get(name, 17)))
    assert after[op] or after[f"Fused{op}"], after


@pytest.mark.parametrize("target", [X86, ARM])
def test_a_relu_that_hides_the_q_of_a_stack_with_a_bias_is_named(target):
    stack = f"{X} v = DequantizeLinear(m, s, z) c = MatMul(x_d, v) a = Add(c, s4)"
    behind = f"{stack} r = Relu(a) {pair('r', 'u', to='y')}"
    around = f"{stack} {pair('a', 'u')} r = Relu(a_d) {pair('r', 'u', to='y')}"
    (found,) = [each for each in report_on(behind, target=target).findings if each.rule == "ORT015"]
    assert "put a pair before the Relu too" in found.message
    assert "ORT015" not in broken(around, target=target)


def test_onnxruntime_gets_scales_along_input_channels_wrong():
    model = model_with(CASES["ORT022"][0])
    scales = np.linspace(0.001, 0.05, 16).astype(np.float32)
    next(each for each in model.graph.initializer if each.name == "sc").CopyFrom(
        onnx.numpy_helper.from_array(scales, "sc")
    )
    feed = {"x": np.random.default_rng(0).standard_normal((2, 16, 4, 4)).astype(np.float32)}
    found, meant = (open_session(model, optimize=each).run(feed)["y"] for each in (True, False))
    assert np.abs(found - meant).max() > 1, "this onnxruntime computes what is meant: drop ORT022"


@pytest.mark.parametrize("name", FLOAT_REASONS)
def test_for_another_machine_the_guards_decide_alone(name):
    if name not in ("ORT016", "ORT029"):  # what x86 wants of types, and what only the proof shows
        assert name in broken(CASES[name][0], OPSETS.get(name, 17), target=ARM)


def test_an_operator_where_int8_ends_is_no_finding():
    assert broken(f"{GOOD.replace(' y =', ' c_d =')} y = Add(c_d, x)") <= {"ORT040"}
    assert "ORT010" in broken(f"{GOOD.replace(' y =', ' c_d =')} a = Add(c_d, x) {pair('a', to='y')}")


def test_a_model_that_does_not_load_is_an_error_and_no_crash(tmp_path, capsys):
    path = tmp_path / "old.onnx"
    onnx.save(model_with(GOOD, opset=12), path)
    assert main(["lint", str(path)]) == 1
    assert "opset 13" in capsys.readouterr().out


def test_a_float_model_is_one_finding(capsys):
    report = graphopt.lint(MODELS / "fmnist_resnet.onnx")
    assert [finding.rule for finding in report.findings] == ["ORT003"]
    assert "11 Conv, 1 Gemm" in report.findings[0].message
    assert not report.failed


def test_what_qdq_writes_runs_in_int8_but_for_nothing():
    result = graphopt.optimize(MODELS / "fmnist_resnet.onnx", "fold,calibrate:method=minmax,qdq", verify=False)
    report = lint_model(load_model(result.model), ORT_CPU)
    assert report.findings == ()
    assert report.figures["share of MACs in int8"] == 1


def test_layouts_of_memory_fuse_nothing_more():
    result = graphopt.optimize(MODELS / "fmnist_mbv2.onnx", "fold,calibrate:method=minmax,qdq", verify=False)
    kinds = [
        Counter(node.op_type for node in optimized_graph(result.model, layouts=each).node) for each in (True, False)
    ]
    for kind in ("QLinearConv", "QLinearAdd", "Conv", "FusedConv"):
        assert kinds[0][kind] == kinds[1][kind], kind


def test_functions_are_looked_into():
    model = model_with(CASES["ORT011"][0])
    function = onnx.helper.make_function(
        "mine", "Negated", ["a"], ["b"], [onnx.helper.make_node("Neg", ["a"], ["b"])], list(model.opset_import)
    )
    model.functions.append(function)
    model.opset_import.append(onnx.helper.make_opsetid("mine", 1))
    model.graph.node[-1].op_type, model.graph.node[-1].domain = "Negated", "mine"
    model.ir_version = 9
    finding, *_ = graphopt.lint(model).findings
    assert "(Neg)" in finding.message


def test_the_model_is_left_as_it_is():
    model = model_with(GOOD)
    before = model.SerializeToString()
    graphopt.lint(model)
    assert model.SerializeToString() == before


def test_optimize_lints_what_it_quantized(tmp_path, capsys):
    out, report = tmp_path / "q.onnx", tmp_path / "r.json"
    source, passes = str(MODELS / "fmnist_resnet.onnx"), "fold,calibrate:method=minmax,qdq"
    assert main(["optimize", source, "--passes", passes, "-o", str(out), "--report", str(report)]) == 0
    assert "lint: no rule of ort-cpu is broken" in capsys.readouterr().out
    found = json.loads(report.read_text(encoding="utf-8"))["lint"]
    assert found["figures"]["share of MACs in int8"] == 1


def test_a_result_slower_than_float_is_said_with_the_advice():
    result = graphopt.optimize(MODELS / "fmnist_resnet.onnx", "fold,calibrate:method=minmax,qdq")
    result.report.check = replace(result.report.check, reference_latency=1.0, other_latency=2.0)
    (warning,) = _lint_warnings(result.report)
    assert "2.00 x the time" in warning
    assert "keep the float model" in warning


def test_the_documentation_lists_every_rule_with_its_severity_and_title():
    page = (MODELS.parent / "docs" / "lint.md").read_text(encoding="utf-8")
    for rule in (*RULES.values(), *target_named("tensorrt").lint_rules):
        assert f"| {rule.id} | {rule.severity.value} | {rule.title} |" in page


# ---------------------------------------------------------------- the command


def test_the_command_prints_a_table_and_a_verdict(tmp_path, capsys):
    path = tmp_path / "q.onnx"
    onnx.save(model_with(CASES["ORT011"][0]), path)
    assert main(["lint", str(path)]) == 0
    out = capsys.readouterr().out
    assert "ORT011" in out
    assert "1 warning" in out


def test_many_places_of_a_rule_are_cut_short(tmp_path, capsys):
    path = tmp_path / "q.onnx"
    body = X + "".join(f" a{i} = Tanh(x_d) {pair(f'a{i}')}" for i in range(9)) + " y = Sum(a0_d, a1_d, a8_d)"
    onnx.save(model_with(body), path)
    assert main(["lint", str(path)]) == 0
    assert "and 6 more" in capsys.readouterr().out


def test_the_command_prints_one_json_document(tmp_path, capsys):
    path = tmp_path / "q.onnx"
    onnx.save(model_with(CASES["ORT011"][0]), path)
    assert main(["lint", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"]["warning"] == 1
    assert found["findings"][0].keys() == {"rule", "severity", "where", "message"}


@pytest.mark.parametrize("scale", ["s", "t"])
def test_a_resize_that_interpolates_is_float_whatever_its_scales_are(scale):
    body = f'{X} p = Resize<mode="linear">(x_d, , twice) {pair("p", scale=scale, to="y")}'
    (found,) = [each for each in report_on(body).findings if "in float" in each.message]
    assert (found.rule, found.message) == ("ORT021", "Resize in float: int8 kernels of Resize need mode = nearest")
    assert "Resize" in optimized_ops(model_with(body))


@pytest.mark.parametrize("target", ["ort-cpu", "ort-arm", "tensorrt"])
def test_every_rule_of_a_target_can_be_listed(target, capsys):
    assert main(["lint", "--list", "--target", target]) == 0
    out = capsys.readouterr().out
    assert all(rule.id in out for rule in target_named(target).lint_rules)


@pytest.mark.parametrize("arguments", [["lint"], ["lint", "none.onnx"], ["lint", "none.onnx", "--target", "cuda"]])
def test_a_wrong_request_is_one_line_and_exit_code_2(arguments, capsys):
    assert main(arguments) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
