"""Int8 islands: operators that hand integers to each other, and which of them are worth their conversions.

Between an island and the float graph around it stand a Q or a DQ, in onnxruntime also a change of layout where the
float graph goes on with a Conv. What its operators save must pay for them:

    saved = sum over its operators of MACs * saving per MAC, or of values * saving per value
    spent = sum over its borders of a fixed cost + elements * cost per element

with the costs of the target's table, measured there one kind of operator at a time; int8 kernels that are slower than
float ones save less than nothing. Those operators stay float without which saved - spent is largest: none, all, or some
at an edge. That is a minimum cut (Ford and Fulkerson 1956): an operator on the wrong side of it costs what it would
have saved there, and a tensor that crosses it its conversion. An estimate is only asked what surely does not pay;
`qdq:autotune=true` measures (`graphopt.autotune`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import onnx_graphsurgeon as gs
from networkx.algorithms.flow import boykov_kolmogorov

from graphopt.channels_last import pools_with_channels_first
from graphopt.conv_kernels import is_depthwise
from graphopt.graph import all_graphs, present, producer
from graphopt.macs import count_macs, macs_with_weight
from graphopt.placement import Placement
from graphopt.sizes import Shape, at_sizes, fixed_shape
from graphopt.targets import Costs, Kind
from graphopt.weights import is_weight

_FEW_ROWS = 16
_FEW_CHANNELS, _FEW_OUTPUTS = 4, 16
_INT8, _FLOAT = "int8", "float"  # the two sides of the cut


@dataclass(frozen=True)
class Island:
    """Operators that are connected by quantized tensors.

    Attributes:
        nodes: the operators, in the graph's order.
        links: their quantized tensors.
    """

    nodes: tuple[gs.Node, ...]
    links: tuple[Link, ...]

    @property
    def borders(self) -> tuple[gs.Tensor, ...]:
        """The tensors that are quantized on the way in, and those that are dequantized on the way out."""
        members = {id(node) for node in self.nodes}
        return tuple(link.tensor for link in self.links if link.is_converted(members))


@dataclass(frozen=True)
class Link:
    """A quantized tensor between operators of an island.

    Attributes:
        tensor: the one that carries the pair.
        computed_by: the operator; None: it comes from the float graph.
        users: operators that read its integers.
        is_read_in_float: others read it too.
        is_read_by_float_conv: a Conv is among the others that read it.
    """

    tensor: gs.Tensor
    computed_by: gs.Node | None
    users: tuple[gs.Node, ...]
    is_read_in_float: bool
    is_read_by_float_conv: bool

    @property
    def maker(self) -> gs.Node | None:
        """The operator that computes it, whether in int8 or in float."""
        return producer(self.tensor) if self.computed_by is None else self.computed_by

    @property
    def is_of_conv(self) -> bool:
        """Whether a Conv computes it."""
        return self.maker is not None and self.maker.op == "Conv"

    @property
    def members(self) -> tuple[gs.Node, ...]:
        """All operators of the island that the tensor links."""
        return self.users if self.computed_by is None else (self.computed_by, *self.users)

    def is_quantized(self, int8: Collection[int]) -> bool:
        """Whether a Q behind a float operator stands there, if the operators with these ids are those in int8."""
        is_float = self.computed_by is None or id(self.computed_by) not in int8
        return is_float and any(id(user) in int8 for user in self.users)

    def is_converted(self, int8: Collection[int]) -> bool:
        """Whether a Q or a DQ stands there, if the operators with these ids are those in int8."""
        if self.computed_by is None or id(self.computed_by) not in int8:
            return self.is_quantized(int8)
        return self.is_read_in_float or not all(id(user) in int8 for user in self.users)

    def has_layout_of_convs(self, of_convs: Collection[int]) -> bool:
        """Whether it has that layout where it is computed in float; `of_convs` as in `changes_layout`."""
        return self.is_of_conv or id(self.maker) in of_convs

    def changes_layout(self, int8: Collection[int], of_convs: Collection[int]) -> bool:
        """Whether it comes from a float operator in the layout of Convs to an int8 one, or the other way round.

        Args:
            int8: ids of the operators that are in int8.
            of_convs: of those that have that layout in float.
        """
        if self.computed_by is None or id(self.computed_by) not in int8:
            return self.has_layout_of_convs(of_convs) and any(id(user) in int8 for user in self.users)
        in_float = any(id(user) in of_convs and id(user) not in int8 for user in self.users)
        return self.is_read_by_float_conv or in_float


def islands_of(placement: Placement) -> list[Island]:
    """The islands of a placement, in the order of their first operators."""
    kept = {id(node): node for node in placement.nodes}
    joined = nx.Graph()
    joined.add_nodes_from(kept)
    linked: dict[int, list[Link]] = {key: [] for key in kept}
    for link in _links(placement, kept):
        members = [id(node) for node in link.members]
        nx.add_path(joined, members)
        linked[members[0]].append(link)
    order = {id(node): index for index, node in enumerate(placement.graph.nodes)}
    found = [sorted(members, key=order.__getitem__) for members in nx.connected_components(joined)]
    return [
        Island(tuple(kept[member] for member in members), tuple(link for member in members for link in linked[member]))
        for members in sorted(found, key=lambda members: order[members[0]])
    ]


def _links(placement: Placement, kept: Mapping[int, gs.Node]) -> Iterator[Link]:
    outputs = {id(tensor) for tensor in placement.graph.outputs}
    quantized = [
        (each.tensor, placement.computed_by.get(name), placement.users[name])
        for name, each in placement.activations.items()
    ]
    quantized += [(each.tensor, producer(each.tensor), ()) for each, _ in placement.rescaled]
    for tensor, computed_by, others in quantized:
        users = {id(node): node for node in (*others, *tensor.outputs) if id(node) in kept and node is not computed_by}
        in_float = [node for node in tensor.outputs if id(node) not in kept]
        if users or computed_by is not None:
            yield Link(
                tensor,
                computed_by,
                tuple(users.values()),
                is_read_in_float=id(tensor) in outputs or bool(in_float),
                is_read_by_float_conv=any(node.op == "Conv" for node in in_float),
            )


def too_small(
    graph: gs.Graph,
    placements: Sequence[Placement],
    costs: Costs,
    input_shapes: Mapping[str, Shape] | None = None,
    observed: Callable[[gs.Tensor], float | None] = lambda _: None,
) -> dict[int, str]:
    """By id of an operator that does not pay, why.

    Args:
        graph: the float graph.
        placements: of that graph and those in it.
        costs: of its target.
        input_shapes: by input name; None: open sizes are assumed as in `graphopt.sizes`.
        observed: how many values a tensor of `graph` had in calibration in a sample, on average, which counts where its
            shape follows from no input's; None: not known.
    """
    sized = at_sizes(graph, input_shapes)
    counterparts = dict(zip(map(id, all_graphs(graph)), all_graphs(sized), strict=True))
    reasons: dict[int, str] = {}
    for placement in placements:
        trade = _Trade(placement, counterparts[id(placement.graph)], costs, observed)
        for island in islands_of(placement):
            reasons |= trade.losing(island)
    return reasons


class _Trade:
    """What operators save in int8, and what it costs to convert tensors; in ns."""

    def __init__(
        self, placement: Placement, sized: gs.Graph, costs: Costs, observed: Callable[[gs.Tensor], float | None]
    ) -> None:
        self.costs = costs
        self.observed = observed
        self.macs = count_macs(sized).by_node
        self.results: dict[int, gs.Tensor] = {}  # by id of an operator, what is quantized of it
        self.behind: dict[int, int | str] = {}  # by id of what a float Conv takes in, the node of that Conv in the flow
        self.of_convs: set[int] = set()  # the ids of operators that have, in float, the layout of Convs
        tensors = (tensor for node in sized.nodes for tensor in (*node.inputs, *node.outputs))
        self.shapes = {tensor.name: fixed_shape(tensor) for tensor in tensors}
        self.runs = self._runs(placement.graph) if placement.label else {}
        self.channels_first = pools_with_channels_first(placement)

    def losing(self, island: Island) -> dict[int, str]:
        """By id of an operator without which the island saves most, why it should stay float."""
        self.results |= {id(link.computed_by): link.tensor for link in island.links if link.computed_by is not None}
        self.behind |= {
            id(user): _FLOAT if link.computed_by is None else id(link.computed_by)
            for link in island.links
            for user in link.users
            if user.op in self.costs.fused_in_float and link.is_of_conv
        }
        self.of_convs |= {id(node) for node in island.nodes if node.op == "Conv" or id(node) in self.behind}
        known = all(self._size(tensor) is not None for tensor in island.borders)
        if not known or not any(map(self._macs, island.nodes)):
            return {}
        _, (kept, _) = nx.minimum_cut(self._flow(island), _INT8, _FLOAT, flow_func=boykov_kolmogorov)
        losing = [node for node in island.nodes if id(node) not in kept]
        if not losing:
            return {}
        savings = [
            self._saving(node) + (self._float_cost(node) if self.behind.get(id(node), _INT8) in kept else 0.0)
            for node in losing
        ]
        saved, lost = sum(each for each in savings if each > 0), -sum(each for each in savings if each < 0)
        spent = self._spent(island, {id(node) for node in island.nodes}) - self._spent(island, kept)
        place, more = ("between float operators", "") if len(losing) == len(island.nodes) else ("at an edge", "more ")
        slower = f", lose {lost / 1e3:.1f} us in slower kernels" if lost else ""
        conversions = f", spend {spent / 1e3:.1f} us {more}on conversions" if spent > 0 else ""
        reason = (
            f"{sum(map(self._macs, losing)):,.0f} MACs {place}: int8 would save some {saved / 1e3:.1f} us"
            f"{slower}{conversions} (qdq:small_islands=true quantizes it)"
        )
        return {id(node): reason for node in losing}

    def _flow(self, island: Island) -> nx.DiGraph:
        """The graph to cut: capacities are costs, and an edge without one is never cut."""
        flow = nx.DiGraph()
        flow.add_nodes_from((_INT8, _FLOAT))
        for node in island.nodes:
            saving, in_float = self._saving(node), self._float_cost(node)
            if (conv := self.behind.get(id(node))) is None:
                saving += in_float
            else:
                flow.add_edge(conv, id(node), capacity=in_float)
            flow.add_edge(_INT8, id(node), capacity=max(saving, 0.0))
            flow.add_edge(id(node), _FLOAT, capacity=max(-saving, 0.0))
        for link in island.links:
            source = _FLOAT if link.computed_by is None else id(link.computed_by)
            conversion, layout = self._conversion(link.tensor), self._layout(link.tensor)
            quantize, dequantize, reorder = ((link.tensor.name, what) for what in ("Q", "DQ", "layout"))
            flow.add_edges_from((id(user), quantize) for user in link.users)
            pool = self._pool_behind_q(link)
            reordered = layout if link.has_layout_of_convs(self.of_convs) else 0.0
            flow.add_edge(quantize, source, **_capacity(conversion, reordered, pool))
            if link.computed_by is None:
                continue
            flow.add_edge(source, dequantize, **_capacity(conversion))
            flow.add_edges_from((dequantize, id(user)) for user in link.users)
            if link.is_read_in_float:
                flow.add_edge(dequantize, _FLOAT)
            flow.add_edge(source, reorder, **_capacity(layout))
            flow.add_edges_from((reorder, id(user)) for user in link.users if id(user) in self.of_convs)
            if link.is_read_by_float_conv:
                flow.add_edge(reorder, _FLOAT)
        return flow

    def _pool_behind_q(self, link: Link) -> float | None:
        """What a MaxPool in float loses where only int8 operators read it: onnxruntime moves their Q before it."""
        if id(link.maker) not in self.channels_first or link.is_read_in_float:
            return 0.0
        saved, saved_per_value = self.costs.saved_ns_and_per_value.get(Kind.CHANNELS_FIRST_POOL, (0.0, 0.0))
        return self._for_each(link.tensor, -saved, -saved_per_value)

    def _spent(self, island: Island, int8: Collection[int]) -> float:
        spent = [self._conversion(link.tensor) for link in island.links if link.is_converted(int8)]
        spent += [self._pool_behind_q(link) for link in island.links if link.is_quantized(int8)]
        spent += [self._layout(link.tensor) for link in island.links if link.changes_layout(int8, self.of_convs)]
        return sum(cost for cost in spent if cost is not None)

    def _conversion(self, tensor: gs.Tensor) -> float | None:
        return self._for_each(tensor, self.costs.border_ns, self.costs.border_ns_per_element)

    def _layout(self, tensor: gs.Tensor) -> float | None:
        return self._for_each(tensor, self.costs.layout_ns, self.costs.layout_ns_per_element)

    def _for_each(self, tensor: gs.Tensor, fixed: float, per_element: float) -> float | None:
        size = self._size(tensor)
        return None if size is None else fixed + per_element * size

    def _saving(self, node: gs.Node) -> float:
        macs = self._macs(node)
        kind = Kind.CHANNELS_FIRST_POOL if id(node) in self.channels_first else _kind(node, macs)
        saved = macs * self.costs.saved_ns_per_mac.get(kind, 0.0) - _copies(node, macs) * self.costs.copied_ns
        saved -= self._pixels(node, kind) * self.costs.pixel_ns
        fixed, per_value = self.costs.saved_ns_and_per_value.get(kind, (0.0, 0.0))
        size = self._size_of_result(node)
        return saved if size is None else saved + fixed + per_value * size

    def _pixels(self, node: gs.Node, kind: str) -> int:
        """How often the kernel of a Mul by a value a channel starts anew."""
        shape = self.shapes.get(node.outputs[0].name) if kind == Kind.OF_CHANNELS else None
        return 0 if shape is None else math.prod(shape) // shape[1]

    def _float_cost(self, node: gs.Node) -> float:
        """What an operator that float Convs take in costs in float behind another."""
        fixed, per_value = self.costs.fused_in_float.get(node.op, (0.0, 0.0))
        size = self._size_of_result(node)
        return 0.0 if size is None else fixed + per_value * size

    def _macs(self, node: gs.Node) -> float:
        known = self.macs.get(node.outputs[0].name)
        return (
            macs_with_weight(node, self._size(node.inputs[0]), self._size_of_result(node)) if known is None else known
        )

    def _size_of_result(self, node: gs.Node) -> float | None:
        """How many values a node computes; calibration may know only what an activation makes of them."""
        size = self._size(node.outputs[0])
        return self._size(self.results[id(node)]) if size is None and id(node) in self.results else size

    def _size(self, tensor: gs.Tensor) -> float | None:
        shape = self.shapes.get(tensor.name)
        if shape is not None:
            return math.prod(shape)
        observed = self.observed(tensor)
        return None if observed is None else observed / self.runs.get(id(tensor), 1.0)

    def _runs(self, graph: gs.Graph) -> dict[int, float]:
        """By id of a tensor of a branch or a body, how often a sample computes it, on average.

        Where no shape tells how many values one run has, one is assumed.
        """
        own = [*graph.inputs, *(tensor for node in graph.nodes for tensor in present(node.outputs))]
        ratios = [
            observed / size
            for tensor in own
            if (size := math.prod(self.shapes.get(tensor.name) or (0,))) and (observed := self.observed(tensor))
        ]
        return dict.fromkeys(map(id, own), statistics.median(ratios)) if ratios else {}


def _capacity(*costs: float | None) -> dict[str, float]:
    """What an edge of a flow can carry; without, where a cost is not known, it is never cut."""
    known = [cost for cost in costs if cost is not None]
    return {"capacity": sum(known)} if len(known) == len(costs) else {}


def _copies(node: gs.Node, macs: float) -> float:
    """How many places a Conv of few channels copies: each of its kernel for each of its result."""
    if node.op != "Conv" or node.attrs.get("group", 1) > 1:
        return 0
    outputs, channels, *kernel = node.inputs[1].shape
    few = channels < _FEW_CHANNELS and outputs < _FEW_OUTPUTS and math.prod(kernel) > 1
    return macs / (outputs * channels) if few else 0


def _kind(node: gs.Node, macs: float) -> str:
    """What an operator is called in a table of costs."""
    op: str = node.op
    if is_depthwise(node):
        return Kind.DEPTHWISE
    if op == "Softmax":
        shape, axis = node.inputs[0].shape, node.attrs.get("axis", -1)
        return op if shape is None or axis % len(shape) == len(shape) - 1 else Kind.INNER_SOFTMAX
    if op == "Mul" and sum(map(_is_value_a_channel, node.inputs)) == 1:
        return Kind.OF_CHANNELS
    if op == "MatMul" and not is_weight(node.inputs[1]):
        return Kind.OF_ACTIVATIONS
    if op in ("Gemm", "MatMul") and is_weight(node.inputs[1]) and macs <= _FEW_ROWS * math.prod(node.inputs[1].shape):
        return Kind.FEW_ROWS
    return op


def _is_value_a_channel(tensor: gs.Tensor) -> bool:
    return tensor.shape is not None and len(tensor.shape) == 4 and list(tensor.shape[2:]) == [1, 1]
