"""Pairs in branches of Ifs and bodies of loops: where they stand, by which ranges, and what stays float and why."""

import json
from collections import Counter

import numpy as np
import onnx
import pytest
from test_insert_qdq import ranges_of
from texts import model_of

import graphopt
from graphopt.cli import OK, main
from graphopt.compare import compare_sessions
from graphopt.data import load_samples
from graphopt.errors import PipelineError
from graphopt.graph import all_graphs
from graphopt.lint import lint_model
from graphopt.model_io import load_model
from graphopt.runtime import open_session
from graphopt.targets import target_named

CONV = "Conv<pads=[1,1,1,1]>"
TWO = f"""
    y = If (flag) <
        then_branch = t () => (float[N,16,8,8] a) {{ c = {CONV}(x, w, b)  r = Relu(c)  a = {CONV}(r, w, b) }},
        else_branch = e () => (float[N,16,8,8] d) {{ c = {CONV}(x, w)  r = Tanh(c)  d = {CONV}(r, v) }}
    >
"""
TARGETS = ["ort-cpu", "tensorrt"]


def model(body, opset=17, inputs="float[N,16,8,8] x, bool flag", outputs="float[N,16,8,8] y", weights=""):
    return model_of(f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        g ({inputs}) => ({outputs})
        <float[16,16,3,3] w, float[16,16,3,3] v, float[16] b{"," if weights else ""} {weights}> {{ {body} }}
    """)


def feeds(*flags, **more):
    random = np.random.default_rng(0)
    return [
        {"x": random.standard_normal((2, 16, 8, 8)).astype(np.float32), "flag": np.array(flag), **more}
        for flag in flags
    ]


BOTH = feeds(True, False)


def quantized(float_model, data=BOTH, target="ort-cpu", passes="calibrate,qdq:small_islands=true", least_sqnr=20):
    """The result of a run, whose model is close to the float one on the data."""
    result = graphopt.optimize(float_model, passes, data=data, target=target)
    assert [each.failure for each in result.report.passes] == [None] * len(result.report.passes)
    onnx.checker.check_model(result.model, full_check=True)
    sessions = open_session(float_model), open_session(result.model, optimize=False)
    samples = load_samples(data, sessions[0].inputs)
    assert compare_sessions(*sessions, samples).worst_first()[0].sqnr_db > least_sqnr
    return result


def names_of(found):
    """All tensor names of a model's graphs that nodes compute."""
    graphs = all_graphs(load_model(found).graph)
    return Counter(tensor.name for graph in graphs for node in graph.nodes for tensor in node.outputs)


def quantizers(found):
    """By graph, outermost first, how many QuantizeLinear nodes it has."""
    return [sum(node.op == "QuantizeLinear" for node in graph.nodes) for graph in all_graphs(load_model(found).graph)]


def reasons(result):
    return [skip.reason for skip in result.report.passes[-1].skipped]


@pytest.mark.parametrize("target", TARGETS)
def test_both_branches_are_quantized(target):
    result = quantized(model(TWO), target=target)
    assert quantizers(result.model) == [0, 3, 4]  # TensorRT has none behind a Conv, but one on each weight
    assert not reasons(result)
    assert result.report.passes[-1].parts["operators"] == 4


def test_tensors_of_one_name_in_two_branches_have_a_range_each():
    ranges, _ = graphopt.calibrate(model(TWO), data=BOTH)
    assert {"x", "y/then_branch/r", "y/else_branch/c", "y/else_branch/r", "a", "d"} == set(ranges.tensors)
    assert ranges.tensors["y/then_branch/r"].minimum == 0 > ranges.tensors["y/else_branch/r"].minimum


def test_new_names_are_unique_over_all_graphs():
    counted = names_of(quantized(model(TWO)).model)
    before = names_of(model(TWO))
    assert {name for name, count in counted.items() if count > 1} <= {
        name for name, count in before.items() if count > 1
    }


def test_a_weight_outside_that_two_branches_read_is_stored_once():
    found = quantized(model(TWO)).model
    everywhere = [found.graph, *(attribute.g for attribute in found.graph.node[-1].attribute)]
    stored = [
        each.name for graph in everywhere for each in graph.initializer if each.data_type == onnx.TensorProto.INT8
    ]
    assert sorted(name for name in stored if name.endswith("_quantized")) == ["v_quantized", "w_quantized"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_branch_that_no_sample_takes_stays_float_and_says_so(target):
    result = quantized(model(TWO), feeds(True, True), target)
    assert [count > 0 for count in quantizers(result.model)] == [False, True, False]
    assert (
        reasons(result)
        == ["no sample went through y/else_branch in calibration, so it has no ranges: calibrate on samples that do"]
        * 2
    )


def test_a_model_all_in_a_branch_that_no_sample_takes_stays_float():
    body = f"""
        y = If (flag) <
            then_branch = t () => (float[N,16,8,8] a) {{ n = Neg(x)  c = {CONV}(n, w)  a = Relu(c) }},
            else_branch = e () => (float[N,16,8,8] d) {{ d = Identity(x) }}
        >"""
    result = graphopt.optimize(model(body), "calibrate,qdq:small_islands=true", data=feeds(False))
    assert ["then_branch in calibration" in reason for reason in reasons(result)] == [True]
    with pytest.raises(PipelineError, match="of another model"):
        graphopt.optimize(model(body), "qdq", ranges=ranges_of(other=(0, 1)))


NESTED = f"""
    c = {CONV}(x, w, b)
    s = If (flag) <
        then_branch = t () => (float[N,16,8,8] a) {{
            d = {CONV}(c, w, b)
            a = If (inner) <
                then_branch = tt () => (float[N,16,8,8] e) {{ f = {CONV}(d, v)  g = Mul(f, half)  e = {CONV}(g, w) }},
                else_branch = te () => (float[N,16,8,8] h) {{ h = {CONV}(c, w) }}
            >
        }},
        else_branch = e () => (float[N,16,8,8] i) {{ i = Identity(c) }}
    >
    y = {CONV}(s, w, b)
"""


def nested():
    return model(NESTED, inputs="float[N,16,8,8] x, bool flag, bool inner", weights="float half = {0.5}")


@pytest.mark.parametrize("target", TARGETS)
def test_branches_in_branches_read_what_is_quantized_outside(target):
    data = [feed | {"inner": np.array(inner)} for inner in (True, False) for feed in BOTH]
    result = quantized(nested(), data, target)
    assert [count > 0 for count in quantizers(result.model)] == [True, True, True, True, False]
    assert not reasons(result)


def test_a_tensor_that_is_read_outside_too_has_one_reader_before_its_q():
    """Else onnxruntime would not fuse the operator that computes it."""
    data = [feed | {"inner": np.array(inner)} for inner in (True, False) for feed in BOTH]
    result = quantized(nested(), data)
    found = lint_model(load_model(result.model), target_named("ort-cpu"))
    assert found.figures["share of MACs in int8"] == 1
    assert not any(finding.severity.value == "warning" for finding in found.findings)


LOOPS = {
    "Loop": f"""
        c = {CONV}(x, w, b)
        y = Loop (turns, flag, x) <body = turn (int64 i, bool go, float[N,16,8,8] z) => (bool on, float[N,16,8,8] u) {{
            on = Identity(go)  d = {CONV}(z, w)  s = Add(d, c)  r = Relu(s)  e = {CONV}(r, v)  u = Tanh(e) }}>
    """,
    "Scan": f"""
        _s, k = Scan <num_scan_inputs = 1, body = turn (float[16,8,8] state, float[16,8,8] each)
            => (float[16,8,8] next, float[1,16,8,8] u) {{
                next = Add(state, each)  o = Unsqueeze(next, axis)  d = {CONV}(o, w)  r = Relu(d)  u = {CONV}(r, w) }}>
            (start, x)
        y = Squeeze(k, one)""",
}
IN_LOOPS = "int64 turns = {3}, int64[1] axis = {0}, int64[1] one = {1}, float[16,8,8] start"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("operator", ["Loop", "Scan"])
def test_the_body_of_a_loop_is_quantized(operator, target):
    result = quantized(model(LOOPS[operator], weights=IN_LOOPS), feeds(True, True), target)
    assert not reasons(result)
    assert quantizers(result.model)[-1] > 1
    assert result.report.passes[-1].parts["operators"] >= LOOPS[operator].count("Conv")


def test_onnxruntime_runs_the_body_of_a_loop_in_int8():
    result = quantized(model(LOOPS["Loop"], weights=IN_LOOPS), feeds(True, True))
    found = lint_model(load_model(result.model), target_named("ort-cpu"))
    assert found.figures["share of MACs in int8"] == 1


def test_the_body_of_a_loop_that_no_sample_runs_stays_float_and_says_so():
    body = LOOPS["Loop"].replace("Loop (turns,", "Loop (many,")
    found = model(body, inputs="float[N,16,8,8] x, bool flag, int64 many", weights=IN_LOOPS)
    result = quantized(found, [feed | {"many": np.array(0)} for feed in feeds(True, True)])
    assert [count > 0 for count in quantizers(result.model)] == [True, False]
    assert set(reasons(result)) == {
        "no sample went through y/body in calibration, so it has no ranges: calibrate on samples that do"
    }


def test_a_quantized_loop_is_stripped():
    float_model = model(LOOPS["Loop"], weights=IN_LOOPS)
    data = feeds(True, True)
    stripped = graphopt.optimize(quantized(float_model, data).model, "strip-qdq:clips=relu", data=data).model
    assert sum(quantizers(stripped)) == 0


def test_operators_in_other_graphs_stay_float():
    body = f"""
        z = SequenceEmpty ()
        s = SequenceInsert (z, x)
        t = SequenceMap (s) <body = m (float[N,16,8,8] e) => (float[N,16,8,8] f) {{ f = {CONV}(e, w) }}>
        y = SequenceAt (t, first)
    """
    result = graphopt.optimize(model(body, weights="int64 first = {0}"), "calibrate,qdq", data=BOTH)
    assert len(reasons(result)) == 1
    assert "(SequenceMap), where its values cannot be observed" in reasons(result)[0]


def test_a_weight_that_a_caller_may_override_stays_float_in_a_branch():
    body = f"""
        y = If (flag) <
            then_branch = t () => (float[N,16,8,8] a) {{ a = {CONV}(x, k) }},
            else_branch = e () => (float[N,16,8,8] d) {{ d = {CONV}(x, w) }}
        >"""
    inputs = "float[N,16,8,8] x, bool flag, float[16,16,3,3] k"
    data = feeds(True, False, k=np.ones((16, 16, 3, 3), np.float32))
    assert ["run freeze-inputs first" in reason for reason in reasons(quantized(model(body, inputs=inputs), data))] == [
        True
    ]


def test_names_and_estimates_keep_operators_of_branches_float():
    float_model = model(TWO)
    for node in float_model.graph.node[0].attribute[0].g.node:
        node.name = f"first/{node.output[0]}"
    result = quantized(float_model, passes="calibrate,qdq:small_islands=true:exclude=first/*")
    assert reasons(result) == ["excluded by name"] * 2
    small = graphopt.optimize(float_model, "calibrate,qdq", data=feeds(True, False)[:1])
    assert all("MACs between float operators" in reason or "no sample" in reason for reason in reasons(small))


def test_autotune_measures_islands_in_branches(monkeypatch):
    monkeypatch.setattr(
        "graphopt.autotune.measure_latency", lambda sessions, feed, **_: [float(len(sessions) - n) for n in (0, 1)]
    )
    result = graphopt.optimize(model(TWO), "calibrate,qdq:autotune=true", data=BOTH)
    assert len(reasons(result)) == 4
    assert all(reason.startswith("measured: ") for reason in reasons(result))
    assert result.report.passes[-1].rewrites == 0


def test_a_low_opset_is_raised_in_branches_too():
    result = quantized(model(TWO, opset=11))
    assert result.model.opset_import[0].version == 13


def test_a_hard_swish_in_a_branch_is_decomposed_by_its_own_range():
    body = TWO.replace("Tanh", "HardSwish").replace("Relu", "HardSwish")
    result = quantized(model(body))
    operators = {node.op for graph in all_graphs(load_model(result.model).graph) for node in graph.nodes}
    assert "HardSwish" not in operators
    assert quantizers(result.model) == [0, 5, 5]


def test_a_model_with_a_quantized_branch_is_refused_and_stripped():
    float_model = model(TWO)
    found = quantized(float_model).model
    with pytest.raises(PipelineError, match="quantized already"):
        graphopt.optimize(found, "qdq", ranges=ranges_of(x=(-1, 1)))
    stripped = graphopt.optimize(found, "strip-qdq:clips=relu", data=BOTH).model
    assert quantizers(stripped) == [0, 0, 0]
    for feed in BOTH:
        expected, again = (open_session(each).run(feed)["y"] for each in (float_model, stripped))
        assert np.abs(expected - again).max() < 0.05 * np.abs(expected).max()  # int8 weights
    assert quantizers(quantized(stripped).model) == [0, 3, 4]


def test_lint_sees_the_operators_of_branches():
    found = load_model(quantized(model(TWO)).model)
    proved = lint_model(found, target_named("ort-cpu"))
    assert proved.figures["share of MACs in int8"] == 1
    assert {each.message[:13] for each in proved.findings if each.severity.value == "warning"} == {"Tanh in float"}
    refused = lint_model(found, target_named("tensorrt"))
    assert {"TRT001", "TRT002"} <= {finding.rule for finding in refused.findings}
    ours = lint_model(load_model(quantized(model(TWO), target="tensorrt").model), target_named("tensorrt"))
    assert {finding.rule for finding in ours.findings} - {"TRT033"} == {"TRT027"}


def test_the_commands_take_a_model_with_quantized_branches(tmp_path, capsys):
    source, out = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    onnx.save(model(TWO), source)
    for number, feed in enumerate(BOTH):
        (tmp_path / "feeds").mkdir(exist_ok=True)
        np.savez(tmp_path / "feeds" / f"{number}.npz", **feed)
    data = ["--data", str(tmp_path / "feeds")]
    assert main(["optimize", str(source), "--passes", "fold,calibrate,qdq", "-o", str(out), *data]) == OK
    capsys.readouterr()
    assert main(["check", str(source), str(out), *data, "--min-sqnr", "20", "--json"]) == OK
    assert json.loads(capsys.readouterr().out)
    assert main(["lint", str(out), "--target", "ort-cpu"]) == OK
    assert main(["inspect", str(out)]) == OK


def test_an_operator_too_small_in_one_branch_says_nothing_of_its_namesake_in_another():
    body = f"""
        y = If (flag) <
            then_branch = t () => (float[N,16,A,B] a) {{ c = {CONV}(x, w, b)  a = Relu(c) }},
            else_branch = e () => (float[N,16,C,D] d) {{ p = GlobalAveragePool(x)  c = {CONV}(p, w, b)  d = Relu(c) }}
        >
    """
    net = model(body, inputs="float[1,16,256,256] x, bool flag", outputs="float[1,16,E,F] y")
    random = np.random.default_rng(0)
    x = random.standard_normal((1, 16, 256, 256)).astype(np.float32)
    data = [{"x": x, "flag": np.array(flag)} for flag in (True, False)]
    result = graphopt.optimize(net, "calibrate,qdq", data=data)
    (holder,) = (node for node in result.model.graph.node if node.op_type == "If")
    ops = {each.name: Counter(node.op_type for node in each.g.node) for each in holder.attribute}
    assert ops["then_branch"]["QuantizeLinear"] > 0
    assert ops["else_branch"]["QuantizeLinear"] == 0
