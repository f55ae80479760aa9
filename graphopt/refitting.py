"""Refit the linear operators of a cut graph, one after another, to what the original computes at the same places.

After channels are removed, an operator reads fewer channels and, behind others that were cut, slightly wrong ones. Its
weight and bias are chosen anew so that its output comes closest to the original's, on rows of data (`graphopt.patches`)
by least squares (`graphopt.least_squares`). The operators are taken in topological order and each reads what those
before it, set already, hand on, so that it makes up for their errors too.

The target of an operator is its own output in the original, before any activation. Where Adds follow, whose other
operands come from operators that are set already, the target is their sum in the original less those operands in the
cut graph: a residual branch then makes up for the error of the skip connection.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.cut import Cut
from graphopt.feeds import Samples
from graphopt.graph import (
    Array,
    Names,
    constant_of,
    has_input,
    is_constant,
    label_of,
    named_tensors,
    producer,
    set_input,
)
from graphopt.least_squares import Affinity, Moments
from graphopt.linear import OPERATORS, LinearWeights, linear, set_weights
from graphopt.node_order import sorted_nodes
from graphopt.pass_base import Context, Skip
from graphopt.patches import Patches
from graphopt.progress import track
from graphopt.replay import Piece, Replay

HELD_OUT = 4  # one sample in so many
_EXACT = 1e-9  # of the target's variance
_COPIES = 3  # of the sums of products, while a system of equations is solved


@dataclass(frozen=True)
class Evidence:
    """What is known of one operator: the map it has now, and sums over the samples to fit and to judge with."""

    now: Affinity
    fit: Moments
    judge: Moments

    @property
    def is_exact(self) -> bool:
        """Whether the operator computes what it should, but for rounding."""
        return self.judge.error(self.now) <= _EXACT * self.judge.power()

    @property
    def is_finite(self) -> bool:
        """Whether all rows were numbers."""
        return self.fit.finite and self.judge.finite


Rule = Callable[[Evidence], Affinity]


@dataclass(frozen=True)
class Operator:
    """A linear operator of the cut graph, and what it should come to."""

    node: gs.Node
    adds_bias: gs.Node | None  # the Add of a constant per channel that follows a MatMul and serves as its bias
    original: gs.Node
    target: str  # the tensor of the original that holds its output, or a sum with it
    others: tuple[gs.Tensor, ...]  # what is added to its output before the target, in the cut graph
    patches: Patches

    @property
    def nbytes(self) -> int:
        """Bytes that refitting it takes: sums for two halves of the samples, and what solving for the weight copies."""
        sizes = self.patches.groups, self.patches.features, self.patches.outputs
        return (2 + _COPIES) * Moments.nbytes(*sizes)

    @property
    def output(self) -> str:
        """The name of the tensor that holds its output, bias included."""
        return str((self.adds_bias or self.node).outputs[0].name)

    @property
    def reads(self) -> str:
        """The name of the activations that it multiplies."""
        return str(self.node.inputs[0].name)

    def affinity(self) -> Affinity:
        """What it does now."""
        weight = np.asarray(constant_of(self.node.inputs[1]))
        node, index = self._bias_place
        bias = np.asarray(constant_of(node.inputs[index])) if has_input(node, index) else None
        if bias is not None and self.node.op == "Gemm":
            bias = bias * self.node.attrs.get("beta", 1.0)
        return self.patches.affinity(weight, bias, self.node.attrs.get("alpha", 1.0))

    def set(self, graph: gs.Graph, fitted: Affinity, names: Names) -> bool:
        """Give it another weight and bias; return False, with nothing changed, where its dtype cannot hold them."""
        dtype = constant_of(self.node.inputs[1]).dtype  # type: ignore[union-attr]
        weight = np.ascontiguousarray(self.patches.weight(fitted, self.node.attrs.get("alpha", 1.0)))
        with np.errstate(over="ignore"):
            weight, bias = weight.astype(dtype), fitted.bias.reshape(-1).astype(dtype)
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            return False
        _put(self.node, 1, weight, names)
        if self.adds_bias is None and self.node.op == "MatMul":
            _, after = set_weights(self.node, LinearWeights(weight, bias), names)
            place = next(index for index, node in enumerate(graph.nodes) if node is self.node)
            graph.nodes[place + 1 : place + 1] = after
            return True
        _put(*self._bias_place, bias, names)
        if self.node.op == "Gemm":
            self.node.attrs["beta"] = 1.0
        return True

    @property
    def _bias_place(self) -> tuple[gs.Node, int]:
        """The node and the number of its input that is the bias."""
        if self.adds_bias is None:
            return self.node, 2
        return self.adds_bias, 0 if is_constant(self.adds_bias.inputs[0]) else 1


def _put(node: gs.Node, index: int, values: Array, names: Names) -> None:
    """Let a node read new values, under the old name where nothing else reads the old ones."""
    wanted = node.inputs[index].name if has_input(node, index) else f"{node.outputs[0].name}/bias"
    is_own = has_input(node, index) and _is_own(node.inputs[index])
    constant = gs.Constant(wanted if is_own else names.fresh(wanted), values)
    if index < len(node.inputs):
        set_input(node, index, constant)
    else:
        node.inputs.append(constant)


def _is_own(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and len(tensor.outputs) == 1


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
        adds_bias = self._bias_add(node, known.output_channels) if node.op == "MatMul" else None
        bias = node.inputs[2] if has_input(node, 2) else None
        if any(_is_shared(tensor) for tensor in (node.inputs[1], bias) if tensor is not None):
            return "it shares its weight or bias with another node"
        if node.inputs[1].dtype not in _FLOATS:
            return "its weight is of another type than float16, float32 and float64"
        if bias is not None and not _is_per_channel(bias, known.output_channels):
            return "its bias is not one number per channel"
        output = (adds_bias or node).outputs[0].name
        if output not in self._originals:
            return "the graph before the cut has no tensor of its output's name: put refit right after prune"
        operator = Operator(node, adds_bias, self._originals[output], output, (), Patches(node, known.weight_shape))
        if operator.nbytes > context.memory_budget // 2:
            return (
                f"the products of its {operator.patches.features} inputs take {operator.nbytes / 2**20:.0f} MiB, more "
                f"than half of the memory budget of {context.memory_budget / 2**20:.0f} MiB"
            )
        return operator

    def with_sums(self, operator: Operator, number: int) -> Operator:
        """The operator with the sum as target that follows its output, if all else in it is there before it runs."""
        tensor, others = (operator.adds_bias or operator.node).outputs[0], operator.others
        while (add := self._only_add(tensor)) is not None:
            other = next((each for each in add.inputs if each is not tensor), tensor)
            result = add.outputs[0]
            waits = other is tensor or self._last.get(id(other), -1) >= number
            if waits or result.name not in self._originals or not _same_shape(tensor, result):
                break
            tensor, others = result, (*others, other)
        return replace(operator, target=tensor.name, original=self._originals[tensor.name], others=others)

    def _bias_add(self, matmul: gs.Node, channels: int) -> gs.Node | None:
        add = self._only_add(matmul.outputs[0])
        constants = [] if add is None else [each for each in add.inputs if is_constant(each)]
        if add is None or len(constants) != 1 or not _same_shape(matmul.outputs[0], add.outputs[0]):
            return None
        return add if _is_per_channel(constants[0], channels) and not _is_shared(constants[0]) else None

    def _only_add(self, tensor: gs.Tensor) -> gs.Node | None:
        """The Add that alone reads a tensor."""
        if id(tensor) in self._named or len(tensor.outputs) != 1:
            return None
        reader = tensor.outputs[0]
        return reader if reader.op == "Add" and not reader.domain else None


_FLOATS = (np.float16, np.float32, np.float64)


def _is_shared(constant: gs.Tensor) -> bool:
    """Whether more than one node reads a constant, under its own name or through Identity."""
    while len(constant.outputs) == 1:
        source = producer(constant)
        if source is None or source.op != "Identity":
            return False
        constant = source.inputs[0]
    return True


def _is_per_channel(bias: gs.Tensor, channels: int) -> bool:
    shape = np.asarray(constant_of(bias)).shape
    return math.prod(shape) == 1 or (math.prod(shape) == channels and shape[-1] == channels)


def _same_shape(one: gs.Tensor, other: gs.Tensor) -> bool:
    return one.shape is not None and other.shape is not None and list(one.shape) == list(other.shape)


@dataclass(frozen=True)
class Data:
    """The samples that operators are refitted on.

    Attributes:
        samples: feeds of the model.
        count: how many there are.
        rows: how many rows of one operator's input and output to take at most, over all samples.
        seed: draws them.
    """

    samples: Samples
    count: int
    rows: int
    seed: int

    @staticmethod
    def is_held_out(index: int) -> bool:
        """Whether a sample is not fitted to, but judged by: every fourth is."""
        return index % HELD_OUT == HELD_OUT - 1


def refit(
    graph: gs.Graph,
    cut: Cut,
    data: Data,
    rule: Rule,
    context: Context,
    what: str,
) -> dict[str, Affinity]:
    """Set each operator of `graph` in turn to what `rule` makes of the evidence; return the new maps by its output.

    A rule that returns the map that it was given leaves the operator alone. An operator that computes what it should
    already, or that sees a NaN or an infinity, is left alone too.

    Raises:
        DataError: one of the graphs does not run on a sample.
        ModelError: onnxruntime cannot load a part of one.
    """
    operators, _ = operators_to_refit(graph, cut, context)
    replay = Replay((graph, cut.original), context.frame, data.samples, data.count, context.memory_budget // 2)
    names = Names(graph)
    changed: dict[str, Affinity] = {}
    for operator in track(operators, context.progress, what, len(operators)):
        evidence = _evidence(operator, replay, cut, data)
        if evidence.is_exact or not evidence.is_finite:
            continue
        chosen = rule(evidence)
        if chosen is not evidence.now and operator.set(graph, chosen, names):
            changed[operator.output] = chosen
    return changed


def _evidence(operator: Operator, replay: Replay, cut: Cut, data: Data) -> Evidence:
    sizes = operator.patches.groups, operator.patches.features, operator.patches.outputs
    evidence = Evidence(operator.affinity(), Moments(*sizes), Moments(*sizes))
    random = np.random.default_rng(data.seed)
    most = -(-data.rows // data.count)
    computed = [tensor.name for tensor in operator.others if not is_constant(tensor)]
    here = Piece(operator.node, [operator.reads, *computed])
    there = Piece(operator.original, [operator.target])
    for index, (now, before) in enumerate(replay.run(here, there)):
        target = _kept(before[operator.target], cut, operator.target)
        for tensor in operator.others:
            target = target - (now[tensor.name] if tensor.name in now else np.asarray(constant_of(tensor)))
        sums = evidence.judge if data.is_held_out(index) else evidence.fit
        for x, y in operator.patches.rows(now[operator.reads], target, most, random):
            sums.add(x, y)
    return evidence


def _kept(value: Array, cut: Cut, name: str) -> Array:
    """The positions of the original's tensor `name` that the cut graph still has."""
    for axis, positions in enumerate(cut.kept.get(name, ())):
        if positions is not None:
            value = np.take(value, positions, axis)
    return value
