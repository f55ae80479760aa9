"""The one test helper that compares two models: a graph before and after passes, run in onnxruntime."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

from graphopt.graph import all_graphs
from graphopt.model_io import load_model
from graphopt.pass_base import Context, Pass, PassResult
from graphopt.runtime import open_session

_TOLERANCE = {np.dtype(np.float16): 4e-3, np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-12}
"""Of the largest magnitude in an output; float16 rounds at 5e-4 an operation, float32 at 6e-8."""


def build(text: str, constants: Mapping[str, np.ndarray] | None = None) -> onnx.ModelProto:
    """The model of an ONNX text, with more initializers."""
    model = onnx.parser.parse_model(text)
    for name, values in (constants or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
    return model


def apply_and_compare(
    model: str | onnx.ModelProto,
    *passes: Pass,
    constants: Mapping[str, np.ndarray] | None = None,
    feed: Mapping[str, np.ndarray] | None = None,
    tolerance: float | None = None,
) -> tuple[PassResult, onnx.ModelProto]:
    """Apply passes to a model, and assert that it is valid and computes what it did.

    Args:
        model: a ModelProto, or an ONNX text; `constants` are then its initializers.
        passes: applied in this order.
        feed: values of inputs; the others are seeded random numbers, symbolic dimensions being 2.
        tolerance: largest difference, relative to the largest magnitude in an output; None: by its dtype.

    Returns:
        What the last pass reported, and the new model.
    """
    before = build(model, constants) if isinstance(model, str) else model
    original = before.SerializeToString()
    loaded = load_model(before)
    context = Context(frame=loaded.frame)
    result = PassResult()
    for each in passes:
        result = each.apply(loaded.graph, context)
    after = loaded.to_proto()
    assert before.SerializeToString() == original, "a pass wrote into the model that it was loaded from"
    onnx.checker.check_model(after, full_check=True)
    assert_equal_outputs(before, after, feed, tolerance)
    return result, after


def assert_equal_outputs(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    feed: Mapping[str, np.ndarray] | None = None,
    tolerance: float | None = None,
) -> None:
    """Assert that two models have the same outputs, with onnxruntime's own optimizations off."""
    old, new = (open_session(model, optimize=False, threads=1) for model in (before, after))
    assert [each.name for each in old.inputs] == [each.name for each in new.inputs]
    assert old.outputs == new.outputs
    rng = np.random.default_rng(0)
    values = {**{each.name: _random(rng, each.dtype, each.shape) for each in old.inputs}, **(feed or {})}
    expected, found = old.run(values), new.run(values)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        if value.dtype.kind != "f":
            np.testing.assert_array_equal(found[name], value, name)
            continue
        limit = (_TOLERANCE[value.dtype] if tolerance is None else tolerance) * np.abs(value).max(initial=0)
        np.testing.assert_allclose(found[name], value, rtol=0, atol=limit, err_msg=name)


def _random(rng: np.random.Generator, dtype: np.dtype, shape: tuple[int | str | None, ...]) -> np.ndarray:
    sizes = [size if isinstance(size, int) and size > 0 else 2 for size in shape]
    if dtype.kind == "f":
        return rng.standard_normal(sizes).astype(dtype)
    return rng.integers(0, 2, sizes).astype(dtype)


def ops(model: onnx.ModelProto) -> Counter[str]:
    """How many nodes of each operator a model holds, nested graphs included."""
    return Counter(node.op for graph in all_graphs(load_model(model).graph) for node in graph.nodes)


def constant(model: onnx.ModelProto, name: str) -> np.ndarray:
    """The value of an initializer of the main graph."""
    return next(numpy_helper.to_array(each) for each in model.graph.initializer if each.name == name)
