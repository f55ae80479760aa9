"""Merge chains of Reshape, Flatten, Squeeze and Unsqueeze, and of Transposes that only move axes of size 1.

None of them moves an element, so of a chain only the last shape counts:

    Reshape(f(x), target) = Reshape(x, target)      for each such f, where the target copies no dimension of f(x)

Everything else is decided on symbols (`graphopt.reshape_chains`): the chain becomes nothing, one Unsqueeze, one Squeeze
or one Reshape that gives the same shape.

The inner operator stays while another node reads it, then only a chain that gives x itself goes. Refused: targets and
axes that are computed at run time, and results that no single operator expresses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_graphsurgeon as gs

from graphopt.graph import (
    Names,
    all_graphs,
    disconnect,
    is_constant,
    label_of,
    named_tensors,
    producer,
    replace_uses,
    set_input,
)
from graphopt.partial_values import known_dimensions
from graphopt.pass_base import Context, Effect, Pass, PassResult, Skip
from graphopt.reshape_chains import NOTHING, RESHAPING, Chain, Refusal, Step, moves_ones, stated, step_between


@dataclass(frozen=True, kw_only=True)
class MergeReshapes(Pass):
    """Merge chains of Reshape, Flatten, Squeeze, Unsqueeze and Transposes of axes of size 1 into one, or none."""

    name: ClassVar[str] = "merge-reshapes"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Merge each of them with the one before it, first to last; `parts` counts by the operator that was last."""
        if not any(_may_merge(node) for each in all_graphs(graph) for node in each.nodes):
            return PassResult()
        context.infer_shapes(graph)
        named, names = named_tensors(graph), Names(graph)
        merged: Counter[str] = Counter()
        skipped: list[Skip] = []
        for each in all_graphs(graph):
            merger = _Merger(each, named, names)
            skipped += merger.run()
            merged += merger.merged
        return PassResult(rewrites=merged.total(), skipped=tuple(skipped), parts=dict(merged))


def _may_merge(node: gs.Node) -> bool:
    """Whether a node and the one before it are of types that may only reshape; a Transpose's shapes must tell."""
    source = producer(node.inputs[0]) if node.inputs else None
    return source is not None and all(each.op in (*RESHAPING, "Transpose") for each in (node, source))


def _before(node: gs.Node, own: Set[int]) -> gs.Node | None:
    """Return the reshaping node of the same graph that a reshaping node reads."""
    if not _may_merge(node) or not _reshapes(node):
        return None
    source = producer(node.inputs[0])
    if source is None or id(source) not in own or not _reshapes(source):
        return None
    return None if is_constant(source.inputs[0]) else source  # else it is for fold-constants


def _reshapes(node: gs.Node) -> bool:
    """Whether a node moves no element, as far as shapes are known."""
    if node.domain or node.op != "Transpose":
        return node.op in RESHAPING and not node.domain
    dimensions = known_dimensions(node.inputs[0])
    return dimensions is not None and moves_ones([size == 1 for size in dimensions], node)


def _ids(graph: gs.Graph) -> set[int]:
    return {id(node) for node in graph.nodes}


@dataclass
class _Merger:
    """The rewrite of one graph."""

    graph: gs.Graph
    named: Set[int]  # ids of the tensors that must stay
    names: Names
    merged: Counter[str] = field(default_factory=Counter)

    def run(self) -> list[Skip]:
        """Merge each node with those before it; return what was left alone."""
        own, gone = _ids(self.graph), set[int]()
        skipped: list[Skip] = []
        for node in self.graph.nodes:
            while (inner := _before(node, own)) is not None and self._is_used(node):
                op = node.op
                try:
                    self._merge(node, inner)
                except Refusal as refusal:
                    skipped.append(Skip(label_of(node), f"not merged with {inner.op}: {refusal}"))
                    break
                self.merged[op] += 1
                for each in (node, inner):
                    if not self._is_used(each):
                        disconnect(each)
                        gone.add(id(each))
        if gone:
            self.graph.nodes[:] = [node for node in self.graph.nodes if id(node) not in gone]
        return skipped

    def _merge(self, outer: gs.Node, inner: gs.Node) -> None:
        """Let `outer` do the work of both.

        Raises:
            Refusal: it cannot; nothing has changed.
        """
        tensor, dimensions = inner.inputs[0], known_dimensions(inner.inputs[0])
        found: Step | Refusal
        try:
            if dimensions is None:
                raise Refusal(f"the rank of {tensor.name} is not known")
            chain = Chain.of(dimensions, self.graph.opset)
            first = chain.sizes
            chain.follow(inner)
            chain.follow(outer)
            found = step_between(chain.plain(first), chain.plain(chain.sizes), chain.positive)
        except Refusal as raised:
            found = raised
        if found == NOTHING:
            return self._skip_both(outer, tensor)
        if any(node is not outer for node in inner.outputs[0].outputs) or id(inner.outputs[0]) in self.named:
            raise Refusal("something else uses its result too")
        if _names_all_sizes(outer, self.graph.opset):
            return set_input(outer, 0, tensor)
        if isinstance(found, Refusal):
            raise found
        return found.become(outer, tensor, self.graph.opset, self.names)

    def _skip_both(self, outer: gs.Node, tensor: gs.Tensor) -> None:
        if id(outer.outputs[0]) in self.named:
            NOTHING.become(outer, tensor, self.graph.opset, self.names)
        else:
            replace_uses(outer.outputs[0], tensor)

    def _is_used(self, node: gs.Node) -> bool:
        return bool(node.outputs[0].outputs) or id(node.outputs[0]) in self.named


def _names_all_sizes(node: gs.Node, opset: int) -> bool:
    """Whether the shape that a node gives does not depend on that of its input, but for one size, by the count."""
    target = stated(node, "shape", opset) if node.op == "Reshape" else None
    return target is not None and (0 not in target or bool(node.attrs.get("allowzero", 0)))
