"""Insert QuantizeLinear/DequantizeLinear pairs where the target runs the graph in int8.

`graphopt.placement` decides where; here ranges become scales and zero points, weights become integers, and pairs are
wired in. Biases stay float: onnxruntime makes its own int32 bias, and TensorRT refuses an int32 DequantizeLinear.

    x -> Q(scale, zero_point) -> DQ -> operator        activations: one pair a tensor
    int8 weight -> DQ(scale[C]) -> operator            weights, where the target stores integers
    float weight -> Q -> DQ -> operator                weights, where it does not

A graph output that carries a pair keeps its name, on the DQ. Per-channel scales need opset 13: a lower one is raised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from fnmatch import fnmatchcase
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.autotune import tune
from graphopt.errors import PipelineError
from graphopt.graph import (
    Names,
    all_graphs,
    constant_of,
    disconnect,
    disconnect_all,
    is_output,
    named_tensors,
    nested_output_names,
    producer,
    replace_uses,
    set_input,
    set_output,
)
from graphopt.graph_copy import copy_graph
from graphopt.hard_activations import decompose_activations
from graphopt.islands import islands_of, too_small
from graphopt.model_io import Model
from graphopt.opset import raise_opset
from graphopt.pass_base import Context, Effect, Pass, PassResult
from graphopt.placement import Activation, Edge, Placement, node_label, place
from graphopt.quantization import QuantParams, params_of_range, params_of_weight
from graphopt.ranges import Ranges
from graphopt.ranges_files import unmatched_names
from graphopt.shapes import infer_shapes
from graphopt.targets import Target

_PER_CHANNEL_OPSET = 13


class Switch(Enum):
    """Whether to do something; `auto` leaves it to the target."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


