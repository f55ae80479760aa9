"""A ModelProto as a `gs.Graph` and its `Frame`, without reading or copying a weight."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.util.exception import OnnxGraphSurgeonException

from graphopt.errors import ModelError
from graphopt.frame import Frame, note_entries, take_frame
from graphopt.graph import all_graphs
from graphopt.protobuf import broken_texts, without
from graphopt.stored_values import StoredTensor, stored_values

_INDEX = "graphopt.index"  # marks the stand-in of a weight with its place among the initializers


def import_model(proto: onnx.ModelProto, folder: Path | None, *, owned: bool) -> tuple[gs.Graph, Frame]:
    """Import a model.

    `folder` is where files of weights are looked for, None if nobody knows. An `owned` proto is taken
    apart; any other is left as it is, but the graph keeps reading its initializers.

    Raises:
        ModelError: a file of weights is missing, a name is no text, or graphsurgeon cannot read the model.

    """
    if (broken := next(broken_texts(proto), None)) is not None:
        raise ModelError(f"the name {broken!r:.80} is not UTF-8: the model is damaged; export or download it again")
    weights = list(proto.graph.initializer)
    if owned:
        shell = proto
        del shell.graph.initializer[:]
    else:
        shell = without_weights(proto)
    input_names = {each.name for each in shell.graph.input} if shell.ir_version >= 4 else set()
    for index, weight in enumerate(weights):
        if weight.name not in input_names:
            _add_stand_in(shell, weight, index)
    defaults = {
        weight.name: gs.Constant(weight.name, StoredTensor(weight, folder))
        for weight in weights
        if weight.name in input_names
    }
    defaults |= _take_sparse_defaults(shell, input_names)
    frame = take_frame(shell)
    frame.defaults = defaults
    try:
        graph = gs.import_onnx(shell)
    except (OnnxGraphSurgeonException, KeyError, ValueError, TypeError) as error:
        raise ModelError(f"graphsurgeon cannot read the model: {str(error).splitlines()[0]}") from error
    _adopt(graph, weights, folder)
    note_entries(frame, shell, graph)
    for constant in defaults.values():
        _check_file(constant)
    return graph, frame


def without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a model without the initializers of its main graph, which are not read."""
    shell = without(proto, "graph")
    shell.graph.CopyFrom(without(proto.graph, "initializer"))
    return shell


def _add_stand_in(shell: onnx.ModelProto, weight: TensorProto, index: int) -> None:
    stand_in = shell.graph.initializer.add(name=weight.name, data_type=weight.data_type, dims=weight.dims)
    stand_in.doc_string = weight.doc_string
    stand_in.metadata_props.extend(weight.metadata_props)
    stand_in.external_data.add(key=_INDEX, value=str(index))


def _take_sparse_defaults(shell: onnx.ModelProto, input_names: set[str]) -> dict[str, gs.Constant]:
    overridable = [tensor for tensor in shell.graph.sparse_initializer if tensor.values.name in input_names]
    defaults = {
        tensor.values.name: gs.Constant(tensor.values.name, stored_values(LazyValues(tensor), None))
        for tensor in overridable
    }
    for tensor in overridable:
        shell.graph.sparse_initializer.remove(tensor)
    return defaults


def _adopt(graph: gs.Graph, weights: list[TensorProto], folder: Path | None) -> None:
    """Give every constant its weight as one of our stored values, and the graph opsets of its own."""
    imports = [without(each) for each in graph.import_domains]
    for top in (graph, *graph.functions):
        for each in all_graphs(top):
            each.import_domains = imports if top is graph else [without(each) for each in top.import_domains]
            tensors = [*each.outputs]
            for node in each.nodes:
                tensors += [*node.inputs, *node.attrs.values()]
            for constant in (tensor for tensor in tensors if isinstance(tensor, gs.Constant)):
                _adopt_constant(constant, weights, folder)


def _adopt_constant(constant: gs.Constant, weights: list[TensorProto], folder: Path | None) -> None:
    tensor = constant._values.tensor
    if isinstance(tensor, TensorProto):
        index = next((entry.value for entry in tensor.external_data if entry.key == _INDEX), None)
        if index is not None:
            constant._values = StoredTensor(weights[int(index)], folder)
    constant._values = stored_values(constant._values, folder)
    constant.data_location = None
    _check_file(constant)


def _check_file(constant: gs.Constant) -> None:
    if isinstance(constant._values, StoredTensor):
        constant._values.check_file()
