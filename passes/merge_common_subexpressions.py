"""Merge nodes that compute the same from the same tensors: the first of them stays.

Two nodes of one graph are the same where operator, attributes and input tensors are: then so are their outputs. Nodes
are visited in topological order and looked up by what they compute, so one sweep merges whole subgraphs, in linear
time. Attributes are compared by type and content, inputs by identity: constants of equal content are one tensor after
merge-duplicate-initializers. Where the later node computes a graph output, the first takes over its name; where both
do, both stay.

Never merged: random operators, Dropout among them; operators of other domains, which may be anything; nodes that hold
graphs; QuantizeLinear and DequantizeLinear, which runtimes fuse into each of their neighbours; Constant and Optional,
whose attributes graphsurgeon does not all carry; nodes of two graphs, since a branch may not run.
"""

from __future__ import annotations

from collections.abc import Hashable, Set
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.graph import all_graphs, disconnect_all, named_tensors, replace_uses, set_output
from graphopt.operators import QUANTIZING, RANDOM
from graphopt.pass_base import Context, Effect, Pass, PassResult, Skip

_KEPT_APART = RANDOM | QUANTIZING | {"Constant", "Optional"}


@dataclass(frozen=True, kw_only=True)
class MergeCommonSubexpressions(Pass):
    """Merge nodes of one graph that compute the same from the same tensors."""

    name: ClassVar[str] = "merge-common-subexpressions"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Merge in `graph` and in each graph in it; `parts` counts by operator."""
        merger = _Merger(named_tensors(graph))
        for each in all_graphs(graph):
            merger.merge_in(each)
        return PassResult(rewrites=sum(merger.merged.values()), skipped=tuple(merger.skipped), parts=merger.merged)


@dataclass
class _Merger:
    named: Set[int]  # ids of the tensors whose names stay
    merged: dict[str, int] = field(default_factory=dict)  # by operator
    skipped: list[Skip] = field(default_factory=list)
    _number: dict[int, int] = field(default_factory=dict)  # of a tensor that took the place of another: that one's id

    def merge_in(self, graph: gs.Graph) -> None:
        first: dict[Hashable, gs.Node] = {}
        gone: list[gs.Node] = []
        for node in graph.nodes:
            computed = self._computed(node)
            if computed is None:
                continue
            same = first.setdefault(computed, node)
            if same is node:
                continue
            twice = [
                new.name
                for old, new in zip(same.outputs, node.outputs, strict=True)
                if id(old) in self.named and id(new) in self.named
            ]
            if twice:
                reason = f"not merged with the same {same.op} {same.name}: both compute outputs, which keep their names"
                self.skipped.append(Skip(node.name or twice[0], reason))
                continue
            self._merge(same, node)
            gone.append(node)
            self.merged[node.op] = self.merged.get(node.op, 0) + 1
        disconnect_all(gone)
        kept_out = {id(node) for node in gone}
        graph.nodes[:] = [node for node in graph.nodes if id(node) not in kept_out]

    def _computed(self, node: gs.Node) -> Hashable:
        """What a node computes, equal for nodes that compute the same; None where that is not certain."""
        if node.domain or node.op in _KEPT_APART:
            return None
        attributes = [(name, _content(value)) for name, value in sorted(node.attrs.items())]
        if any(content is None for _, content in attributes):
            return None
        inputs = [self._number.get(id(tensor), id(tensor)) if tensor.name else None for tensor in node.inputs]
        while inputs and inputs[-1] is None:
            inputs.pop()
        return node.op, tuple(attributes), tuple(inputs), tuple(bool(tensor.name) for tensor in node.outputs)

    def _merge(self, same: gs.Node, node: gs.Node) -> None:
        """Let `same` compute what `node` does; `node` stays connected to its inputs only."""
        for index, (old, new) in enumerate(zip(list(same.outputs), list(node.outputs), strict=True)):
            if id(new) not in self.named:
                replace_uses(new, old)
                continue
            self._number[id(new)] = self._number.get(id(old), id(old))
            set_output(node, index, gs.Variable.empty())
            set_output(same, index, new)
            replace_uses(old, new)


def _content(value: object) -> Hashable:
    """What tells an attribute from another one by type and value; None for a graph, or a type that is not known."""
    if isinstance(value, gs.Constant):
        array = np.asarray(value.values)
        return str(array.dtype), array.shape, array.tobytes()
    if isinstance(value, list | tuple):
        contents = tuple(map(_content, value))
        return None if None in contents else contents
    if isinstance(value, str | int | float | np.dtype | type):
        return type(value).__name__, repr(value)  # 1 is not 1.0, nor 0.0 -0.0
    return None
