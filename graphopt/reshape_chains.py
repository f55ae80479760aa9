"""Operators that move no element, and the shapes that a chain of them leads to, in symbols for what is not known.

Each dimension that is not known gets a symbol of its own, and shapes are followed as products of numbers and symbols:
Flatten(x[n, 3, m]) has the shape [n, 3 m]. Two shapes are then joined by one operator, where one does it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.graph import Names, constant_of, disconnect

RESHAPING = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
_AXES_SINCE = 13  # the opset in which axes became an input


class Refusal(Exception):  # noqa: N818 # not an error: the sentence of a Skip
    """A chain that cannot be told or expressed, and why."""


@dataclass(frozen=True)
class Size:
    """A dimension: a number times symbols, each of which may come more than once."""

    number: int = 1
    symbols: tuple[int, ...] = ()

    def over(self, other: Size) -> Size:
        """Return the quotient.

        Raises:
            Refusal: it is no such product.
        """
        left, right = Counter(self.symbols), Counter(other.symbols)
        if not other.number or self.number % other.number or not left >= right:
            raise Refusal("the size that -1 stands for is not known")
        return Size(self.number // other.number, tuple(sorted((left - right).elements())))


ONE = Size()


def product(sizes: Iterable[Size]) -> Size:
    """The product of sizes."""
    sizes = list(sizes)
    symbols = sorted(symbol for size in sizes for symbol in size.symbols)
    return Size(math.prod(size.number for size in sizes), tuple(symbols))


@dataclass
class Chain:
    """The shape of a tensor as it goes through operators.

    Attributes:
        sizes: of the tensor at hand.
        opset: of the graph.
        ones: symbols that are 1, else an operator of the chain fails.
        positive: symbols that are not 0, else an operator of the chain fails.
    """

    sizes: list[Size]
    opset: int
    ones: set[int] = field(default_factory=set)
    positive: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, dimensions: Sequence[int | None], opset: int) -> Chain:
        """A chain that begins with a tensor of these dimensions; None: not known."""
        return cls([Size(1, (axis,)) if size is None else Size(size) for axis, size in enumerate(dimensions)], opset)

    def follow(self, node: gs.Node) -> None:
        """Apply one more node.

        Raises:
            Refusal: its result cannot be told, or it moves elements.
        """
        steps = {
            "Flatten": self._flatten,
            "Reshape": self._reshape,
            "Squeeze": self._squeeze,
            "Transpose": self._transpose,
            "Unsqueeze": self._unsqueeze,
        }
        self.sizes = steps[node.op](node)

    def plain(self, sizes: Iterable[Size]) -> list[Size]:
        """Sizes without the symbols that are 1."""
        ones = self.ones
        return [Size(size.number, tuple(each for each in size.symbols if each not in ones)) for size in sizes]

    def _flatten(self, node: gs.Node) -> list[Size]:
        axis = node.attrs.get("axis", 1)
        axis += len(self.sizes) if axis < 0 else 0
        return [product(self.sizes[:axis]), product(self.sizes[axis:])]

    def _squeeze(self, node: gs.Node) -> list[Size]:
        axes = stated(node, "axes", self.opset)
        if not axes:  # runtimes take none given and none omitted alike
            if any(size.symbols for size in self.sizes):
                raise Refusal("it drops every axis of size 1, and a size is not known")
            return [size for size in self.sizes if size.number != 1]
        dropped = {axis % len(self.sizes) for axis in axes}
        self.ones.update(symbol for axis in dropped for symbol in self.sizes[axis].symbols)
        return [size for axis, size in enumerate(self.sizes) if axis not in dropped]

    def _transpose(self, node: gs.Node) -> list[Size]:
        if not moves_ones([size == ONE for size in self.plain(self.sizes)], node):
            raise Refusal("an axis that it moves may be larger than 1")
        return [self.sizes[axis] for axis in permutation_of(node, len(self.sizes))]

    def _unsqueeze(self, node: gs.Node) -> list[Size]:
        axes = stated(node, "axes", self.opset) or []
        rank, sizes = len(self.sizes) + len(axes), iter(self.sizes)
        added = {axis % rank for axis in axes}
        return [ONE if axis in added else next(sizes) for axis in range(rank)]

    def _reshape(self, node: gs.Node) -> list[Size]:
        target, copies = stated(node, "shape", self.opset), not node.attrs.get("allowzero", 0)
        if target is None or (0 in target and not copies):
            raise Refusal("its result is empty")
        sizes = [self.sizes[axis] if size == 0 else Size(size) for axis, size in enumerate(target)]
        if -1 in target:
            others = product(size for size, wanted in zip(sizes, target, strict=True) if wanted != -1)
            self.positive.update(others.symbols)
            sizes[target.index(-1)] = product(self.sizes).over(others)
        return sizes


def moves_ones(is_one: Sequence[bool], transpose: gs.Node) -> bool:
    """Whether a Transpose leaves the axes that are not of size 1 in their order."""
    kept = [axis for axis in permutation_of(transpose, len(is_one)) if not is_one[axis]]
    return kept == sorted(kept)


def permutation_of(transpose: gs.Node, rank: int) -> list[int]:
    """Which axis of its input each axis of a Transpose's output is."""
    return list(transpose.attrs.get("perm", range(rank)[::-1]))


