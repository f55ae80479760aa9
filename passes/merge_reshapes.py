"""Merge chains of Reshape, Flatten, Squeeze and Unsqueeze.

None of them moves an element, so of a chain only the last shape counts:

    Reshape(f(x), target) = Reshape(x, target)      for each such f, where the target copies no dimension of f(x)

Everything else is decided on symbols. Each dimension of x that is not known gets one of its own, and the shape that a
chain gives is followed as products of numbers and symbols: Flatten(x[n, 3, m]) has the shape [n, 3 m]. The chain
becomes the first of these that gives the same shape: nothing, one Unsqueeze, one Squeeze, one Reshape whose target
holds numbers, a 0 where a dimension of x stays in its place, and -1 once. Where a copied dimension is 0, a -1 beside it
is an error, so that stands only where an operator of the chain would have failed as well.

The inner operator stays while another node reads it, then only a chain that gives x itself goes. Refused: targets and
axes that are computed at run time, and results that no single operator expresses.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.graph import (
    Names,
    all_graphs,
    constant_of,
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

_AXES_SINCE = 13  # the opset in which axes became an input
_OPERATORS = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")


@dataclass(frozen=True, kw_only=True)
class MergeReshapes(Pass):
    """Merge chains of Reshape, Flatten, Squeeze and Unsqueeze into one of them, or none."""

    name: ClassVar[str] = "merge-reshapes"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Merge each of them with the one before it, first to last; `parts` counts by the operator that was last."""
        if not any(_before(node, own) for each in all_graphs(graph) for own in [_ids(each)] for node in each.nodes):
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


def _before(node: gs.Node, own: Set[int]) -> gs.Node | None:
    """Return the reshaping node of the same graph that a reshaping node reads."""
    if node.op not in _OPERATORS or node.domain or not node.inputs:
        return None
    source = producer(node.inputs[0])
    if source is None or id(source) not in own or source.op not in _OPERATORS or source.domain:
        return None
    return None if is_constant(source.inputs[0]) else source  # else it is for fold-constants


def _ids(graph: gs.Graph) -> set[int]:
    return {id(node) for node in graph.nodes}


