"""Questions about a `gs.Graph`, and edits of it that are safe.

graphsurgeon compares tensors by name and nodes by content, so everything here goes by object identity. It also keeps
the lists of producers and consumers in step by searching them with that comparison; the edits below search by identity.

A graph can hold others: the branches of If, the bodies of Loop and Scan. Their nodes use outer tensors by object, but
a branch *output* that names an outer tensor is an object of its own: `nested_output_names` is how a rewrite sees it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

Array = NDArray[Any]


def all_graphs(graph: gs.Graph) -> Iterator[gs.Graph]:
    """The graph itself and every branch or body nested in it, outermost first."""
    yield graph
    for node in graph.nodes:
        if node.op in _HOLDERS or node.domain:  # what `bodies` asks first, without the call: every pass comes here
            for body in bodies(node):
                yield from all_graphs(body)


def bodies(node: gs.Node) -> list[gs.Graph]:
    """The graphs that a node holds as attributes: the branches of an If, the body of a Loop or a Scan."""
    if not node.domain and node.op not in _HOLDERS:
        return []
    return [value for value in node.attrs.values() if isinstance(value, gs.Graph)]


_HOLDERS = frozenset({"If", "Loop", "Scan", "SequenceMap"})  # ONNX's operators with graphs as attributes


def all_nodes(graph: gs.Graph) -> Iterator[gs.Node]:
    """The nodes of `all_graphs`, in its order: those of a copy of the graph come in the same one."""
    for each in all_graphs(graph):
        yield from each.nodes


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that computes a tensor; None for graph inputs and constants."""
    return tensor.inputs[0] if tensor.inputs else None


def only_reader(tensor: gs.Tensor, named: Container[int]) -> gs.Node | None:
    """The node that alone reads a tensor; None where others do, or by name: `named` has the ids of `named_tensors`."""
    if id(tensor) in named or len(tensor.outputs) != 1:
        return None
    reader: gs.Node = tensor.outputs[0]
    return reader


def present(tensors: Iterable[gs.Tensor]) -> list[gs.Tensor]:
    """The tensors that are there: omitted optional inputs and outputs have no name."""
    return [tensor for tensor in tensors if tensor.name]


def label_of(node: gs.Node) -> str:
    """What reports call a node: its name, or that of its first output when it has none."""
    return str(node.name or node.outputs[0].name)


def has_input(node: gs.Node, index: int) -> bool:
    """Whether a node has its input number `index`, which may be optional."""
    return index < len(node.inputs) and bool(node.inputs[index].name)


def integers_of(node: gs.Node, index: int) -> list[int] | None:
    """The values of a constant integer input; None where it is omitted or computed."""
    value = constant_of(node.inputs[index]) if has_input(node, index) else None
    return None if value is None else [int(each) for each in value.reshape(-1)]


def is_constant(tensor: gs.Tensor) -> bool:
    """Whether the value is known before the model runs, without loading it."""
    return _constant_source(tensor) is not None


def constant_of(tensor: gs.Tensor) -> Array | None:
    """The value of a constant tensor, else None.

    Constants are initializers and the outputs of Constant nodes, also behind a chain of Identity. A graph input with
    a default value is none: the caller may override it.
    """
    source = _constant_source(tensor)
    if isinstance(source, gs.Constant):
        return np.asarray(source.values)
    return None if source is None else _constant_node_value(source)


def constants_in(graph: gs.Graph) -> Iterator[gs.Constant]:
    """Every constant of the graph and the graphs in it, once: initializers and the values of Constant nodes."""
    seen: dict[int, gs.Constant] = {}
    for each in all_graphs(graph):
        for node in each.nodes:
            for tensor in (*node.inputs, *node.attrs.values()):
                if isinstance(tensor, gs.Constant):
                    seen[id(tensor)] = tensor
        seen.update((id(tensor), tensor) for tensor in each.outputs if isinstance(tensor, gs.Constant))
    yield from seen.values()


def _constant_source(tensor: gs.Tensor) -> gs.Constant | gs.Node | None:
    while not isinstance(tensor, gs.Constant):
        node = producer(tensor)
        if node is None:
            return None
        if node.op == "Constant":
            return node if set(node.attrs) & _CONSTANT_ATTRIBUTES else None
        if node.op != "Identity":
            return None
        tensor = node.inputs[0]
    return tensor


_CONSTANT_ATTRIBUTES = {"value", "value_float", "value_floats", "value_int", "value_ints"}


def _constant_node_value(node: gs.Node) -> Array:
    (attribute,) = set(node.attrs) & _CONSTANT_ATTRIBUTES
    value = node.attrs[attribute]
    if attribute == "value":
        return np.asarray(value.values)
    return np.asarray(value, np.float32 if "float" in attribute else np.int64)


def nested_output_names(graph: gs.Graph) -> set[str]:
    """Names that branches and bodies inside `graph` return without computing them: uses that no consumer list shows."""
    return {
        output.name for body in all_graphs(graph) if body is not graph for output in body.outputs if not output.inputs
    }


def named_tensors(root: gs.Graph) -> set[int]:
    """Ids of the tensors that are read by name, not by a node: outputs of any graph, and what branches return.

    A rewrite must keep these, and their names. Ids stay valid while the tensors are in the graph.
    """
    named = {id(output) for graph in all_graphs(root) for output in graph.outputs}
    returned = nested_output_names(root)
    if not returned:
        return named
    return named | {
        id(tensor)
        for graph in all_graphs(root)
        for node in graph.nodes
        for tensor in node.outputs
        if tensor.name in returned
    }


