"""Tensors inside branches of Ifs and bodies of Loops and Scans: their names, and a model that gives their values.

A tensor of a nested graph leaves it as one more output of the node that holds the graph, and of each holder around that
one:

- of an If: the other branch gives an empty tensor, so that a branch that is not taken gives no values;
- of a Loop: the values of all turns in one vector. Their size may change from turn to turn, so they are gathered in a
  sequence, a state that grows; before opset 13 states are tensors, and a Concat copies them in every turn;
- of a Scan, which has no states that grow and no sizes that change: stacked, then as one vector.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.graph import Names, all_graphs, label_of, present
from graphopt.model_io import Model

Holders = tuple[tuple[gs.Node, str], ...]
"""The nodes that a nested graph is inside of, outermost first, each with the attribute that holds it."""

HOLDERS = frozenset({"If", "Loop", "Scan"})
"""The operators whose graphs are quantized."""

_LOOPS = HOLDERS - {"If"}
_LOOP_STATES = 2  # the index of a Loop's first state: behind the number of turns and the condition
_SEQUENCES_AS_STATES = 13  # opset
_STACKED_LISTS = frozenset({"scan_output_axes", "scan_output_directions"})  # of Scan: an entry for each such output


@dataclass(frozen=True)
class NestedTensor:
    """A tensor of a nested graph, computed there or handed to a body, and where the graph is."""

    tensor: gs.Tensor
    holders: Holders

    @property
    def why_not_given(self) -> str | None:
        """Why its values cannot leave the graph; None when they can."""
        if any(node.op == "Scan" for node, _ in self.holders[:-1]):
            return "it is in a graph inside the body of a Scan: how many values it has may change"
        return None


def nested_graphs(graph: gs.Graph, holders: Holders = ()) -> Iterator[tuple[gs.Graph, Holders]]:
    """The graph, and all branches of Ifs and bodies of Loops and Scans in it, outermost first, each with its holders.

    Graphs that other operators hold are left out, with those in them.
    """
    yield graph, holders
    for node in graph.nodes:
        if node.op in HOLDERS and not node.domain:
            for attribute, nested in node.attrs.items():
                if isinstance(nested, gs.Graph):
                    yield from nested_graphs(nested, (*holders, (node, attribute)))


def nested_label(holders: Holders) -> str:
    """What reports call a nested graph: "If_0/then_branch", "Loop_3/body"."""
    return "/".join(part for node, attribute in holders for part in (label_of(node), attribute))


def range_names(graph: gs.Graph) -> dict[int, str]:
    """By id of a tensor of a nested graph, the name that ranges have for it; others bear their own."""
    return {id(each.tensor): name for name, each in nested_tensors(graph).items()}


def nested_tensors(graph: gs.Graph) -> dict[str, NestedTensor]:
    """All tensors that nested graphs compute, or bodies are handed, by the names that ranges have for them.

    That is the tensor's own name where no other tensor of the model bears it. Two branches may use the same one, as
    only one of them runs: then the nodes that it is inside of precede it, as in "If_0/then_branch/name". A copy of the
    graph has the same names.
    """
    bearers = Counter(
        tensor.name for each in all_graphs(graph) for node in each.nodes for tensor in present(node.outputs)
    )
    bearers.update(tensor.name for each in all_graphs(graph) for tensor in each.inputs)
    names = Names(graph)
    found: dict[str, NestedTensor] = {}
    for nested, holders in nested_graphs(graph):
        if not holders:
            continue
        for tensor in (*nested.inputs, *(tensor for node in nested.nodes for tensor in present(node.outputs))):
            name = tensor.name
            if bearers[name] > 1:
                name = names.fresh(f"{nested_label(holders)}/{name}")
            found[name] = NestedTensor(tensor, holders)
    return found


def with_nested_outputs(model: Model, tensors: Mapping[str, np.dtype[Any]]) -> tuple[Model, dict[str, str]]:
    """A copy of a model in which tensors of nested graphs are tensors of the main graph too.

    Args:
        model: is left as it is.
        tensors: names as in `nested_tensors`, with the dtypes.

    Returns:
        the copy, and by name what the tensor is called in its main graph; it is empty where nothing computes it.
    """
    copy = model.copy()
    found = nested_tensors(copy.graph)
    giving = _Giving(copy.graph)
    return copy, {name: giving.give(name, found[name], dtype) for name, dtype in tensors.items()}


class _Giving:
    """Adds outputs to the nodes that hold nested graphs."""

    def __init__(self, graph: gs.Graph) -> None:
        self._graph = graph
        self._names = Names(graph)

    def give(self, name: str, nested: NestedTensor, dtype: np.dtype[Any]) -> str:
        """The name in the main graph of the values of a tensor of a nested graph."""
        tensor = nested.tensor
        where = "in a loop" if any(node.op in _LOOPS for node, _ in nested.holders) else "in a branch"
        graphs = [self._graph, *(node.attrs[attribute] for node, attribute in nested.holders)]
        for depth, (node, attribute) in reversed(list(enumerate(nested.holders))):
            wanted = f"{name} ({where})" if depth == 0 else f"{name} ({where}, inner graph)"
            if node.op == "If":
                tensor = self._of_branch(tensor, node, attribute, dtype, wanted)
            else:
                give = self._gathered if node.op == "Loop" else self._stacked
                tensor = give(tensor, node, graphs[depth], dtype, wanted)
        return str(tensor.name)

    def _of_branch(
        self, tensor: gs.Tensor, node: gs.Node, attribute: str, dtype: np.dtype[Any], wanted: str
    ) -> gs.Tensor:
        """The new output of an If that has the value of a tensor of one of its branches."""
        for each, branch in node.attrs.items():
            if each == attribute:
                self._return(tensor, branch, dtype, wanted)
                continue
            empty = gs.Constant(self._names.fresh(f"{wanted}, empty"), np.empty(0, dtype))
            returned = self._append("Constant", [], branch, dtype, f"{wanted}, returned", value=empty)
            branch.outputs.append(returned)
        return self._output(node, dtype, wanted)

    def _gathered(
        self, tensor: gs.Tensor, node: gs.Node, graph: gs.Graph, dtype: np.dtype[Any], wanted: str
    ) -> gs.Tensor:
        """A new tensor of `graph` that has the values of a tensor of its Loop in all turns, one behind the other."""
        body = node.attrs["body"]
        flat = self._flat(tensor, body, dtype, f"{wanted}, now")
        kind = "sequence_type" if graph.opset >= _SEQUENCES_AS_STATES else "tensor_type"
        first: gs.Tensor = gs.Constant(self._names.fresh(f"{wanted}, empty"), np.empty(0, dtype))
        before = gs.Variable(self._names.fresh(f"{wanted}, so far"), dtype, [None], kind)
        after = gs.Variable(self._names.fresh(f"{wanted}, returned"), dtype, [None], kind)
        result = gs.Variable(self._names.fresh(wanted), dtype)
        last = result
        if kind == "sequence_type":  # ConcatFromSequence takes no sequence of nothing: it begins with an empty tensor
            empty, first = first, gs.Variable(self._names.fresh(f"{wanted}, before"), dtype, [None], kind)
            last = gs.Variable(self._names.fresh(f"{wanted}, in turns"), dtype, [None], kind)
            graph.nodes.insert(0, gs.Node("SequenceConstruct", first.name, {}, [empty], [first]))
            body.nodes.append(gs.Node("SequenceInsert", after.name, {}, [before, flat], [after]))
            graph.nodes.append(gs.Node("ConcatFromSequence", result.name, {"axis": 0}, [last], [result]))
        else:
            body.nodes.append(gs.Node("Concat", after.name, {"axis": 0}, [before, flat], [after]))
        while len(node.inputs) < _LOOP_STATES:
            node.inputs.append(gs.Variable.empty())
        states = len(node.inputs) - _LOOP_STATES
        node.inputs.append(first)
        body.inputs.append(before)
        body.outputs.insert(1 + states, after)  # behind the condition and the other states
        node.outputs.insert(states, last)
        return result

    def _stacked(
        self, tensor: gs.Tensor, node: gs.Node, graph: gs.Graph, dtype: np.dtype[Any], wanted: str
    ) -> gs.Tensor:
        """A new tensor of `graph` that has the values of a tensor of its Scan in all turns."""
        self._return(tensor, node.attrs["body"], dtype, wanted)
        for name in _STACKED_LISTS & node.attrs.keys():
            node.attrs[name] = [*node.attrs[name], 0]
        return self._flat(self._output(node, dtype, f"{wanted}, stacked"), graph, dtype, wanted)

    def _return(self, tensor: gs.Tensor, graph: gs.Graph, dtype: np.dtype[Any], wanted: str) -> None:
        """Return the tensor from a nested graph; it may be an output already, so by another name."""
        graph.outputs.append(self._append("Identity", [tensor], graph, dtype, f"{wanted}, returned"))

    def _flat(self, tensor: gs.Tensor, graph: gs.Graph, dtype: np.dtype[Any], wanted: str) -> gs.Tensor:
        size = gs.Constant(self._names.fresh(f"{wanted}, size"), np.array([-1], np.int64))
        return self._append("Reshape", [tensor, size], graph, dtype, wanted)

    def _append(
        self, op: str, inputs: list[gs.Tensor], graph: gs.Graph, dtype: np.dtype[Any], wanted: str, **attributes: Any
    ) -> gs.Tensor:
        result = gs.Variable(self._names.fresh(wanted), dtype)
        graph.nodes.append(gs.Node(op, result.name, attributes, inputs, [result]))
        return result

    def _output(self, node: gs.Node, dtype: np.dtype[Any], wanted: str) -> gs.Tensor:
        output = gs.Variable(self._names.fresh(wanted), dtype)
        node.outputs.append(output)
        return output
