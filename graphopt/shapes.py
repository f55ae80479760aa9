"""Models without their weights, and what ONNX shape inference finds on them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import (
    GraphProto,
    NodeProto,
    TensorProto,
    TensorShapeProto,
    TypeProto,
    ValueInfoProto,
    helper,
    shape_inference,
)
from onnx_graphsurgeon.importers.onnx_importer import get_onnx_tensor_dtype

from graphopt.errors import ModelError
from graphopt.frame import Frame, gs_graphs, proto_graphs
from graphopt.graph_export import export_model
from graphopt.model_io import Model
from graphopt.protobuf import all_graph_protos, without
from graphopt.stored_values import data_type_of, stored_bytes, tensor_proto

_LARGEST_KEPT = 1024  # bytes; shapes, axes, pads and scales are smaller, and shape inference reads them
_MOST_INTEGERS, _MOST_SCALES = 128, 8  # elements of what shape inference reads: an integer tensor, a float one


def hollow(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with every large weight as an input of the main graph: for work that needs no values.

    The ONNX checker, shape inference and the version converter take the result at any size of the model.
    Initializers and Constant nodes of more than 1 KB count as large; those inside branches and bodies too,
    where their name is the only one of its kind. Nothing of a weight is copied.
    """
    shell = without(proto, "graph")
    names = Counter(_produced_names(proto.graph))
    held: dict[str, TensorProto] = {}
    shell.graph.CopyFrom(_hollow_graph(proto.graph, names, held, main=True))
    inputs = {each.name for each in shell.graph.input}
    shell.graph.input.extend(
        helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
        for name, tensor in held.items()
        if name not in inputs
    )
    return shell


def hollow_model(model: Model) -> onnx.ModelProto:
    """Return a model as `hollow` makes it, without reading its large weights first."""
    return hollow(export_model(model.graph, model.frame, _header))


def infer_shapes(graph: gs.Graph) -> int:
    """Fill in the dtype and shape of tensors, nested graphs included, where ONNX shape inference knows them.

    Returns how many tensors it found something new about.

    Sizes that the graph states already stay; unknown ones and symbolic ones become what inference finds.
    Names that inference makes up for unknown sizes are dropped: in the next run the same name would mean
    another size. Inputs and stated outputs of the main graph stay as they are.

    Raises:
        ModelError: the graph has a cycle, a value that ONNX cannot express, or a node that no operator fits.

    """
    proto = export_model(graph, Frame(), _shape_or_header)
    symbols = forget_unknown_sizes(proto.graph)
    _repeat_outer_constants(proto.graph, {})
    try:
        inferred = shape_inference.infer_shapes(proto, data_prop=True)
    except shape_inference.InferenceError as error:  # even without strict mode, of a node with too few inputs
        raise ModelError(f"ONNX shape inference: {' '.join(str(error).split())}") from error
    entries = {
        key: {value.name: value for value in (*each.input, *each.output, *each.value_info)}
        for key, each in proto_graphs(inferred.graph)
    }
    interface = {id(tensor) for tensor in graph.inputs}
    interface |= {id(tensor) for tensor in graph.outputs if tensor.dtype is not None and tensor.shape is not None}
    refined = 0
    for key, each in gs_graphs(graph):
        tensors = (*(tensor for node in each.nodes for tensor in node.outputs), *each.inputs, *each.outputs)
        for tensor in tensors:
            found = entries.get(key, {}).get(tensor.name)
            if found is not None and isinstance(tensor, gs.Variable) and id(tensor) not in interface:
                refined += _refine(tensor, found.type.tensor_type, symbols)
    return refined