def is_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Whether a tensor is an output of `graph`."""
    return any(output is tensor for output in graph.outputs)


def set_input(node: gs.Node, index: int, tensor: gs.Tensor) -> None:
    """Let `node` read `tensor` as its input number `index`."""
    old = node.inputs[index]
    _drop_identical(old.outputs, node)
    list.__setitem__(node.inputs, index, tensor)
    list.append(tensor.outputs, node)


def set_output(node: gs.Node, index: int, tensor: gs.Tensor) -> None:
    """Let `node` compute `tensor` as its output number `index`; what it computed there before is left without.

    Raises:
        ValueError: another node computes the tensor.
    """
    if tensor.inputs:
        raise ValueError(f"{tensor.name} is computed by {tensor.inputs[0].name or tensor.inputs[0].op} already")
    _drop_identical(node.outputs[index].inputs, node)
    list.__setitem__(node.outputs, index, tensor)
    list.append(tensor.inputs, node)


def replace_uses(old: gs.Tensor, new: gs.Tensor) -> int:
    """Let every consumer of `old`, nested ones too, read `new` instead; return how many inputs changed.

    Graph outputs stay as they are: renaming one would change the model's interface.
    """
    changed = 0
    for node in list({id(node): node for node in old.outputs}.values()):
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                set_input(node, index, new)
                changed += 1
    return changed


def disconnect(node: gs.Node) -> None:
    """Take a node out of the consumer and producer lists of its tensors; it stays in the graph's node list."""
    for tensor in node.inputs:
        _drop_identical(tensor.outputs, node)
    for tensor in node.outputs:
        _drop_identical(tensor.inputs, node)
    list.clear(node.inputs)
    list.clear(node.outputs)


def disconnect_all(nodes: Iterable[gs.Node]) -> None:
    """Do what `disconnect` does for many nodes, in time linear in them however many share one tensor."""
    gone = {id(node): node for node in nodes}
    touched = {id(tensor): tensor for node in gone.values() for tensor in (*node.inputs, *node.outputs)}
    for tensor in touched.values():
        for ends in (tensor.inputs, tensor.outputs):
            list.__setitem__(ends, slice(None), [node for node in ends if id(node) not in gone])
    for node in gone.values():
        list.clear(node.inputs)
        list.clear(node.outputs)


def remove_nodes(graph: gs.Graph, nodes: Iterable[gs.Node]) -> None:
    """Disconnect nodes and take them out of `graph`, in one sweep of its node list.

    Raises:
        ValueError: an output of one of them is still read or is a graph output.
    """
    doomed = {id(node): node for node in nodes}
    kept_outputs = {id(tensor) for tensor in graph.outputs}
    for node in doomed.values():
        for tensor in node.outputs:
            if id(tensor) in kept_outputs or any(id(consumer) not in doomed for consumer in tensor.outputs):
                raise ValueError(f"cannot remove {node.name or node.op}: its output {tensor.name} is in use")
    disconnect_all(doomed.values())
    graph.nodes[:] = [node for node in graph.nodes if id(node) not in doomed]


def remove_unread_nodes(graph: gs.Graph, nodes: Iterable[gs.Node]) -> None:
    """Do what `remove_nodes` does for those of `nodes` of whose outputs none is read or is an output of `graph`."""
    unread = [node for node in nodes if not any(tensor.outputs or is_output(graph, tensor) for tensor in node.outputs)]
    remove_nodes(graph, unread)


def remove_unread_constants(root: gs.Graph) -> None:
    """Take out the Constant nodes, of all graphs, whose value nothing reads; unread initializers are not exported."""
    named = named_tensors(root)
    for graph in all_graphs(root):
        unread = [
            node
            for node in graph.nodes
            if node.op == "Constant" and not any(out.outputs or id(out) in named for out in present(node.outputs))
        ]
        if unread:
            remove_nodes(graph, unread)


def _drop_identical(nodes: list[gs.Node], node: gs.Node) -> None:
    for index, other in enumerate(nodes):
        if other is node:
            list.__delitem__(nodes, index)
            return


class Names:
    """The tensor and node names that a graph uses, and new ones that clash with none of them."""

    def __init__(self, graph: gs.Graph) -> None:
        self._graph = graph
        self._last: dict[str, int] = {}  # number given last to each name wanted: counting anew would be quadratic

    @cached_property
    def _used(self) -> set[str]:
        """The names, read when the first new one is asked for: most passes ask for none."""
        used: set[str] = set()
        for each in all_graphs(self._graph):
            used.update(tensor.name for tensor in (*each.inputs, *each.outputs))
            for node in each.nodes:
                used.add(node.name)
                used.update(tensor.name for tensor in (*node.inputs, *node.outputs))
        return used

    def fresh(self, wanted: str) -> str:
        """`wanted`, or `wanted_1`, `wanted_2` ... if it is taken; the name is taken from now on."""
        name, number = wanted, self._last.get(wanted, 0)
        while name in self._used:
            number += 1
            name = f"{wanted}_{number}"
        self._used.add(name)
        self._last[wanted] = number
        return name
