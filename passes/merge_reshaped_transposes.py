"""Merge two Transposes with Reshapes between them into one Transpose, or none.

Where the Reshapes only split and join neighbouring axes, their input and their output are two views of one list of
finer axes, and so the two Transposes permute these one after the other:

    [1, T, H, D] -> T(0,2,1,3) -> Reshape [H, T, D] -> T(0,2,1)      =  T(0,2,3,1) -> Reshape [H, D, T]
    [N, H, W, C] -> T(0,3,1,2) -> Reshape [N, C, HW] -> T(0,2,1)     =  Reshape [N, HW, C]

A Reshape before the merged Transpose and one behind it make the difference to the tensors as they are, where there is
one. There are never more nodes than there were.

Runtimes copy rows where one axis moves past others, and single elements where more is moved. So two Transposes of one
axis each stay, if a single one would move more. Refused besides: Reshapes that cut across axes, ranks that are not
known, targets that are computed at run time, and results between that something else uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import ClassVar

import onnx_graphsurgeon as gs

from graphopt.graph import Names, all_graphs, disconnect_all, is_constant, label_of, named_tensors, producer
from graphopt.partial_values import known_dimensions
from graphopt.pass_base import Context, Effect, Pass, PassResult, Skip
from graphopt.reshape_chains import (
    NOTHING,
    ONE,
    RESHAPING,
    Chain,
    Refusal,
    Size,
    Step,
    permutation_of,
    product,
    step_between,
)


@dataclass(frozen=True, kw_only=True)
class MergeReshapedTransposes(Pass):
    """Merge two Transposes with Reshapes between them, which split and join axes, into one Transpose, or none."""

    name: ClassVar[str] = "merge-reshaped-transposes"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Merge each Transpose with the one before it, first to last."""
        named, names = named_tensors(graph), Names(graph)
        if not any(_chain_before(node, named) for each in all_graphs(graph) for node in each.nodes):
            return PassResult()
        context.infer_shapes(graph)
        merged, skipped = 0, list[Skip]()
        for each in all_graphs(graph):
            count, skips = _merge_in(each, named, names)
            merged += count
            skipped += skips
        return PassResult(rewrites=merged, skipped=tuple(skipped))


def _merge_in(graph: gs.Graph, named: Set[int], names: Names) -> tuple[int, list[Skip]]:
    merged, skipped = 0, list[Skip]()
    own, gone = {id(node) for node in graph.nodes}, set[int]()
    nodes: list[gs.Node] = []
    for node in graph.nodes:
        chain = _chain_before(node, named)
        if chain is not None and all(id(each) in own for each in chain):
            try:
                steps = _merged(chain, node, graph.opset)
            except Refusal as refusal:
                skipped.append(Skip(label_of(node), f"not merged with {label_of(chain[0])}: {refusal}"))
            else:
                gone.update(id(each) for each in chain)
                new = _write(steps, chain, node, graph.opset, names)
                own.update(map(id, new))
                nodes += new
                merged += 1
        nodes.append(node)
    graph.nodes[:] = [node for node in nodes if id(node) not in gone]
    return merged, skipped


def _chain_before(node: gs.Node, named: Set[int]) -> list[gs.Node] | None:
    """Return the Transpose and the Reshapes before a Transpose, first to last, if nothing else reads them."""
    if node.op != "Transpose" or node.domain:
        return None
    chain: list[gs.Node] = []
    reader = node
    while (before := producer(reader.inputs[0])) is not None and before.op in (*RESHAPING, "Transpose"):
        (output,) = before.outputs
        if before.domain or id(output) in named or any(each is not reader for each in output.outputs):
            return None
        chain.insert(0, before)
        if before.op == "Transpose":
            return chain if len(chain) > 1 and not is_constant(before.inputs[0]) else None
        reader = before
    return None


def _merged(chain: Sequence[gs.Node], last: gs.Node, opset: int) -> list[Step]:
    """What stands for a chain of a Transpose and Reshapes and the last Transpose, but for what does nothing.

    Raises:
        Refusal: they do not merge, or it would not pay.
    """
    first, *reshapes = chain
    dimensions = known_dimensions(first.inputs[0])
    if dimensions is None:
        raise Refusal(f"the rank of {first.inputs[0].name} is not known")
    given = Chain.of(dimensions, opset).sizes
    inner = permutation_of(first, len(given))
    middle = Chain([given[axis] for axis in inner], opset)
    split = middle.sizes
    for node in reshapes:
        middle.follow(node)
    outer = permutation_of(last, len(middle.sizes))
    given, split, joined = (middle.plain(sizes) for sizes in (given, split, middle.sizes))
    result = [joined[axis] for axis in outer]
    fine = [replace(axis, split=inner[axis.split], joined=outer.index(axis.joined)) for axis in _finer(split, joined)]
    before, after = sorted(fine, key=lambda axis: axis.split), sorted(fine, key=lambda axis: axis.joined)
    if before == after:
        step = step_between(given, result, middle.positive)
        return [] if step == NOTHING else [step]
    ways = list(_ways(before, after, given, result, middle.positive))
    if not ways:
        raise Refusal("no single operators lead to the axes that move, and from them")
    steps = min(ways, key=lambda way: (not any(map(_moves_one_axis, way)), len(way)))
    if not any(map(_moves_one_axis, steps)) and _is_of_one_axis(inner) and _is_of_one_axis(outer):
        raise Refusal("one Transpose would move more than one axis, which takes longer than both")
    return steps


