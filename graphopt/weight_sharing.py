"""A model as a small protobuf and weights beside it, which onnxruntime takes without a copy on our side."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
from onnx import TensorProto

from graphopt.graph_export import export_model
from graphopt.model_io import Model
from graphopt.protobuf import all_graph_protos, without
from graphopt.stored_values import StoredSparseTensor, StoredTensor, data_type_of, is_packed, tensor_proto

_LEAST_BYTES = 4096  # a smaller weight may be the shape of something, which onnxruntime wants in the model


def share_weights(model: Model) -> tuple[onnx.ModelProto, dict[str, ort.OrtValue]]:
    """Return the model with the large weights of its main graph held out, and those weights by name.

    Arrays, and weights in files beside the model, are not copied. Constant nodes with large values become
    initializers: only those can be handed over. Weights inside branches and bodies stay in the model.
    """
    held: list[gs.Constant] = []

    def store(constant: gs.Constant) -> TensorProto:
        if not _can_be_held_out(constant):
            return tensor_proto(constant)
        stand_in = TensorProto(name=constant.name, dims=constant.shape)
        stand_in.data_type = data_type_of(constant)
        stand_in.data_location = TensorProto.EXTERNAL
        stand_in.external_data.add(key="location", value=str(len(held)))
        held.append(constant)
        return stand_in

    proto = export_model(model.graph, model.frame, store)
    _make_initializers(proto.graph)
    for node in proto.graph.node:
        _fill(node, held)
    shared = [tensor for tensor in proto.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    return proto, {tensor.name: _value(held[_number(tensor)], tensor.data_type) for tensor in shared}


def _can_be_held_out(constant: gs.Constant) -> bool:
    values = constant._values
    if isinstance(values, StoredSparseTensor) or constant._export_dtype is not None:
        return False
    plain = data_type_of(constant) != TensorProto.STRING and not is_packed(data_type_of(constant))
    return plain and values.nbytes >= _LEAST_BYTES


def _number(stand_in: TensorProto) -> int:
    return int(stand_in.external_data[0].value)


def _make_initializers(graph: onnx.GraphProto) -> None:
    """Replace Constant nodes whose value is held out by initializers; onnxruntime drops those that nothing reads."""
    graphs = list(all_graph_protos(graph))
    read = {name for each in graphs for node in each.node for name in node.input}
    read.update(output.name for each in graphs for output in each.output)
    kept = []
    for node in graph.node:
        tensor = node.attribute[0].t if node.op_type == "Constant" and node.attribute else TensorProto()
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.name = node.output[0]
            if tensor.name in read:
                graph.initializer.append(tensor)
        else:
            kept.append(node)
    if len(kept) < len(graph.node):
        nodes = [without(node) for node in kept]
        del graph.node[:]
        graph.node.extend(nodes)


def _fill(node: onnx.NodeProto, held: list[gs.Constant]) -> None:
    """Put the values back that onnxruntime can take only inside the model."""
    for attribute in node.attribute:
        tensors = [attribute.t] if attribute.HasField("t") else []
        if attribute.HasField("g"):
            tensors += attribute.g.initializer
            for inner in attribute.g.node:
                _fill(inner, held)
        for tensor in tensors:
            if tensor.data_location == TensorProto.EXTERNAL:
                tensor.CopyFrom(tensor_proto(held[_number(tensor)]))


def _value(constant: gs.Constant, data_type: int) -> ort.OrtValue:
    values = constant._values
    array = values.load() if isinstance(values, StoredTensor) else values  # not kept by the constant: no copy stays
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(array), data_type)
