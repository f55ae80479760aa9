"""Move the biases of a quantized graph so that each operator gives on average what it gives in the float graph.

Rounded weights and clipped activations shift the mean of what an operator returns. With y a channel of its output
before any activation, in the float graph, and y' the same in the quantized one,

    b + E[y - y']        over all positions of all samples

has the float mean again: the empirical bias correction of Nagel, van Baalen, Blankevoort and Welling, "Data-Free
Quantization Through Weight Equalization and Bias Correction", arXiv:1906.04721, section 4.2. Operators are taken in
topological order and each reads what those before it, corrected already, hand on: no shift is counted twice.

A mean m of few samples is noise in part. With s its standard error, m^2 is on average s^2 too large, so that the shift
is m * max(0, 1 - s^2 / m^2), which leaves a channel alone where its mean is within one standard error of zero. Samples
are the independent units for s, not positions, which a picture has thousands of that are alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graphopt.affine import why_not_constant
from graphopt.biases import Bias, bias_add
from graphopt.feeds import Samples
from graphopt.graph import Array, Names, has_input, is_constant, label_of, named_tensors
from graphopt.held_out import is_held_out
from graphopt.linear import OPERATORS
from graphopt.node_order import names_read, sorted_nodes
from graphopt.pass_base import Context, Skip
from graphopt.progress import track
from graphopt.quantizers import dequantizer_of, is_weight, quantizers_after
from graphopt.replay import Piece, Replay


@dataclass(frozen=True)
class Correctable:
    """A linear operator of the quantized graph, and its counterpart.

    Attributes:
        bias: where its bias is.
        original: the node of the float graph that computes its output, bias included.
        target: the name of that output in the float graph.
    """

    bias: Bias
    original: gs.Node
    target: str

    @property
    def output(self) -> str:
        """The name of its output in the quantized graph."""
        return str(self.bias.output.name)

    @property
    def channel_axis(self) -> int:
        """The axis of its output's channels."""
        return 1 if self.bias.node.op in ("Conv", "ConvTranspose") else -1

    def move(self, by: Array, names: Names) -> None:
        """Add a number to each channel.

        Args:
            by: the numbers, of shape [channels] and the type of the output.
            names: those of the quantized graph.
        """
        old = self.bias.values()
        self.bias.put(by if old is None else np.asarray(old + by, by.dtype), names)


def correctable(graph: gs.Graph, original: gs.Graph, context: Context) -> tuple[list[Correctable], list[Skip]]:
    """The linear operators of a quantized graph whose bias can be moved, and those whose bias cannot.

    Args:
        graph: the quantized graph, with shapes inferred.
        original: the float graph that it was made from.
        context: its defaults.

    Returns:
        The operators in the topological order of `original`, and the others, each with the reason.
    """
    nodes = sorted_nodes(original)
    place_of = {tensor.name: place for place, node in enumerate(nodes) for tensor in node.outputs}
    named = named_tensors(graph)
    found: dict[int, Correctable] = {}
    skipped: list[Skip] = []
    for node in graph.nodes:
        if node.domain or node.op not in OPERATORS or not _has_known_weight(node):
            continue
        bias = _bias_of(node, named, context)
        if isinstance(bias, str):
            skipped.append(Skip(label_of(node), bias))
            continue
        place = next((place_of[name] for name in _names_of(bias.output) if name in place_of), None)
        if place is None or nodes[place].op != bias.output.inputs[0].op:
            skipped.append(
                Skip(label_of(node), "the graph before qdq has no such operator: put correct-bias behind qdq")
            )
            continue
        found[place] = Correctable(bias, nodes[place], nodes[place].outputs[0].name)
    return [found[place] for place in sorted(found)], skipped


def correct(graph: gs.Graph, original: gs.Graph, samples: Samples, count: int, context: Context) -> dict[str, Array]:
    """Correct the operators of `graph` in turn; return what each channel gained, by the name of the operator's output.

    Args:
        graph: the quantized graph, with shapes inferred; its nodes change places too.
        original: the float graph that it was made from.
        samples: feeds for both; those that are held out are not used.
        count: how many there are.
        context: its frame, and the memory budget for what is kept between operators.

    Raises:
        DataError: one of the graphs does not run on a sample.
        ModelError: onnxruntime cannot load a part of one.
    """
    operators, _ = correctable(graph, original, context)
    graph.nodes[:] = _in_order(graph, [each.bias.node for each in operators])
    replay = Replay((graph, original), context.frame, samples, count, context.memory_budget, optimize=False)
    names = Names(graph)
    gained: dict[str, Array] = {}
    what = f"correct-bias, up to {context.memory_budget / 2**20:.0f} MiB"
    for operator in track(operators, context.progress, what, len(operators)):
        by = _shift(operator, replay)
        if by is not None and by.any():
            operator.move(by, names)
            gained[operator.output] = by
    return gained


