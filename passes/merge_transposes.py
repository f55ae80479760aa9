"""Merge Transposes, also those with other operators between them.

With T_p(x) = Transpose(x, perm = p), so that axis i of T_p(x) is axis p[i] of x:

    T_q(T_p(x)) = T_r(x)  with r[i] = p[q[i]];  nothing where r = 0, 1, 2 ...
    f(T_p(x)) = T_p(f'(x))  for f of one element at a time, and f' = f with its axes renamed, a -> p[a], for others
    Gemm(T(x), w) = Gemm(x, w, transA = 1)  and so for the second input
    Flatten(T_p(x)) w = Flatten(x) w'  where p leaves the batch axis alone, with the rows of w' in the order of x

The second line holds for all tensors that f reads at once; a constant c becomes T_p^-1(c). Such operators form regions,
connected parts of the graph. In a region each node may compute f' instead of f, and a Transpose stands wherever the two
sides of a tensor differ. Exporters of models in NHWC write them around each convolution:

    Conv -> T_p -> Add(bias) -> Relu -> T_p^-1 -> Conv    becomes    Conv -> Add(bias') -> Relu -> Conv

The choice that leaves the fewest Transposes is a minimum cut between the nodes that stay and those that change; it is
taken where it leaves fewer than there were, so nothing moves for its own sake. Sums along an axis may be added in
another order. A tensor that a node outside the region reads, a graph output and a value that a branch returns keep
their layout.

Refused: ranks that are not known, axes that are computed at run time, computed inputs that broadcast from a lower rank.
A Transpose of a constant is for fold-constants.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import ClassVar

import networkx as nx
import numpy as np
import onnx_graphsurgeon as gs

from graphopt.graph import (
    Names,
    all_graphs,
    constant_of,
    disconnect,
    is_constant,
    label_of,
    named_tensors,
    producer,
    replace_uses,
    set_input,
    set_output,
)
from graphopt.layouts import (
    LAYOUT_RULES,
    Layout,
    Permutation,
    data_inputs,
    data_outputs,
    has_layout_rule,
    inverse,
    is_single,
    permuted_constant,
    reads_as_data,
    why_not_movable,
)
from graphopt.node_order import sorted_nodes
from graphopt.partial_values import dimensions_of, known_dimensions
from graphopt.pass_base import Context, Effect, Pass, PassResult, Skip


@dataclass(frozen=True, kw_only=True)
class MergeTransposes(Pass):
    """Merge Transposes, across operators that work in any layout too, and into Gemm."""

    name: ClassVar[str] = "merge-transposes"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Merge them in `graph` and the graphs in it; `parts` counts pairs, regions, Gemms and weights."""
        graphs = [each for each in all_graphs(graph) if any(map(_is_transpose, each.nodes))]
        if not graphs:
            return PassResult()
        transposes = [[node for node in each.nodes if _is_transpose(node)] for each in graphs]
        flattened = any(_flattening(node) for nodes in transposes for node in nodes)
        if flattened or any(len(nodes) > 1 for nodes in transposes):
            context.infer_shapes(graph)
        named, names = named_tensors(graph), Names(graph)
        merged: Counter[str] = Counter()
        skipped: list[Skip] = []
        for each in graphs:
            merger = _Merger(each, named, names)
            merged += merger.run()
            skipped += merger.skips()
        return PassResult(rewrites=merged.total(), skipped=tuple(skipped), parts=dict(merged))


def _is_transpose(node: gs.Node) -> bool:
    return node.op == "Transpose" and not node.domain and bool(node.inputs)


def _permutation(node: gs.Node) -> Permutation | None:
    """Return the permutation of a Transpose; None for another node, and where the rank is not known."""
    if not _is_transpose(node):
        return None
    if "perm" in node.attrs:
        return tuple(node.attrs["perm"])
    for tensor in (node.inputs[0], node.outputs[0]):
        dimensions = known_dimensions(tensor)
        if dimensions is not None:
            return tuple(reversed(range(len(dimensions))))
    return None


