"""HardSigmoid and HardSwish equal what they are replaced by, and the ranges of the new tensors hold their values."""

import numpy as np
import pytest
from test_insert_qdq import ranges_of
from texts import model_of

from graphopt.hard_activations import decompose_activations
from graphopt.model_io import load_model
from graphopt.runtime import open_session

VALUES = np.linspace(-6, 6, 4096, dtype=np.float32).reshape(1, -1)


@pytest.mark.parametrize(
    "operator",
    ["HardSwish(x)", "HardSigmoid(x)", "HardSigmoid<alpha=0.16666667, beta=0.5>(x)", "HardSigmoid<beta=0.0>(x)"],
)
def test_the_decomposition_equals_the_operator_and_its_ranges_hold(operator):
    text = f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1,4096] x) => (float[1,4096] y) {{ y = {operator} }}
    """
    (expected,) = open_session(model_of(text)).run({"x": VALUES}).values()
    model = load_model(model_of(text))
    ranges = ranges_of(x=(-6, 6), y=(float(expected.min()), float(expected.max())))
    found = decompose_activations(model.graph, list(model.graph.nodes), ranges)
    assert not {"HardSwish", "HardSigmoid"} & {node.op for node in model.graph.nodes}
    new = [name for name in found.tensors if name not in ranges.tensors]
    values = open_session(model.to_proto(), extra_outputs=new, optimize=False).run({"x": VALUES})
    np.testing.assert_allclose(values["y"], expected, atol=1e-6)
    assert new
    for name in new:
        assert found.tensors[name].minimum <= values[name].min() + 1e-6
        assert found.tensors[name].maximum >= values[name].max() - 1e-6
