"""Remove the nodes whose results nothing uses, and with them the weights that only they read.

A result is used when a node reads it, in the graph or in a branch nested in it, when it is a graph output, or
when a branch returns it by name. Nodes with a random or a stateful operator go too: ONNX operators have no
other effects. Graph inputs stay, used or not: they are the model's interface. Unused outputs of a node that
is used stay as well.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from graphopt.graph import all_graphs, bodies, disconnect_all, named_tensors, present, producer
from graphopt.pass_base import Context, Effect, Pass, PassResult


@dataclass(frozen=True, kw_only=True)
class RemoveDeadNodes(Pass):
    """Remove nodes whose results nothing uses."""

    name: ClassVar[str] = "remove-dead-nodes"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Remove dead nodes from `graph` and the graphs in it."""
        uses = _Uses(graph)
        dead: dict[int, gs.Node] = {}
        for each in reversed(list(all_graphs(graph))):  # innermost first: their nodes read outer tensors
            for node in reversed(each.nodes):
                _bury(node, uses, dead)
        removed = 0
        for each in all_graphs(graph):
            kept = [node for node in each.nodes if id(node) not in dead]
            removed += len(each.nodes) - len(kept)
            each.nodes[:] = kept
        disconnect_all(dead.values())
        return PassResult(rewrites=removed)


class _Uses:
    """How often each tensor is used, as nodes go."""

    def __init__(self, root: gs.Graph) -> None:
        self._named = named_tensors(root)
        self._gone: Counter[int] = Counter()

    def drop(self, tensor: gs.Tensor) -> None:
        """Count one reader less."""
        self._gone[id(tensor)] += 1

    def any_of(self, node: gs.Node) -> bool:
        """Whether any result of a node is used."""
        return any(
            id(tensor) in self._named or len(tensor.outputs) > self._gone[id(tensor)]
            for tensor in present(node.outputs)
        )


def _bury(node: gs.Node, uses: _Uses, dead: dict[int, gs.Node]) -> None:
    """Add a node to the dead if nothing uses it, and then those that only it kept alive."""
    pending = [node]
    while pending:
        node = pending.pop()
        if id(node) in dead or uses.any_of(node):
            continue
        inner = [each for body in bodies(node) for graph in all_graphs(body) for each in graph.nodes]
        for each in (node, *inner):
            if id(each) in dead:
                continue
            dead[id(each)] = each
            for tensor in present(each.inputs):
                uses.drop(tensor)
                source = producer(tensor)
                if source is not None:
                    pending.append(source)
