"""HardSigmoid, HardSwish and AveragePool as what they stand for, which int8 kernels can run, or run faster.

    HardSigmoid(x) = max(0, min(1, alpha * x + beta)) = alpha * clip(x + beta / alpha, 0, 1 / alpha)
    HardSwish(x)   = x * HardSigmoid(x; 1/6, 1/2)     = x * clip(x + 3, 0, 6) / 6
    (https://onnx.ai/onnx/operators/onnx__HardSigmoid.html, onnx__HardSwish.html)

Between quantizers only the sum and the product remain: the Q behind a sum does its Clip, and a factor is a DQ with
another scale. The ranges of the new tensors follow from those of the old ones, so calibration need not see them.

    AveragePool(x) = Conv(x, 1 / |kernel|; a group a channel) * |kernel| / places that count

onnxruntime runs the Conv in int8 two to four times faster than its AveragePool (measured from 32 x 112 x 112 to
1280 x 8 x 8); the factor, for where padding does not count in the mean, takes a third of the time of the Conv. A pool
over the whole picture has a fast kernel of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.evaluate import evaluate
from graphopt.graph import Names, all_graphs, disconnect, has_input
from graphopt.nested_tensors import range_names
from graphopt.ranges import Ranges, TensorRange

_NOT_OF_CONV = ("ceil_mode", "count_include_pad")
_SWISH_ALPHA, _SWISH_BETA = 1 / 6, 0.5


def is_decomposed(node: gs.Node) -> bool:
    """Whether what a node stands for runs in int8 where the node itself does not, or runs faster.

    An AveragePool must be of pictures whose channels are known, and whose sizes are, too, where padding does not count.
    None may be smaller than the kernel: a pool takes the mean of what is there, and the Conv fails.
    """
    if node.op != "AveragePool":
        return True
    shape, result = (tensor.shape for tensor in (node.inputs[0], node.outputs[0]))
    if shape is None or len(shape) != 4 or node.attrs.get("ceil_mode"):
        return False
    if result is not None and all(size == 1 for size in result[2:]):
        return False
    known = all(isinstance(size, int) for size in (shape[1:] if _leaves_padding_out(node) else shape[1:2]))
    return known and _kernel_fits(node, shape[2:])


def _kernel_fits(pool: gs.Node, sizes: Iterable[Any]) -> bool:
    """Whether no padded size, of those that are known or 1, is below the kernel's."""
    if pool.attrs.get("auto_pad", "NOTSET").startswith("SAME"):
        return True
    kernel = pool.attrs["kernel_shape"]
    pads = pool.attrs.get("pads") or [0] * (2 * len(kernel))
    dilations = pool.attrs.get("dilations") or [1] * len(kernel)
    padded = (
        (size if isinstance(size, int) else 1) + begin + end
        for size, begin, end in zip(sizes, pads[: len(kernel)], pads[len(kernel) :], strict=True)
    )
    return all(size > (places - 1) * step for size, places, step in zip(padded, kernel, dilations, strict=True))


def _leaves_padding_out(pool: gs.Node) -> bool:
    pads = any(pool.attrs.get("pads") or ()) or pool.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return pads and not pool.attrs.get("count_include_pad", 0)


def decompose(graph: gs.Graph, nodes: Iterable[gs.Node], ranges: Ranges) -> Ranges:
    """Replace nodes of float32 tensors for which `is_decomposed` holds in place.

    Args:
        graph: the main graph.
        nodes: which of its nodes to replace, and of those in nested graphs.
        ranges: with those of the nodes' outputs.

    Returns:
        The ranges, with those of the new tensors.
    """
    names, called, tensors = Names(graph), range_names(graph), dict(ranges.tensors)
    replacements: dict[int, list[gs.Node]] = {}
    for node in nodes:
        found = tensors[called.get(id(node.outputs[0]), node.outputs[0].name)]
        decomposition = _Decomposition(node, names, tensors)
        if node.op == "AveragePool":
            replacements[id(node)] = decomposition.average(found, graph.import_domains)
        else:
            replacements[id(node)] = decomposition.hard_activation(found)
    for each in all_graphs(graph):
        each.nodes[:] = [new for node in each.nodes for new in replacements.get(id(node), [node])]
    return replace(ranges, tensors=tensors)


def write_clips_as_limits(graph: gs.Graph, products: Iterable[gs.Node]) -> None:
    """Replace the Relu or Clip behind a product in int8 by Max and Min, in place, where no Q follows.

    onnxruntime looks for the Q of a product behind a Relu or Clip that one node reads; finding none it does not fuse
    the product at all, and dequantizes its weight in every run (held against version 1.32). It looks behind no Max.

    Args:
        graph: the main graph, quantizers and all.
        products: those whose output may stay float, of it or of nested graphs.
    """
    names = Names(graph)
    clips = {id(clip) for node in products if (clip := _clip_that_hides(node)) is not None}
    for each in all_graphs(graph):
        each.nodes[:] = [new for node in each.nodes for new in (_limits(node, names) if id(node) in clips else [node])]


def _clip_that_hides(product: gs.Node) -> gs.Node | None:
    (value,) = product.outputs
    if len(value.outputs) != 1 or value.outputs[0].op not in ("Relu", "Clip"):
        return None
    (clip,) = value.outputs
    readers = clip.outputs[0].outputs
    hides = len(readers) == 1 and readers[0].op != "QuantizeLinear" and any(_bounds(clip))
    return clip if hides else None


