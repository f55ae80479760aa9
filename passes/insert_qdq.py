"""Insert QuantizeLinear/DequantizeLinear pairs where the target runs the graph in int8.

`graphopt.placement` decides where, `graphopt.islands` and `graphopt.autotune` what pays, and `graphopt.insertion`
wires the pairs in: ranges become scales and zero points, weights become integers. Biases stay float: onnxruntime makes
its own int32 bias, and TensorRT refuses an int32 DequantizeLinear.

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

import onnx_graphsurgeon as gs

from graphopt.autotune import tune
from graphopt.errors import PipelineError
from graphopt.feeds import Feed
from graphopt.graph import (
    all_graphs,
)
from graphopt.graph_copy import copy_graph
from graphopt.hard_activations import decompose_activations
from graphopt.insertion import Insertion
from graphopt.islands import islands_of, too_small
from graphopt.model_io import Model
from graphopt.opset import raise_opset
from graphopt.pass_base import Context, Effect, Pass, PassResult
from graphopt.placement import Placement, node_label, place
from graphopt.ranges import Ranges
from graphopt.ranges_files import unmatched_names
from graphopt.shapes import infer_shapes
from graphopt.targets import Target

_PER_CHANNEL_OPSET = 13
_SIXTEEN_BITS_OPSET = 21


class ActivationType(Enum):
    """Integers that activations are stored as; `auto` leaves it to the target."""

    AUTO = "auto"
    UINT8 = "uint8"
    INT8 = "int8"
    UINT16 = "uint16"
    INT16 = "int16"


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
    activations: ActivationType = field(
        default=ActivationType.AUTO,
        metadata={"help": "the type of activations; 16 bits are exact enough for most, and run in float on ort-cpu"},
    )
    per_channel: bool = field(default=True, metadata={"help": "weights have a scale for each output channel"})
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
        """Insert the pairs; reads `context.ranges` and `context.target`, leaves `context.unquantized`.

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
        context.unquantized = copy_graph(graph)
        known = [graph] if context.original is None else [graph, context.original.graph]  # fold removes tensors
        nodes = [node for each in known for node in each.nodes]
        names = {tensor.name for node in nodes for tensor in (*node.inputs, *node.outputs)}
        unmatched = unmatched_names(ranges, names)
        target = self._options_on(context.target)
        excluded = self._excluded(graph)
        placement = _place_with_ranges(graph, target, excluded, ranges)
        if not placement.nodes:
            return PassResult(skipped=placement.skipped)
        least = _PER_CHANNEL_OPSET if target.activation.dtype.itemsize == 1 else _SIXTEEN_BITS_OPSET
        if (note := raise_opset(graph, least)) is not None:  # some nodes are others now
            infer_shapes(graph)
            excluded = self._excluded(graph)
            placement = _place_with_ranges(graph, target, excluded, ranges)
        if self.autotune:
            excluded |= _slower_here(graph, target, placement, excluded, ranges, context)
        elif target.costs is not None and not self.small_islands:
            feed = _first_sample(context)
            shapes = None if feed is None else {name: value.shape for name, value in feed.items()}
            excluded |= too_small(graph, placement, target.costs, shapes)
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
        """The target with what the options override.

        Raises:
            PipelineError: the target has no such activations.
        """
        if self.activations is not ActivationType.AUTO:
            chosen = target.activations.get(self.activations.value)
            if chosen is None:
                known = ", ".join(target.activations)
                raise PipelineError(f"qdq:activations: {target.name} has {known}, not {self.activations.value}")
            costs = target.costs if chosen == target.activation else None  # they are those of its own type
            target = replace(target, activation=chosen, costs=costs)
        if not self.per_channel:
            rules = {op: replace(rule, per_channel=False) for op, rule in target.rules.items()}
            target = replace(target, rules=rules)
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


def _first_sample(context: Context) -> Feed | None:
    return None if context.samples is None else next(iter(context.samples), None)


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
    feed = _first_sample(context)
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
    Insertion(graph, target, placement, ranges).run()
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