@dataclass(frozen=True)
class _Axis:
    """An axis that is all or a part of one axis in either of two views of a tensor."""

    split: int
    joined: int
    size: Size


def _finer(split: Sequence[Size], joined: Sequence[Size]) -> Iterator[_Axis]:
    """Yield the axes that both views are made of, but for those of size 1.

    Raises:
        Refusal: there are none: an axis of one view cuts across axes of the other.
    """
    left, right = ([(axis, size) for axis, size in enumerate(sizes) if size != ONE][::-1] for sizes in (split, joined))
    while left and right:
        (one, its_size), (other, other_size) = left.pop(), right.pop()
        if its_size == other_size:
            yield _Axis(one, other, its_size)
            continue
        try:
            rest, size = other_size.over(its_size), its_size
            right.append((other, rest))
        except Refusal:
            rest, size = its_size.over(other_size), other_size
            left.append((one, rest))
        yield _Axis(one, other, size)
    if left or right:
        raise Refusal("the Reshapes cut across axes")


def _ways(
    before: Sequence[_Axis], after: Sequence[_Axis], given: list[Size], result: list[Size], positive: Set[int]
) -> Iterator[list[Step]]:
    """Yield operators that lead from the given axes to those of the result: a Transpose, and Reshapes around it.

    The Transpose reads the given axes as they are, or writes those of the result, where either are made of no finer
    axes, or it moves as few axes as there are that stay beside each other.
    """
    of_given, of_result = _whole(before, given, after, result), _whole(after, result, before, given)
    orders = [(given, of_given)] if of_given is not None else []
    if of_result is not None:
        orders.append(([result[axis] for axis in of_result], [of_result.index(axis) for axis in range(len(result))]))
    widths, permutation = _joined(before, after)
    for sizes, order in (*orders, (widths, permutation)):
        try:
            steps = (
                step_between(given, sizes, positive),
                Step("Transpose", tuple(order)),
                step_between([sizes[axis] for axis in order], result, positive),
            )
        except Refusal:
            continue
        yield [step for step in steps if step != NOTHING]


def _whole(
    axes: Sequence[_Axis], sizes: Sequence[Size], wanted: Sequence[_Axis], goal: Sequence[Size]
) -> list[int] | None:
    """Return an order of the axes of `sizes` in which its finer ones come as wanted, and those of size 1 as in `goal`.

    None where the axes of `sizes` have parts.
    """
    if [axis.size for axis in axes] != [size for size in sizes if size != ONE]:
        return None
    place = dict(zip(axes, (axis for axis, size in enumerate(sizes) if size != ONE), strict=True))
    ones = [axis for axis, size in enumerate(sizes) if size == ONE]
    order: list[int] = []
    left = list(wanted)
    for size in goal:
        if size == ONE:
            order += ones[:1]
            del ones[:1]
        else:
            rest = size
            while rest != ONE:
                axis = left.pop(0)
                order.append(place[axis])
                rest = rest.over(axis.size)
    return [*ones, *order]


def _joined(before: Sequence[_Axis], after: Sequence[_Axis]) -> tuple[list[Size], list[int]]:
    """The sizes of the axes before, where those that stay beside each other are one, and their order after."""
    place = {axis: number for number, axis in enumerate(before)}
    runs: list[list[_Axis]] = []
    for axis in after:
        if runs and place[axis] == place[runs[-1][-1]] + 1:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    in_order = sorted(runs, key=lambda run: place[run[0]])
    widths = [product(axis.size for axis in run) for run in in_order]
    return widths, [in_order.index(run) for run in runs]


def _moves_one_axis(step: Step) -> bool:
    return step.op == "Transpose" and _is_of_one_axis(step.values)


def _is_of_one_axis(permutation: Sequence[int]) -> bool:
    """Whether one axis moves past others, or none."""
    rest = ([*permutation[:axis], *permutation[axis + 1 :]] for axis in range(len(permutation)))
    return any(each == sorted(each) for each in rest)


def _write(steps: Sequence[Step], chain: Sequence[gs.Node], last: gs.Node, opset: int, names: Names) -> list[gs.Node]:
    """Let the last node compute the last step from what the chain reads, and return new nodes for those before it."""
    tensor = chain[0].inputs[0]
    new: list[gs.Node] = []
    for step in steps[:-1]:
        output = gs.Variable(names.fresh(f"{last.outputs[0].name}_{step.op.lower()}"), tensor.dtype)
        node = gs.Node("Identity", names.fresh(f"{label_of(last)}/{step.op.lower()}"), outputs=[output])
        step.become(node, tensor, opset, names)
        new.append(node)
        tensor = output
    (steps[-1] if steps else NOTHING).become(last, tensor, opset, names)
    disconnect_all(chain)
    return new
