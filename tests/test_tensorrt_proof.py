"""What TensorRT's compiler makes of Q/DQ graphs; most needs the extra `tensorrt`, which CI installs."""

import numpy as np
import pytest
from test_lint_tensorrt import CASES, CONV, GOOD, W, X, model_with
from texts import model_of
from zoo import NAMES, zoo_feeds, zoo_model

import graphopt
from graphopt.errors import ModelError
from graphopt.lint import Severity
from graphopt.model_io import load_model
from graphopt.targets import tensorrt_build
from graphopt.tensorrt_proof import TensorRTProof, has_compiler, prove

FROZEN = {"silero_vad_v6": "values=sr=16000"}  # TensorRT for RTX 1.7 builds it for one sample rate
OF_ZEROS = {"/lstm_fwd/cell/Gemm", "/lstm_bwd/cell/Gemm"}  # of captcha_crnn: the first step, whose state is zero


def compiled(test):
    """A test that asks the compiler."""
    return pytest.mark.slow(pytest.mark.skipif(not has_compiler(), reason="the extra tensorrt is not installed")(test))


def findings(model):
    return {found.rule: found for found in graphopt.lint(model, "tensorrt").findings}


def operators_in(model, kind):
    loaded = load_model(model)
    found = getattr(prove(loaded), kind)
    return {node.op for node in loaded.graph.nodes if id(node) in found and "Linear" not in node.op}


def test_without_the_compiler_lint_says_that_it_did_not_ask_it(monkeypatch):
    monkeypatch.setattr(tensorrt_build, "has_compiler", lambda: False)
    found = findings(model_with(GOOD))
    assert "graphopt[tensorrt]" in found["TRT033"].message
    assert not {"TRT031", "TRT032"} & set(found)


def test_what_the_compiler_says_becomes_findings_and_figures(monkeypatch):
    def refuse(model, input_shapes):
        raise ModelError("it is too good")

    def all_float(model, input_shapes):
        return TensorRTProof(frozenset(), frozenset(id(node) for node in model.graph.nodes))

    def all_int8(model, input_shapes):
        return TensorRTProof(frozenset(id(node) for node in model.graph.nodes), frozenset())

    monkeypatch.setattr(tensorrt_build, "has_compiler", lambda: True)
    monkeypatch.setattr(tensorrt_build, "compiler_name", lambda: "TensorRT 0")
    for prover, rules, share in (
        (refuse, {"TRT027", "TRT031"}, None),
        (all_float, {"TRT027", "TRT032"}, 0),
        (all_int8, {"TRT027"}, 1),
    ):
        monkeypatch.setattr(tensorrt_build, "prove", prover)
        report = graphopt.lint(model_with(GOOD), "tensorrt")
        assert {found.rule for found in report.findings} == rules
        assert report.figures.get("share of MACs in int8") == share
        assert report.failed == (share is None)


@pytest.mark.parametrize(("least", "told"), [(0, True), (1, False)])
def test_optimize_says_whether_the_float_model_is_refused_too(monkeypatch, least, told):
    def refuse(model, input_shapes):
        if sum(node.op == "QuantizeLinear" for node in model.graph.nodes) >= least:
            raise ModelError("it is too good")
        return TensorRTProof(frozenset(), frozenset())

    monkeypatch.setattr(tensorrt_build, "has_compiler", lambda: True)
    monkeypatch.setattr(tensorrt_build, "compiler_name", lambda: "TensorRT 0")
    monkeypatch.setattr(tensorrt_build, "prove", refuse)
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[1,16,8,8] x) => (float[1,16,6,6] y)
        <float[16,16,3,3] w> { y = Conv(x, w) }"""
    result = graphopt.optimize(model_of(text), "calibrate:method=minmax,qdq", target="tensorrt")
    (warning,) = [each for each in result.report.warnings if each.startswith("lint: 1 error")]
    assert ("(the float model breaks TRT031 as well)" in warning) == told


@compiled
def test_a_conv_with_pairs_on_both_inputs_runs_in_int8_and_one_without_in_float():
    assert operators_in(model_with(GOOD), "in_int8") == {"Conv"}
    assert operators_in(model_with(f"{W} y = Conv<pads=[1,1,1,1]>(x, wd)"), "in_float") == {"Conv"}
    assert operators_in(model_with(f"{X} wd = DequantizeLinear(w, s, z) y = ConvTranspose(xd, wd)"), "in_float") == {
        "ConvTranspose"
    }


@compiled
@pytest.mark.parametrize("name", ["TRT001", "TRT003", "TRT004", "TRT006", "TRT009", "TRT010", "TRT013"])
def test_the_compiler_refuses_what_lint_calls_an_error(name):
    with pytest.raises(ModelError):
        prove(load_model(model_with(CASES[name][0])))


@compiled
@pytest.mark.parametrize(
    "quantized",
    [
        (
            "xq = QuantizeLinear<axis=1>(x, sc, zc) xd = DequantizeLinear<axis=1>(xq, sc, zc) "
            f"{W} y = Conv<pads=[1,1,1,1]>(xd, wd)"
        ),
        f"{X} wd = DequantizeLinear<axis=1>(w, sc, zc) y = Conv<pads=[1,1,1,1]>(xd, wd)",
    ],
)
def test_scales_along_another_axis_are_not_refused_but_cost_int8(quantized):
    assert operators_in(model_with(quantized), "in_float") == {"Conv"}
    assert "TRT032" in findings(model_with(quantized))


@compiled
@pytest.mark.parametrize(
    ("options", "figure"),
    [
        ("int8_weights=on", "share of MACs in int8"),
        ("activations=float8e4m3", "share of MACs in float8"),
        ("weights=int4:exclude_ops=Conv", None),
    ],
)
def test_tensorrt_builds_stored_int8_weights_float8_and_blocks_of_4_bits(options, figure):
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[2,16,16,8] x) => (float[2,16,16,64] y)
        <float[16,16,3,3] w, float[128,64] m, int64[3] rows = {2,16,128}, int64[4] all = {2,16,1,64}>
        { c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) f = Reshape(r, rows) p = MatMul(f, m) u = Reshape(p, all)
          z = Sigmoid(u) y = Concat<axis=2>(z, z, z, z, z, z, z, z, z, z, z, z, z, z, z, z) }
    """
    data = [{"x": np.random.default_rng(0).standard_normal((2, 16, 16, 8)).astype(np.float32)}]
    passes = f"calibrate:method=minmax,qdq:{options}"
    result = graphopt.optimize(model_of(text), passes, data=data, target="tensorrt", verify=False)
    report = graphopt.lint(result.model, "tensorrt")
    assert not report.failed, report.findings
    assert "TRT032" not in {found.rule for found in report.findings}
    if figure is not None:
        assert report.figures[figure] == 1