def _shift(operator: Correctable, replay: Replay) -> Array | None:
    """What to add to each channel; None where a value is no number, or there are no values."""
    here, there = Piece(operator.bias.node, [operator.output]), Piece(operator.original, [operator.target])
    sizes, shifts = [], []
    dtype = np.dtype(np.float32)
    for index, (now, before) in enumerate(replay.run(here, there)):
        found, expected = now[operator.output], before[operator.target]
        if is_held_out(index) or not expected.size:
            continue
        dtype = expected.dtype
        sizes.append(expected.size)
        with np.errstate(invalid="ignore"):  # infinity less infinity
            shifts.append(_means(expected, operator.channel_axis) - _means(found, operator.channel_axis))
    if not shifts or not np.isfinite(shifts).all():
        return None
    return shrunk_mean(np.array(shifts), np.array(sizes)).astype(dtype)


def shrunk_mean(values: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    """The mean over samples, drawn to zero as far as it may be chance; the module docstring has the formula.

    Args:
        values: of each sample, of shape [samples, channels].
        sizes: how much each sample counts, of shape [samples].

    Returns:
        Shape [channels]; zeros where there is one sample, which says nothing of chance.
    """
    count = len(values)
    if count < 2:
        return np.zeros(values.shape[1])
    shares = sizes / sizes.sum()
    mean = shares @ values
    variance = count / (count - 1) * (shares**2 @ (values - mean) ** 2)
    return np.asarray(mean * np.maximum(0, 1 - variance / np.where(mean == 0, np.inf, mean**2)))


def _means(values: Array, channel_axis: int) -> NDArray[np.float64]:
    others = tuple(axis for axis in range(values.ndim) if axis != channel_axis % values.ndim)
    return np.asarray(values.mean(axis=others, dtype=np.float64))


def _has_known_weight(node: gs.Node) -> bool:
    """Whether its weight is a constant, perhaps behind Q and DQ: not so for products of activations."""
    dequantizer = dequantizer_of(node.inputs[1])
    return is_constant(node.inputs[1]) or (dequantizer is not None and is_weight(dequantizer))


def _bias_of(node: gs.Node, named: set[int], context: Context) -> Bias | str:
    """Where the bias of an operator is or goes, or why it has none that can be moved."""
    if node.op != "MatMul":
        reason = why_not_constant(node.inputs[2], context.defaults) if has_input(node, 2) else None
        return Bias(node) if reason is None else f"its bias {reason}"
    shape = node.inputs[1].shape
    add = None if not shape else bias_add(node, shape[-1], named)
    return "it has no bias: no Add of a constant per channel follows it" if add is None else Bias(node, add)


def _names_of(tensor: gs.Tensor) -> list[str]:
    """What a tensor may be called in the float graph: graph outputs keep their names on the DQ behind it."""
    behind = [reader.outputs[0].name for each in quantizers_after(tensor) for reader in each.output.outputs]
    return [tensor.name, *behind]


def _in_order(graph: gs.Graph, operators: Sequence[gs.Node]) -> list[gs.Node]:
    """The nodes in a topological order in which `operators` come in theirs, and what each needs right before it.

    A replay goes through both graphs in one direction, and `qdq` leaves the nodes in another order than it found.
    """
    number = {id(node): place for place, node in enumerate(operators)}
    first: dict[str, float] = {}  # by tensor, the number of the first operator that needs it
    order: list[tuple[float, gs.Node]] = []
    for node in reversed(sorted_nodes(graph)):
        needed = min((first.get(tensor.name, math.inf) for tensor in node.outputs), default=math.inf)
        needed = min(needed, number.get(id(node), math.inf))
        first.update((name, min(needed, first.get(name, math.inf))) for name in names_read(node))
        order.append((needed, node))
    order.reverse()
    return [node for _, node in sorted(order, key=lambda item: item[0])]