def _flattening(node: gs.Node) -> tuple[gs.Node, gs.Node] | None:
    """Return what alone reads a Transpose if it is a Flatten or a Reshape, and the product that alone reads that."""
    reshape = _only_reader(node)
    product = reshape and _only_reader(reshape)
    if reshape is None or reshape.op not in ("Flatten", "Reshape") or reshape.domain or product is None:
        return None
    if product.op not in ("Gemm", "MatMul") or product.domain or product.inputs[0] is not reshape.outputs[0]:
        return None
    flat = known_dimensions(reshape.outputs[0])
    if not is_constant(product.inputs[1]) or (flat is not None and len(flat) != 2):
        return None
    return reshape, product


def _only_reader(node: gs.Node) -> gs.Node | None:
    readers = node.outputs[0].outputs
    return readers[0] if len(readers) == 1 else None


def _composed(first: Permutation, second: Permutation) -> Permutation:
    """Return the permutation that does `first` and then `second`."""
    return tuple(first[axis] for axis in second)


def _is_in_order(permutation: Permutation) -> bool:
    return list(permutation) == sorted(permutation)


@dataclass
class _Merger:
    """The rewrite of one graph; nodes of graphs around or inside it count as strangers."""

    graph: gs.Graph
    named: Set[int]  # ids of the tensors that must stay
    names: Names
    own: dict[int, gs.Node] = field(init=False)
    constants: dict[tuple[int, Permutation], tuple[gs.Constant, gs.Tensor]] = field(default_factory=dict)  # new, old

    def __post_init__(self) -> None:
        self.own = {id(node): node for node in self.graph.nodes}

    def run(self) -> Counter[str]:
        """Merge until nothing changes: each region that is rewritten leaves fewer Transposes."""
        merged = Counter({"Gemm": self._merge_into_gemms(), "weights": self._merge_into_weights()})
        while True:
            pairs, regions = self._merge_pairs(), sum(map(self._rewrite, self._regions()))
            merged.update({"pairs": pairs, "regions": regions})
            if merged.total():
                self._tidy()
            if not pairs and not regions:
                return +merged

    def skips(self) -> Iterator[Skip]:
        """Yield what looked like a match; called when there is nothing left to do."""
        for node in self._transposes():
            where = label_of(node)
            if _permutation(node) is None:
                yield Skip(where, "it reverses the axes of a tensor whose rank is not known")
                continue
            for reader in node.outputs[0].outputs:
                reason = why_not_movable(reader, self.graph.opset) if has_layout_rule(reader) else None
                if reason is not None:
                    yield Skip(where, f"not moved through {reader.op} {label_of(reader)}: {reason}")
                elif reader.op == "Gemm" and not reader.domain and self._is_matrix(node):
                    yield Skip(where, "not merged into Gemm: something else uses its result too")
            found = _flattening(node)
            reason = found and self._why_not_into_weight(node, *found)
            if found and reason:
                yield Skip(where, f"not merged into the weight of {label_of(found[1])}: {reason}")
        for region in self._regions():
            borders = _Borders(self, region)
            matches = [node for node in borders.before if inverse(borders.before[node]) in borders.after]
            for key in matches:
                node = self.own[key]
                reason = "moving it to the Transpose that undoes it takes as many new Transposes as it saves"
                yield Skip(label_of(node), reason)

    def _transposes(self) -> list[gs.Node]:
        return [node for node in self.own.values() if _is_transpose(node)]

    def is_own_transpose(self, node: gs.Node | None) -> bool:
        """Whether a node is a Transpose of this graph with a known permutation."""
        return node is not None and id(node) in self.own and _permutation(node) is not None

    def is_needed_as_is(self, tensor: gs.Tensor, members: Set[int]) -> bool:
        """Whether anything but Transposes of this graph and data inputs of members uses a tensor."""
        return id(tensor) in self.named or any(
            not self.is_own_transpose(node) and not (id(node) in members and reads_as_data(node, tensor))
            for node in tensor.outputs
        )

    # Gemm

    def _is_matrix(self, node: gs.Node) -> bool:
        return tuple(node.attrs.get("perm", (1, 0))) == (1, 0) and not is_constant(node.inputs[0])

    def _merge_into_gemms(self) -> int:
        merged = 0
        for node in self._transposes():
            tensor, readers = node.outputs[0], list({id(each): each for each in node.outputs[0].outputs}.values())
            if not self._is_matrix(node) or not readers or id(tensor) in self.named:
                continue
            if any(each.op != "Gemm" or each.domain or id(each) not in self.own for each in readers):
                continue
            if any(each is tensor for reader in readers for each in reader.inputs[2:]):
                continue
            for reader in readers:
                for index, attribute in enumerate(("transA", "transB")):
                    if reader.inputs[index] is tensor:
                        reader.attrs[attribute] = 1 - reader.attrs.get(attribute, 0)
                        set_input(reader, index, node.inputs[0])
                merged += 1
        return merged

    # Transpose, Flatten, product with a weight

    def _merge_into_weights(self) -> int:
        merged = 0
        for node in self._transposes():
            found = _flattening(node)
            if found is not None and self._why_not_into_weight(node, *found) is None:
                self._into_weight(node, *found)
                merged += 1
        return merged

    def _why_not_into_weight(self, node: gs.Node, reshape: gs.Node, product: gs.Node) -> str | None:
        if any(id(each) not in self.own or id(each.outputs[0]) in self.named for each in (node, reshape)):
            return "something else uses its result too"
        order, dimensions = _permutation(node), known_dimensions(node.inputs[0])
        if order is None or dimensions is None or None in dimensions[1:]:
            return "a size of its input is not known"
        if order[0] != 0:
            return "it moves the batch axis"
        flat = known_dimensions(reshape.outputs[0])
        if flat is None or flat[1] != math.prod(size or 0 for size in dimensions[1:]):
            return f"the {reshape.op} between them does not keep the batch axis and merge all others"
        if len(product.inputs[1].outputs) > 1 or dimensions_of(product.inputs[1]) is None:
            return "something else reads the weight too"
        if product.attrs.get("transA", 0):
            return "the product transposes it again"
        return None

    def _into_weight(self, node: gs.Node, reshape: gs.Node, product: gs.Node) -> None:
        order, sizes = _permutation(node), known_dimensions(node.inputs[0])
        weight = constant_of(product.inputs[1])
        assert order is not None and sizes is not None and weight is not None  # _why_not_into_weight
        last = bool(product.attrs.get("transB", 0))  # where the weight has the axis that is summed over
        rows = np.arange(math.prod(size or 0 for size in sizes[1:])).reshape([sizes[axis] or 0 for axis in order[1:]])
        rows = rows.transpose([axis - 1 for axis in inverse(order)[1:]]).reshape(-1)
        set_input(product, 1, permuted_constant(product.inputs[1].name, weight.take(rows, axis=int(last)), self.names))
        set_input(reshape, 0, node.inputs[0])

    # Transpose of Transpose

    def _merge_pairs(self) -> int:
        merged = 0
        for node in self._transposes():
            before = producer(node.inputs[0])
            if before is None or not self.is_own_transpose(before):
                continue
            first, second = _permutation(before), _permutation(node)
            used = node.outputs[0].outputs or id(node.outputs[0]) in self.named
            if first is not None and second is not None and used:
                self._set_order(node, before.inputs[0], _composed(first, second))
                merged += 1
        return merged

    def _set_order(self, node: gs.Node, tensor: gs.Tensor, permutation: Permutation) -> None:
        """Let a Transpose read `tensor` in another order; it goes where that moves no axis."""
        if not _is_in_order(permutation):
            set_input(node, 0, tensor)
            node.attrs["perm"] = list(permutation)
        elif id(node.outputs[0]) in self.named:
            set_input(node, 0, tensor)
            node.op, node.attrs = "Identity", {}
        else:
            replace_uses(node.outputs[0], tensor)

    def _tidy(self) -> None:
        """Drop Transposes that nothing uses any more, and put the nodes in order."""
        for node in reversed(list(self.own.values())):
            if node.op == "Transpose" and not any(each.outputs or id(each) in self.named for each in node.outputs):
                self._drop(node)
        self.graph.nodes[:] = list(self.own.values())
        self.graph.nodes[:] = sorted_nodes(self.graph)
        self.own = {id(node): node for node in self.graph.nodes}

    # Regions

    def _is_movable(self, node: gs.Node | None) -> bool:
        return node is not None and id(node) in self.own and why_not_movable(node, self.graph.opset) is None

    def _regions(self) -> list[dict[int, gs.Node]]:
        """Return the connected parts of movable nodes beside Transposes, each by id."""
        regions: list[dict[int, gs.Node]] = []
        seen: set[int] = set()
        for transpose in self._transposes():
            for start in (producer(transpose.inputs[0]), *transpose.outputs[0].outputs):
                region: dict[int, gs.Node] = {}
                pending = [start]
                while pending:
                    node = pending.pop()
                    if node is None or id(node) in seen or not self._is_movable(node):
                        continue
                    seen.add(id(node))
                    region[id(node)] = node
                    pending += [producer(node.inputs[index]) for index in data_inputs(node)]
                    pending += [reader for tensor in node.outputs for reader in tensor.outputs]
                if region:
                    regions.append(region)
        return regions

    def _rewrite(self, region: dict[int, gs.Node]) -> bool:
        """Change the layout of those nodes of a region for which that saves Transposes; False if none."""
        borders = _Borders(self, region)
        for permutation in dict.fromkeys((*borders.before.values(), *map(inverse, borders.after))):
            changed = borders.cheapest(permutation)
            if changed:
                self._change([region[key] for key in region if key in changed], permutation, borders)
                return True
        return False

    def _change(self, nodes: list[gs.Node], permutation: Permutation, borders: _Borders) -> None:
        """Let nodes compute x' in place of each x = T_p(x')."""
        back = inverse(permutation)
        inputs = [[(index, node.inputs[index]) for index in data_inputs(node)] for node in nodes]
        outputs = [tensor for node in nodes for tensor in data_outputs(node)]
        moved: dict[int, gs.Tensor] = {}
        for node in nodes:
            for index, tensor in enumerate(node.outputs):
                if tensor.name and not is_single(tensor):
                    moved[id(tensor)] = self._taken_over(tensor, back)
                    set_output(node, index, moved[id(tensor)])

        for node, data in zip(nodes, inputs, strict=True):
            for index, tensor in data:
                if id(tensor) not in moved:
                    moved[id(tensor)] = self._in_other_layout(tensor, back, borders)
                set_input(node, index, moved[id(tensor)])
            if LAYOUT_RULES[node.op].all_inputs:
                self._move_constants(node, permutation)
            LAYOUT_RULES[node.op].rename(Layout(node, permutation, self.names))
        for tensor in outputs:
            self._restore(tensor, moved[id(tensor)], permutation)

    def _in_other_layout(self, tensor: gs.Tensor, back: Permutation, borders: _Borders) -> gs.Tensor:
        source = producer(tensor)
        if source is not None and id(source) in borders.before:
            return self._transposed(source.inputs[0], _composed(borders.before[id(source)], back))
        return self._transposed(tensor, back)

    def _restore(self, tensor: gs.Tensor, moved: gs.Tensor, permutation: Permutation) -> None:
        """Serve those that still read `tensor`, whose node computes `moved` now."""
        for reader in list(tensor.outputs):
            order = _permutation(reader)
            if order is not None and id(reader) in self.own:
                self._set_order(reader, moved, _composed(permutation, order))
                if reader.inputs[0] is tensor:  # what read it reads the moved one
                    self._drop(reader)
        if tensor.outputs or id(tensor) in self.named:
            self._add_transpose(moved, tensor, permutation)

    def _drop(self, node: gs.Node) -> None:
        disconnect(node)
        del self.own[id(node)]

    def _taken_over(self, tensor: gs.Tensor, back: Permutation) -> gs.Tensor:
        """Return what a node computes in place of `tensor`: the result of a Transpose that is then not needed."""
        for reader in tensor.outputs:
            if id(reader) in self.own and _permutation(reader) == back:
                result = reader.outputs[0]
                self._drop(reader)
                return result
        return self._variable_like(tensor, back)

    def _transposed(self, tensor: gs.Tensor, permutation: Permutation) -> gs.Tensor:
        """Return `tensor` with its axes permuted: an old result where there is one."""
        if _is_in_order(permutation):
            return tensor
        for reader in tensor.outputs:
            if id(reader) in self.own and _permutation(reader) == permutation:
                return reader.outputs[0]
        result = self._variable_like(tensor, permutation)
        self._add_transpose(tensor, result, permutation)
        return result

    def _variable_like(self, tensor: gs.Tensor, permutation: Permutation) -> gs.Variable:
        shape = None if tensor.shape is None else [tensor.shape[axis] for axis in permutation]
        return gs.Variable(self.names.fresh(f"{tensor.name}_transposed"), tensor.dtype, shape)

    def _add_transpose(self, tensor: gs.Tensor, result: gs.Tensor, permutation: Permutation) -> None:
        name = self.names.fresh(f"{result.name}_Transpose")
        node = gs.Node("Transpose", name, {"perm": list(permutation)}, [tensor], [result])
        self.own[id(node)] = node

    def _move_constants(self, node: gs.Node, permutation: Permutation) -> None:
        for index, tensor in enumerate(node.inputs):
            key = (id(tensor), permutation)
            if not is_constant(tensor) or is_single(tensor):
                continue
            if key not in self.constants:
                value = constant_of(tensor)
                assert value is not None  # is_constant
                aligned = value.reshape((1,) * (len(permutation) - value.ndim) + value.shape)
                self.constants[key] = (
                    permuted_constant(tensor.name, aligned.transpose(inverse(permutation)), self.names),
                    tensor,
                )
            set_input(node, index, self.constants[key][0])