def _repeat_outer_constants(graph: GraphProto, outer: Mapping[str, TensorProto]) -> None:
    """List the constants that branches and bodies read from outside in them too: else inference has no values there."""
    known = {**outer, **{tensor.name: tensor for tensor in graph.initializer}}
    for body in (attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")):
        read = {name for node in body.node for name in node.input} - {tensor.name for tensor in body.initializer}
        body.initializer.extend(known[name] for name in sorted(read & known.keys()))
        _repeat_outer_constants(body, known)


def _refine(tensor: gs.Variable, found: TypeProto.Tensor, symbols: set[str]) -> bool:
    before = tensor.dtype, tensor.shape
    if tensor.dtype is None and found.elem_type:
        tensor.dtype = get_onnx_tensor_dtype(ValueInfoProto(type=TypeProto(tensor_type=found)))
    if not found.HasField("shape"):
        return bool(tensor.dtype != before[0])
    sizes = [_size(each, symbols) for each in found.shape.dim]
    if tensor.shape is None or len(tensor.shape) != len(sizes):
        tensor.shape = sizes
    else:
        tensor.shape = [old if new is None else new for old, new in zip(tensor.shape, sizes, strict=True)]
    return (tensor.dtype, tensor.shape) != before


def _size(size: TensorShapeProto.Dimension, symbols: set[str]) -> int | str | None:
    if size.HasField("dim_value"):
        return size.dim_value
    return size.dim_param if size.dim_param in symbols else None


def forget_unknown_sizes(graph: GraphProto) -> set[str]:
    """Clear sizes such as -1, "?" and "unk__3": at their word, two unknown sizes would be equal.

    Returns the names of sizes that stay.
    """
    names: set[str] = set()
    for size in _sizes(graph):
        if size.dim_value > 0:
            continue
        name = size.dim_param
        if size.dim_value < 0 or (name and not is_name(name)):
            size.Clear()
        elif name:
            names.add(name)
    return names


def is_name(size: object) -> bool:
    """Tell whether a size is a name that an exporter gave it, so that equal names mean equal sizes."""
    return isinstance(size, str) and not size.startswith("unk__") and any(map(str.isalpha, size))


def _sizes(graph: GraphProto) -> Iterator[TensorShapeProto.Dimension]:
    for each in all_graph_protos(graph):
        for value in (*each.input, *each.output, *each.value_info):
            yield from value.type.tensor_type.shape.dim


def _produced_names(graph: GraphProto) -> Iterator[str]:
    for each in all_graph_protos(graph):
        yield from (tensor.name for tensor in each.initializer)
        yield from (value.name for value in each.input)
        yield from (name for node in each.node for name in node.output)


def _hollow_graph(graph: GraphProto, names: Counter[str], held: dict[str, TensorProto], *, main: bool) -> GraphProto:
    copy = without(graph, "node", "initializer", "value_info")
    outputs = {output.name for output in graph.output}

    def hold(name: str, tensor: TensorProto) -> bool:
        expected = 2 if main and name in inputs else 1  # a default value and its input share a name
        if name in outputs or stored_bytes(tensor) <= _LARGEST_KEPT or names[name] != expected:
            return False
        held[name] = tensor
        return True

    inputs = {value.name for value in graph.input}
    copy.initializer.extend(tensor for tensor in graph.initializer if not hold(tensor.name, tensor))
    for node in graph.node:
        tensor = _constant_value(node)
        if tensor is None or not hold(node.output[0], tensor):
            copy.node.append(_hollow_node(node, names, held))
    copy.value_info.extend(value for value in graph.value_info if value.name not in held)
    return copy


def _constant_value(node: NodeProto) -> TensorProto | None:
    if node.op_type != "Constant" or not node.attribute:
        return None
    return node.attribute[0].t if node.attribute[0].name == "value" else None


def _hollow_node(node: NodeProto, names: Counter[str], held: dict[str, TensorProto]) -> NodeProto:
    if not any(attribute.HasField("g") for attribute in node.attribute):
        return node
    copy = without(node, "attribute")
    for attribute in node.attribute:
        if attribute.HasField("g"):
            added = copy.attribute.add()
            added.CopyFrom(without(attribute, "g"))
            added.g.CopyFrom(_hollow_graph(attribute.g, names, held, main=False))
        else:
            copy.attribute.append(attribute)
    return copy


def _header(constant: gs.Constant) -> TensorProto:
    """Return a small constant whole, of a large one only what `hollow` and shape inference look at."""
    header = _type_and_shape(constant)
    return tensor_proto(constant) if stored_bytes(header) <= _LARGEST_KEPT else header


def _shape_or_header(constant: gs.Constant) -> TensorProto:
    """Return a constant whole where it may be the shape, the axes or the scales of something, else only its type."""
    few = math.prod(constant.shape) <= (_MOST_INTEGERS if np.dtype(constant.dtype).kind in "biu" else _MOST_SCALES)
    return tensor_proto(constant) if few else _type_and_shape(constant)


def _type_and_shape(constant: gs.Constant) -> TensorProto:
    return TensorProto(name=constant.name, data_type=data_type_of(constant), dims=constant.shape)