class _Refusal(Exception):  # noqa: N818 # not an error: the sentence of a Skip
    """A chain that cannot be merged, and why."""


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
                except _Refusal as refusal:
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
            _Refusal: it cannot; nothing has changed.
        """
        tensor, dimensions = inner.inputs[0], known_dimensions(inner.inputs[0])
        refusal: _Refusal | None = None
        if dimensions is None:
            refusal = _Refusal(f"the rank of {tensor.name} is not known")
        else:
            chain = _Chain(dimensions, self.graph.opset)
            try:
                chain.follow(inner)
                chain.follow(outer)
            except _Refusal as raised:
                refusal = raised
            if refusal is None and chain.is_back:
                return self._skip_both(outer, tensor)
        if any(node is not outer for node in inner.outputs[0].outputs) or id(inner.outputs[0]) in self.named:
            raise _Refusal("something else uses its result too")
        if _names_all_sizes(outer, self.graph.opset):
            return set_input(outer, 0, tensor)
        if refusal is not None:
            raise refusal
        return self._become(outer, tensor, *chain.as_one())

    def _skip_both(self, outer: gs.Node, tensor: gs.Tensor) -> None:
        if id(outer.outputs[0]) in self.named:
            self._become(outer, tensor, "Identity", None)
        else:
            replace_uses(outer.outputs[0], tensor)

    def _become(self, node: gs.Node, tensor: gs.Tensor, op: str, values: list[int] | None) -> None:
        output = node.outputs[0]
        disconnect(node)
        node.op, node.attrs = op, {}
        node.inputs.append(tensor)
        node.outputs.append(output)
        if values is None:
            return
        if op != "Reshape" and self.graph.opset < _AXES_SINCE:
            node.attrs["axes"] = values
        else:
            what = "shape" if op == "Reshape" else "axes"
            name = self.names.fresh(f"{output.name}_{what}")
            node.inputs.append(gs.Constant(name, np.array(values, np.int64)))

    def _is_used(self, node: gs.Node) -> bool:
        return bool(node.outputs[0].outputs) or id(node.outputs[0]) in self.named


def _names_all_sizes(node: gs.Node, opset: int) -> bool:
    """Whether the shape that a node gives does not depend on that of its input, but for one size, by the count."""
    target = _stated(node, "shape", opset) if node.op == "Reshape" else None
    return target is not None and (0 not in target or bool(node.attrs.get("allowzero", 0)))


def _stated(node: gs.Node, attribute: str, opset: int) -> list[int] | None:
    """Return the axes or the target of a node, None where omitted.

    Raises:
        _Refusal: they are computed at run time.
    """
    if opset < (5 if attribute == "shape" else _AXES_SINCE):
        return None if attribute not in node.attrs else list(node.attrs[attribute])
    if len(node.inputs) < 2 or not node.inputs[1].name:
        return None
    value = constant_of(node.inputs[1])
    if value is None:
        raise _Refusal(f"{node.inputs[1].name} is computed at run time")
    return [int(each) for each in value.reshape(-1)]


@dataclass(frozen=True)
class _Size:
    """A dimension: a number times symbols, each of which may come more than once."""

    number: int = 1
    symbols: tuple[int, ...] = ()

    def over(self, other: _Size) -> _Size:
        """Return the quotient.

        Raises:
            _Refusal: it is no such product.
        """
        left, right = Counter(self.symbols), Counter(other.symbols)
        if self.number % other.number or not left >= right:
            raise _Refusal("the size that -1 stands for is not known")
        return _Size(self.number // other.number, tuple(sorted((left - right).elements())))


def _product(sizes: Iterable[_Size]) -> _Size:
    sizes = list(sizes)
    symbols = sorted(symbol for size in sizes for symbol in size.symbols)
    return _Size(math.prod(size.number for size in sizes), tuple(symbols))


class _Chain:
    """The shape of a tensor as it goes through reshaping nodes, in symbols for what is not known of it."""

    def __init__(self, dimensions: Sequence[int | None], opset: int) -> None:
        self._first = [_Size(1, (axis,)) if size is None else _Size(size) for axis, size in enumerate(dimensions)]
        self._sizes, self._opset = list(self._first), opset
        self._ones: set[int] = set()  # symbols that are 1, else the chain fails
        self._positive: set[int] = set()  # symbols that are not 0, else the chain fails

    def follow(self, node: gs.Node) -> None:
        """Apply one more node.

        Raises:
            _Refusal: its result cannot be told.
        """
        steps = {"Flatten": self._flatten, "Reshape": self._reshape, "Squeeze": self._squeeze}
        self._sizes = steps.get(node.op, self._unsqueeze)(node)

    def _flatten(self, node: gs.Node) -> list[_Size]:
        axis = node.attrs.get("axis", 1)
        axis += len(self._sizes) if axis < 0 else 0
        return [_product(self._sizes[:axis]), _product(self._sizes[axis:])]

    def _squeeze(self, node: gs.Node) -> list[_Size]:
        axes = _stated(node, "axes", self._opset)
        if not axes:  # runtimes take none given and none omitted alike
            if any(size.symbols for size in self._sizes):
                raise _Refusal("it drops every axis of size 1, and a size is not known")
            return [size for size in self._sizes if size.number != 1]
        dropped = {axis % len(self._sizes) for axis in axes}
        self._ones.update(symbol for axis in dropped for symbol in self._sizes[axis].symbols)
        return [size for axis, size in enumerate(self._sizes) if axis not in dropped]

    def _unsqueeze(self, node: gs.Node) -> list[_Size]:
        axes = _stated(node, "axes", self._opset) or []
        rank, sizes = len(self._sizes) + len(axes), iter(self._sizes)
        added = {axis % rank for axis in axes}
        return [_Size() if axis in added else next(sizes) for axis in range(rank)]

    def _reshape(self, node: gs.Node) -> list[_Size]:
        target, copies = _stated(node, "shape", self._opset), not node.attrs.get("allowzero", 0)
        if target is None or (0 in target and not copies):
            raise _Refusal("its result is empty")
        sizes = [self._sizes[axis] if size == 0 else _Size(size) for axis, size in enumerate(target)]
        if -1 in target:
            others = _product(size for size, wanted in zip(sizes, target, strict=True) if wanted != -1)
            self._positive.update(others.symbols)
            sizes[target.index(-1)] = _product(self._sizes).over(others)
        return sizes

    def _plain(self, sizes: list[_Size]) -> list[_Size]:
        ones = self._ones
        return [_Size(size.number, tuple(each for each in size.symbols if each not in ones)) for size in sizes]

    @property
    def is_back(self) -> bool:
        """Whether the last shape is the first."""
        return self._plain(self._sizes) == self._plain(self._first)

    def as_one(self) -> tuple[str, list[int]]:
        """Return the operator that leads from the first shape to the last, and its axes or target.

        Raises:
            _Refusal: there is none.
        """
        first, last = self._plain(self._first), self._plain(self._sizes)
        for op, few, many in (("Unsqueeze", first, last), ("Squeeze", last, first)):
            axes = _axes_of_ones(few, many)
            if axes is not None:
                return op, axes
        unknown = [axis for axis, size in enumerate(last) if size.symbols]
        stays = [len(unknown) > 1 and last[axis : axis + 1] == first[axis : axis + 1] for axis in unknown]
        if stays.count(False) > 1:
            raise _Refusal("more than one size of the result is neither known nor one that stays in its place")
        copied = [axis for axis, copy in zip(unknown, stays, strict=True) if copy]
        may_be_empty = {symbol for axis in copied for symbol in last[axis].symbols} - self._positive
        if False in stays and may_be_empty:
            raise _Refusal("with two sizes that are not known one Reshape fails where the other is 0")
        return "Reshape", [
            0 if axis in copied else -1 if axis in unknown else last[axis].number for axis in range(len(last))
        ]


def _axes_of_ones(few: list[_Size], many: list[_Size]) -> list[int] | None:
    """Return the axes of size 1 that `many` has more than `few`; None where that is not all."""
    axes, matched = [], 0
    for axis, size in enumerate(many):
        if few[matched : matched + 1] == [size]:
            matched += 1
        elif size == _Size():
            axes.append(axis)
        else:
            return None
    return axes if matched == len(few) else None
