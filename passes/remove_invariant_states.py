"""Remove the states of Loops and Scans that no turn changes: the body reads the value from outside instead.

    result = Loop(turns, go, s)  body(turn, go, t) { ... f(t) ... return go, t }    body(turn, go) { ... f(s) ... }

TensorFlow's exporter hands all that a body reads to it as states, weights too. As a state a weight is no constant:
kernels do not pack it, what depends on it does not fold, and it is not quantized as a weight.

A state is invariant when the body returns what came in, by itself or through Identity: before, in and after every turn,
however many there are, it has its initial value. It stays where a graph inside the body returns it by name, where the
body returns it twice, where a tensor in the body has the name of the initial value, which hides that, and where the
node has no other result.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from graphopt.graph import Names, all_graphs, disconnect, named_tensors, nested_output_names, producer, replace_uses
from graphopt.pass_base import Context, Effect, Pass, PassResult

_SCAN_WITHOUT_BATCHES = 9  # the opset from which on the inputs of a Scan are its states and sequences alone


@dataclass(frozen=True, kw_only=True)
class RemoveInvariantStates(Pass):
    """Remove states of Loops and Scans that no turn changes: the body reads them from outside."""

    name: ClassVar[str] = "remove-invariant-states"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Remove them in `graph` and the graphs in it; `parts` counts by operator."""
        parts: dict[str, int] = {}
        names, named = Names(graph), named_tensors(graph)
        for each in list(all_graphs(graph)):  # outermost first: what is read from outside then is no state any more
            nodes: list[gs.Node] = []
            for node in each.nodes:
                nodes.append(node)
                if invariant := _invariant_states(node, each.opset):
                    nodes += _remove(node, invariant, names, named)
                    parts[node.op] = parts.get(node.op, 0) + len(invariant)
            each.nodes[:] = nodes
        return PassResult(rewrites=sum(parts.values()), parts=parts)


@dataclass(frozen=True)
class _State:
    """Where a state is: in the inputs of the node and of its body, in what the body returns, in the node's outputs."""

    given: int
    returned: int
    result: int


def _states(node: gs.Node, opset: int) -> list[_State]:
    if node.domain:
        return []
    if node.op == "Loop":
        return [_State(index, index - 1, index - 2) for index in range(2, len(node.inputs))]
    if node.op == "Scan" and opset >= _SCAN_WITHOUT_BATCHES:
        return [_State(index, index, index) for index in range(len(node.inputs) - node.attrs["num_scan_inputs"])]
    return []


def _invariant_states(node: gs.Node, opset: int) -> list[_State]:
    states = _states(node, opset)
    if not states or len(node.outputs) < len(states):
        return []
    body = node.attrs["body"]
    invariant = [state for state in states if _returns(body.outputs[state.returned], body.inputs[state.given])]
    if not invariant:
        return []
    returned = [output.name for output in body.outputs]
    elsewhere, own = nested_output_names(body), _names_in(body)
    invariant = [
        state
        for state in invariant
        if (name := body.inputs[state.given].name) not in elsewhere
        and returned.count(name) == (body.outputs[state.returned].name == name)
        and own.get(node.inputs[state.given].name, set())
        <= {id(node.inputs[state.given]), id(body.inputs[state.given])}
    ]
    return invariant if len(invariant) < len(node.outputs) else []


def _returns(output: gs.Tensor, given: gs.Tensor) -> bool:
    """Whether what a body returns is what came in."""
    while output.name != given.name:
        node = producer(output)
        if node is None or node.op != "Identity" or node.domain:
            return False
        output = node.inputs[0]
    return True


def _names_in(body: gs.Graph) -> dict[str, set[int]]:
    """Ids of the tensors that a body and the graphs in it have of their own, or read, by name."""
    found: dict[str, set[int]] = {}
    for graph in all_graphs(body):
        ends = (tensor for node in graph.nodes for tensor in (*node.inputs, *node.outputs))
        for tensor in (*graph.inputs, *ends):
            found.setdefault(tensor.name, set()).add(id(tensor))
    return found


def _remove(node: gs.Node, states: Sequence[_State], names: Names, named: Set[int]) -> list[gs.Node]:
    """Take states out of a node and its body; return Identities for results whose names must stay."""
    body = node.attrs["body"]
    initial = {state.result: node.inputs[state.given] for state in states}
    for state in states:
        replace_uses(body.inputs[state.given], node.inputs[state.given])
    body.inputs[:] = _without(body.inputs, [state.given for state in states])
    body.outputs[:] = _without(body.outputs, [state.returned for state in states])
    inputs, outputs = _without(node.inputs, [state.given for state in states]), _without(node.outputs, list(initial))
    results = [(node.outputs[index], value) for index, value in initial.items()]
    disconnect(node)
    node.inputs.extend(inputs)
    node.outputs.extend(outputs)
    identities = []
    for result, value in results:
        replace_uses(result, value)
        if id(result) in named:
            identities.append(gs.Node("Identity", names.fresh(f"{result.name}/identity"), {}, [value], [result]))
    return identities


def _without(tensors: Sequence[gs.Tensor], indices: Sequence[int]) -> list[gs.Tensor]:
    return [tensor for index, tensor in enumerate(tensors) if index not in indices]