@dataclass(frozen=True, kw_only=True)
class InsertQdq(Pass):
    """Quantize activations and weights by Q/DQ pairs, with the ranges that `calibrate` found."""

    name: ClassVar[str] = "qdq"
    effect: ClassVar[Effect] = Effect.LOSSY

    exclude: tuple[str, ...] = field(
        default=(), metadata={"help": "names of nodes that stay float (* and ? are wildcards)"}
    )
    exclude_ops: tuple[str, ...] = field(default=(), metadata={"help": "operator types that stay float"})
    reduce_range: Switch = field(
        default=Switch.AUTO, metadata={"help": "weights whose int8 sums cannot saturate, for x86 without VNNI"}
    )
    int8_weights: Switch = field(
        default=Switch.AUTO, metadata={"help": "store weights as int8 behind a DQ, not as float behind Q and DQ"}
    )
    small_islands: bool = field(
        default=False, metadata={"help": "quantize also where conversions are estimated to cost more than int8 saves"}
    )
    autotune: bool = field(
        default=False, metadata={"help": "measure in onnxruntime here, and quantize only what makes the model faster"}
    )

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Insert the pairs; reads `context.ranges` and `context.target`.

        Raises:
            PipelineError: no ranges, or ranges of another model.
        """
        ranges = context.ranges
        if ranges is None:
            raise PipelineError("qdq needs ranges: put calibrate before it, or give a ranges file (--ranges FILE)")
        if quantized := [node for node in graph.nodes if node.op == "QuantizeLinear"]:
            raise PipelineError(
                f"the model is quantized already ({len(quantized)} QuantizeLinear nodes): to quantize it anew, "
                "put strip-qdq first"
            )
        infer_shapes(graph)
        known = [graph] if context.original is None else [graph, context.original.graph]  # fold removes tensors
        nodes = [node for each in known for node in each.nodes]
        names = {tensor.name for node in nodes for tensor in (*node.inputs, *node.outputs)}
        unmatched = unmatched_names(ranges, names)
        target = self._options_on(context.target)
        excluded = self._excluded(graph)
        placement = _place_with_ranges(graph, target, excluded, ranges)
        if not placement.nodes:
            return PassResult(skipped=placement.skipped)
        if (note := raise_opset(graph, _PER_CHANNEL_OPSET)) is not None:  # some nodes are others now
            infer_shapes(graph)
            excluded = self._excluded(graph)
            placement = _place_with_ranges(graph, target, excluded, ranges)
        if self.autotune:
            excluded |= _slower_here(graph, target, placement, excluded, ranges, context)
        elif target.costs is not None and not self.small_islands:
            excluded |= too_small(graph, placement, target.costs, _input_shapes(context))
        placement = _quantize(graph, target, excluded, ranges)
        if not placement.nodes:
            return PassResult(skipped=placement.skipped)
        return PassResult(
            rewrites=len(placement.activations) + len(placement.weights) + len(placement.operands),
            skipped=placement.skipped,
            parts={
                "operators": len(placement.nodes),
                "activations": len(placement.activations),
                "weights": len(placement.weights),
            },
            notes=(*((note,) if note else ()), *(target.notes if target is context.target else ())),
            warnings=(unmatched,) if unmatched else (),
        )

    def _options_on(self, target: Target) -> Target:
        if self.reduce_range is not Switch.AUTO:
            target = replace(target, saturates=self.reduce_range is Switch.ON)
        if self.int8_weights is not Switch.AUTO:
            target = replace(target, stores_int8_weights=self.int8_weights is Switch.ON)
        return target

    def _excluded(self, graph: gs.Graph) -> dict[int, str]:
        """By id of a node, why the options keep it float.

        Raises:
            PipelineError: a name pattern or an operator type that fits no node.
        """
        nodes = [node for each in all_graphs(graph) for node in each.nodes]
        excluded = {id(node): "excluded by its operator type" for node in nodes if node.op in self.exclude_ops}
        if unknown := set(self.exclude_ops) - {node.op for node in nodes}:
            raise PipelineError(f"qdq:exclude_ops: the model has no operator {', '.join(sorted(unknown))}")
        for pattern in self.exclude:
            found = {id(node): "excluded by name" for node in nodes if fnmatchcase(node_label(node), pattern)}
            if not found:
                raise PipelineError(f"qdq:exclude: no node's name fits '{pattern}'")
            excluded |= found
        return excluded


def _input_shapes(context: Context) -> dict[str, tuple[int, ...]] | None:
    """The shapes of the first sample; None where there is none."""
    feed = None if context.samples is None else next(iter(context.samples), None)
    return None if feed is None else {name: value.shape for name, value in feed.items()}


def _slower_here(
    graph: gs.Graph,
    target: Target,
    placement: Placement,
    excluded: Mapping[int, str],
    ranges: Ranges,
    context: Context,
) -> dict[int, str]:
    """By id of a node, what onnxruntime measured on this machine that speaks against its island.

    Raises:
        PipelineError: the target is another machine, or there are no inputs to measure with.
    """
    if not target.runs_here:
        raise PipelineError(f"qdq:autotune measures in onnxruntime on this CPU, and {target.name} runs elsewhere")
    feed = next(iter(context.samples), None) if context.samples is not None else None
    if feed is None:
        raise PipelineError("qdq:autotune needs inputs to measure with: give --data")
    islands = islands_of(graph, placement)
    position_of = {id(node): position for position, node in enumerate(graph.nodes)}

    def build(left_out: Sequence[int]) -> Model:
        copy = copy_graph(graph)
        gone = {id(node) for position in left_out for node in islands[position].nodes}
        floats = {position_of[key]: excluded.get(key, "") for key in (*gone, *excluded) if key in position_of}
        _quantize(copy, target, {id(copy.nodes[position]): why for position, why in floats.items()}, ranges)
        return Model(copy, context.frame)

    tuned = tune(islands, build, feed, progress=context.progress)
    return {id(node): reason for position, reason in tuned.reasons.items() for node in islands[position].nodes}


def _quantize(graph: gs.Graph, target: Target, excluded: dict[int, str], ranges: Ranges) -> Placement:
    """Insert the pairs everywhere but at excluded nodes; `excluded` gains those whose ranges are not known."""
    placement = _place_with_ranges(graph, target, excluded, ranges)
    if decomposed := [node for node in placement.nodes if node.op in target.decomposed]:
        ranges = decompose_activations(graph, decomposed, ranges)
        infer_shapes(graph)
        placement = _place_with_ranges(graph, target, excluded, ranges)
    _Insertion(graph, target, placement, ranges).run()
    return placement


def _place_with_ranges(graph: gs.Graph, target: Target, excluded: dict[int, str], ranges: Ranges) -> Placement:
    """The placement over tensors whose ranges are known; operators that need another one's pair stay float.

    Raises:
        PipelineError: no range fits the graph.
    """
    placement = place(graph, target, excluded)
    if placement.observed and not any(name in ranges.tensors for name in placement.observed):
        raise PipelineError(
            f"the ranges are of another model: none is called like this one's tensors ({placement.observed[0]}, ...)"
        )
    while missing := [item for item in placement.activations.items() if item[1].source.name not in ranges.tensors]:
        for name, activation in missing:
            for node in placement.users[name]:
                excluded[id(node)] = f"no range is known for {activation.source.name}"
        placement = place(graph, target, excluded)
    return placement


class _Insertion:
    """Wires a placement's pairs into a graph."""

    def __init__(self, graph: gs.Graph, target: Target, placement: Placement, ranges: Ranges) -> None:
        self.graph = graph
        self.target = target
        self.placement = placement
        self.ranges = ranges
        self.names = Names(graph)
        self.new_nodes: list[gs.Node] = []
        self.nested_names = nested_output_names(graph)
        self.stored: dict[int, gs.Variable] = {}  # by id of a tensor, its integers
        self.replaced: set[int] = set()  # ids of nodes that others stand for now

    def run(self) -> None:
        between = [(node, node.inputs[0], node.outputs[0]) for node in self.placement.on_integers]
        dequantized: dict[tuple[int, int | None], gs.Variable] = {}
        for edge, axis in self.placement.weights:
            key = (id(edge.tensor), axis)
            if key not in dequantized:
                dequantized[key] = self._weight(edge, axis)
            set_input(edge.node, edge.index, dequantized[key])
        for edge in self.placement.operands:
            set_input(edge.node, edge.index, self._operand(edge))
        for edge in self.placement.biases:
            self._flatten(edge)
        for name, activation in self.placement.activations.items():
            self._activation(activation, self.placement.readers[name])
        for activation, before in self.placement.rescaled:
            self._rescale(activation, before)
        for node, value, result in between:
            self._move_between(node, value, result)
        self._remove_replaced()
        self.graph.toposort()

    def _flatten(self, edge: Edge) -> None:
        """Make a bias of shape [1, N] a vector: onnxruntime fuses only those into int8 kernels."""
        values = constant_of(edge.tensor)
        assert values is not None
        if values.ndim > 1:
            name = self.names.fresh(f"{edge.tensor.name}_vector")
            set_input(edge.node, edge.index, gs.Constant(name, values.reshape(-1)))

    def _params(self, activation: Activation) -> QuantParams:
        found = self.ranges.tensors[activation.source.name]
        return params_of_range(found.minimum, found.maximum, self.target.activation).scaled(activation.factor)

    def _activation(self, activation: Activation, readers: tuple[Edge, ...]) -> None:
        tensor, params = activation.tensor, self._params(activation)
        keeps_name = is_output(self.graph, tensor) or tensor.name in self.nested_names
        if self.target.quantizes_outputs and keeps_name and producer(tensor) is not None:
            self._named_output(tensor, params)
            return
        pair_output = gs.Variable(self.names.fresh(f"{tensor.name}_dequantized"), tensor.dtype, tensor.shape)
        if self.target.quantizes_outputs:
            replace_uses(tensor, pair_output)
        else:
            for edge in readers:
                set_input(edge.node, edge.index, pair_output)
        self.stored[id(tensor)] = self._pair(tensor, pair_output, params)

    def _rescale(self, activation: Activation, before: gs.Tensor) -> None:
        """Read the integers of `before` with the scale of `activation`, in place of the operator between them."""
        stored = self.stored[id(before)]
        self.stored[id(activation.tensor)] = stored
        node = producer(activation.tensor)
        assert node is not None
        disconnect(node)  # the DQ takes its output over, name and all
        self.replaced.add(id(node))
        params = self._params(activation)
        constants = self._constants(activation.tensor.name, params)
        self._add("DequantizeLinear", activation.tensor, [stored, *constants], activation.tensor, {})

    def _move_between(self, node: gs.Node, value: gs.Tensor, result: gs.Tensor) -> None:
        """Let an operator that reads `value` and computes `result` work on their integers."""
        stored, output = self.stored[id(value)], self.stored[id(result)]
        quantize = producer(output)
        assert quantize is not None
        zero_point = quantize.inputs[2]
        disconnect(quantize)
        self.replaced.add(id(quantize))
        set_output(node, 0, output)
        set_input(node, 0, stored)
        if len(node.inputs) > 2:
            set_input(node, 2, zero_point)
        elif node.attrs.get("mode", "constant") == "constant":
            node.inputs.append(zero_point)

    def _remove_replaced(self) -> None:
        """Take out what others stand for now, and each DQ that only they read."""
        named = named_tensors(self.graph)
        unread = [
            node
            for node in self.new_nodes
            if node.op == "DequantizeLinear" and not node.outputs[0].outputs and id(node.outputs[0]) not in named
        ]
        disconnect_all(unread)
        gone = self.replaced | {id(node) for node in unread}
        self.graph.nodes[:] = [node for node in (*self.graph.nodes, *self.new_nodes) if id(node) not in gone]

    def _named_output(self, tensor: gs.Tensor, params: QuantParams) -> None:
        """Put a pair before a tensor whose name must stay: a new tensor takes its place at the producer."""
        node = producer(tensor)
        assert node is not None
        index = next(index for index, output in enumerate(node.outputs) if output is tensor)
        before = gs.Variable(self.names.fresh(f"{tensor.name}_float"), tensor.dtype, tensor.shape)
        node.outputs[index] = before
        self.stored[id(tensor)] = self._pair(before, tensor, params)

    def _pair(self, tensor: gs.Tensor, output: gs.Tensor, params: QuantParams) -> gs.Variable:
        """Add tensor -> Q -> DQ -> output; return the integers between them."""
        constants = self._constants(tensor.name, params)
        stored = gs.Variable(self.names.fresh(f"{tensor.name}_quantized"), params.quant_type.dtype, tensor.shape)
        attributes = {} if params.axis is None else {"axis": params.axis}
        self._add("QuantizeLinear", tensor, [tensor, *constants], stored, attributes)
        self._add("DequantizeLinear", tensor, [stored, *constants], output, attributes)
        return stored

    def _weight(self, edge: Edge, axis: int | None) -> gs.Variable:
        weight = edge.tensor
        values = constant_of(weight)
        assert values is not None
        fits = self.target.saturates and not _is_depthwise(edge.node)
        params = params_of_weight(values, axis, self.target.weight, pairs_fit_16_bits=fits)
        return self._constant_pair(weight, params)

    def _operand(self, edge: Edge) -> gs.Variable:
        """A constant that meets activations: quantized as they are, over its own range."""
        values = constant_of(edge.tensor)
        assert values is not None
        low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
        return self._constant_pair(edge.tensor, params_of_range(low, high, self.target.activation))

    def _constant_pair(self, constant: gs.Tensor, params: QuantParams) -> gs.Variable:
        output = gs.Variable(self.names.fresh(f"{constant.name}_dequantized"), np.dtype(np.float32), constant.shape)
        if not self.target.stores_int8_weights:
            self._pair(constant, output, params)
            return output
        values = constant_of(constant)
        assert values is not None
        stored = gs.Constant(self.names.fresh(f"{constant.name}_quantized"), params.quantize(values))
        attributes = {} if params.axis is None else {"axis": params.axis}
        self._add("DequantizeLinear", constant, [stored, *self._constants(constant.name, params)], output, attributes)
        return output

    def _constants(self, name: str, params: QuantParams) -> list[gs.Constant]:
        scale = gs.Constant(self.names.fresh(f"{name}_scale"), params.scale)
        zero_point = gs.Constant(self.names.fresh(f"{name}_zero_point"), params.zero_point)
        return [scale, zero_point]

    def _add(
        self, op: str, about: gs.Tensor, inputs: list[gs.Tensor], output: gs.Tensor, attributes: dict[str, int]
    ) -> None:
        name = self.names.fresh(f"{about.name}_{op}")
        self.new_nodes.append(gs.Node(op, name, attributes, inputs, [output]))


def _is_depthwise(node: gs.Node) -> bool:
    """Whether each output channel of a Conv reads one input channel of several: kernels of their own sum those."""
    return node.op == "Conv" and bool(node.attrs.get("group", 1) > 1 and node.inputs[1].shape[1] == 1)
