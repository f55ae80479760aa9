"""Replace Concat with a tensor of one value by Pad: that writes the value without a tensor to read it from.

    Concat(f, x, g, axis = a) = Pad(x, begins = [.., f.shape[a], ..], ends = [.., g.shape[a], ..], value = v)

where f and g, any number of them, are filled with v: initializers, or what ConstantOfShape fills for a shape that may
be computed. Their lengths along the axis must be known; Concat demands that the other sizes are those of x. Pad is
only written where something goes in exchange: an initializer, or a ConstantOfShape, that nothing else reads.

Left alone: vectors, since joining those is how shapes are computed; fills of more than one value; types for which the
opset or onnxruntime has no Pad.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.filled import filled_with
from graphopt.graph import Names, all_graphs, constant_of, disconnect, is_constant, label_of, named_tensors, producer
from graphopt.partial_values import ShapeValues, known_dimensions
from graphopt.pass_base import Context, Effect, Pass, PassResult, Skip

_PADS_AS_INPUT = 11  # the opset since which they are; integers can be padded since then too
_FLOATS = {"float16", "float32", "float64"}
_PADDED = _FLOATS | {"int8", "int32", "int64", "uint8", "uint32", "uint64"}


@dataclass(frozen=True, kw_only=True)
class ReplaceConcat(Pass):
    """Replace Concat of a tensor with tensors that are filled with one value by Pad."""

    name: ClassVar[str] = "replace-concat"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Replace in `graph` and the graphs in it; the fills are then dead."""
        found = [
            (node, padding, each.opset)
            for each in all_graphs(graph)
            for node in each.nodes
            if node.op == "Concat" and not node.domain and (padding := _padding(node)) is not None
        ]
        if not found:
            return PassResult()
        context.infer_shapes(graph)
        named, names, shapes = named_tensors(graph), Names(graph), ShapeValues(graph)
        chosen: dict[int, tuple[gs.Node, _Padding, list[int], int]] = {}
        skipped = []
        for node, padding, opset in found:
            sizes = [_sizes(tensor, shapes) for tensor in node.inputs]
            rank = next((len(size) for size in sizes if size is not None), None)
            if rank == 1:
                continue
            pads = None if rank is None else _pads(node.attrs["axis"] % rank, rank, sizes, padding.position)
            reason = _why_not(padding, pads, opset)
            if reason is None and pads is not None:
                chosen[id(node)] = node, padding, pads, opset
            else:
                skipped.append(_skip(node, reason))
        kept = [node for node, padding, *_ in chosen.values() if not _any_dies(padding, chosen, named)]
        for node in kept:
            del chosen[id(node)]
            skipped.append(_skip(node, "others read all that it joins, so nothing would go"))
        for node, padding, pads, opset in chosen.values():
            _replace(node, padding, pads, opset, names)
        return PassResult(rewrites=len(chosen), skipped=tuple(skipped))


def _skip(node: gs.Node, reason: str | None) -> Skip:
    return Skip(label_of(node), f"not replaced by Pad: {reason}")


@dataclass(frozen=True)
class _Padding:
    """What a Concat joins to its one input that is not filled with a value."""

    position: int  # of that input
    fills: list[gs.Tensor]
    values: list[np.generic]  # of the fills


def _padding(node: gs.Node) -> _Padding | None:
    values = [filled_with(tensor) for tensor in node.inputs]
    if values.count(None) != 1 or len(values) == 1:
        return None
    position = values.index(None)
    if is_constant(node.inputs[position]):
        return None
    fills = [tensor for index, tensor in enumerate(node.inputs) if index != position]
    return _Padding(position, fills, [value for value in values if value is not None])


def _sizes(tensor: gs.Tensor, shapes: ShapeValues) -> Sequence[int | None] | None:
    """The sizes of a tensor, also of what ConstantOfShape fills for a shape of which only a part is known."""
    node = producer(tensor)
    if node is None or node.op != "ConstantOfShape":
        return known_dimensions(tensor)
    stated, shape = constant_of(node.inputs[0]), shapes.of(node.inputs[0])
    if stated is not None:
        return [int(size) for size in stated]
    if shape is None:
        return known_dimensions(tensor)
    return [int(size) if known else None for size, known in zip(shape.values, shape.known, strict=True)]


def _pads(axis: int, rank: int, sizes: list[Sequence[int | None] | None], position: int) -> list[int] | None:
    """Begins of all axes, then ends; None where a length is not known."""
    lengths = [None if size is None else size[axis] for size in sizes]
    before, after = lengths[:position], lengths[position + 1 :]
    if None in before or None in after:
        return None
    pads = [0] * (2 * rank)
    pads[axis], pads[rank + axis] = sum(filter(None, before)), sum(filter(None, after))
    return pads


def _why_not(padding: _Padding, pads: list[int] | None, opset: int) -> str | None:
    value = padding.values[0]
    if any(other != value for other in padding.values):
        return "what it joins is filled with more than one value"
    if pads is None:
        return "how long what it joins is, is computed at run time"
    if value.dtype.name not in (_PADDED if opset >= _PADS_AS_INPUT else _FLOATS):
        return f"there is no Pad for {value.dtype} in opset {opset}"
    if opset < _PADS_AS_INPUT and np.float32(value) != value:
        return f"the attribute of Pad in opset {opset} cannot hold {value}"
    return None


def _any_dies(padding: _Padding, chosen: Container[int], named: Container[int]) -> bool:
    """Whether a fill is read by nodes alone that will not read it any more."""
    return any(
        id(tensor) not in named and all(id(reader) in chosen for reader in tensor.outputs) for tensor in padding.fills
    )


def _replace(node: gs.Node, padding: _Padding, pads: list[int], opset: int, names: Names) -> None:
    (output,) = node.outputs
    value = np.asarray(padding.values[0])
    inputs = [node.inputs[padding.position]]
    disconnect(node)
    node.op = "Pad"
    node.attrs.clear()
    if opset < _PADS_AS_INPUT:
        node.attrs.update(pads=pads, value=float(value))
    else:
        inputs.append(gs.Constant(names.fresh(f"{output.name}/pads"), np.array(pads, np.int64)))
        if value != 0:  # the default
            inputs.append(gs.Constant(names.fresh(f"{output.name}/value"), value))
    node.inputs.extend(inputs)
    node.outputs.append(output)
