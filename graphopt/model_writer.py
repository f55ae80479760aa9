"""Write a model to one file with no weight in memory twice but the one that is being written.

A protobuf message is its fields one after another, each as its number, its length and its bytes
(https://protobuf.dev/programming-guides/encoding/). So a model can be written as all but its graph, and the graph as
all but its large initializers, followed by those, as soon as their lengths are known.
"""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import Message
from onnx import GraphProto, TensorProto

from graphopt.frame import Frame
from graphopt.graph_export import constants_by_graph, export_model
from graphopt.protobuf import without
from graphopt.stored_values import StoredTensor, data_type_of, tensor_proto

_LEAST_BYTES = 65536  # of an initializer that is written on its own
_LENGTH_DELIMITED = 2  # protobuf's wire type of messages


def write_model(file: BinaryIO, graph: gs.Graph, frame: Frame) -> None:
    """Write a model that fits in one protobuf.

    Raises:
        ModelError: the graph has a cycle, or a value that ONNX cannot express.
        OSError: the file cannot be written.

    """
    held = {id(constant): constant for constant in constants_by_graph(graph).get((), ()) if _is_large(constant)}

    def store(constant: gs.Constant) -> TensorProto:
        if id(constant) not in held:
            return tensor_proto(constant)
        return TensorProto(name=constant.name, data_type=data_type_of(constant), dims=constant.shape)

    proto = export_model(graph, frame, store)
    constants = {constant.name: constant for constant in held.values()}
    stand_ins = [tensor for tensor in proto.graph.initializer if tensor.name in constants]
    rest = without(proto.graph, "initializer")
    rest.initializer.extend(tensor for tensor in proto.graph.initializer if tensor.name not in constants)
    start = rest.SerializeToString()
    lengths = [_filled(each, constants[each.name]).ByteSize() for each in stand_ins]
    heads = [_head(GraphProto, "initializer", length) for length in lengths]
    file.write(without(proto, "graph").SerializeToString())
    file.write(_head(onnx.ModelProto, "graph", len(start) + sum(map(len, heads)) + sum(lengths)))
    file.write(start)
    for head, stand_in in zip(heads, stand_ins, strict=True):
        file.write(head)
        file.write(_filled(stand_in, constants[stand_in.name]).SerializeToString())


def _is_large(constant: gs.Constant) -> bool:
    values = constant._values
    return isinstance(values, StoredTensor | np.ndarray) and values.nbytes >= _LEAST_BYTES


def _filled(stand_in: TensorProto, constant: gs.Constant) -> TensorProto:
    """Return a constant as it is to be written, with the doc string and the metadata of its stand-in."""
    values = constant._values
    if isinstance(values, StoredTensor) and values.file is None and values.tensor.name == constant.name:
        return values.tensor  # as it was loaded: no copy
    tensor = tensor_proto(constant)
    if not (tensor.doc_string or tensor.metadata_props):
        tensor.MergeFrom(without(stand_in, "name", "data_type", "dims"))
    return tensor


def _head(message: type[Message], field: str, length: int) -> bytes:
    """Return what stands before the bytes of a message in a field: the field's number and the length."""
    number: int = message.DESCRIPTOR.fields_by_name[field].number
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(length)


def _varint(number: int) -> bytes:
    """Return a number as protobuf writes it: seven bits a byte, the lowest first."""
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])
