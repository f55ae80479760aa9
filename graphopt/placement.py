"""Where a target wants Q/DQ pairs: an analysis of a float graph, used by `calibrate` (what to observe) and `qdq`.

One propagation, driven by the target's table:

1. operators that gain from int8 start it, unless a guard of `graphopt.gains` keeps them float (a `Skip` says why);
2. forward, in topological order: an operator that joins or commutes *can* run in int8 when one of its inputs is
   available in int8;
3. backward: of those, the ones stay whose result an int8 operator reads; the others would pay for a Q/DQ pair that
   saves nothing (except where the float kernel is so much slower that it does: `Rule.joins_last`);
4. the inputs of what stays, and its outputs where the target fuses operators with the Q behind them, carry quantizers.
   An activation function that the Q makes redundant is absorbed: the Q stands behind it.

Tensors joined by operators that only move values share one scale: that of the value's source. A positive constant
factor changes nothing but the scale by which integers are read, so it costs nothing: x -> Q(s) -> DQ(s * factor). With
it a hard-swish, x * clip(x + 3, 0, 6) / 6, is an int8 Add whose Q clips, and an int8 Mul whose DQ divides.

Each branch of an If, and the body of each Loop and Scan, is placed as a graph of its own, in which what it reads from
outside is like a graph input and what it returns like a graph output. A tensor that is read inside and outside thus has
a pair on either side, of one range.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from networkx import DiGraph

from graphopt.branches import branch_lengths, data_flow
from graphopt.gains import is_float32, keeps_integers, rank_of, why_float
from graphopt.graph import all_graphs, all_nodes, bodies, constant_of, is_constant, label_of, present, producer
from graphopt.nested_tensors import HOLDERS, nested_graphs, nested_label, range_names
from graphopt.pass_base import Skip
from graphopt.targets import Role, Rule, Target
from graphopt.weights import is_weight


@dataclass(frozen=True)
class Edge:
    """One input of one node: where a DequantizeLinear feeds an operator."""

    node: gs.Node
    index: int

    @property
    def tensor(self) -> gs.Tensor:
        """The tensor that the input reads."""
        return self.node.inputs[self.index]


@dataclass(frozen=True)
class Activation:
    """A tensor that is quantized, and where its range comes from.

    Attributes:
        tensor: what carries the pair.
        source: the tensor whose range it uses: itself, unless it is moved or rescaled from there.
        factor: by which its values are larger than those of `source`.
        range_name: what ranges call `source`.
    """

    tensor: gs.Tensor
    source: gs.Tensor
    factor: float
    range_name: str


@dataclass(frozen=True)
class Placement:
    """What carries a quantizer in one graph: the main one, a branch of an If, the body of a Loop or a Scan.

    Attributes:
        graph: that graph.
        label: which one it is, as "If_0/then_branch"; empty: the main graph.
        nodes: the operators that run in int8.
        activations: by tensor name, what carries a pair.
        rescaled: outputs of operators that a DQ replaces, each with the integers' tensor before it, topologically.
        on_integers: operators to be written between the Q of their input and the DQ of their output.
        readers: by tensor name, the inputs that read the tensor through its Q/DQ pair.
        computed_by: by tensor name, the int8 operator behind which, and behind what it absorbs, the pair stands.
        users: by tensor name, the operators that cannot run in int8 without its Q/DQ pair: what reads it, and what
            computes it and needs a Q behind.
        weights: inputs with weights (`graphopt.weights`), each with the axis that has its scales (None: one scale).
        operands: constant inputs that are quantized like activations (Add and Mul by a constant).
        biases: constants that are added to an operator's result as part of it; they must be vectors.
        skipped: operators that gain from int8 and stay float.
    """

    graph: gs.Graph
    label: str
    nodes: tuple[gs.Node, ...]
    activations: Mapping[str, Activation]
    rescaled: tuple[tuple[Activation, gs.Tensor], ...]
    on_integers: tuple[gs.Node, ...]
    readers: Mapping[str, tuple[Edge, ...]]
    computed_by: Mapping[str, gs.Node]
    users: Mapping[str, tuple[gs.Node, ...]]
    weights: tuple[tuple[Edge, int | None], ...]
    operands: tuple[Edge, ...]
    biases: tuple[Edge, ...]
    skipped: tuple[Skip, ...]

    @property
    def observed(self) -> tuple[str, ...]:
        """Names of the tensors whose ranges calibration must find."""
        return tuple(dict.fromkeys(each.range_name for each in self.activations.values()))


def place_all(graph: gs.Graph, target: Target, excluded: Mapping[int, str] | None = None) -> tuple[Placement, ...]:
    """Decide where quantizers go, in the graph and in each branch or body in it, outermost first.

    Args:
        graph: a float graph in topological order whose tensors have dtypes and shapes where they can be known
            (`infer_shapes`).
        target: the table to follow.
        excluded: by id of a node, why it must stay float.
    """
    names, why = range_names(graph), excluded or {}
    return tuple(
        _Placing(each, target, why, names, nested_label(holders)).run() for each, holders in nested_graphs(graph)
    )


def place(graph: gs.Graph, target: Target, excluded: Mapping[int, str] | None = None) -> Placement:
    """Do what `place_all` does for the graph alone, without its branches."""
    return _Placing(graph, target, excluded or {}, {}, "").run()


def node_label(node: gs.Node) -> str:
    """A node's name, or its operator and first output when it has none."""
    return node.name or f"{node.op} -> {node.outputs[0].name}"