def _bounds(clip: gs.Node) -> tuple[gs.Tensor | None, gs.Tensor | None]:
    """The lower and the upper limit, where the node states them; Relu's is made up."""
    if clip.op == "Relu":
        return gs.Constant("", np.zeros((), np.float32)), None
    lower, upper = (clip.inputs[index] if has_input(clip, index) else None for index in (1, 2))
    return lower, upper


def _limits(clip: gs.Node, names: Names) -> list[gs.Node]:
    """Max and Min as Clip puts them: where the limits cross, the upper one holds."""
    value, result, bounds = clip.inputs[0], clip.outputs[0], _bounds(clip)
    disconnect(clip)
    limits = [(op, bound) for op, bound in zip(("Max", "Min"), bounds, strict=True) if bound is not None]
    new: list[gs.Node] = []
    for position, (op, bound) in enumerate(limits):
        bound.name = bound.name or names.fresh(f"{result.name}_zero")
        is_last = position == len(limits) - 1
        name = clip.name if is_last else names.fresh(f"{result.name}_limited")
        output = result if is_last else gs.Variable(name, np.dtype(np.float32), result.shape)
        new.append(gs.Node(op, name, {}, [value, bound], [output]))
        value = output
    return new


class _Decomposition:
    """The nodes that stand for one node; ranges of new tensors are added to `ranges`."""

    def __init__(self, node: gs.Node, names: Names, ranges: dict[str, TensorRange]) -> None:
        self.node, self.names, self.ranges = node, names, ranges
        self.value, self.result = node.inputs[0], node.outputs[0]
        self.new: list[gs.Node] = []

    def average(self, found: TensorRange, imports: Iterable[onnx.OperatorSetIdProto]) -> list[gs.Node]:
        attrs = {name: value for name, value in self.node.attrs.items() if name not in _NOT_OF_CONV}
        channels, *sizes = self.value.shape[1:]
        kernel = [int(size) for size in attrs["kernel_shape"]]
        leaves_padding_out = _leaves_padding_out(self.node)
        disconnect(self.node)
        mean = self._conv(self.value, channels, kernel, attrs, "with_padding" if leaves_padding_out else None)
        if leaves_padding_out:
            ones = gs.Constant("ones", np.ones((1, 1, *sizes), np.float32))
            counted = self._conv(ones, 1, kernel, attrs, "counted")
            counting = self.new.pop()
            constants = {id(tensor): tensor.values for tensor in counting.inputs}
            share = evaluate([counting], constants, [counted], imports).values[id(counted)]
            disconnect(counting)
            factor = gs.Constant(self.names.fresh(f"{self.result.name}_factor"), 1 / share)
            self._add("Mul", None, mean, factor)
            self.ranges[mean.name] = found
        return self.new

    def _conv(
        self, value: gs.Tensor, channels: int, kernel: list[int], attrs: dict[str, Any], what: str | None
    ) -> gs.Tensor:
        weight = np.full((channels, 1, *kernel), 1 / math.prod(kernel), np.float32)
        mean = gs.Constant(self.names.fresh(f"{self.result.name}_mean"), weight)
        return self._add("Conv", what, value, mean, **attrs, group=channels)

    def hard_activation(self, found: TensorRange) -> list[gs.Node]:
        swish = self.node.op == "HardSwish"
        alpha = _SWISH_ALPHA if swish else self.node.attrs.get("alpha", 0.2)
        beta = _SWISH_BETA if swish else self.node.attrs.get("beta", 0.5)
        disconnect(self.node)
        shifted = self._add("Add", "shifted", self.value, self._scalar("offset", beta / alpha))
        bounds = (self._scalar("lowest", 0.0), self._scalar("highest", 1 / alpha))
        clipped = self._add("Clip", "clipped", shifted, *bounds)
        product = self._add("Mul", "product", self.value, clipped) if swish else clipped
        self._add("Mul", None, product, self._scalar("factor", alpha))
        self.ranges[product.name] = scaled_range(found, 1 / alpha)
        if swish:  # the factor of x is as large as it may be: x's own range does not say how much of it is used
            self.ranges[clipped.name] = replace(
                found, minimum=0.0, maximum=1 / alpha, observed_minimum=0.0, observed_maximum=1 / alpha
            )
        return self.new

    def _scalar(self, what: str, value: float) -> gs.Constant:
        return gs.Constant(self.names.fresh(f"{self.result.name}_{what}"), np.asarray(value, np.float32))

    def _add(self, op: str, what: str | None, *inputs: gs.Tensor, **attrs: Any) -> gs.Tensor:
        """A new node; its output is a new tensor, or the old node's (None)."""
        name = self.names.fresh(f"{self.result.name}_{what or 'rescaled'}")
        shape = self.result.shape if op == "Conv" else self.value.shape
        output = self.result if what is None else gs.Variable(name, np.dtype(np.float32), shape)
        self.new.append(gs.Node(op, name, attrs, list(inputs), [output]))
        return output


def scaled_range(found: TensorRange, factor: float) -> TensorRange:
    """The range of `factor` times a tensor; `factor` > 0, and statistics that nobody asks for here are left out."""
    return replace(
        found,
        minimum=found.minimum * factor,
        maximum=found.maximum * factor,
        observed_minimum=found.observed_minimum * factor,
        observed_maximum=found.observed_maximum * factor,
        mean=None,
        second_moment=None,
        histogram=None,
    )
