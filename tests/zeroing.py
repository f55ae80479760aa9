"""What a cut model must equal: the original with zeros, where they are read, in place of what was removed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from comparing import _random
from onnx import helper, numpy_helper, shape_inference

from graphopt.cut import Cut
from graphopt.model_io import load_model
from graphopt.pass_base import Context, Pass, PassResult
from graphopt.runtime import open_session


def zeroed(model: onnx.ModelProto, cut: Cut) -> onnx.ModelProto:
    """The model with every computed tensor set to zero before each reader at the positions that were removed."""
    result = shape_inference.infer_shapes(model, data_prop=True)
    sizes = {
        value.name: [each.dim_value for each in value.type.tensor_type.shape.dim] for value in result.graph.value_info
    }
    computed = {name for node in result.graph.node for name in node.output}
    types = {value.name: value.type.tensor_type.elem_type for value in result.graph.value_info}
    nodes = []
    for node in result.graph.node:
        if node.op_type in ("LSTM", "GRU", "RNN"):
            _forget(result.graph, node.input[2], cut)
        for index, name in enumerate(node.input):
            removed = cut.kept.get(name)
            if name not in computed or removed is None or types.get(name) != onnx.TensorProto.FLOAT:
                continue
            mask = _mask(removed, sizes[name])
            fresh = f"{name}/{node.output[0]}/{index}"
            result.graph.initializer.append(numpy_helper.from_array(mask, f"{fresh}/mask"))
            result.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), f"{fresh}/zero"))
            nodes.append(helper.make_node("Where", [f"{fresh}/mask", name, f"{fresh}/zero"], [fresh]))
            node.input[index] = fresh
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del result.graph.node[:]
    result.graph.node.extend(copies)
    return result


def _forget(graph: onnx.GraphProto, recurrence: str, cut: Cut) -> None:
    """Let removed units of a recurrent operator go unread by the next step: R [D, gates * H, H]."""
    kept = cut.kept.get(recurrence)
    for tensor in graph.initializer:
        if tensor.name == recurrence and kept is not None and kept[2] is not None:
            value = numpy_helper.to_array(tensor).copy()
            value[:, :, np.setdiff1d(np.arange(value.shape[2]), kept[2])] = 0
            tensor.CopyFrom(numpy_helper.from_array(value, recurrence))


def _mask(kept: tuple[np.ndarray | None, ...], sizes: list[int]) -> np.ndarray:
    mask = np.ones([1] * len(kept), bool)
    for axis, positions in enumerate(kept):
        if positions is not None:
            along = np.zeros(sizes[axis], bool)
            along[positions] = True
            mask = mask & along.reshape([-1 if place == axis else 1 for place in range(len(kept))])
    return mask


def prune_and_compare(
    model: onnx.ModelProto, item: Pass, *, exact: bool = True, batches: tuple[int, ...] = (1, 3)
) -> tuple[PassResult, onnx.ModelProto]:
    """Apply a pass that cuts; assert that the result is valid, runs on all batches, and equals the zeroed original."""
    original = model.SerializeToString()
    loaded = load_model(model)
    context = Context(frame=loaded.frame)
    result = item.apply(loaded.graph, context)
    after = loaded.to_proto()
    assert model.SerializeToString() == original, "the pass wrote into the model that it was loaded from"
    onnx.checker.check_model(after, full_check=True)
    if context.cut is None:
        return result, after
    expected = zeroed(model, context.cut)
    old, new = (open_session(each, optimize=False, threads=1) for each in (expected, after))
    for batch in batches:
        rng = np.random.default_rng(batch)
        feed = {
            spec.name: _random(rng, spec.dtype, [batch if isinstance(size, str) else size for size in spec.shape])
            for spec in old.inputs
        }
        found, wanted = new.run(feed), old.run(feed)
        for name, value in wanted.items():
            assert found[name].shape == value.shape
            if exact:
                limit = 1e-5 * np.abs(value).max(initial=1e-3)
                np.testing.assert_allclose(found[name], value, rtol=0, atol=limit, err_msg=name)
    return result, after


def parameters(model: onnx.ModelProto) -> int:
    """How many float parameters a model holds."""
    return sum(int(np.prod(each.dims)) for each in model.graph.initializer if each.data_type == onnx.TensorProto.FLOAT)


def weights(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Seeded weights by name; names that end in "_var" are positive."""
    rng = np.random.default_rng(seed)
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: np.abs(value) + 0.5 if name.endswith("_var") else value / 3 for name, value in values.items()}
