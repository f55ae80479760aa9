"""Insert QuantizeLinear/DequantizeLinear pairs where the target runs the graph in int8.

`graphopt.placement` decides where, `graphopt.islands` and `graphopt.autotune` what pays, and `graphopt.insertion`
wires the pairs in: ranges become scales and zero points, weights become integers. Biases stay float: onnxruntime makes
its own int32 bias, and TensorRT refuses an int32 DequantizeLinear.

    x -> Q(scale, zero_point) -> DQ -> operator        activations: one pair a tensor
    int8 weight -> DQ(scale[C]) -> operator            weights, where the target stores integers
    float weight -> Q -> DQ -> operator                weights, where it does not

    int4 weight -> DQ(scale[K / 32, N]) -> MatMul      with weights=int4; its activation stays float

A graph output that carries a pair keeps its name, on the DQ. Per-channel scales need opset 13: a lower one is raised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from fnmatch import fnmatchcase
from typing import ClassVar

import onnx_graphsurgeon as gs

from graphopt.autotune import tune
from graphopt.calibrated_placement import place_calibrated
from graphopt.decompositions import decompose, is_decomposed, write_clips_as_limits
from graphopt.errors import PipelineError
from graphopt.feeds import Feed
from graphopt.float_weights import keep_weights_float
from graphopt.graph import Names, all_nodes
from graphopt.graph_copy import copy_graph
from graphopt.insertion import insert_pairs
from graphopt.islands import islands_of, too_small
from graphopt.model_io import Model
from graphopt.moved_reads import quantize_moved_reads
from graphopt.nested_tensors import nested_tensors, range_names
from graphopt.opset import raise_opset
from graphopt.padded_channels import pad_input_channels
from graphopt.pass_base import Context, Effect, Pass, PassResult, Skip
from graphopt.placement import Placement, node_label, place_all
from graphopt.quantization import QuantType
from graphopt.ranges import Ranges
from graphopt.ranges_files import unmatched_names
from graphopt.repeated_pixels import repeat_pixels
from graphopt.shapes import infer_shapes
from graphopt.targets import Blocks, Role, Target, targets
from graphopt.weight_blocks import OPSET as BLOCKS_OPSET
from graphopt.weight_blocks import products_for_blocks, store_in_blocks

_PER_CHANNEL_OPSET = 13
_FLOAT8_OPSET = 19
_SIXTEEN_BITS_OPSET = 21
_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_IN_BLOCKS = "its weight is stored in blocks, and its activation stays float"  # nothing that a report should list


class ActivationType(Enum):
    """What activations are stored as; `auto` leaves it to the target."""

    AUTO = "auto"
    UINT8 = "uint8"
    INT8 = "int8"
    UINT16 = "uint16"
    INT16 = "int16"
    FLOAT8E4M3 = "float8e4m3"


class WeightType(Enum):
    """What weights of matrix products are stored as; `auto` leaves it to the target."""

    AUTO = "auto"
    INT4 = "int4"


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
    weights: WeightType = field(
        default=WeightType.AUTO,
        metadata={"help": "int4: matrix products read weights of 4 bits in blocks; their activations stay float"},
    )
    block_size: int = field(
        default=0, metadata={"help": "weights that share a scale with weights=int4; 0 leaves it to the target"}
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
            PipelineError: no ranges where activations are to be quantized, or ranges of another model.
        """
        blocks, ranges = self._blocks_on(context.target), context.ranges
        if ranges is None and blocks is None:
            raise PipelineError("qdq needs ranges: put calibrate before it, or give a ranges file (--ranges FILE)")
        if quantized := Counter(node.op for node in all_nodes(graph) if node.op in _QUANTIZERS):
            counts = " and ".join(f"{count} {op}" for op, count in sorted(quantized.items()))
            raise PipelineError(
                f"the model is quantized already ({counts} nodes): to quantize it anew, put strip-qdq first, which "
                "says of what it leaves alone, why"
            )
        infer_shapes(graph)
        context.unquantized = copy_graph(graph)
        if blocks is None:
            assert ranges is not None
            return self._insert_pairs(graph, context, ranges, self._excluded(graph))
        return self._store_in_blocks(graph, context, blocks)

    def _store_in_blocks(self, graph: gs.Graph, context: Context, blocks: Blocks) -> PassResult:
        """Store what weights can be in blocks, then quantize the other operators where there are ranges."""
        size = self.block_size or blocks.sizes[0]
        note = raise_opset(graph, BLOCKS_OPSET)
        infer_shapes(graph)
        excluded = self._excluded(graph)
        products, skipped = products_for_blocks(graph, blocks, size, set(excluded))
        store_in_blocks(graph, products, blocks, size)
        excluded |= {id(product.node): _IN_BLOCKS for product in products}
        if context.ranges is not None:
            others = self._insert_pairs(graph, context, context.ranges, excluded)
        else:
            others = _without_ranges(graph, self._options_on(context.target), excluded)
        return PassResult(
            rewrites=len(products) + others.rewrites,
            skipped=(*skipped, *(skip for skip in others.skipped if skip.reason != _IN_BLOCKS)),
            parts={"weights in blocks": len(products), **others.parts},
            notes=(*((note,) if note else ()), *others.notes),
            warnings=others.warnings,
        )

    def _insert_pairs(self, graph: gs.Graph, context: Context, ranges: Ranges, excluded: dict[int, str]) -> PassResult:
        known = [graph] if context.original is None else [graph, context.original.graph]  # fold removes tensors
        nodes = [node for each in known for node in each.nodes]
        names = {tensor.name for node in nodes for tensor in (*node.inputs, *node.outputs)}
        names.update(name for each in known for name in (*nested_tensors(each), *(one.name for one in each.inputs)))
        unmatched = unmatched_names(ranges, names)
        target = self._options_on(context.target)
        placements = place_calibrated(graph, target, excluded, ranges)
        if not any(each.nodes for each in placements):
            return PassResult(skipped=_skipped(placements))
        if (raised := raise_opset(graph, _least_opset(target.activation))) is not None:  # some nodes are others now
            infer_shapes(graph)
            excluded = self._excluded(graph)
            placements = place_calibrated(graph, target, excluded, ranges)
        slower: dict[int, str] = {}
        measured = ""
        if self.autotune:
            slower, measured = _slower_here(graph, target, placements, excluded, ranges, context)
        elif target.costs is not None and not self.small_islands:
            reasons = context.too_small
            if reasons is None:
                reasons = reasons_too_small(graph, placements, target, context, ranges)
            slower = {id(node): reasons[name] for node, name in _named_nodes(graph) if name in reasons}
        if slower:
            excluded |= slower
            placements = place_calibrated(graph, target, excluded, ranges)
        notes = (*((measured,) if measured else ()), *_needed_versions(target, placements))
        placements, rewritten = _quantize(graph, target, placements, excluded, ranges, context)
        operators, activations, weights, operands = (
            sum(map(len, each))
            for each in zip(*((at.nodes, at.activations, at.weights, at.operands) for at in placements), strict=True)
        )
        if not operators:
            return PassResult(skipped=_skipped(placements), notes=notes)
        return PassResult(
            rewrites=activations + weights + operands,
            skipped=_skipped(placements),
            parts={"operators": operators, "activations": activations, "weights": weights, **rewritten},
            notes=(*notes, *((raised,) if raised else ()), *(target.notes if target is context.target else ())),
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
            is_own = chosen == target.activation  # of which costs and kernels are known
            costs, dense_convs = (target.costs, target.dense_convs) if is_own else (None, None)
            weight = chosen if chosen.is_float else target.weight
            rules = target.activation_rules.get(self.activations.value, target.rules)
            target = replace(
                target, activation=chosen, weight=weight, rules=rules, costs=costs, dense_convs=dense_convs
            )
        if not self.per_channel:
            rules = {op: replace(rule, per_channel=False) for op, rule in target.rules.items()}
            target = replace(target, rules=rules)
        if self.reduce_range is not Switch.AUTO:
            target = replace(target, saturates=self.reduce_range is Switch.ON)
        if self.int8_weights is not Switch.AUTO:
            target = replace(target, stores_int8_weights=self.int8_weights is Switch.ON)
        return target

    def _blocks_on(self, target: Target) -> Blocks | None:
        """The blocks that the options ask for; None: they ask for none.

        Raises:
            PipelineError: the target has no such weights, or no blocks of that size.
        """
        if self.weights is WeightType.AUTO:
            if self.block_size:
                raise PipelineError("qdq:block_size is of weights in blocks: add weights=int4")
            return None
        blocks = target.block_weights.get(self.weights.value)
        if blocks is None:
            known = ", ".join(name for name, each in targets().items() if self.weights.value in each().block_weights)
            raise PipelineError(
                f"qdq:weights: {target.name} has no kernels for {self.weights.value} weights; {known} have"
            )
        if self.block_size and self.block_size not in blocks.sizes:
            known = ", ".join(map(str, sorted(blocks.sizes)))
            raise PipelineError(f"qdq:block_size: {target.name} reads blocks of {known}, not of {self.block_size}")
        return blocks

    def _excluded(self, graph: gs.Graph) -> dict[int, str]:
        """By id of a node, why the options keep it float.

        Raises:
            PipelineError: a name pattern or an operator type that fits no node.
        """
        nodes = list(all_nodes(graph))
        excluded = {id(node): "excluded by its operator type" for node in nodes if node.op in self.exclude_ops}
        if unknown := set(self.exclude_ops) - {node.op for node in nodes}:
            raise PipelineError(f"qdq:exclude_ops: the model has no operator {', '.join(sorted(unknown))}")
        for pattern in self.exclude:
            found = {id(node): "excluded by name" for node in nodes if fnmatchcase(node_label(node), pattern)}
            if not found:
                raise PipelineError(f"qdq:exclude: no node's name fits '{pattern}'")
            excluded |= found
        return excluded


def _needed_versions(target: Target, placements: Sequence[Placement]) -> tuple[str, ...]:
    """What is said of operators whose int8 form older runtimes lack."""
    placed = sorted({node.op for each in placements for node in each.nodes if node.op in target.rules})
    return tuple(
        f"{op} in int8 needs {since}: older ones do not load the model (qdq:exclude_ops={op} keeps it float)"
        for op in placed
        if (since := target.rules[op].since)
    )


def _skipped(placements: Sequence[Placement]) -> tuple[Skip, ...]:
    return tuple(skip for each in placements for skip in each.skipped)


def _least_opset(activation: QuantType) -> int:
    """The opset that has scales for each channel and the type of activations."""
    if activation.is_float:
        return _FLOAT8_OPSET
    return _PER_CHANNEL_OPSET if activation.dtype.itemsize == 1 else _SIXTEEN_BITS_OPSET


def _without_ranges(graph: gs.Graph, target: Target, excluded: dict[int, str]) -> PassResult:
    """What is said of operators that could run in int8 if their ranges were known."""
    placements = place_all(graph, target, excluded)
    gaining = {op for op, rule in target.rules.items() if rule.role is Role.GAINS}
    lacking = [node for each in placements for node in each.nodes if node.op in gaining]
    reason = "to run in int8 it needs ranges: put calibrate before qdq"
    note = f"no ranges, so only weights are quantized: calibrate before qdq is for the {len(lacking)} other operators"
    return PassResult(
        skipped=(*_skipped(placements), *(Skip(node_label(node), reason) for node in lacking)),
        notes=(note,) if lacking else (),
    )


def _first_sample(context: Context) -> Feed | None:
    return None if context.samples is None else next(iter(context.samples), None)


def reasons_too_small(
    graph: gs.Graph, placements: Sequence[Placement], target: Target, context: Context, ranges: Ranges
) -> dict[str, str]:
    """Why operators do not pay in int8 on the target, by the names that ranges have for their first outputs."""
    if target.costs is None:
        return {}
    shapes = None if context.samples is None else context.samples.first_shapes()
    found = too_small(graph, placements, target.costs, shapes, _observed_sizes(graph, ranges))
    return {name: found[id(node)] for node, name in _named_nodes(graph) if id(node) in found}


def _named_nodes(graph: gs.Graph) -> list[tuple[gs.Node, str]]:
    """The nodes of the graph and those in it with the names of their first outputs, which nested graphs may share."""
    called = range_names(graph)
    return [(node, called.get(id(node.outputs[0]), node.outputs[0].name)) for node in all_nodes(graph) if node.outputs]


def _observed_sizes(graph: gs.Graph, ranges: Ranges) -> Callable[[gs.Tensor], float | None]:
    """How many values a tensor of the graph, or of one in it, had in a sample."""
    called = range_names(graph)

    def size_of(tensor: gs.Tensor) -> float | None:
        found = ranges.tensors.get(called.get(id(tensor), tensor.name))
        return found.count / ranges.samples if found is not None and found.count and ranges.samples else None

    return size_of


def _slower_here(
    graph: gs.Graph,
    target: Target,
    placements: Sequence[Placement],
    excluded: Mapping[int, str],
    ranges: Ranges,
    context: Context,
) -> tuple[dict[int, str], str]:
    """By id of a node, what onnxruntime measured on this machine that speaks against its island; and all in one line.

    Raises:
        PipelineError: the target is another machine, or there are no inputs to measure with.
    """
    if not target.runs_here:
        raise PipelineError(f"qdq:autotune measures in onnxruntime on this CPU, and {target.name} runs elsewhere")
    feed = _first_sample(context)
    if feed is None:
        raise PipelineError("qdq:autotune needs inputs to measure with: give --data")
    islands = [island for placement in placements for island in islands_of(placement)]
    position_of = {id(node): position for position, node in enumerate(all_nodes(graph))}

    def build(left_out: Sequence[int]) -> Model:
        copy = copy_graph(graph)
        nodes = list(all_nodes(copy))
        gone = {id(node) for position in left_out for node in islands[position].nodes}
        floats = {position_of[key]: excluded.get(key, "") for key in (*gone, *excluded) if key in position_of}
        stay = {id(nodes[position]): why for position, why in floats.items()}
        _quantize(copy, target, place_calibrated(copy, target, stay, ranges), stay, ranges, context)
        return Model(copy, context.frame)

    tuned = tune(islands, build, feed, progress=context.progress)
    slower = {id(node): reason for position, reason in tuned.reasons.items() for node in islands[position].nodes}
    return slower, str(tuned)


def _quantize(
    graph: gs.Graph,
    target: Target,
    placements: tuple[Placement, ...],
    excluded: dict[int, str],
    ranges: Ranges,
    context: Context,
) -> tuple[tuple[Placement, ...], dict[str, int]]:
    """Insert the pairs of placements.

    Returns:
        the placements as they are once operators that run as others are written out, and how many operators have
        another form for the target's kernels, by what that is.
    """
    placed = [node for each in placements for node in each.nodes if node.op in target.decomposed]
    if decomposed := list(filter(is_decomposed, placed)):
        ranges = decompose(graph, decomposed, ranges)
        infer_shapes(graph)
        placements = place_calibrated(graph, target, excluded, ranges)
    insert_pairs(graph, target, placements, ranges, context.weight_scales)
    names, rewritten = Names(graph), Counter[str]()
    for each in placements:
        if target.dense_convs is not None:
            padded = pad_input_channels(each.graph, each.nodes, target.dense_convs, names)
            rewritten["Convs with channels of zeros"] += padded
        if target.repeats_pixels:
            rewritten["Resizes as copies"] += repeat_pixels(each.graph, each.nodes, names)
        kept = keep_weights_float(each.graph, target.quantizes_weights, target.absorbed, names)
        rewritten["weights kept float"] += kept
    if target.aborts_at_moved_reads:
        quantize_moved_reads(graph)
    if target.clips_hide_products:
        floating = {op for op, rule in target.rules.items() if rule.role is Role.GAINS and not rule.needs_output}
        write_clips_as_limits(graph, [node for each in placements for node in each.nodes if node.op in floating])
    return placements, dict(+rewritten)
