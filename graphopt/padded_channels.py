"""Channels of zeros for Convs that read a model's inputs, where fast int8 kernels take multiples of some number.

    x[N, 3, ...] -> Q -> DQ -> Conv(w[M, 3, ...])
    x[N, 3, ...] -> Q -> Pad with the zero point -> DQ -> Conv(w[M, 4, ...])

The new weights are 0, so the integer sums are the same. On input planes a Pad copies long rows. Between int8 Convs
onnxruntime keeps the channels of a place side by side, where a Pad costs what it saves, and it does so too where
Transposes before the Conv bring it to that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.graph import Names, constant_of, is_constant, producer, remove_unread_nodes, set_input
from graphopt.quantizers import Quantizer, dequantizer_of
from graphopt.targets import DenseConvs


def pad_input_channels(graph: gs.Graph, nodes: Iterable[gs.Node], kernels: DenseConvs, names: Names) -> int:
    """Pad what the int8 Convs among `nodes` read from the inputs of the model, in place; return for how many.

    Args:
        graph: the graph that the nodes are in, quantizers and all.
        nodes: operators that run in int8.
        kernels: which Convs the target has fast kernels for.
        names: of the main graph.
    """
    padding = _Padding(graph, kernels, names)
    padded = sum(padding.pad(node) for node in nodes if node.op == "Conv")
    padding.finish()
    return padded


class _Padding:
    def __init__(self, graph: gs.Graph, kernels: DenseConvs, names: Names) -> None:
        self.graph, self.kernels, self.names = graph, kernels, names
        self.wider: dict[int, gs.Variable] = {}  # by id of what a DQ computes, what another one of more channels does
        self.replaced: list[gs.Node] = []

    def pad(self, conv: gs.Node) -> bool:
        """Pad what a Conv reads, unless there is nothing to gain; tell whether it was done."""
        values, weights = (dequantizer_of(tensor) for tensor in conv.inputs[:2])
        if values is None or weights is None or not is_constant(weights.data) or not values.has_zero_point:
            return False
        outputs, channels, *kernel = weights.data.shape
        lacking = -channels % self.kernels.multiple
        if not lacking or conv.attrs.get("group", 1) > 1:
            return False
        gains = self.kernels.take(outputs, math.prod(kernel), _places(conv.outputs[0]))
        if not gains or not _reads_input_planes(values):
            return False
        set_input(conv, 0, self._wider(values, lambda: self._padded(values, channels, lacking, len(kernel))))
        set_input(conv, 1, self._wider(weights, lambda: self._with_zeros(weights, lacking)))
        return True

    def finish(self) -> None:
        """Remove each DQ that only padded Convs read, and order the nodes."""
        if not self.replaced:
            return
        remove_unread_nodes(self.graph, self.replaced)
        self.graph.toposort()

    def _wider(self, found: Quantizer, integers: Callable[[], gs.Tensor]) -> gs.Variable:
        """What wider integers stand for; the same for all Convs that read the same."""
        key = id(found.output)
        if key not in self.wider:
            stored = integers()
            name = self.names.fresh(f"{stored.name}_dequantized")
            self.wider[key] = gs.Variable(name, found.output.dtype, stored.shape)
            inputs = [stored, *found.node.inputs[1:]]
            self._add("DequantizeLinear", inputs, self.wider[key], dict(found.node.attrs))
            self.replaced.append(found.node)
        return self.wider[key]

    def _padded(self, values: Quantizer, channels: int, lacking: int, spatial: int) -> gs.Variable:
        data = values.data
        shape = None if data.shape is None else [data.shape[0], channels + lacking, *data.shape[2:]]
        padded = gs.Variable(self.names.fresh(f"{data.name}_padded"), data.dtype, shape)
        pads = np.zeros((2, 2 + spatial), np.int64)
        pads[1, 1] = lacking
        amounts = gs.Constant(self.names.fresh(f"{padded.name}_by"), pads.reshape(-1))
        self._add("Pad", [data, amounts, values.node.inputs[2]], padded, {})
        return padded

    def _with_zeros(self, weights: Quantizer, lacking: int) -> gs.Constant:
        stored = constant_of(weights.data)
        assert stored is not None
        zeros = np.zeros((stored.shape[0], lacking, *stored.shape[2:]), stored.dtype)
        return gs.Constant(self.names.fresh(f"{weights.data.name}_padded"), np.concatenate([stored, zeros], axis=1))

    def _add(self, op: str, inputs: list[gs.Tensor], output: gs.Variable, attributes: dict[str, Any]) -> None:
        self.graph.nodes.append(gs.Node(op, output.name, attributes, inputs, [output]))


def _places(result: gs.Tensor) -> int | None:
    """The product of the spatial sizes of [N, C, ...]; None where one is not known."""
    sizes = [None] if result.shape is None else result.shape[2:]
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


def _reads_input_planes(values: Quantizer) -> bool:
    """Whether nothing before a DQ is computed from int8, or transposed."""
    waiting, seen = [values.data], set[int]()
    while waiting:
        node = producer(waiting.pop())
        if node is None or id(node) in seen:
            continue
        if node.op in ("DequantizeLinear", "Transpose"):
            return False
        seen.add(id(node))
        waiting += node.inputs
    return True
