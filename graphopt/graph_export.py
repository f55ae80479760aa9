"""A `gs.Graph` and its `Frame` as a ModelProto.

Written anew because graphsurgeon's exporter cannot write packed and string constants or empty list
attributes, renames the tensors it was loaded from, and copies a weight into every branch that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import Message
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, ValueInfoProto, helper
from onnx_graphsurgeon.util.misc import convert_to_onnx_attr_type

from graphopt.errors import ModelError
from graphopt.frame import (
    Frame,
    GraphFrame,
    GraphKey,
    TensorEntry,
    function_key,
    gs_graphs,
    is_uncarried,
    nested_key,
)
from graphopt.node_order import sorted_nodes
from graphopt.protobuf import without
from graphopt.stored_values import StoredSparseTensor, tensor_proto

Store = Callable[[gs.Constant], TensorProto]


def export_model(graph: gs.Graph, frame: Frame, store: Store = tensor_proto) -> onnx.ModelProto:
    """Return the model; neither the graph nor what it was loaded from is changed.

    Nodes are sorted. An initializer is listed in the innermost graph that holds all its users; one that
    nothing uses is left out. `store` makes the TensorProto of each constant.

    Raises:
        ModelError: a cycle, two different constants of one name, or a value that ONNX cannot express.

    """
    return _Exporter(graph, frame, store).model()


def node_proto(node: gs.Node) -> NodeProto:
    """Return one node without its graph and without what a Frame keeps for it."""
    return _Exporter(gs.Graph(), Frame(), tensor_proto).node(node, (), GraphFrame())


def value_info_proto(tensor: gs.Tensor) -> ValueInfoProto:
    """Return what is known of a tensor: its name, and its type where the dtype is known."""
    return _entry(tensor, {})


_NO_EXTRAS = NodeProto()


class _Exporter:
    def __init__(self, graph: gs.Graph, frame: Frame, store: Store) -> None:
        self._graph = graph
        self._frame = frame
        self._store = store
        # a file that left types and shapes to inference does not grow by what a pass has inferred
        self._states_types = not frame.graphs or any(each.value_info for each in frame.graphs.values())
        self._constants = constants_by_graph(graph, ())
        for function in graph.functions:
            self._constants |= constants_by_graph(function, function_key(function.domain, function.name))

    def model(self) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(self._frame.header)
        imports = opset_imports(self._graph)
        model.opset_import.extend(imports)
        model.ir_version = self._graph.ir_version or helper.find_min_ir_version_for(imports, ignore_unknown=True)
        for field in ("producer_name", "producer_version"):
            model.ClearField(field)
            if value := getattr(self._graph, field):
                setattr(model, field, value)
        model.functions.extend(self._function(function) for function in self._graph.functions)
        self._write_graph(model.graph, self._graph, ())
        self._write_defaults(model)
        return model

    def _write_defaults(self, model: onnx.ModelProto) -> None:
        """List default values as initializers, and before IR 4 every initializer as an input too."""
        inputs = {tensor.name for tensor in self._graph.inputs}
        for name, constant in self._frame.defaults.items():
            if name in inputs:
                self._write_initializer(model.graph, constant, self._frame.graphs.get((), GraphFrame()))
        if model.ir_version < 4:
            model.graph.input.extend(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
                for tensor in model.graph.initializer
                if tensor.name not in inputs
            )

    def _write_graph(self, proto: GraphProto, graph: gs.Graph, key: GraphKey) -> None:
        """Write a graph into an empty proto; one of its own would be copied whole into the model."""
        frame = self._frame.graphs.get(key) or GraphFrame()
        proto.CopyFrom(frame.header)
        del proto.quantization_annotation[:]
        proto.name = graph.name or "graph"
        proto.ClearField("doc_string")
        if graph.doc_string:
            proto.doc_string = graph.doc_string
        nodes = sorted_nodes(graph)
        proto.node.extend(self.node(node, key, frame) for node in nodes)
        for constant in self._constants.get(key, ()):
            self._write_initializer(proto, constant, frame)
        proto.input.extend(_entry(tensor, frame.inputs) for tensor in graph.inputs)
        proto.output.extend(_entry(tensor, frame.outputs) for tensor in graph.outputs)
        if self._states_types:
            proto.value_info.extend(_value_info(graph, nodes, frame))
        names = {tensor.name for node in nodes for tensor in (*node.inputs, *node.outputs)}
        names.update(tensor.name for tensor in graph.inputs)
        proto.quantization_annotation.extend(
            annotation
            for annotation in frame.header.quantization_annotation
            if annotation.tensor_name in names
            and names.issuperset(entry.value for entry in annotation.quant_parameter_tensor_names)
        )

    def _write_initializer(self, proto: GraphProto, constant: gs.Constant, frame: GraphFrame) -> None:
        sparse = frame.sparse.get(constant.name)
        if isinstance(constant._values, StoredSparseTensor):
            added = proto.sparse_initializer.add()
            added.CopyFrom(constant._values.tensor)
            added.values.name = constant.name
        elif sparse is not None and _equal_values(constant.values, StoredSparseTensor(sparse).load()):
            proto.sparse_initializer.add().CopyFrom(sparse)  # read by a pass, but not changed
        else:
            tensor = proto.initializer.add()
            tensor.CopyFrom(self._store(constant))
            if constant.name in frame.tensors and not (tensor.doc_string or tensor.metadata_props):
                tensor.MergeFrom(frame.tensors[constant.name])

    def _function(self, function: gs.Function) -> onnx.FunctionProto:
        """Return a function as it was loaded, but for its nodes; constants in it become Constant nodes."""
        proto = onnx.FunctionProto()
        loaded = self._frame.functions.get((function.domain or "", function.name))
        if loaded is not None:
            proto.CopyFrom(loaded)
            del proto.node[:]
        else:
            proto.name, proto.domain, proto.doc_string = function.name, function.domain, function.doc_string
            proto.input.extend(tensor.name for tensor in function.inputs)
            proto.output.extend(tensor.name for tensor in function.outputs)
            proto.opset_import.extend(opset_imports(function))
            proto.attribute.extend(name for name, value in function.attrs.items() if value is None)
            proto.attribute_proto.extend(
                self._attribute(name, value, function) for name, value in function.attrs.items() if value is not None
            )
        key = function_key(function.domain, function.name)
        for constant in self._constants.get(key, ()):
            tensor = self._store(constant)
            proto.node.add().CopyFrom(helper.make_node("Constant", [], [constant.name], value=tensor))
        frame = self._frame.graphs.get(key) or GraphFrame()
        proto.node.extend(self.node(node, key, frame) for node in sorted_nodes(function))
        return proto

    def node(self, node: gs.Node, key: GraphKey, frame: GraphFrame) -> NodeProto:
        extras = frame.extras_of(node) or _NO_EXTRAS
        proto = NodeProto() if extras is _NO_EXTRAS else without(extras, "attribute")
        proto.op_type = node.op
        if node.name:
            proto.name = node.name
        if node.domain is not None:
            proto.domain = node.domain
        proto.input.extend([tensor.name for tensor in node.inputs])
        proto.output.extend([tensor.name for tensor in node.outputs])
        loaded = {attribute.name: attribute for attribute in extras.attribute}
        for name, value in node.attrs.items():
            if isinstance(value, gs.Graph):
                nested = proto.attribute.add(name=name, type=AttributeProto.GRAPH)
                self._write_graph(nested.g, value, nested_key(key, node, name))
            elif name in loaded and _is_empty_list(value):
                proto.attribute.append(loaded[name])
            else:
                proto.attribute.append(self._attribute(name, value, node))
        proto.attribute.extend(
            attribute for name, attribute in loaded.items() if name not in node.attrs and is_uncarried(attribute)
        )
        return proto

    def _attribute(self, name: str, value: Any, owner: gs.Node | gs.Function) -> AttributeProto:
        if isinstance(value, gs.Constant):
            return helper.make_attribute(name, self._store(value))
        if isinstance(value, gs.Node.AttributeRef):
            reference = AttributeProto(name=name, ref_attr_name=value.name)
            reference.type = convert_to_onnx_attr_type(value.type)
            return reference
        if isinstance(value, type | np.dtype):
            value = helper.np_dtype_to_tensor_dtype(np.dtype(value))
        if isinstance(value, np.ndarray | np.generic):
            value = value.tolist()
        if _is_empty_list(value):
            return AttributeProto(name=name, type=_list_type(name, owner))
        try:
            return helper.make_attribute(name, value)
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"{owner.name or getattr(owner, 'op', '')}: attribute {name} is {value!r:.60}, "
                "which ONNX cannot express; use a number, a string, a tensor, or a list of one kind"
            ) from error


def opset_imports(graph: gs.Graph) -> list[onnx.OperatorSetIdProto]:
    """Return the opsets that a graph was loaded with, its own, and version 1 of other domains in use."""
    imports = {each.domain: without(each) for each in graph.import_domains or ()}
    own = "ai.onnx" if "ai.onnx" in imports else ""
    imports.setdefault(own, helper.make_opsetid(own, graph.opset)).version = graph.opset
    for _, each in gs_graphs(graph):
        for node in each.nodes:
            if node.domain not in (None, "", "ai.onnx") and node.domain not in imports:
                imports[node.domain] = helper.make_opsetid(node.domain, 1)
    return list(imports.values())


def constants_by_graph(graph: gs.Graph, key: GraphKey = ()) -> dict[GraphKey, list[gs.Constant]]:
    """Return the constants of each graph: it, and no graph in it, holds all their users.

    Raises:
        ModelError: two constants of one graph have the same name and different values.

    """
    homes: dict[tuple[str, int], GraphKey] = {}
    constants: dict[tuple[str, int], gs.Constant] = {}
    for place, each in gs_graphs(graph, key):
        for constant in _constants_of(each):
            identity = constant.name, id(constant._values)  # a clone is another object with the same values
            homes[identity] = _common(homes.get(identity, place), place)
            constants[identity] = constant
    found: dict[GraphKey, list[gs.Constant]] = {}
    names: set[tuple[GraphKey, str]] = set()
    for identity, place in homes.items():
        if (place, identity[0]) in names:
            raise ModelError(f"two different constants are named {identity[0]!r}; give each a name of its own")
        names.add((place, identity[0]))
        found.setdefault(place, []).append(constants[identity])
    return found


def _constants_of(graph: gs.Graph) -> Iterator[gs.Constant]:
    used = (*(tensor for node in graph.nodes for tensor in node.inputs), *graph.outputs)
    yield from {id(tensor): tensor for tensor in used if isinstance(tensor, gs.Constant)}.values()


def _common(one: GraphKey, other: GraphKey) -> GraphKey:
    """Return the innermost graph that holds both; each level of nesting adds two items to a key."""
    length = 0
    while one[length : length + 2] == other[length : length + 2] and length < min(len(one), len(other)):
        length += 2
    return one[:length]


def _entry(tensor: gs.Tensor, loaded: dict[str, TensorEntry]) -> ValueInfoProto:
    """Return the entry of a tensor: the loaded one, word for word, if it still says the same."""
    entry = loaded.get(tensor.name)
    shape = None if tensor.shape is None else tuple(tensor.shape)
    if entry is not None and entry.dtype == tensor.dtype and entry.shape == shape:
        return entry.proto
    proto = ValueInfoProto() if entry is None else without(entry.proto, "type")
    proto.name = tensor.name
    kind = getattr(tensor, "type", "tensor_type")
    if not tensor.dtype:  # unknown, or 0: graphsurgeon has no dtype for a sequence of maps
        return proto
    if isinstance(tensor.dtype, Message):  # graphsurgeon keeps what an optional holds, and what it does not know
        if kind == "optional_type":
            proto.type.CopyFrom(helper.make_optional_type_proto(tensor.dtype))
        return proto
    dtype = tensor.dtype if isinstance(tensor.dtype, int) else _data_type(np.dtype(tensor.dtype))
    if kind == "sequence_type":
        proto.type.CopyFrom(helper.make_sequence_type_proto(helper.make_tensor_type_proto(dtype, shape)))
    elif kind == "sparse_tensor_type":
        proto.type.CopyFrom(helper.make_sparse_tensor_type_proto(dtype, shape))
    else:
        proto.type.CopyFrom(helper.make_tensor_type_proto(dtype, shape))
    return proto


@cache
def _data_type(dtype: np.dtype[Any]) -> int:
    return helper.np_dtype_to_tensor_dtype(dtype)


def _value_info(graph: gs.Graph, nodes: list[gs.Node], frame: GraphFrame) -> Iterator[ValueInfoProto]:
    """Yield what is known of tensors that the graph computes and does not return; of weights only loaded entries."""
    interface = {tensor.name for tensor in (*graph.inputs, *graph.outputs)}
    weights = {tensor.name: tensor for node in nodes for tensor in node.inputs if isinstance(tensor, gs.Constant)}
    known = [weights[name] for name in weights.keys() & frame.value_info.keys()] if frame.value_info else []
    for tensor in (*known, *(tensor for node in nodes for tensor in node.outputs)):
        entry = None if tensor.name in interface else _entry(tensor, frame.value_info)
        if entry is not None and entry.HasField("type"):
            yield entry


def _list_type(name: str, owner: gs.Node | gs.Function) -> Any:
    """Return the attribute type of an empty list, which only the operator's schema knows."""
    try:
        schema = onnx.defs.get_schema(getattr(owner, "op", ""), owner.domain or "")
        return int(schema.attributes[name].type.value)  # type: ignore[attr-defined]  # its stub lacks the enum
    except (onnx.defs.SchemaError, KeyError):
        return AttributeProto.INTS


def _is_empty_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and not value


def _equal_values(one: Any, other: Any) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bool(np.array_equal(one, other))