class _Borders:
    """The Transposes around a region, and what a change of layout inside costs."""

    def __init__(self, merger: _Merger, region: dict[int, gs.Node]) -> None:
        self._merger, self._region = merger, region
        read = [node.inputs[index] for node in region.values() for index in data_inputs(node)]
        computed = [tensor for node in region.values() for tensor in data_outputs(node)]
        self._tensors = {id(tensor): tensor for tensor in (*read, *computed)}
        self.before: dict[int, Permutation] = {}  # of the Transposes that lead in, by id of the node
        self.after: Counter[Permutation] = Counter()  # of those that lead out
        for tensor in self._tensors.values():
            source = producer(tensor)
            order = _permutation(source) if source is not None and merger.is_own_transpose(source) else None
            # one that leads from the region into it again counts as leading out only
            if order is not None and source is not None and id(producer(source.inputs[0])) not in region:
                self.before[id(source)] = order
            if id(source) in region:
                self.after.update(self._orders_after(tensor))

    def _orders_after(self, tensor: gs.Tensor) -> list[Permutation]:
        orders = [_permutation(node) for node in tensor.outputs if id(node) in self._merger.own]
        return [order for order in orders if order is not None]

    def cheapest(self, permutation: Permutation) -> set[int]:
        """Return the ids of the nodes whose change of layout saves most Transposes; none where none is saved.

        Each edge of the network from a node that stays to one that changes costs a Transpose. Ties leave nodes alone.
        """
        network = nx.DiGraph()
        network.add_nodes_from(("stay", "change"))

        def cost(start: object, end: object, price: int) -> None:
            old = network.edges[start, end]["capacity"] if network.has_edge(start, end) else 0
            network.add_edge(start, end, capacity=old + price)

        for key, tensor in self._tensors.items():
            source = producer(tensor)
            readers = {id(node) for node in tensor.outputs if id(node) in self._region and reads_as_data(node, tensor)}
            undoing = self._orders_after(tensor).count(inverse(permutation))
            flexible = source is not None and (id(source) in self._region or id(source) in self.before)
            start: object = id(source) if flexible else "stay"
            if not undoing and readers:  # a Transpose for the readers that change, if the source stays
                cost(start, ("to", key), 1)
                network.add_edges_from((("to", key), reader) for reader in readers)
            if not flexible:
                continue
            if id(source) in self._region:
                cost(start, "change", undoing)  # these stay if the source stays
            elif self.before.get(id(source)) == permutation and not is_constant(source.inputs[0]):  # type: ignore[union-attr]
                cost(start, "change", 1)
            if self._merger.is_needed_as_is(tensor, self._region.keys()):
                cost("stay", start, 1)  # a Transpose back
            elif readers:
                cost(("from", key), start, 1)
                network.add_edges_from((reader, ("from", key)) for reader in readers)
        now = sum(edge["capacity"] for _, _, edge in network.in_edges("change", data=True))
        then, (_, changing) = nx.minimum_cut(network, "stay", "change")
        return {key for key in changing if key in self._region} if then < now else set()
