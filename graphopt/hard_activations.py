"""HardSigmoid and HardSwish as what they stand for, which int8 kernels can run.

    HardSigmoid(x) = max(0, min(1, alpha * x + beta)) = alpha * clip(x + beta / alpha, 0, 1 / alpha)
    HardSwish(x)   = x * HardSigmoid(x; 1/6, 1/2)     = x * clip(x + 3, 0, 6) / 6
    (https://onnx.ai/onnx/operators/onnx__HardSigmoid.html, onnx__HardSwish.html)

Between quantizers only the sum and the product remain: the Q behind a sum does its Clip, and a factor is a DQ with
another scale. The ranges of the new tensors follow from those of the old ones, so calibration need not see them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.branch_tensors import range_names
from graphopt.graph import Names, all_graphs, disconnect
from graphopt.ranges import Ranges, TensorRange

_SWISH_ALPHA, _SWISH_BETA = 1 / 6, 0.5


def decompose_activations(graph: gs.Graph, nodes: Iterable[gs.Node], ranges: Ranges) -> Ranges:
    """Replace HardSigmoid and HardSwish nodes of float32 tensors in place.

    Args:
        graph: the main graph.
        nodes: which of its nodes to replace, and of those in its branches.
        ranges: with those of the nodes' outputs.

    Returns:
        The ranges, with those of the new tensors.
    """
    names, called, tensors = Names(graph), range_names(graph), dict(ranges.tensors)
    replacements: dict[int, list[gs.Node]] = {}
    for node in nodes:
        found = tensors[called.get(id(node.outputs[0]), node.outputs[0].name)]
        replacements[id(node)] = _Decomposition(node, names, tensors).run(found)
    for each in all_graphs(graph):
        each.nodes[:] = [new for node in each.nodes for new in replacements.get(id(node), [node])]
    return replace(ranges, tensors=tensors)


class _Decomposition:
    """The nodes that stand for one node; ranges of new tensors are added to `ranges`."""

    def __init__(self, node: gs.Node, names: Names, ranges: dict[str, TensorRange]) -> None:
        self.node, self.names, self.ranges = node, names, ranges
        self.value, self.result = node.inputs[0], node.outputs[0]
        self.new: list[gs.Node] = []

    def run(self, found: TensorRange) -> list[gs.Node]:
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

    def _add(self, op: str, what: str | None, *inputs: gs.Tensor) -> gs.Tensor:
        """A new node; its output is a new tensor, or the old node's (None)."""
        name = self.names.fresh(f"{self.result.name}_{what or 'rescaled'}")
        output = self.result if what is None else gs.Variable(name, np.dtype(np.float32), self.value.shape)
        self.new.append(gs.Node(op, name, {}, list(inputs), [output]))
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