def output_channel_axis(node: gs.Node, weight_rank: int) -> int | None:
    """The axis of input 1 that runs along the operator's output channels; None where there is no such axis.

    Conv: [M, C/group, k...] -> 0. ConvTranspose: [C, M/group, k...] -> 1, if group is 1. Gemm: [K, N] -> 1, or
    [N, K] -> 0 with transB. MatMul: [K, N] -> 1; a stack of matrices has none.
    """
    if node.op == "Conv":
        return 0
    if node.op == "ConvTranspose":
        return 1 if node.attrs.get("group", 1) == 1 else None
    if node.op == "Gemm":
        return 0 if node.attrs.get("transB", 0) else 1
    return 1 if weight_rank == 2 else None


class _Placing:
    """The state of one propagation; sets hold `id`s, because graphsurgeon compares by content."""

    def __init__(
        self, graph: gs.Graph, target: Target, excluded: Mapping[int, str], names: Mapping[int, str], label: str
    ) -> None:
        self.graph = graph
        self.target = target
        self.excluded = excluded
        self.names = names
        self.label = label
        self.outputs = {id(tensor) for tensor in graph.outputs}
        self.nested_uses = _tensors_used_by_bodies(graph)
        self.skipped: list[Skip] = []
        self.kept: dict[int, gs.Node] = {}

    def run(self) -> Placement:
        gaining = [node for node in self.graph.nodes if self._gains(node)]
        self.kept = {id(node): node for node in gaining}
        self._skip_other_bodies()
        if self.target.quantizes_outputs:
            self._join_neighbours()
        edges = [edge for node in self.kept.values() for edge in self._quantized_inputs(node)]
        edges += self._residual_edges()
        return self._collect(edges)

    # ---------------------------------------------------------------- which operators

    def _gains(self, node: gs.Node) -> bool:
        rule = self._rule(node)
        reason = self.target.stays_float.get(node.op)
        if rule is not None and rule.role is Role.GAINS:
            reason = self.excluded.get(id(node)) or why_float(node, rule, self.target)
            if reason is None:
                return True
        if reason is not None:
            self.skipped.append(Skip(node_label(node), reason))
        return False

    def _skip_other_bodies(self) -> None:
        """Operators in graphs that others than If, Loop and Scan hold, whose tensors have no ranges."""
        for holder in self.graph.nodes:
            if holder.op in HOLDERS and not holder.domain:
                continue
            reason = f"it is inside the body of {label_of(holder)} ({holder.op}), where its values cannot be observed"
            for node in (node for body in bodies(holder) for node in all_nodes(body)):
                rule = self._rule(node)
                if rule is not None and rule.role is Role.GAINS:
                    self.skipped.append(Skip(node_label(node), reason))

    def _join_neighbours(self) -> None:
        """Steps 2 and 3 of the propagation: what can run in int8, then what of it pays."""
        available: set[int] = set()
        candidates: list[gs.Node] = []
        for node in self.graph.nodes:
            rule = self._rule(node)
            if id(node) in self.kept:
                available.update(id(edge.tensor) for edge in self._quantized_inputs(node))
                if self._needs_output(node):
                    available.update(id(tensor) for tensor in self._results(node))
            elif rule is not None and self._can_join(node, rule, available):
                candidates.append(node)
                available.update(id(tensor) for tensor in self._results(node))
        for node in reversed(candidates):
            if self._rule_of(node).joins_last or any(self._int8_reads(tensor) for tensor in self._results(node)):
                self.kept[id(node)] = node

    def _can_join(self, node: gs.Node, rule: Rule, available: set[int]) -> bool:
        if rule.role is Role.GAINS or id(node) in self.excluded:
            return False
        inputs = [edge.tensor for edge in self._quantized_inputs(node)]
        if not keeps_integers(node, rule) or not all(
            is_float32(tensor) for tensor in (*inputs, *present(node.outputs))
        ):
            return False
        dynamic = [tensor for tensor in inputs if not is_constant(tensor)]
        return any(id(tensor) in available for tensor in dynamic)

    def _int8_reads(self, tensor: gs.Tensor) -> bool:
        return any(
            id(consumer) in self.kept and any(edge.tensor is tensor for edge in self._quantized_inputs(consumer))
            for consumer in tensor.outputs
        )

    # ---------------------------------------------------------------- which tensors

    def _rule(self, node: gs.Node) -> Rule | None:
        if node.domain not in (None, "", "ai.onnx"):
            return None
        if self.target.absorbs_factors and (found := _factor(node)) is not None:
            return Rule(role=Role.RESCALES, inputs=(found[0],))
        return self.target.rules.get(node.op)

    def _rule_of(self, node: gs.Node) -> Rule:
        """The rule of an operator that has one."""
        rule = self._rule(node)
        assert rule is not None
        return rule

    def _quantized_inputs(self, node: gs.Node) -> list[Edge]:
        rule = self._rule_of(node)
        indices = range(len(node.inputs)) if rule.inputs is None else rule.inputs
        return [Edge(node, index) for index in indices if index < len(node.inputs) and node.inputs[index].name]

    def _results(self, node: gs.Node) -> list[gs.Tensor]:
        """The tensors on which the quantizers of a node's outputs stand.

        Behind an operator that only moves values there is nothing to absorb: the Q of its input has clipped already.
        One that is decomposed ends in a factor, and its own range tells those of its parts.
        """
        outputs, rule = present(node.outputs), self._rule_of(node)
        if rule.role in (Role.COMMUTES, Role.RESCALES) or rule.on_integers or node.op in self.target.decomposed:
            return outputs
        if (bias := self._bias_of(node)) is not None:
            outputs = bias.node.outputs
        return [self._behind_activation(output) for output in outputs]

    def _needs_output(self, node: gs.Node) -> bool:
        return self._rule_of(node).needs_output or self._bias_of(node) is not None

    def _bias_of(self, node: gs.Node) -> Edge | None:
        """The constant input of an Add that becomes part of `node`: a value for each output feature of a product.

        onnxruntime fuses matrices with a [N] or [1, N], and stacks of matrices of known shape with a [N].
        """
        if not self._rule_of(node).fuses_bias or not is_weight(node.inputs[1]):
            return None
        (output,) = node.outputs
        if len(output.outputs) != 1 or id(output) in self.outputs or id(output) in self.nested_uses:
            return None
        (add,) = output.outputs
        if add.op != "Add" or id(add) in self.excluded or rank_of(node.inputs[1]) != 2:
            return None
        index = int(add.inputs[0] is output)
        bias, shape = add.inputs[index], node.inputs[0].shape
        if shape is None or not is_constant(bias) or bias.shape is None:
            return None
        features = node.inputs[1].shape[1]
        stacked = len(shape) > 2 and all(isinstance(size, int) for size in shape)
        fitting = [(features,), (1, features)] if len(shape) == 2 else [(features,)] if stacked else []
        return Edge(add, index) if tuple(bias.shape) in fitting else None

    def _behind_activation(self, tensor: gs.Tensor) -> gs.Tensor:
        """The output of the activation function that reads `tensor`, if a Q there makes that function redundant."""
        if len(tensor.outputs) != 1 or id(tensor) in self.outputs or id(tensor) in self.nested_uses:
            return tensor
        (consumer,) = tensor.outputs
        if consumer.op not in self.target.absorbed or id(consumer) in self.excluded:
            return tensor
        return consumer.outputs[0] if consumer.inputs[0] is tensor else tensor

    def _residual_edges(self) -> list[Edge]:
        """For targets that fuse an Add into the operator before it: the Add's other input."""
        if not self.target.adds_fused_into:
            return []
        adds = [node for node in self.graph.nodes if node.op == "Add" and id(node) not in self.excluded]
        adds = [node for node in adds if not any(is_constant(tensor) for tensor in node.inputs)]
        if not adds:
            return []
        flow = data_flow(self.graph)
        edges = (self._residual_edge(node, flow) for node in adds)
        return [edge for edge in edges if edge is not None]

    def _residual_edge(self, node: gs.Node, flow: DiGraph) -> Edge | None:
        """The input of a residual Add that bypasses the operator which the Add is fused into.

        The two branches meet at their lowest common ancestor. The branch that comes from such an operator in int8 is
        fused; when both do, the longer one is the main path and the shorter one the bypass.
        """
        fused = [index for index, tensor in enumerate(node.inputs) if self._takes_in_adds(tensor)]
        if not fused:
            return None
        if len(fused) == 1:
            return Edge(node, 1 - fused[0])
        depths = branch_lengths(flow, node)
        return None if depths is None else Edge(node, int(depths[1] < depths[0]))

    def _takes_in_adds(self, tensor: gs.Tensor) -> bool:
        """Whether only an int8 operator that Adds are fused into gives a tensor, perhaps by way of its bias Add."""
        node = producer(tensor)
        if node is None or len(tensor.outputs) != 1 or id(tensor) in self.outputs:
            return False
        if node.op == "Add" and any(is_constant(operand) for operand in node.inputs):
            return any(self._takes_in_adds(operand) for operand in node.inputs if not is_constant(operand))
        return id(node) in self.kept and node.op in self.target.adds_fused_into

    # ---------------------------------------------------------------- the result

    def _collect(self, edges: list[Edge]) -> Placement:
        weights: list[tuple[Edge, int | None]] = []
        operands: list[Edge] = []
        readers: dict[str, list[Edge]] = {}
        tensors: dict[str, gs.Tensor] = {}
        for edge in edges:
            if self._is_weight(edge):
                weights.append((edge, self._weight_axis(edge)))
            elif is_constant(edge.tensor):
                operands.append(edge)
            else:
                readers.setdefault(edge.tensor.name, []).append(edge)
                tensors[edge.tensor.name] = edge.tensor
        users = {name: [edge.node for edge in found] for name, found in readers.items()}
        computed_by: dict[str, gs.Node] = {}
        if self.target.quantizes_outputs:
            for node, tensor in self._quantized_outputs(tensors.values()):
                tensors[tensor.name] = tensor
                computed_by[tensor.name] = node
                if self._needs_output(node):
                    users.setdefault(tensor.name, []).append(node)
        rescaled = self._rescaled()
        for output, _ in rescaled:
            tensors.pop(output.tensor.name, None)
        return Placement(
            graph=self.graph,
            label=self.label,
            nodes=tuple(self.kept.values()),
            activations={name: self._activation(tensor) for name, tensor in tensors.items()},
            rescaled=rescaled,
            on_integers=tuple(node for node in self.kept.values() if self._rule_of(node).on_integers),
            readers={name: tuple(readers.get(name, ())) for name in tensors},
            computed_by=computed_by,
            users={name: tuple(found) for name, found in users.items()},
            weights=tuple(weights),
            operands=tuple(operands),
            biases=tuple(bias for node in self.kept.values() if (bias := self._bias_of(node)) is not None),
            skipped=tuple(self.skipped),
        )

    def _is_weight(self, edge: Edge) -> bool:
        rule = self._rule(edge.node)
        return edge.index == 1 and rule is not None and rule.role is Role.GAINS and is_weight(edge.tensor)

    def _weight_axis(self, edge: Edge) -> int | None:
        if not self._rule_of(edge.node).per_channel or edge.tensor.shape is None:
            return None
        return output_channel_axis(edge.node, len(edge.tensor.shape))

    def _quantized_outputs(self, read: Iterable[gs.Tensor]) -> list[tuple[gs.Node, gs.Tensor]]:
        """Int8 operators with outputs that carry a Q: where the kernel needs one, or an int8 operator reads it."""
        wanted = {id(tensor) for tensor in read}
        outputs: list[tuple[gs.Node, gs.Tensor]] = []
        for node in self.kept.values():
            needed = self._needs_output(node)
            outputs += [(node, tensor) for tensor in self._results(node) if needed or id(tensor) in wanted]
        return outputs

    def _rescaled(self) -> tuple[tuple[Activation, gs.Tensor], ...]:
        """The outputs of kept operators with a factor, in topological order, with the input that has the integers."""
        nodes = [node for node in self.graph.nodes if id(node) in self.kept]
        nodes = [node for node in nodes if self._rule_of(node).role is Role.RESCALES]
        return tuple((self._activation(node.outputs[0]), self._quantized_inputs(node)[0].tensor) for node in nodes)

    def _activation(self, tensor: gs.Tensor) -> Activation:
        """A tensor with the range that it has: operators that only move values change none."""
        source, factor = tensor, 1.0
        while (node := producer(source)) is not None and id(node) in self.kept:
            role = self._rule_of(node).role
            if role is Role.RESCALES:
                factor *= _factor_of(node)
            elif role is not Role.COMMUTES:
                break
            source = self._quantized_inputs(node)[0].tensor
        return Activation(tensor, source, factor, self.names.get(id(source), source.name))


def _factor(node: gs.Node) -> tuple[int, float] | None:
    """For a product with (or a quotient by) one positive constant: the index of the other input, and the factor."""
    if node.op not in ("Mul", "Div"):
        return None
    for index in (1,) if node.op == "Div" else (0, 1):
        constant, other = node.inputs[index], node.inputs[1 - index]
        if constant.shape is None or any(size != 1 for size in constant.shape) or is_constant(other):
            continue
        if (rank := rank_of(other)) is None or len(constant.shape) > rank:
            continue
        value = constant_of(constant)
        if value is not None and value.dtype == np.float32 and 0 < (factor := float(value.reshape(()))) < np.inf:
            return 1 - index, 1 / factor if node.op == "Div" else factor
    return None


def _factor_of(node: gs.Node) -> float:
    found = _factor(node)
    assert found is not None
    return found[1]


def _tensors_used_by_bodies(graph: gs.Graph) -> set[int]:
    return {
        id(tensor) for body in all_graphs(graph) if body is not graph for node in body.nodes for tensor in node.inputs
    }