def stated(node: gs.Node, attribute: str, opset: int) -> list[int] | None:
    """Return the axes or the target of a node, None where omitted.

    Raises:
        Refusal: they are computed at run time.
    """
    if opset < (5 if attribute == "shape" else _AXES_SINCE):
        return None if attribute not in node.attrs else list(node.attrs[attribute])
    if len(node.inputs) < 2 or not node.inputs[1].name:
        return None
    value = constant_of(node.inputs[1])
    if value is None:
        raise Refusal(f"{node.inputs[1].name} is computed at run time")
    return [int(each) for each in value.reshape(-1)]


@dataclass(frozen=True)
class Step:
    """One operator with its axes, its target or, of a Transpose, its permutation; Identity has none."""

    op: str
    values: tuple[int, ...] = ()

    def become(self, node: gs.Node, tensor: gs.Tensor, opset: int, names: Names) -> None:
        """Make `node` this operator on `tensor`; it keeps its name and its output."""
        output = node.outputs[0]
        disconnect(node)
        node.op, node.attrs = self.op, {}
        node.inputs.append(tensor)
        node.outputs.append(output)
        if self.op == "Identity":
            return
        if self.op == "Transpose":
            node.attrs["perm"] = list(self.values)
        elif self.op != "Reshape" and opset < _AXES_SINCE:
            node.attrs["axes"] = list(self.values)
        else:
            what = "shape" if self.op == "Reshape" else "axes"
            name = names.fresh(f"{output.name}_{what}")
            node.inputs.append(gs.Constant(name, np.array(self.values, np.int64)))


NOTHING = Step("Identity")


def step_between(first: Sequence[Size], last: Sequence[Size], positive: Iterable[int] = ()) -> Step:
    """Return the operator that leads from one shape to another of as many elements.

    It is the first of these that does: nothing, one Unsqueeze, one Squeeze, one Reshape whose target holds numbers, a 0
    where a dimension stays in its place, and -1 once. Where a copied dimension is 0, a -1 beside it is an error.

    Args:
        first: plain sizes, as `Chain.plain` gives them.
        last: the same.
        positive: symbols that are not 0.

    Raises:
        Refusal: there is none.
    """
    if first == last:
        return NOTHING
    for op, few, many in (("Unsqueeze", first, last), ("Squeeze", last, first)):
        axes = _axes_of_ones(few, many)
        if axes is not None:
            return Step(op, axes)
    unknown = [axis for axis, size in enumerate(last) if size.symbols]
    stays = [len(unknown) > 1 and last[axis : axis + 1] == first[axis : axis + 1] for axis in unknown]
    if stays.count(False) > 1:
        raise Refusal("more than one size of the result is neither known nor one that stays in its place")
    copied = [axis for axis, copy in zip(unknown, stays, strict=True) if copy]
    may_be_empty = {symbol for axis in copied for symbol in last[axis].symbols} - set(positive)
    if False in stays and may_be_empty:
        raise Refusal("with two sizes that are not known one Reshape fails where the other is 0")
    target = (0 if axis in copied else -1 if axis in unknown else last[axis].number for axis in range(len(last)))
    return Step("Reshape", tuple(target))


def _axes_of_ones(few: Sequence[Size], many: Sequence[Size]) -> tuple[int, ...] | None:
    """Return the axes of size 1 that `many` has more than `few`; None where that is not all."""
    axes, matched = [], 0
    for axis, size in enumerate(many):
        if list(few[matched : matched + 1]) == [size]:
            matched += 1
        elif size == ONE:
            axes.append(axis)
        else:
            return None
    return tuple(axes) if matched == len(few) else None
