"""Replace a Sum of two tensors by an Add.

    Sum(a, b) = Add(a, b)

for every type that Sum takes: before opset 8 Sum wants equal shapes, and since then both broadcast alike. Many tools
and runtimes look for Add alone, for residual connections among others. A Sum of one tensor is for remove-identities;
one of more than two stays, as a chain of Adds would be more nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from graphopt.graph import all_graphs, present
from graphopt.pass_base import Context, Effect, Pass, PassResult


@dataclass(frozen=True, kw_only=True)
class ReplaceSum(Pass):
    """Replace a Sum of two tensors by an Add."""

    name: ClassVar[str] = "replace-sum"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Rename them in `graph` and the graphs in it."""
        sums = [
            node
            for each in all_graphs(graph)
            for node in each.nodes
            if node.op == "Sum" and not node.domain and len(node.inputs) == len(present(node.inputs)) == 2
        ]
        for node in sums:
            node.op = "Add"
        return PassResult(rewrites=len(sums))
