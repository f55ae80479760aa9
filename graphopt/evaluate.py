"""Evaluate nodes whose inputs are all known, in small models of their own.

The whole model is never serialised: constants are fed by reference, only the nodes travel. All nodes go into
one onnxruntime session with its optimizations off, so that the values are those the model itself would
compute. When that session fails, the list is halved until the node that fails stands alone; the others are
still evaluated. Operators that move elements, on types that onnxruntime takes nowhere from numpy (bfloat16, float8,
int4, strings), are evaluated by onnx's reference implementation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
from onnx.reference import ReferenceEvaluator
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from graphopt.graph import Array, present
from graphopt.operators import MOVING

_IR_VERSION = 10  # the model's own may be too old for its operators: real files state IR 3 with opset 8
_FATAL = 4  # onnxruntime's log severity: what fails is reported here, not on stderr


@dataclass(frozen=True)
class Evaluation:
    """What evaluating a list of nodes gave."""

    values: dict[int, Array] = field(default_factory=dict)  # by id: what was wanted, or is read by other nodes
    failures: dict[int, str] = field(default_factory=dict)  # by id of the node: onnxruntime's reason, one line


def evaluate(
    nodes: Sequence[gs.Node],
    constants: Mapping[int, Array],
    wanted: Iterable[gs.Tensor],
    opset_imports: Iterable[onnx.OperatorSetIdProto],
) -> Evaluation:
    """Compute the outputs of `nodes` that are `wanted`, or that nodes outside the list read.

    A tensor is missing from the result where its node failed or reads, directly or not, the output of one
    that did.

    Args:
        nodes: in topological order; none holds a graph and none is random.
        constants: by id, the value of every tensor that the nodes read and none of them computes.
        wanted: outputs of `nodes`, of the types that numpy has.
        opset_imports: of the model that the nodes come from.

    """
    wanted_ids = {id(tensor) for tensor in wanted}
    known = dict(constants)
    failures: dict[int, str] = {}
    pending = [list(run) for _, run in groupby(nodes, is_evaluated_by_reference)][::-1]  # a stack: the first is next
    while pending:
        part = _computable(pending.pop(), known)
        results = _results(part, wanted_ids)
        run = _run_reference if part and is_evaluated_by_reference(part[0]) else _run
        try:
            known.update(run(part, known, results, opset_imports))
        except Exception as error:  # onnxruntime raises RuntimeError, ValueError and types of its own
            if len(part) == 1:
                failures[id(part[0])] = _first_line(error)
            else:
                middle = len(part) // 2
                pending += [part[middle:], part[:middle]]
    return Evaluation({key: value for key, value in known.items() if key not in constants}, failures)


def is_numpy_type(dtype: object) -> bool:
    """Tell whether a dtype of graphsurgeon is one that numpy has itself, strings not counted."""
    if dtype is None or isinstance(dtype, int):  # graphsurgeon's word for a type that numpy lacks
        return False
    return np.dtype(dtype).isbuiltin == 1 and np.dtype(dtype).kind in "biuf"  # type: ignore[call-overload]


def is_evaluated_by_reference(node: gs.Node) -> bool:
    """Tell whether a node moves, or casts, elements of a type that onnxruntime does not take from numpy."""
    dtypes = [tensor.dtype for tensor in (*node.inputs, *node.outputs) if tensor.dtype is not None]
    return node.op in _BY_REFERENCE and not all(map(is_numpy_type, dtypes))


_BY_REFERENCE = MOVING | {"Cast", "Concat", "Split"}


def _computable(nodes: list[gs.Node], known: Mapping[int, Array]) -> list[gs.Node]:
    """Return the nodes that do not read the output of a node that failed."""
    available = set(known)
    computable = []
    for node in nodes:
        if all(id(tensor) in available for tensor in present(node.inputs)):
            computable.append(node)
            available.update(id(tensor) for tensor in node.outputs)
    return computable


def _results(nodes: list[gs.Node], wanted: set[int]) -> list[gs.Tensor]:
    """Return the outputs of `nodes` that are wanted or read by other nodes."""
    inside = {id(node) for node in nodes}
    return [
        tensor
        for node in nodes
        for tensor in present(node.outputs)
        if id(tensor) in wanted or any(id(consumer) not in inside for consumer in tensor.outputs)
    ]


def _run(
    nodes: list[gs.Node],
    known: Mapping[int, Array],
    results: list[gs.Tensor],
    opset_imports: Iterable[onnx.OperatorSetIdProto],
) -> dict[int, Array]:
    if not results:
        return {}
    computed = {id(tensor) for node in nodes for tensor in node.outputs}
    read = {id(tensor) for node in nodes for tensor in present(node.inputs)} - computed
    feed = {_name(key): known[key] for key in read}
    graph = onnx.helper.make_graph(
        [_node_proto(node) for node in nodes],
        "constants",
        [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in feed.items()
        ],
        [onnx.ValueInfoProto(name=_name(id(tensor))) for tensor in results],  # onnxruntime finds the types
    )
    model = onnx.helper.make_model(graph, opset_imports=list(opset_imports), ir_version=_IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return {id(tensor): value for tensor, value in zip(results, session.run(None, feed), strict=True)}


def _run_reference(
    nodes: list[gs.Node],
    known: Mapping[int, Array],
    results: list[gs.Tensor],
    opset_imports: Iterable[onnx.OperatorSetIdProto],
) -> dict[int, Array]:
    opsets = {each.domain: each.version for each in opset_imports}
    values = dict(known)
    for node in nodes:
        feed = {_name(id(tensor)): values[id(tensor)] for tensor in present(node.inputs)}
        outputs = ReferenceEvaluator(_node_proto(node), opsets=opsets).run(None, feed)
        values.update((id(tensor), value) for tensor, value in zip(node.outputs, outputs, strict=True))
    return {id(tensor): values[id(tensor)] for tensor in results}


def _node_proto(node: gs.Node) -> onnx.NodeProto:
    """Return the node with its tensors named by identity: names of branches may clash."""
    proto = onnx.NodeProto(op_type=node.op, domain=node.domain or "")
    proto.input.extend(_name(id(tensor)) if tensor.name else "" for tensor in node.inputs)
    proto.output.extend(_name(id(tensor)) if tensor.name else "" for tensor in node.outputs)
    proto.attribute.extend(OnnxExporter.export_attributes(node.attrs))
    return proto


def _name(key: int) -> str:
    return f"t{key}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
