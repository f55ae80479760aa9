"""A Resize between int8 Convs that repeats each pixel, as copies of what lies side by side in memory.

    q[N, C, H, W] -> DQ -> Resize by (h, w) -> Q -> r[N, C, h * H, w * W]
    q -> Transpose -> [N, H, W, 1, C], w times side by side -> [N * H, 1, w * W, C], h times -> Transpose -> r

Around its int8 Convs onnxruntime keeps the channels of a pixel side by side, to which it moves a Resize too, whose
kernel then takes every value by itself: 1.6 ms of a [1, 128, 128, 128] that copies make in 0.1. Its own Transposes and
these cancel out. Elsewhere these would cost more than they save.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.graph import (
    Names,
    constant_of,
    disconnect,
    has_input,
    integers_of,
    is_output,
    producer,
    remove_nodes,
    remove_unread_nodes,
)
from graphopt.quantizers import dequantizer_of, quantizer_of, quantizers_after
from graphopt.sizes import fixed_shape

_TO_PIXELS, _TO_PLANES = (0, 2, 3, 1), (0, 3, 1, 2)
_OTHER_LAYOUT = frozenset({"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def repeat_pixels(graph: gs.Graph, nodes: Iterable[gs.Node], names: Names) -> int:
    """Replace each Resize that repeats pixels between int8 Convs, in place; return how many.

    Args:
        graph: the graph that the nodes are in, quantizers and all.
        nodes: operators that run in int8.
        names: of the main graph.
    """
    int8 = {id(node): node for node in nodes}
    resizes = [node for node in int8.values() if node.op == "Resize"]
    if not resizes:
        return 0
    from_convs, to_convs = (_reached(int8, forwards=forwards) for forwards in (True, False))
    repeating = _Repeating(graph, names)
    between = [node for node in resizes if id(node) in from_convs and id(node) in to_convs]
    replaced = sum(map(repeating.replace, between))
    repeating.finish()
    return replaced


def factors_of(resize: gs.Node) -> tuple[int, int] | None:
    """How often a Resize repeats each row and each column of [N, C, H, W]; None where it does something else.

    Formulas: https://onnx.ai/onnx/operators/onnx__Resize.html.
    """
    scales = _scales_of(resize)
    if scales is None or len(scales) != 4 or scales[:2] != [1, 1] or resize.attrs.get("axes"):
        return None
    if resize.attrs.get("mode", "nearest") != "nearest" or any(scale < 1 or scale % 1 for scale in scales):
        return None
    rows, columns = (int(scale) for scale in scales[2:])
    repeats = rows * columns > 1 and all(_repeats(resize, factor) for factor in (rows, columns))
    return (rows, columns) if repeats else None


def _scales_of(resize: gs.Node) -> list[float] | None:
    scales = constant_of(resize.inputs[2]) if has_input(resize, 2) else None
    if scales is not None and scales.size:
        return [float(scale) for scale in scales.reshape(-1)]
    before, after = fixed_shape(resize.inputs[0]), integers_of(resize, 3)
    if before is None or after is None or len(before) != len(after) or 0 in before:
        return None
    return [new / old for old, new in zip(before, after, strict=True)]


def _repeats(resize: gs.Node, factor: int) -> bool:
    """Whether place i takes the value of place floor(i / factor)."""
    places = np.arange(2 * factor)
    kind = resize.attrs.get("coordinate_transformation_mode", "half_pixel")
    if kind == "asymmetric":
        found = places / factor
    elif kind in ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel"):
        found = (places + 0.5) / factor - 0.5
    else:
        return factor == 1 and kind == "align_corners"
    rounded = {
        "round_prefer_floor": np.ceil(found - 0.5),
        "round_prefer_ceil": np.floor(found + 0.5),
        "floor": np.floor(found),
        "ceil": np.ceil(found),
    }[resize.attrs.get("nearest_mode", "round_prefer_floor")]
    return bool(np.array_equal(np.maximum(rounded, 0), places // factor))


def _reached(int8: dict[int, gs.Node], *, forwards: bool) -> Collection[int]:
    """By id, the operators that lie behind an int8 Conv, or before one, with none between that changes the layout."""
    waiting = [node for node in int8.values() if node.op == "Conv"]
    seen: set[int] = set()
    while waiting:
        for node in _beside(waiting.pop(), forwards=forwards):
            is_between = id(node) in int8 or quantizer_of(node) is not None
            if id(node) not in seen and is_between and node.op not in _OTHER_LAYOUT:
                seen.add(id(node))
                waiting.append(node)
    return seen


def _beside(node: gs.Node, *, forwards: bool) -> Iterator[gs.Node]:
    if forwards:
        yield from (reader for tensor in node.outputs for reader in tensor.outputs)
    else:
        yield from (found for tensor in node.inputs if (found := producer(tensor)) is not None)


class _Repeating:
    def __init__(self, graph: gs.Graph, names: Names) -> None:
        self.graph, self.names = graph, names
        self.replaced: list[gs.Node] = []
        self.dequantizers: dict[int, gs.Node] = {}  # that a Resize read

    def replace(self, resize: gs.Node) -> bool:
        """Write copies in place of a Resize that repeats pixels of so many channels; tell whether it is one."""
        values, (result,) = dequantizer_of(resize.inputs[0]), resize.outputs
        factors, shape, quantizers = factors_of(resize), resize.inputs[0].shape, list(quantizers_after(result))
        if factors is None or values is None or shape is None or not isinstance(shape[1], int):
            return False
        if len(quantizers) != 1 or len(result.outputs) != 1 or is_output(self.graph, result):
            return False
        (quantize,), (rows, columns), (batch, channels, height, _) = quantizers, factors, shape
        pixels = self._step("Transpose", [values.data], perm=list(_TO_PIXELS))
        if columns > 1:
            single = self._reshape(pixels, self._constant(pixels, [0, 0, 0, 1, channels]))
            beside = self._step("Concat", [single] * columns, axis=3)
            pixels = self._reshape(beside, self._constant(beside, [0, 0, -1, channels]))
        if rows > 1:
            single = self._reshape(pixels, self._constant(pixels, [-1, 1, 0, 0]))
            below = self._step("Concat", [single] * rows, axis=1)
            pixels = self._reshape(below, self._sizes_of_all(values.data, batch, height, rows))
        integers = quantize.output
        disconnect(quantize.node)
        self.replaced += [resize, quantize.node]
        self.dequantizers[id(values.node)] = values.node
        self._step("Transpose", [pixels], integers, perm=list(_TO_PLANES))
        return True

    def finish(self) -> None:
        """Take out what was replaced, and order the nodes."""
        if not self.replaced:
            return
        remove_nodes(self.graph, self.replaced)
        remove_unread_nodes(self.graph, self.dequantizers.values())
        self.graph.toposort()

    def _sizes_of_all(self, data: gs.Tensor, batch: Any, height: Any, rows: int) -> gs.Tensor:
        """What becomes of [N * H, h, W, C]: N, which may show only when the model runs, and h * H."""
        if isinstance(height, int):
            return self._constant(data, [-1, rows * height, 0, 0])
        if isinstance(batch, int):
            return self._constant(data, [batch, -1, 0, 0])
        first = self._step("Gather", [self._step("Shape", [data]), self._constant(data, [0])])
        return self._step("Concat", [first, self._constant(data, [-1, 0, 0])], axis=0)

    def _reshape(self, tensor: gs.Tensor, sizes: gs.Tensor) -> gs.Variable:
        return self._step("Reshape", [tensor, sizes])

    def _constant(self, about: gs.Tensor, values: list[int]) -> gs.Constant:
        return gs.Constant(self.names.fresh(f"{about.name}_sizes"), np.array(values, np.int64))

    def _step(
        self, op: str, inputs: list[gs.Tensor], output: gs.Variable | None = None, **attributes: Any
    ) -> gs.Variable:
        name = self.names.fresh(f"{inputs[0].name}_{op}")
        dtype = np.dtype(np.int64) if op == "Shape" else inputs[0].dtype
        output = output or gs.Variable(name, dtype)
        self.graph.nodes.append(gs.Node(op, name, attributes, inputs, [output]))
        return output
