"""Fold chains of affine nodes into the linear operators around them.

A chain is a run of nodes that only scale and shift (`graphopt.affine`), each the only reader of the one before, along
one axis; together they are one scale and one shift. It goes, whichever is possible first,

1.  down, into the linear operator before it: y = s (W x + b) + t;
2.  up, into every operator that reads it, when all are linear: W (s x + t) + b. Where one of them cannot take a shift,
    as a Conv that pads cannot, the scale goes up alone and one Add stays: s x + t = s (x + t / s);
3.  into fewer nodes: Mul + Add, or one of the two where the other would do nothing.

On both ways a scale above zero crosses what is positively homogeneous, f(s x) = s f(x), as Relu and pooling are; the
shift then stays where it is. A shift alone stays before and after a MatMul, which has no bias to put it in.
(`graphopt.linear` has the algebra.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.affine import Affine, AffineNode, affine_of, is_batch_norm
from graphopt.graph import (
    Array,
    Names,
    all_graphs,
    disconnect,
    label_of,
    named_tensors,
    producer,
    set_input,
    set_output,
)
from graphopt.linear import OPERATORS, Linear, LinearWeights, linear, set_weights
from graphopt.pass_base import Context, PassResult, Skip
from graphopt.sizes import numpy_dtype

_POOLS = frozenset({"AveragePool", "MaxPool"})
_HOMOGENEOUS = frozenset({"Abs", "LeakyRelu", "PRelu", "Relu"}) | _POOLS


def fold_chains(root: gs.Graph, context: Context, *, batch_norm: bool, expand: bool = False) -> PassResult:
    """Fold the chains of `root` and of the graphs in it.

    Args:
        root: the graph, whose shapes have been inferred.
        context: of the pass.
        batch_norm: fold the chains with a BatchNormalization in them; else those without, in which none is a link.
        expand: write a chain that nothing can absorb as Mul + Add even if that makes more nodes.
    """
    folder = _Folder(root, context.defaults, batch_norm=batch_norm, expand=expand)
    for graph in all_graphs(root):
        folder.fold_in(graph)
    notes = (f"{folder.duplicated} bytes of shared weights duplicated",) if folder.duplicated else ()
    parts = dict(folder.folded)
    return PassResult(rewrites=sum(parts.values()), skipped=tuple(folder.skipped), parts=parts, notes=notes)


@dataclass(frozen=True)
class _Chain:
    """Affine nodes in a row and what they do together."""

    nodes: tuple[gs.Node, ...]
    source: gs.Tensor  # what the first reads
    result: gs.Tensor  # what the last computes
    affine: Affine

    @property
    def size(self) -> int:
        """How many nodes write it as Mul + Add."""
        return (not self.affine.keeps_scale) + (not self.affine.keeps_zero)

    @property
    def touches_linear(self) -> bool:
        """Whether a linear operator stands before or after it."""
        neighbours = [producer(self.source), *self.result.outputs]
        return any(node is not None and node.op in OPERATORS for node in neighbours)

    @property
    def is_bias_of_matmul(self) -> bool:
        """Whether it is as folded as it can be: MatMul has no bias of its own."""
        source = producer(self.source)
        return source is not None and source.op == "MatMul" and self.affine.keeps_scale


@dataclass(frozen=True)
class _Move:
    """Where a chain goes: operators with their new weights, and what stays in its place."""

    operators: list[tuple[Linear, LinearWeights]]
    rest: list[tuple[str, Array]]


@dataclass
class _Folder:
    root: gs.Graph
    overridable: Container[str]
    batch_norm: bool
    expand: bool
    folded: Counter[str] = field(default_factory=Counter)  # nodes, by direction
    duplicated: int = 0  # bytes
    skipped: list[Skip] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._named = named_tensors(self.root)
        self._names = Names(self.root)
        self._before: dict[int, list[gs.Node]] = {}  # new nodes, by the id of the node that they stand before
        self._after: dict[int, list[gs.Node]] = {}

    def fold_in(self, graph: gs.Graph) -> None:
        """Fold each chain of one graph; those in its branches are not its own."""
        own = {id(node) for node in graph.nodes}
        gone = {
            id(node) for chain in self._chains(graph) if self._fold(chain, own, graph.opset) for node in chain.nodes
        }
        if not gone:
            return
        graph.nodes[:] = [
            each
            for node in graph.nodes
            for each in (
                *self._before.get(id(node), ()),
                *(() if id(node) in gone else (node,)),
                *self._after.get(id(node), ()),
            )
        ]

    def _chains(self, graph: gs.Graph) -> list[_Chain]:
        """Return the longest chains, in topological order."""
        chains: dict[int, _Chain] = {}  # by id of the tensor that they end in
        for node in graph.nodes:
            if is_batch_norm(node) and not self.batch_norm:
                continue
            link = affine_of(node, graph.opset, self.overridable)
            if isinstance(link, AffineNode):
                chain = self._extended(chains, link, node)
                chains[id(chain.result)] = chain
            elif link is not None and self._is_asked_about(node):
                self.skipped.append(Skip(label_of(node), f"not folded: {link}"))
        return [chain for chain in chains.values() if any(map(is_batch_norm, chain.nodes)) == self.batch_norm]

    def _extended(self, chains: dict[int, _Chain], link: AffineNode, node: gs.Node) -> _Chain:
        """Return the chain that ends in a node, and take the one that it makes longer out of `chains`."""
        chain = chains.get(id(link.source))
        if chain is not None and len(link.source.outputs) == 1 and id(link.source) not in self._named:
            together = chain.affine.then(link.affine)
            if together is not None and together.finite:
                del chains[id(link.source)]
                return _Chain((*chain.nodes, node), chain.source, node.outputs[0], together)
        return _Chain((node,), link.source, node.outputs[0], link.affine)

    def _is_asked_about(self, node: gs.Node) -> bool:
        """Whether a report should say why a node is no link."""
        if self.batch_norm:
            return is_batch_norm(node)
        sources = (producer(tensor) for tensor in node.inputs)
        return any(source is not None and source.op in OPERATORS for source in sources)

    def _fold(self, chain: _Chain, own: Container[int], opset: int) -> bool:
        down = self._down(chain, own, opset)
        if not isinstance(down, str):
            self._go_down(chain, down)
            return True
        up = self._up(chain, own, opset)
        if not isinstance(up, str):
            self._go_up(chain, up)
            return True
        fewer = chain.size < len(chain.nodes)
        steps = _steps(chain, chain.affine) if fewer or self.expand else None
        if steps is not None:
            self._take_out(chain, "merged" if fewer else "written as Mul and Add")
            self._write(steps or [("Identity", None)], chain, chain.result)
            return True
        if self.batch_norm or (chain.touches_linear and not chain.is_bias_of_matmul):
            self.skipped.append(Skip(label_of(chain.nodes[0]), f"not folded: {down}; {up}"))
        return False

    def _down(self, chain: _Chain, own: Container[int], opset: int) -> _Move | str:
        """Return how the operator before a chain takes it in, or why it cannot."""
        source, affine = chain.source, chain.affine
        while (
            (node := producer(source)) is not None
            and _crosses(affine, node)
            and self._why_not_rewire(source, own) is None
        ):
            source = node.inputs[0]
        if node is None:
            return "it reads a graph input; there is no linear operator before it to fold into"
        operator = linear(node, self.overridable)
        if isinstance(operator, str):
            return f"before it, {operator}"
        if affine.keeps_scale and not operator.has_bias_input:
            return f"{operator.label} has no bias to put a shift in"
        reason = self._why_not_rewire(source, own)
        reason = reason or _why_not_along(affine, operator.output_axis, operator.output_channels, operator.label)
        reason = reason or operator.why_not_after(affine, opset)
        if reason is not None:
            return reason
        rest = _steps(chain, affine.shift_alone) if source is not chain.source else []
        if rest is None:
            return _not_finite(operator)
        weights = operator.after(affine.scale_alone if source is not chain.source else affine)
        return _Move([(operator, weights)], rest) if weights.finite else _not_finite(operator)

    def _why_not_rewire(self, tensor: gs.Tensor, own: Container[int]) -> str | None:
        """Say why what a tensor holds cannot be changed for the one node that the chain leads to."""
        if id(producer(tensor)) not in own:
            return f"its input {tensor.name} is computed outside the branch that it is in"
        if id(tensor) in self._named:
            return f"its input {tensor.name} is a graph output too"
        if len(tensor.outputs) > 1:
            return f"its input {tensor.name} is read by {len(tensor.outputs) - 1} other nodes too"
        return None

    def _up(self, chain: _Chain, own: Container[int], opset: int) -> _Move | str:
        """Return how the operators after a chain take it in, or why they cannot."""
        if _ends_normalization(chain):
            return "it ends a normalization, which runtimes compute at once where they find all of it"
        readers = self._readers(chain, own)
        if isinstance(readers, str):
            return readers
        affine = chain.affine
        operators = []
        for node in readers:
            operator = linear(node, self.overridable)
            if isinstance(operator, str):
                return f"after it, {operator}"
            reason = _why_not_along(affine, operator.input_axis, operator.input_channels, operator.label)
            reason = reason or operator.why_not_before(affine, opset)
            if reason is not None:
                return reason
            operators.append(operator)
        reason = _why_not_shift(chain, operators)
        rest: list[tuple[str, Array]] | None = []
        if reason is not None:
            if affine.keeps_scale or (np.abs(affine.scale) < _least_scale(chain.result.dtype)).any():
                return reason
            with np.errstate(over="ignore", invalid="ignore"):
                rest = _steps(chain, replace(affine.shift_alone, shift=affine.shift / affine.scale))
            affine = affine.scale_alone
        changed = [(operator, operator.before(affine)) for operator in operators]
        unfit = next((operator for operator, weights in changed if not weights.finite), None)
        if rest is None or unfit is not None:
            return _not_finite(unfit or operators[0])
        return _Move(changed, rest)

    def _readers(self, chain: _Chain, own: Container[int]) -> list[gs.Node] | str:
        """Return the operators that the result of a chain leads to, or why that cannot be changed."""
        found: dict[int, gs.Node] = {}
        pending = [chain.result]
        for tensor in pending:
            if id(tensor) in self._named:
                return f"its output {tensor.name} is a graph output"
            for node in tensor.outputs:
                if id(node) not in own:
                    return f"after it, {node.op} {node.name} is inside a branch"
                if any(each is tensor for each in node.inputs[1:]):
                    return f"after it, {node.op} {node.name} reads it as a weight"
                if _crosses(chain.affine, node):
                    pending.append(node.outputs[0])
                else:
                    found[id(node)] = node
        return list(found.values()) or f"nothing reads its output {chain.result.name}"

    def _go_down(self, chain: _Chain, move: _Move) -> None:
        (operator, weights) = move.operators[0]
        source = producer(chain.source)
        assert source is not None  # the operator, or what lies between it and the chain
        self._take_out(chain, "into the operator before")
        if move.rest:
            self._write(move.rest, chain, chain.result)
        else:
            set_output(source, 0, chain.result)
        self._set_weights(operator, weights)

    def _go_up(self, chain: _Chain, move: _Move) -> None:
        kept, readers = chain.source, {id(node): node for node in chain.result.outputs}
        self._take_out(chain, "into the operators after")
        if move.rest:
            kept = gs.Variable(
                self._names.fresh(f"{chain.result.name}/shifted"), chain.result.dtype, chain.result.shape
            )
            self._write(move.rest, chain, kept)
        for node in readers.values():
            set_input(node, 0, kept)
        for operator, weights in move.operators:
            self._set_weights(operator, weights)

    def _take_out(self, chain: _Chain, direction: str) -> None:
        self.folded[direction] += len(chain.nodes)
        for node in chain.nodes:
            disconnect(node)

    def _set_weights(self, operator: Linear, weights: LinearWeights) -> None:
        if len(operator.node.inputs[1].outputs) > 1 and isinstance(weights.weight, np.ndarray):
            self.duplicated += weights.weight.nbytes
        before, after = set_weights(operator.node, weights, self._names)
        key = id(operator.node)
        self._before[key] = [*self._before.get(key, ()), *before]
        self._after[key] = [*after, *self._after.get(key, ())]

    def _write(self, steps: Sequence[tuple[str, Array | None]], chain: _Chain, result: gs.Tensor) -> None:
        """Put nodes in the place of a chain that take its source through the steps to `result`."""
        nodes, source = [], chain.source
        for index, (op, values) in enumerate(steps):
            name = f"{result.name}/{op.lower()}"
            output = result
            if index < len(steps) - 1:
                output = gs.Variable(self._names.fresh(f"{name}/result"), result.dtype, result.shape)
            constants = [] if values is None else [gs.Constant(self._names.fresh(f"{name}/constant"), values)]
            nodes.append(gs.Node(op, self._names.fresh(name), inputs=[source, *constants], outputs=[output]))
            source = output
        self._after[id(chain.nodes[-1])] = nodes


def _steps(chain: _Chain, affine: Affine) -> list[tuple[str, Array]] | None:
    """Return the operators that write an affine map, with their constants; None where the dtype cannot hold them."""
    dtype = chain.result.dtype
    if dtype is None:
        return None
    dtype, steps = numpy_dtype(dtype), []
    if not affine.keeps_scale:
        steps.append(("Mul", affine.constant(affine.scale, dtype)))
    if not affine.keeps_zero:
        steps.append(("Add", affine.constant(affine.shift, dtype)))
    return steps if all(np.isfinite(values).all() for _, values in steps) else None


def _least_scale(dtype: Any) -> float:
    """Return the least scale to divide a shift by: times a weight of its own size it is still a normal number."""
    is_half = dtype is not None and numpy_dtype(dtype) == np.float16
    return float(np.sqrt(np.finfo(np.float16 if is_half else np.float32).tiny))


def _ends_normalization(chain: _Chain) -> bool:
    """Whether what is scaled and shifted was divided by a deviation: LayerNormalization, written out."""
    quotient = producer(chain.source)
    deviation = producer(quotient.inputs[1]) if quotient is not None and quotient.op == "Div" else None
    return deviation is not None and deviation.op == "Sqrt"


def _why_not_along(affine: Affine, axis: int, channels: int, label: str) -> str | None:
    if affine.axis is None:
        return None
    if affine.axis != axis:
        return f"it runs along axis {affine.axis} from the end, and the channels of {label} are axis {axis}"
    if affine.scale.size != channels:
        return f"it has {affine.scale.size} numbers, and {label} has {channels} channels"
    return None


def _crosses(affine: Affine, node: gs.Node) -> bool:
    """Tell whether a scale passes a node: f(s x) = s f(x) for s > 0, with channels where they are."""
    if node.op not in _HOMOGENEOUS or node.domain or len(node.outputs) > 1:
        return False
    if affine.keeps_scale or (affine.scale <= 0).any():
        return False
    return node.op not in _POOLS or affine.axis in (None, -1 - len(node.attrs["kernel_shape"]))


def _why_not_shift(chain: _Chain, operators: list[Linear]) -> str | None:
    """Say why the operators after a chain cannot take its shift too."""
    if chain.affine.keeps_zero:
        return None
    between = next((node for node in chain.result.outputs if node.op not in OPERATORS), None)
    if between is not None:
        return f"a shift does not pass {between.op} {between.name}".rstrip()
    reason = next(filter(None, (operator.why_not_shift_before() for operator in operators)), None)
    if reason is not None:
        return reason
    adds = sum(not operator.has_bias_input for operator in operators)
    return None if adds < chain.size else f"{adds} MatMul after it would need an Add each for the shift"


def _not_finite(operator: Linear) -> str:
    dtype = operator.node.inputs[1].dtype
    return f"the folded weights of {operator.label} would not be finite in {dtype}"
