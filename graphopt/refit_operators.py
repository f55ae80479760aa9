"""Which operators of a cut graph can get other weights, in which order, and what each should come to.

The target of an operator is its own output in the original, before any activation. Where Adds follow, whose other
operands come from operators that are set already, the target is their sum in the original less those operands in the
cut graph: a residual branch then makes up for the error of the skip connection.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.biases import Bias, bias_add, is_per_channel, only_add, put_constant, same_shape
from graphopt.cut import Cut
from graphopt.graph import (
    Names,
    constant_of,
    has_input,
    is_constant,
    label_of,
    named_tensors,
    producer,
)
from graphopt.least_squares import Affinity, Moments
from graphopt.linear import OPERATORS, LinearWeights, linear, set_weights
from graphopt.node_order import sorted_nodes
from graphopt.pass_base import Context, Skip
from graphopt.patches import Patches

_COPIES = 3  # of the sums of products, while a system of equations is solved


@dataclass(frozen=True)
class Operator:
    """A linear operator of the cut graph, and what it should come to."""

    bias: Bias
    original: gs.Node
    target: str  # the tensor of the original that holds its output, or a sum with it
    others: tuple[gs.Tensor, ...]  # what is added to its output before the target, in the cut graph
    patches: Patches

    @property
    def node(self) -> gs.Node:
        """The node in the cut graph."""
        return self.bias.node

    @property
    def nbytes(self) -> int:
        """Bytes that refitting it takes: sums for two halves of the samples, and what solving for the weight copies."""
        sizes = self.patches.groups, self.patches.features, self.patches.outputs
        return (2 + _COPIES) * Moments.nbytes(*sizes)

    @property
    def output(self) -> str:
        """The name of the tensor that holds its output, bias included."""
        return str(self.bias.output.name)

    @property
    def reads(self) -> str:
        """The name of the activations that it multiplies."""
        return str(self.node.inputs[0].name)

    def affinity(self) -> Affinity:
        """What it does now."""
        weight = np.asarray(constant_of(self.node.inputs[1]))
        return self.patches.affinity(weight, self.bias.values(), self.node.attrs.get("alpha", 1.0))

    def set(self, graph: gs.Graph, fitted: Affinity, names: Names) -> bool:
        """Give it another weight and bias; return False, with nothing changed, where its dtype cannot hold them."""
        dtype = constant_of(self.node.inputs[1]).dtype  # type: ignore[union-attr]
        weight = np.ascontiguousarray(self.patches.weight(fitted, self.node.attrs.get("alpha", 1.0)))
        with np.errstate(over="ignore"):
            weight, bias = weight.astype(dtype), fitted.bias.reshape(-1).astype(dtype)
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            return False
        put_constant(self.node, 1, weight, names)
        if self.bias.add is None and self.node.op == "MatMul":
            _, after = set_weights(self.node, LinearWeights(weight, bias), names)
            place = next(index for index, node in enumerate(graph.nodes) if node is self.node)
            graph.nodes[place + 1 : place + 1] = after
            return True
        self.bias.put(bias, names)
        return True


def operators_to_refit(graph: gs.Graph, cut: Cut, context: Context) -> tuple[list[Operator], list[Skip]]:
    """The linear operators of a cut graph in the order in which to refit them, and those that cannot be.

    Args:
        graph: the cut graph, with shapes inferred.
        cut: where it comes from.
        context: its defaults and its memory budget.
    """
    finder = _Finder(graph, cut)
    found: list[Operator] = []
    skipped: list[Skip] = []
    for node in sorted_nodes(graph):
        operator = None
        if not node.domain and node.op in OPERATORS:
            operator = finder.operator(node, context)
        if isinstance(operator, str):
            skipped.append(Skip(label_of(node), operator))
        elif operator is not None:
            found.append(operator)
        finder.pass_by(node, is_refitted=isinstance(operator, Operator))
    return [finder.with_sums(each, number) for number, each in enumerate(found)], skipped


class _Finder:
    """Goes through the nodes of a cut graph in order, and knows which operators each tensor waits for."""

    def __init__(self, graph: gs.Graph, cut: Cut) -> None:
        self._originals = {tensor.name: node for node in cut.original.nodes for tensor in node.outputs}
        self._named = named_tensors(graph)
        self._last: dict[int, int] = {}  # by id of a tensor: number of the last refitted operator that it needs
        self._count = 0

    def pass_by(self, node: gs.Node, *, is_refitted: bool) -> None:
        """Take note of a node, in topological order."""
        last = max((self._last.get(id(tensor), -1) for tensor in node.inputs), default=-1)
        if is_refitted:
            last, self._count = self._count, self._count + 1
        self._last.update((id(tensor), last) for tensor in node.outputs)

    def operator(self, node: gs.Node, context: Context) -> Operator | str:
        """The operator that a node is, with its own output as the target, or why it is not refitted."""
        known = linear(node, context.defaults)
        if isinstance(known, str):
            return known
        if known.dequantized is not None:
            return "its weight is quantized: refit before qdq"
        add = self._bias_add(node, known.output_channels) if node.op == "MatMul" else None
        bias = node.inputs[2] if has_input(node, 2) else None
        if any(_is_shared(tensor) for tensor in (node.inputs[1], bias) if tensor is not None):
            return "it shares its weight or bias with another node"
        if node.inputs[1].dtype not in _FLOATS:
            return "its weight is of another type than float16, float32 and float64"
        if bias is not None and not is_per_channel(bias, known.output_channels):
            return "its bias is not one number per channel"
        place = Bias(node, add)
        output = place.output.name
        if output not in self._originals:
            return "the graph before the cut has no tensor of its output's name: put refit right after prune"
        operator = Operator(place, self._originals[output], output, (), Patches(node, known.weight_shape))
        if operator.nbytes > context.memory_budget // 2:
            return (
                f"the products of its {operator.patches.features} inputs take {operator.nbytes / 2**20:.0f} MiB, more "
                f"than half of the memory budget of {context.memory_budget / 2**20:.0f} MiB"
            )
        return operator

    def with_sums(self, operator: Operator, number: int) -> Operator:
        """The operator with the sum as target that follows its output, if all else in it is there before it runs."""
        tensor, others = operator.bias.output, operator.others
        while (add := only_add(tensor, self._named)) is not None:
            other = next((each for each in add.inputs if each is not tensor), tensor)
            result = add.outputs[0]
            waits = other is tensor or self._last.get(id(other), -1) >= number
            if waits or result.name not in self._originals or not same_shape(tensor, result):
                break
            tensor, others = result, (*others, other)
        return replace(operator, target=tensor.name, original=self._originals[tensor.name], others=others)

    def _bias_add(self, matmul: gs.Node, channels: int) -> gs.Node | None:
        """The Add that serves as the bias of a MatMul, where no other node reads its constant."""
        add = bias_add(matmul, channels, self._named)
        is_free = add is not None and not any(_is_shared(each) for each in add.inputs if is_constant(each))
        return add if is_free else None


_FLOATS = (np.float16, np.float32, np.float64)


def _is_shared(constant: gs.Tensor) -> bool:
    """Whether more than one node reads a constant, under its own name or through Identity."""
    while len(constant.outputs) == 1:
        source = producer(constant)
        if source is None or source.op != "Identity":
            return False
        constant = source.inputs[0]
    return True
