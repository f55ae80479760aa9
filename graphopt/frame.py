"""What a model holds besides the graph that graphsurgeon keeps: read on load, written back on export.

graphsurgeon drops metadata, doc strings, quantization annotations, training information, attributes of rare
types and the wording of shapes. A `Frame` keeps them, keyed by names, which survive clones of the graph:

- a node's extras stay with the node that has the same operator and the same name, or else the same first
  output;
- a tensor's entry (shape wording, doc string) stays with the tensor of that name, word for word while the
  dtype and the shape that the graph states for it are those it was loaded with;
- a nested graph's extras stay with the node that holds it, found by its first output.

What is renamed or removed loses its extras.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, GraphProto, NodeProto, ValueInfoProto

from graphopt.protobuf import without

GraphKey = tuple[str, ...]
"""Where a graph is: () for the main one, else first output and attribute of each node on the way."""

_UNCARRIED = {  # attribute types that graphsurgeon skips
    AttributeProto.SPARSE_TENSOR,
    AttributeProto.SPARSE_TENSORS,
    AttributeProto.TYPE_PROTO,
    AttributeProto.TYPE_PROTOS,
    AttributeProto.TENSORS,
    AttributeProto.GRAPHS,
}
_LISTS = {
    AttributeProto.FLOATS: "floats",
    AttributeProto.INTS: "ints",
    AttributeProto.STRINGS: "strings",
}


@dataclass(frozen=True)
class TensorEntry:
    """An entry of input, output or value_info, and what graphsurgeon read from it."""

    proto: ValueInfoProto
    dtype: Any
    shape: tuple[Any, ...] | None


@dataclass
class GraphFrame:
    """The extras of one graph."""

    header: GraphProto = field(default_factory=GraphProto)  # without nodes, tensors and entries
    nodes: dict[tuple[str, ...], NodeProto] = field(default_factory=dict)
    inputs: dict[str, TensorEntry] = field(default_factory=dict)
    outputs: dict[str, TensorEntry] = field(default_factory=dict)
    value_info: dict[str, TensorEntry] = field(default_factory=dict)
    tensors: dict[str, onnx.TensorProto] = field(default_factory=dict)  # doc strings and metadata of weights
    sparse: dict[str, onnx.SparseTensorProto] = field(default_factory=dict)

    def extras_of(self, node: gs.Node) -> NodeProto | None:
        """Return the extras that were loaded with this node."""
        for key in _node_keys(node.op, node.name, node.outputs[0].name if node.outputs else ""):
            if key in self.nodes:
                return self.nodes[key]
        return None


@dataclass
class Frame:
    """What a model holds besides its graph.

    Attributes:
        header: the model without graph, functions and opset imports: metadata_props, doc string,
            training_info ...
        graphs: the extras of the main graph, under (), and of each nested one.
        functions: the model-local functions as they were loaded, by domain and name.
        defaults: the default values of graph inputs that a caller may override, by input name.

    """

    header: onnx.ModelProto = field(default_factory=onnx.ModelProto)
    graphs: dict[GraphKey, GraphFrame] = field(default_factory=dict)
    functions: dict[tuple[str, str], onnx.FunctionProto] = field(default_factory=dict)
    defaults: dict[str, gs.Constant] = field(default_factory=dict)

    def copy(self) -> Frame:
        """Return a frame whose defaults can be changed; the rest is never written and shared."""
        defaults = {name: constant.copy() for name, constant in self.defaults.items()}
        return replace(self, defaults=defaults)


def take_frame(shell: onnx.ModelProto) -> Frame:
    """Return the frame of a model, and take out of `shell` the attributes that graphsurgeon cannot read."""
    frame = Frame(
        header=without(shell, "graph", "functions", "opset_import"),
        functions={(function.domain, function.name): function for function in shell.functions},
    )
    for key, graph in proto_graphs(shell.graph):
        frame.graphs[key] = _take_graph_frame(graph)
    for function in shell.functions:
        key = function_key(function.domain, function.name)
        frame.graphs[key] = GraphFrame(nodes=_take_extras(function.node))
    return frame


def note_entries(frame: Frame, shell: onnx.ModelProto, graph: gs.Graph) -> None:
    """Add the entries of inputs, outputs and value_info, with what graphsurgeon made of them in `graph`."""
    nested = dict(gs_graphs(graph))
    for key, proto in proto_graphs(shell.graph):
        if key in nested:
            _note_graph_entries(frame.graphs[key], proto, nested[key])


def gs_graphs(graph: gs.Graph, key: GraphKey = ()) -> Iterator[tuple[GraphKey, gs.Graph]]:
    """Yield a graph and every graph nested in it, each with its key."""
    yield key, graph
    for node in graph.nodes:
        for name, value in node.attrs.items():
            if isinstance(value, gs.Graph):
                yield from gs_graphs(value, nested_key(key, node, name))


def nested_key(key: GraphKey, node: gs.Node, attribute: str) -> GraphKey:
    """Return the key of the graph that `node`, itself in the graph of `key`, holds as an attribute."""
    return (*key, node.outputs[0].name if node.outputs else "", attribute)


def function_key(domain: str | None, name: str) -> GraphKey:
    """Return the key of the nodes of a model-local function."""
    return f"function of {domain or ''}", name


def proto_graphs(graph: GraphProto, key: GraphKey = ()) -> Iterator[tuple[GraphKey, GraphProto]]:
    """Yield a graph of a ModelProto and every graph nested in it, each with its key."""
    yield key, graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from proto_graphs(attribute.g, (*key, node.output[0] if node.output else "", attribute.name))


def _take_graph_frame(graph: GraphProto) -> GraphFrame:
    return GraphFrame(
        header=without(graph, "node", "initializer", "sparse_initializer", "input", "output", "value_info"),
        nodes=_take_extras(graph.node),
        tensors={
            tensor.name: without(tensor, *_TENSOR_VALUES)
            for tensor in graph.initializer
            if tensor.doc_string or tensor.metadata_props
        },
        sparse={tensor.values.name: tensor for tensor in graph.sparse_initializer},
    )


_TENSOR_VALUES = tuple(
    name for name in onnx.TensorProto.DESCRIPTOR.fields_by_name if name not in ("doc_string", "metadata_props")
)


def _take_extras(nodes: Any) -> dict[tuple[str, ...], NodeProto]:
    all_extras: dict[tuple[str, ...], NodeProto] = {}
    name_counts = Counter(node.name for node in nodes)
    for node in nodes:
        extras = without(node, "input", "output", "op_type", "name", "domain", "attribute")
        uncarried = [attribute for attribute in node.attribute if is_uncarried(attribute)]
        extras.attribute.extend(uncarried)
        extras.attribute.extend(attribute for attribute in node.attribute if _is_empty_list(attribute))
        for attribute in uncarried:
            node.attribute.remove(attribute)
        if extras.ByteSize():
            name = node.name if name_counts[node.name] == 1 else ""
            for key in _node_keys(node.op_type, name, node.output[0] if node.output else ""):
                all_extras.setdefault(key, extras)
    return all_extras


def _node_keys(op: str, name: str, first_output: str) -> Iterator[tuple[str, ...]]:
    if first_output:
        yield op, "output", first_output
    if name:
        yield op, "name", name


def is_uncarried(attribute: AttributeProto) -> bool:
    """Whether graphsurgeon cannot read an attribute: a rare type, or a string that is no text."""
    return attribute.type in _UNCARRIED or not all(map(_is_text, (attribute.s, *attribute.strings)))


def _is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_empty_list(attribute: AttributeProto) -> bool:
    """Whether only the proto knows the type of the list: an empty Python list has none."""
    return attribute.type in _LISTS and not getattr(attribute, _LISTS[attribute.type])


def _note_graph_entries(frame: GraphFrame, proto: GraphProto, graph: gs.Graph) -> None:
    tensors = {tensor.name: tensor for node in graph.nodes for tensor in (*node.inputs, *node.outputs)}
    tensors |= {tensor.name: tensor for tensor in (*graph.inputs, *graph.outputs)}

    def entries(protos: Any) -> dict[str, TensorEntry]:
        return {
            each.name: TensorEntry(each, tensor.dtype, None if tensor.shape is None else tuple(tensor.shape))
            for each in protos
            if (tensor := tensors.get(each.name)) is not None
        }

    frame.inputs, frame.outputs = entries(proto.input), entries(proto.output)
    frame.value_info = entries(proto.value_info)
