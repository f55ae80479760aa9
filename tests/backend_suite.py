"""The conformance suite of ONNX as models with the outputs they must have, and the same with inputs made constants.

onnxruntime's Python interface cannot take or return bfloat16, float8, int4 and the like: such inputs are fed as float32
and cast by the model, and such outputs are cast to it.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")  # all that needs no network

_HIGHEST_OPSET, _HIGHEST_IR = 25, 11  # of onnxruntime 1.31; it refuses a model of others as a whole


@dataclass(frozen=True)
class Case:
    """A model, values of its inputs in order (arrays, lists of arrays, None), and the outputs that it must have."""

    name: str
    model: ModelProto
    inputs: Sequence[Any]
    expected: Sequence[Any]
    rtol: float
    atol: float


def cases(every: int = 1) -> Iterator[Case]:
    """Yield every n-th case of the suite, one for each set of data."""
    with warnings.catch_warnings(action="ignore"):  # the suite computes infinities on purpose
        found = [case for kind in KINDS for case in load_model_tests(kind=kind)]
    for case in sorted(found, key=lambda case: case.name)[::every]:
        for model, inputs, outputs in _data(case):
            lowered = _of_known_opset(model)
            yield _within_numpy(Case(case.name, lowered, inputs, outputs, case.rtol, case.atol))


def with_constant_inputs(case: Case) -> Case:
    """Make the inputs of a case initializers, and sequences of them; those that may be absent stay inputs."""
    model = ModelProto()
    model.CopyFrom(case.model)
    model.ir_version = max(model.ir_version, 4)  # before, an initializer is an input
    graph, makers, left = model.graph, [], []
    given = list(zip(graph.input, case.inputs, strict=False))
    kept = list(graph.input)[len(given) :]
    for info, value in given:
        kind = info.type.WhichOneof("value")
        if kind == "tensor_type" and value is not None:
            graph.initializer.append(_tensor(value, info.name, info.type.tensor_type.elem_type))
        elif kind == "sequence_type" and value and info.type.sequence_type.elem_type.HasField("tensor_type"):
            names = [f"{info.name}/{index}" for index in range(len(value))]
            element = info.type.sequence_type.elem_type.tensor_type.elem_type
            graph.initializer.extend(_tensor(each, name, element) for each, name in zip(value, names, strict=True))
            makers.append(helper.make_node("SequenceConstruct", names, [info.name]))
        else:
            left.append((info, value))
    nodes = [*makers, *graph.node]
    inputs = [*(info for info, _ in left), *kept]
    copies = [type(each).FromString(each.SerializeToString()) for each in (*nodes, *inputs)]
    del graph.node[:], graph.input[:]
    graph.node.extend(copies[: len(nodes)])
    graph.input.extend(copies[len(nodes) :])
    return replace(case, name=f"{case.name} (constant)", model=model, inputs=[value for _, value in left])


def why_not_right(model: ModelProto, case: Case) -> str | None:
    """Run a model in onnxruntime on the inputs of a case; say how its outputs differ, or None."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    feed = dict(zip((info.name for info in case.model.graph.input), case.inputs, strict=False))
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        outputs = session.run(None, feed)
        Runner.assert_similar_outputs(case.expected, outputs, case.rtol, case.atol)
    except Exception as error:  # whatever onnxruntime raises on what it does not implement
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def _data(case: Any) -> Iterator[tuple[ModelProto, list[Any], list[Any]]]:
    if case.model is not None:
        for inputs, outputs in case.data_sets:
            yield case.model, list(map(_value, inputs)), list(map(_value, outputs))
        return
    model = onnx.load(Path(case.model_dir, "model.onnx"))
    for folder in sorted(Path(case.model_dir).glob("test_data_set_*")):
        yield model, _read_all(folder, "input", model.graph.input), _read_all(folder, "output", model.graph.output)


def _read_all(folder: Path, role: str, entries: Any) -> list[Any]:
    files = [(folder / f"{role}_{index}.pb", info) for index, info in enumerate(entries)]
    return [_read(file, info) for file, info in files if file.exists()]


def _read(path: Path, info: onnx.ValueInfoProto) -> Any:
    if info.type.HasField("sequence_type"):
        return numpy_helper.to_list(onnx.SequenceProto.FromString(path.read_bytes()))
    return numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))


def _value(value: Any) -> Any:
    if isinstance(value, TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def _tensor(value: Any, name: str, data_type: int) -> TensorProto:
    if data_type == TensorProto.STRING:
        return helper.make_tensor(name, data_type, value.shape, [str(each).encode() for each in value.flat])
    return numpy_helper.from_array(np.asarray(value, helper.tensor_dtype_to_np_dtype(data_type)), name)


def _of_known_opset(model: ModelProto) -> ModelProto:
    """Return the model in an opset that onnxruntime has; where an operator is not the same in it, it fails there."""
    copy = ModelProto()
    copy.CopyFrom(model)
    copy.ir_version = min(copy.ir_version, _HIGHEST_IR)
    for each in copy.opset_import:
        if not each.domain:
            each.version = min(each.version, _HIGHEST_OPSET)
    return copy


def _is_foreign(info: onnx.ValueInfoProto) -> bool:
    kind = info.type.tensor_type.elem_type
    return bool(kind) and kind != TensorProto.STRING and helper.tensor_dtype_to_np_dtype(kind).isbuiltin != 1


def _within_numpy(case: Case) -> Case:
    """Return the case with inputs and outputs of types that only a Cast can make and read as float32."""
    foreign = [info.name for info in (*case.model.graph.input, *case.model.graph.output) if _is_foreign(info)]
    if not foreign:
        return case
    model = ModelProto()
    model.CopyFrom(case.model)
    before, after = [], []
    inputs, expected = list(case.inputs), list(case.expected)
    for values, entries, nodes in ((inputs, model.graph.input, before), (expected, model.graph.output, after)):
        for index, info in enumerate(entries):
            if not _is_foreign(info) or index >= len(values):
                continue
            kind, inner = info.type.tensor_type.elem_type, info.name
            info.name = f"{inner}/float"
            info.type.tensor_type.elem_type = TensorProto.FLOAT
            values[index] = np.asarray(values[index]).astype(np.float32)
            if nodes is before:
                nodes.append(helper.make_node("Cast", [info.name], [inner], to=kind))
            else:
                nodes.append(helper.make_node("Cast", [inner], [info.name], to=TensorProto.FLOAT))
    nodes = [*before, *map(_copy, model.graph.node), *after]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return replace(case, model=model, inputs=inputs, expected=expected)


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy
