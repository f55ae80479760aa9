"""Compute what does not depend on the model's inputs, and store the results instead of the nodes.

In this order, in the graph and in the branches and bodies nested in it:

1.  An If whose condition is constant gives way to the nodes of its branch.
2.  Constant nodes become initializers.
3.  Shape arithmetic whose result is known becomes a constant, even where other dimensions are not known; a
    Reshape whose target has one unknown element gets -1 there.
4.  Nodes whose inputs are all constant are evaluated by onnxruntime, as long as the model does not grow
    (`graphopt.constant_regions` has the rule).

Never folded: random operators, Dropout among them, operators of other domains than ONNX's own, operators
that hold graphs or return sequences, and QuantizeLinear and DequantizeLinear: they say how a weight is
stored, and folding them would store it as float again. Of types that numpy lacks (bfloat16, float8, int4,
strings) only nodes that move or cast elements are folded. A graph output that is constant stays the output
of a Constant node, as does a value that a branch returns by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.constant_regions import Budget, Region, constants_read, growth, region_of, smallest_cut, split
from graphopt.evaluate import evaluate, is_evaluated_by_reference, is_numpy_type
from graphopt.graph import (
    Array,
    Names,
    all_graphs,
    bodies,
    constant_of,
    disconnect,
    disconnect_all,
    is_constant,
    label_of,
    named_tensors,
    present,
    producer,
    set_input,
)
from graphopt.inline_branch import inline_branches
from graphopt.operators import QUANTIZING, RANDOM
from graphopt.partial_values import ShapeValues, static_shape
from graphopt.pass_base import Context, Effect, Pass, PassResult, Skip
from graphopt.sizes import numpy_dtype

_CONSTANT_OF_ANY_TYPE = 9  # the opset; before, Constant had floating-point types only
_MAX_EVALUATED_BYTES = 2**30  # of one tensor on the way to a result


@dataclass(frozen=True, kw_only=True)
class FoldConstants(Pass):
    """Replace nodes whose inputs are all constant by their results, and shape arithmetic by what it gives."""

    name: ClassVar[str] = "fold-constants"
    effect: ClassVar[Effect] = Effect.EXACT

    max_growth: int = field(
        default=4096,
        metadata={"help": "bytes by which folding constants may grow the model, all in all"},
    )

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Fold in `graph` and the graphs in it; `skipped` names what would grow the model or fail."""
        inlined = inline_branches(graph)
        named = named_tensors(graph)
        stored = sum(_store_constant_nodes(each, named) for each in all_graphs(graph))
        context.infer_shapes(graph)
        known = _fold_known_values(graph, named)
        evaluated, skipped, budget = 0, [], Budget(self.max_growth)
        for each in all_graphs(graph):
            count, skips = _fold_constant_nodes(each, named, budget)
            evaluated += count
            skipped += skips
        parts = {"branches": inlined, "constants": stored, "shape values": known, "evaluated": evaluated}
        growth = self.max_growth - budget.left
        return PassResult(rewrites=sum(parts.values()), skipped=tuple(skipped), parts=parts, growth=growth)


def _store_constant_nodes(graph: gs.Graph, named: Set[int]) -> int:
    """Turn Constant nodes into initializers, without loading their values."""
    kept = []
    for node in graph.nodes:
        if node.op != "Constant" or id(node.outputs[0]) in named or not is_constant(node.outputs[0]):
            kept.append(node)
            continue
        tensor, value = node.outputs[0], node.attrs.get("value")
        values = constant_of(tensor) if value is None else value._values
        disconnect(node)
        tensor.to_constant(values)
    stored = len(graph.nodes) - len(kept)
    graph.nodes[:] = kept
    return stored


def _fold_known_values(root: gs.Graph, named: Set[int]) -> int:
    found, names, count = ShapeValues(root), Names(root), 0
    for graph in all_graphs(root):
        values = {}
        folded = []
        for node in graph.nodes:
            value = found.of(node.outputs[0]) if node.outputs else None
            if value is not None and value.complete and _may_be_constant(node, named, graph.opset):
                folded.append(node)
                values[id(node.outputs[0])] = value.values
            elif node.op == "Reshape" and not node.domain:
                count += _settle_reshape(node, found, names)
        _replace(graph, folded, values, named)
        count += len(folded)
    return count


def _settle_reshape(node: gs.Node, found: ShapeValues, names: Names) -> int:
    """Write 0 for an element of a Reshape's target that copies a size, and -1 for the one that the others determine."""
    target = found.of(node.inputs[1])
    if target is None or target.complete:
        return 0  # what computes a complete one is folded
    data, wanted = node.inputs[0], target.values.astype(np.int64)
    copies = not node.attrs.get("allowzero", 0)
    rank = 0 if data.shape is None else len(data.shape)
    for axis in map(int, np.flatnonzero(~target.known)):
        copied = copies and axis < rank and wanted[axis] and found.number(data, axis) == wanted[axis]
        wanted[axis] = 0 if copied else -1
    if (wanted < 0).sum() > 1 or np.any(wanted[target.known] < -1):
        return 0
    if (wanted < 0).any() and np.any(target.known & (wanted == 0)):
        return 0  # an axis of size 0, and then the number of elements determines nothing
    set_input(node, 1, gs.Constant(names.fresh(f"{node.outputs[0].name}/shape"), wanted))
    return 1


def _fold_constant_nodes(graph: gs.Graph, named: Set[int], budget: Budget) -> tuple[int, list[Skip]]:
    nodes, values, skipped = _sizable(graph, list(_constant_nodes(graph, named)), named)
    folded: list[gs.Node] = []
    pending: list[gs.Node] = []
    regions = []
    for region in split(nodes, named):
        sizes = {key: size for key, size in _sizes(region, values).items() if size is not None}  # all are known
        regions.append((growth(region, sizes), region, sizes))
    for grown, region, sizes in sorted(regions, key=lambda each: each[0]):
        chosen, skips = _choose(region, sizes, named, grown, budget)
        folded += chosen
        skipped += skips
        if not all(id(tensor) in values for node in chosen for tensor in present(node.outputs)):
            pending += chosen
    evaluated, failed, skips = _evaluated(graph, pending, named)
    folded = [node for node in folded if id(node) not in failed]
    _replace(graph, folded, values | evaluated, named)
    return len(folded), skipped + skips


def _constant_nodes(graph: gs.Graph, named: Set[int]) -> Iterator[gs.Node]:
    """Yield the nodes of `graph` that can be evaluated and read constants alone, or outputs of such nodes."""
    computed: set[int] = set()
    for node in graph.nodes:
        inputs = present(node.inputs)
        constant = inputs and all(id(tensor) in computed or _is_stored(tensor) for tensor in inputs)
        if constant and _is_foldable(node, graph.opset) and _may_be_constant(node, named, graph.opset):
            computed.update(id(tensor) for tensor in node.outputs)
            yield node


def _may_be_constant(node: gs.Node, named: Set[int], opset: int) -> bool:
    """Tell whether a Constant node may take the place of a node where the name of its result has to stay."""
    if node.op == "Constant":
        return False
    if opset >= _CONSTANT_OF_ANY_TYPE or not any(id(tensor) in named for tensor in node.outputs):
        return True
    return all(is_numpy_type(tensor.dtype) and np.dtype(tensor.dtype).kind == "f" for tensor in node.outputs)


def _is_stored(tensor: gs.Tensor) -> bool:
    """Tell whether a tensor is an initializer or the output of a Constant node."""
    if isinstance(tensor, gs.Constant):
        return True
    source = producer(tensor)
    return source is not None and source.op == "Constant" and is_constant(tensor)


def _is_foldable(node: gs.Node, opset: int) -> bool:
    if node.domain or node.op in RANDOM | QUANTIZING or bodies(node) or not _returns_tensors(node.op, opset):
        return False
    dtypes = [tensor.dtype for tensor in (*node.inputs, *node.outputs) if tensor.dtype is not None]
    return all(map(is_numpy_type, dtypes)) or is_evaluated_by_reference(node)


@cache
def _returns_tensors(op: str, opset: int) -> bool:
    """Tell whether ONNX defines the operator, with outputs that may be tensors."""
    try:
        schema = onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return False
    return all(any(kind.startswith("tensor") for kind in output.types) for output in schema.outputs)


def _sizable(
    graph: gs.Graph, nodes: list[gs.Node], named: Set[int]
) -> tuple[list[gs.Node], dict[int, Array], list[Skip]]:
    """Return the nodes whose outputs have a known size; where shape inference did not tell, they are evaluated."""
    small: list[gs.Node] = []
    large: list[gs.Node] = []
    skipped: list[Skip] = []
    for region in split(nodes, named):
        sizes = _sizes(region, {})
        biggest = max((size for size in sizes.values() if size is not None), default=0)
        if biggest > _MAX_EVALUATED_BYTES:
            reason = f"evaluating it would take {biggest} bytes of memory"
            skipped.append(Skip(label_of(region.nodes[0]), reason))
        elif None in sizes.values():
            large += region.nodes
        else:
            small += region.nodes
    everything = {id(tensor) for node in large for tensor in node.outputs}
    values, failed, skips = _evaluated(graph, large, named | everything)
    usable = {id(node) for node in (*small, *large)} - failed
    return [node for node in nodes if id(node) in usable], values, skipped + skips


def _sizes(region: Region, values: Mapping[int, Array]) -> dict[int, int | None]:
    """Return the bytes of every tensor that a region reads or computes, by id; None where they are not known."""
    sizes: dict[int, int | None] = {
        id(tensor): (tensor._values if isinstance(tensor, gs.Constant) else _value(tensor)).nbytes
        for tensor in constants_read(region)
    }
    for tensor in (tensor for node in region.nodes for tensor in node.outputs):
        value = values.get(id(tensor))
        shape, dtype = static_shape(tensor), tensor.dtype
        if value is not None:
            sizes[id(tensor)] = value.nbytes
        elif shape is None or dtype is None:
            sizes[id(tensor)] = None
        else:
            sizes[id(tensor)] = int(np.prod(shape, dtype=object)) * numpy_dtype(dtype).itemsize
    return sizes


def _choose(
    region: Region, sizes: Mapping[int, int], named: Set[int], grown: int, budget: Budget
) -> tuple[list[gs.Node], list[Skip]]:
    if budget.allows(grown):
        return list(region.nodes), []
    left = budget.left
    cut = smallest_cut(region, sizes)
    chosen = [node for node in region.nodes if id(node) in cut]
    if not budget.allows(growth(region_of(chosen, named), sizes)):
        chosen = []
    taken = {id(node) for node in chosen}
    kept = next((node for node in region.nodes if id(node) not in taken), None)
    if kept is None:
        return chosen, []
    reason = f"folding it would grow the model by {grown} bytes, of which max_growth leaves {left}"
    return chosen, [Skip(label_of(kept), reason)]


def _evaluated(
    graph: gs.Graph, nodes: Sequence[gs.Node], named: Set[int]
) -> tuple[dict[int, Array], set[int], list[Skip]]:
    """Evaluate nodes; return the values that something else reads, the ids of the nodes without, and why."""
    if not nodes:
        return {}, set(), []
    region = Region(tuple(nodes), frozenset())
    constants = {id(tensor): _value(tensor) for tensor in constants_read(region)}
    wanted = [tensor for node in nodes for tensor in node.outputs if id(tensor) in named]
    imports = graph.import_domains or [onnx.helper.make_opsetid("", graph.opset)]
    evaluation = evaluate(nodes, constants, wanted, imports)
    skipped, lost = [], set()
    missing: set[int] = set()
    for node in nodes:
        reason = evaluation.failures.get(id(node))
        if reason is not None:
            skipped.append(Skip(label_of(node), f"onnxruntime cannot evaluate it: {reason}"))
        if reason is not None or any(id(tensor) in missing for tensor in node.inputs):
            lost.add(id(node))
            missing.update(id(tensor) for tensor in present(node.outputs))
    return evaluation.values, lost, skipped


def _value(tensor: gs.Tensor) -> Array:
    value = constant_of(tensor)
    if value is None:
        raise ValueError(f"{tensor.name} is not constant")
    return value


def _replace(
    graph: gs.Graph,
    nodes: Sequence[gs.Node],
    values: Mapping[int, Array],
    named: Set[int],
) -> None:
    """Take nodes out of the graph and leave the values that others read in their place."""
    outputs = {id(node): present(node.outputs) for node in nodes}
    disconnect_all(nodes)
    kept: list[gs.Node] = []
    for node in graph.nodes:
        if id(node) not in outputs:
            kept.append(node)
            continue
        for tensor in outputs[id(node)]:
            if id(tensor) in named:
                value = gs.Constant(tensor.name, values[id(tensor)])
                kept.append(gs.Node("Constant", node.name, {"value": value}, outputs=[tensor]))
            elif tensor.outputs:
                tensor.to_constant(values[id(tensor)])
    graph.nodes[:] = kept
