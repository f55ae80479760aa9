"""Where the sizes in a shape tensor come from: a number in the model, or an axis of a tensor.

Reshape, Expand, ConstantOfShape and Resize read their result's sizes from a tensor. When channels go, numbers among
them must change; a size that Shape reads follows by itself, as long as nothing computes with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from graphopt.graph import Names, constant_of, integers_of, producer


@dataclass(frozen=True)
class SizeOf:
    """The size of an axis, as Shape reads it when the model runs."""

    tensor: gs.Tensor
    axis: int


Entry = int | SizeOf | None  # None: computed in another way


def stated(tensor: gs.Tensor) -> list[Entry] | None:
    """The entries of an integer tensor of rank 0 or 1; None where not even their number is known."""
    value = constant_of(tensor)
    if value is not None:
        return [int(each) for each in value.reshape(-1)] if value.dtype.kind in "iu" and value.ndim < 2 else None
    node = producer(tensor)
    rule = None if node is None or node.domain else _RULES.get(node.op)
    if node is None or rule is None:
        shape = tensor.shape
        return [None] * shape[0] if shape is not None and len(shape) == 1 and isinstance(shape[0], int) else None
    return rule(node)


def carries_sizes(node: gs.Node) -> bool:
    """Whether an operator hands sizes on as they are, so that `stated` sees through it."""
    return node.op in _RULES and not node.domain


def _shape(node: gs.Node) -> list[Entry] | None:
    data = node.inputs[0]
    if data.shape is None:
        return None
    axes = range(len(data.shape))[slice(node.attrs.get("start"), node.attrs.get("end"))]
    return [SizeOf(data, axis) for axis in axes]


def _concat(node: gs.Node) -> list[Entry] | None:
    entries: list[Entry] = []
    for tensor in node.inputs:
        part = stated(tensor)
        if part is None:
            return None
        entries += part
    return entries


def _selected(entries: list[Entry]) -> list[Entry]:
    """Entries that were picked out of others: a number among them can no longer be changed for one reader alone."""
    return [None if isinstance(entry, int) else entry for entry in entries]


def _gather(node: gs.Node) -> list[Entry] | None:
    entries, indices = stated(node.inputs[0]), integers_of(node, 1)
    if entries is None or indices is None or node.attrs.get("axis", 0):
        return None
    return _selected([entries[index] for index in indices if -len(entries) <= index < len(entries)])


def _slice(node: gs.Node) -> list[Entry] | None:
    entries = stated(node.inputs[0])
    bounds = [integers_of(node, place) for place in (1, 2)]
    if entries is None or len(node.inputs) < 3 or any(each is None or len(each) != 1 for each in bounds):
        return None
    step = integers_of(node, 4) or [1]
    (start,), (end,) = (each for each in bounds if each is not None)
    return _selected(entries[slice(start, end if end >= 0 or step[0] > 0 else None, step[0])])


def _same(node: gs.Node) -> list[Entry] | None:
    entries = stated(node.inputs[0])
    return None if entries is None else _selected(entries)


_RULES = {
    "Shape": _shape,
    "Concat": _concat,
    "Gather": _gather,
    "Slice": _slice,
    "Cast": lambda node: stated(node.inputs[0]),
    "Identity": lambda node: stated(node.inputs[0]),
    "Squeeze": _same,
    "Unsqueeze": _same,
}


def restated(tensor: gs.Tensor, changes: Mapping[int, int], graph: gs.Graph, names: Names) -> gs.Tensor:
    """A tensor with other numbers at some places, for one reader: what it is made of stays for the others.

    Args:
        tensor: a constant, or a Concat of which the pieces at these places are constants, also behind a Cast.
        changes: the new number by place.
        graph: gets new nodes where they are needed.
        names: of the graph.

    Raises:
        ValueError: a piece at one of the places is neither.
    """
    value = constant_of(tensor)
    if value is not None:
        new = value.copy()
        for place, number in changes.items():
            new.reshape(-1)[place] = number
        return gs.Constant(names.fresh(tensor.name), new)
    node = producer(tensor)
    if node is not None and node.op in ("Cast", "Identity"):
        source = restated(node.inputs[0], changes, graph, names)
        return _beside(node, [source], graph, names)
    if node is None or node.op != "Concat":
        raise ValueError(f"{tensor.name} holds no numbers that can be changed")
    pieces, offset = [], 0
    for piece in node.inputs:
        count = len(stated(piece) or ())
        own = {place - offset: number for place, number in changes.items() if offset <= place < offset + count}
        pieces.append(restated(piece, own, graph, names) if own else piece)
        offset += count
    return _beside(node, pieces, graph, names)


def _beside(node: gs.Node, inputs: list[gs.Tensor], graph: gs.Graph, names: Names) -> gs.Tensor:
    """The result of a node like `node`, behind it in the graph, with other inputs."""
    (old,) = node.outputs
    result = gs.Variable(names.fresh(old.name), old.dtype, old.shape)
    copy = gs.Node(node.op, names.fresh(node.name), dict(node.attrs), inputs, [result])
    position = next(index for index, each in enumerate(graph.nodes) if each is node)
    graph.nodes.insert(position + 1, copy)
    return result
