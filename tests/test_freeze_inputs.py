import numpy as np
import onnx
import pytest
from comparing import build

from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.passes.freeze_inputs import FreezeInputs


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
