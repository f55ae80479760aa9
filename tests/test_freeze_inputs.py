import numpy as np
import onnx
import pytest
from comparing import build

import graphopt
from graphopt.errors import PipelineError
from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.pass_manager import PassManager
from graphopt.passes import registry
from graphopt.passes.freeze_inputs import FreezeInputs
from graphopt.pipeline import parse_pipeline
from graphopt.runtime import open_session


def _model():
    text = '<ir_version: 8, opset_import: ["" : 17]> agraph (float[N] x) => (float[N] y)'
    model = build(text + "{ a = Mul (x, k) y = Add (a, b) }", {"k": np.float32(2), "b": np.float32(3)})
    for name in ("k", "b"):
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, []))
    return load_model(model)


@pytest.mark.parametrize(
    ("names", "frozen"),
    [(("*",), {"k", "b"}), (("k",), {"k"}), (("b*", "x"), {"b"}), (("k", "b"), {"k", "b"})],
)
def test_freezes_the_inputs_that_are_named(names, frozen):
    model = _model()
    result = FreezeInputs(names=names).apply(model.graph, Context(frame=model.frame))
    proto = model.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert result.rewrites == len(frozen)
    assert {each.name for each in proto.graph.input} == {"x", "k", "b"} - frozen
    assert {each.name for each in proto.graph.initializer} == {"k", "b"}


def test_says_which_name_is_no_input_with_a_default():
    model = _model()
    result = FreezeInputs(names=("weight", "k")).apply(model.graph, Context(frame=model.frame))
    assert result.rewrites == 1
    assert [skip.where for skip in result.skipped] == ["weight"]


def test_does_nothing_without_defaults():
    model = _model()
    assert FreezeInputs().apply(model.graph, Context()).rewrites == 0
    assert len(model.graph.inputs) == 3


CHOICE = """
    <ir_version: {ir}, opset_import: ["" : 17]>
    g (float[N, 2] x, int64 rate, bool[1] loud, float[M] open, string name) => (float[N, 2] y)
    {{
        high = Constant <value_int = 16000> ()
        two = Constant <value_float = 2.0> ()
        three = Constant <value_float = 3.0> ()
        fast = Equal (rate, high)
        a = If (fast) <
            then_branch = g1 () => (float[N, 2] t) {{ t = Mul (x, two) }},
            else_branch = g2 () => (float[N, 2] e) {{ e = Mul (x, three) }}>
        y = If (loud) <
            then_branch = g3 () => (float[N, 2] u) {{ u = Mul (a, three) }},
            else_branch = g4 () => (float[N, 2] v) {{ v = Identity (a) }}>
    }}
"""


def choice(ir=8):
    model = onnx.parser.parse_model(CHOICE.format(ir=ir))
    del model.graph.input[3:]  # what nothing reads is for the refusals alone
    return model


@pytest.mark.parametrize("ir", [3, 8])
@pytest.mark.parametrize("data", [None, [{"x": np.ones((1, 2), np.float32), "rate": 8000, "loud": [False]}]])
def test_an_input_becomes_a_number_and_the_result_is_judged_with_that_number(ir, data):
    result = graphopt.optimize(choice(ir), "freeze-inputs:values=rate=16000+loud=true,fold", data=data)
    assert [each.name for each in open_session(result.model).inputs] == ["x"]
    assert "If" not in {node.op_type for node in result.model.graph.node}
    assert [record.failure for record in result.report.passes] == [None, None]
    assert not [each for each in result.report.warnings if "default values" in each]
    x = np.array([[1, -2]], np.float32)
    np.testing.assert_array_equal(open_session(result.model).run({"x": x})["y"], 6 * x)


def test_what_runs_beside_the_result_has_the_same_number():
    feeds = [{"x": np.ones((1, 2), np.float32), "loud": np.array([False])}] * 2  # none for rate
    passes = "freeze-inputs:names=:values=rate=16000,fold,calibrate,qdq:small_islands=true"
    result = graphopt.optimize(choice(), passes, data=feeds)
    assert [each.name for each in result.model.graph.input] == ["x", "loud"]
    manager = PassManager(parse_pipeline("freeze-inputs:values=rate=16000", registry()))
    assert [each.name for each in manager.run(choice()).model.graph.input] == ["x", "loud"]
    ranges, _ = graphopt.calibrate(choice(), feeds, passes="freeze-inputs:values=rate=16000,fold")
    assert ranges.samples == 2
    check = graphopt.check(choice(), result.model, data=[{**feed, "rate": 16000} for feed in feeds])
    assert check.comparison.outputs[0].max_error == 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("rate", "takes NAME=NUMBER, not 'rate'"),
        ("rate=", "takes NAME=NUMBER"),
        ("=1", "takes NAME=NUMBER"),
        ("rat=1", "input 'rat' cannot be 1: the model's inputs are x, rate, loud, open, name"),
        ("rate=1.5", "it takes int64"),
        ("rate=fast", "it takes int64"),
        (f"rate={2**63}", "it takes int64"),
        ("loud=2", "it takes bool"),
        ("open=1", "only inputs of a fixed size"),
        ("name=1", "it holds no numbers"),
    ],
)
def test_a_number_that_an_input_cannot_have_is_refused(value, message):
    with pytest.raises(PipelineError, match=message):
        graphopt.optimize(onnx.parser.parse_model(CHOICE.format(ir=8)), f"freeze-inputs:values={value}")


def test_an_input_that_is_an_output_as_well_stays_one():
    model = load_model(build('<ir_version: 8, opset_import: ["" : 17]> g (float[1] x) => (float[1] x) { a = Abs (x) }'))
    result = FreezeInputs(values=("x=1",)).apply(model.graph, Context(frame=model.frame))
    assert result.rewrites == 0
    assert [skip.reason for skip in result.skipped] == ["is a graph output too, so it stays an input"]
