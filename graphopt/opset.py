"""Raise the opset of a graph, one node at a time.

onnx's version converter works on whole models: it needs all weights in one protobuf, refuses nodes of other
domains, and loses what its own representation has no place for. Here it is given a model of separate nodes,
each with inputs and outputs of its own, and only nodes that come back changed are touched in the graph.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import networkx as nx
import onnx
import onnx_graphsurgeon as gs
from onnx import GraphProto, TensorProto, ValueInfoProto, helper, numpy_helper, version_converter

from graphopt.errors import ModelError
from graphopt.graph import Names, all_graphs, bodies, constant_of, disconnect, is_constant, present
from graphopt.graph_export import node_proto, opset_imports, value_info_proto
from graphopt.protobuf import without
from graphopt.shapes import forget_unknown_sizes, infer_shapes

_MAY_BE_SHAPES = {TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64}  # types of axes, sizes and scales
_LARGEST_SHOWN = 64  # elements of a constant that the converter gets to see; axes, sizes and scales have fewer
_CONTROL_FLOW_AS_TODAY = 9  # since this opset If, Loop and Scan have only been extended


def raise_opset(graph: gs.Graph, version: int) -> str | None:
    """Raise the ONNX opset of a graph to `version`, in place, nested graphs included.

    Nodes whose operator means the same in both opsets stay the objects they are. The IR version is raised
    as far as the new opset needs it. The outputs are the same but for float rounding.

    Returns:
        What was done, or None where the opset is high enough already.

    Raises:
        ModelError: the model has local functions, or a node that onnx cannot convert; the graph is
            unchanged then, but for dtypes and shapes that were filled in.

    """
    old = graph.opset
    if old >= version:
        return None
    step = f"from {old} to {version}"
    if graph.functions:
        raise ModelError(f"cannot raise the opset {step}: the model has local functions; inline them first")
    infer_shapes(graph)  # some conversions need the rank of a node's input
    candidates = [node for each in all_graphs(graph) for node in each.nodes if _may_change(node, old, version)]
    conversions = {id(conversion.node): conversion for conversion in _convert(candidates, old, version)}
    names = Names(graph)
    for each in all_graphs(graph):
        each.nodes[:] = [new for node in each.nodes for new in _replace(node, conversions.get(id(node)), names)]
        each.opset = version
        each.import_domains = opset_imports(each)
    if graph.ir_version is not None:
        graph.ir_version = max(
            graph.ir_version, helper.find_min_ir_version_for(graph.import_domains, ignore_unknown=True)
        )
    rewritten = Counter(conversion.node.op for conversion in conversions.values())
    details = ", ".join(f"{count} {op}" for op, count in sorted(rewritten.items()))
    return f"opset raised {step}" + (f"; nodes rewritten for it: {details}" if details else "")


class _Island(NamedTuple):
    """A node as a graph of its own, whose names no other island has."""

    node: gs.Node
    graph: GraphProto
    tensors: dict[str, gs.Tensor]  # the node's tensors by their names in `graph`


class _Conversion(NamedTuple):
    """A node and those that take its place, which know the tensors by the names of an island."""

    node: gs.Node
    replacements: list[gs.Node]
    tensors: dict[str, gs.Tensor]


def _may_change(node: gs.Node, old: int, version: int) -> bool:
    if node.domain not in (None, "", "ai.onnx") or node.op == "Constant" or not present(node.outputs):
        return False
    if bodies(node):
        if old < _CONTROL_FLOW_AS_TODAY:
            raise ModelError(f"{_where(node)}: control flow of opset {old} cannot be raised; export the model again")
        return False
    if not onnx.defs.has(node.op, node.domain or ""):
        raise ModelError(f"{_where(node)}: ONNX has no such operator, so its opset cannot be raised to {version}")
    return True


def _where(node: gs.Node) -> str:
    return f"node {node.name or present(node.outputs)[0].name!r} ({node.op})"


def _convert(nodes: list[gs.Node], old: int, version: int) -> list[_Conversion]:
    """Return what each node becomes; those that mean the same as they stand are left out."""
    if not nodes:
        return []
    islands = [_island(node, f"{number}") for number, node in enumerate(nodes)]
    graph = GraphProto(name="islands")
    for island in islands:
        graph.MergeFrom(island.graph)
    forget_unknown_sizes(graph)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", old)])
    try:
        converted = version_converter.convert_version(model, version)
    except (RuntimeError, ValueError) as error:
        if len(nodes) == 1:
            reason = " ".join(str(error).split())
            raise ModelError(f"{_where(nodes[0])}: onnx cannot raise it to opset {version}: {reason:.200}") from error
        middle = len(nodes) // 2  # the message does not tell which node it is
        return _convert(nodes[:middle], old, version) + _convert(nodes[middle:], old, version)
    parts = _connected_nodes(converted.graph)
    new_nodes = gs.import_onnx(converted).nodes
    found = []
    for island in islands:
        part = parts[island.graph.output[0].name]
        if [converted.graph.node[index] for index in part] != list(island.graph.node):
            found.append(_Conversion(island.node, [new_nodes[index] for index in part], island.tensors))
    return found


def _island(node: gs.Node, prefix: str) -> _Island:
    """Return a node as a graph, its inputs as inputs but for small constants, which onnx may read."""
    inputs = {tensor.name: (f"{prefix}.in{index}", tensor) for index, tensor in enumerate(present(node.inputs))}
    outputs = {tensor.name: (f"{prefix}.out{index}", tensor) for index, tensor in enumerate(present(node.outputs))}
    proto = node_proto(node)
    proto.input[:] = [inputs[name][0] if name else "" for name in proto.input]
    proto.output[:] = [outputs[name][0] if name else "" for name in proto.output]
    graph = GraphProto(node=[proto])
    for name, tensor in inputs.values():
        value = _small_value(tensor, name)
        if value is None:
            graph.input.append(_declared(tensor, name))
        else:
            graph.initializer.append(value)
    graph.output.extend(_declared(tensor, name) for name, tensor in outputs.values())
    return _Island(node, graph, dict((*inputs.values(), *outputs.values())))


def _declared(tensor: gs.Tensor, name: str) -> ValueInfoProto:
    declared = without(value_info_proto(tensor))
    declared.name = name
    return declared


def _connected_nodes(graph: GraphProto) -> dict[str, list[int]]:
    """Return, for each tensor, the nodes that are connected with it, by their place in the graph."""
    links: nx.Graph[int | str] = nx.Graph()
    for index, node in enumerate(graph.node):
        links.add_edges_from((index, name) for name in (*node.input, *node.output) if name)
    parts: dict[str, list[int]] = {}
    for part in nx.connected_components(links):
        indices = sorted(item for item in part if isinstance(item, int))
        parts |= {item: indices for item in part if isinstance(item, str)}
    return parts


def _small_value(tensor: gs.Tensor, name: str) -> TensorProto | None:
    if not is_constant(tensor):
        return None
    value = constant_of(tensor)
    if value is None or value.size > _LARGEST_SHOWN:
        return None
    proto = numpy_helper.from_array(value, name)
    return proto if proto.data_type in _MAY_BE_SHAPES else None


def _replace(node: gs.Node, conversion: _Conversion | None, names: Names) -> list[gs.Node]:
    """Return the nodes that take a node's place, connected to the tensors that it read and wrote."""
    if conversion is None:
        return [node]
    known = dict(conversion.tensors)
    base = present(node.outputs)[0].name

    def connected(tensor: gs.Tensor) -> gs.Tensor:
        if not tensor.name:
            return gs.Variable.empty()
        if tensor.name not in known:
            fresh = names.fresh(f"{base}_{node.op}")
            is_new_constant = isinstance(tensor, gs.Constant)
            known[tensor.name] = gs.Constant(fresh, tensor.values) if is_new_constant else gs.Variable(fresh)
        return known[tensor.name]

    disconnect(node)
    return [
        gs.Node(
            op=new.op,
            name=node.name if new.op == node.op else names.fresh(f"{node.name or base}_{new.op}"),
            attrs=new.attrs,
            inputs=[connected(tensor) for tensor in new.inputs],
            outputs=[connected(tensor) for tensor in new.outputs],
            domain=node.domain,
        )
        for new in conversion.replacements
    ]