@compiled
def test_an_error_names_the_node_and_not_a_place_in_the_source():
    model = model_with(f"{CONV} y = mine.Plugin(c)")
    model.graph.node[-1].name = "the plugin"
    with pytest.raises(ModelError, match="the plugin") as error:
        prove(load_model(model))
    assert "cpp" not in str(error.value)
    assert "\n" not in str(error.value)


@compiled
def test_open_sizes_are_those_of_the_inputs_where_these_are_known():
    """A kernel of 100 frames, more than any of the sizes that are made up for the first axis."""
    text = """
        <ir_version: 8, opset_import: ["" : 17]> g (float[T,8] x) => (float[A,B,C,D] y)
        <float[4,1,100,3] w, int64[2] axes = {0,1}> { p = Unsqueeze(x, axes) y = Conv(p, w) }
    """
    model = load_model(model_of(text))
    with pytest.raises(ModelError, match=r"\(with inputs x \[1, 8\] and others: the model leaves sizes open\)"):
        prove(model)
    assert len(prove(model, {"x": (128, 8)}).in_float) > 0


def test_a_refusal_names_the_numbers_that_choose_branches(monkeypatch):
    def refuse(model, input_shapes):
        raise ModelError("no branches")

    monkeypatch.setattr(tensorrt_build, "has_compiler", lambda: True)
    monkeypatch.setattr(tensorrt_build, "compiler_name", lambda: "TensorRT 0")
    monkeypatch.setattr(tensorrt_build, "prove", refuse)
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[2] x, INPUT, int64 other) => (float[2] y) {
        z = Sub (other, other) limit = Constant <value_int = 2> () chosen = CHOICE
        y = If (chosen) <
            then_branch = g1 () => (float[2] t) { t = Relu (x) },
            else_branch = g2 () => (float[2] e) { e = Abs (x) }>
    }"""
    advice = "; branches follow from rate: freeze-inputs:values=rate=NUMBER before fold leaves one"
    for given, choice, expected in (
        ("int64 rate", "Greater (rate, limit)", advice),
        ("bool rate", "Not (rate)", advice),
        ("int64[N] rate", "Greater (rate, limit)", ""),  # of any size: no number is all of it
    ):
        model = model_of(text.replace("INPUT", given).replace("CHOICE", choice))
        assert findings(model)["TRT031"].message == f"TensorRT 0 refuses it: no branches{expected}"


@compiled
def test_the_model_and_its_names_are_left_as_they_are():
    model = load_model(model_with(GOOD))
    before = [(node.name, [tensor.shape for tensor in node.outputs]) for node in model.graph.nodes]
    prove(model)
    assert [(node.name, [tensor.shape for tensor in node.outputs]) for node in model.graph.nodes] == before


@compiled
@pytest.mark.zoo
@pytest.mark.parametrize("name", NAMES)
def test_tensorrt_builds_what_qdq_writes_and_runs_every_quantized_product_in_int8(name):
    """But ConvTranspose, for which TensorRT for RTX has no int8 kernel."""
    data = str(zoo_feeds(name, "calibration"))
    freeze = ":".join(["freeze-inputs", *([FROZEN[name]] if name in FROZEN else [])])
    passes = f"{freeze},fold,calibrate:method=minmax,qdq"
    result = graphopt.optimize(str(zoo_model(name)), passes, data=data, samples=2, target="tensorrt", verify=False)
    report = graphopt.lint(result.model, "tensorrt")
    errors = [found for found in report.findings if found.severity is Severity.ERROR]
    assert not errors
    left = [found for found in report.findings if found.rule == "TRT032" and found.where not in OF_ZEROS]
    assert all("ConvTranspose" in found.message for found in left), left[:3]


@compiled
@pytest.mark.zoo
def test_lint_names_the_input_that_chooses_the_branch_that_tensorrt_refuses():
    found = findings(zoo_model("silero_vad_v6"))
    assert "branches follow from sr: freeze-inputs:values=sr=NUMBER before fold leaves one" in found["TRT031"].message
