"""Which constant nodes to fold so that the model does not grow: a cut of minimum size.

Folding a node stores its outputs unless only folded nodes read them, and lets a constant die once all its
readers are folded. A set of folded nodes is thus a cut through the constant part of the graph: what crosses
the cut is what the file holds. Two rules decide on each connected region:

1.  Fold all of it when the bytes stored after exceed those that die by at most `max_growth`.
2.  Else fold up to the cut that stores the fewest bytes, and of several such cuts the one nearest to the
    uses. Tensors of at most `max_growth` bytes count as free there.

So a Tile that is sliced afterwards folds, a ConstantOfShape that fills 4 MB does not, and the shape
arithmetic before it does. The cut is a minimum s-t cut with the tensors as capacities (Ford and Fulkerson
1956): source -> constant -> reader, producer -> tensor -> reader, tensor -> sink where something outside
reads it, and an unlimited edge from each reader back to the producer, because a node folds only after those
before it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import networkx as nx
import onnx_graphsurgeon as gs

from graphopt.graph import present

_SOURCE, _SINK = "constants", "uses"


@dataclass(frozen=True)
class Region:
    """Constant nodes that are connected: one reads what another computes, or both read one large constant.

    `uses` are the ids of the tensors that something outside reads.
    """

    nodes: tuple[gs.Node, ...]  # in topological order
    uses: Set[int]

    @property
    def stored(self) -> list[gs.Tensor]:
        """Tensors that become constants when all nodes fold."""
        return [tensor for node in self.nodes for tensor in present(node.outputs) if id(tensor) in self.uses]


def split(nodes: Sequence[gs.Node], named: Set[int], max_growth: int) -> list[Region]:
    """Split constant nodes, given in topological order, into regions.

    Args:
        nodes: the nodes whose inputs are all constants or outputs of other nodes of the list.
        named: ids of the tensors whose value is needed beside what consumer lists show: graph outputs.
        max_growth: bytes from which on a constant that several nodes read connects them: only together can
            they let it die, as when a weight is cut into slices.

    """
    inside = {id(node): node for node in nodes}
    links: nx.Graph = nx.Graph()
    links.add_nodes_from(inside)
    for node in nodes:
        links.add_edges_from(
            (id(node), id(reader))
            for tensor in present(node.outputs)
            for reader in tensor.outputs
            if id(reader) in inside
        )
        links.add_edges_from(
            (id(node), id(tensor))
            for tensor in node.inputs
            if isinstance(tensor, gs.Constant) and tensor._values.nbytes > max_growth
        )
    position = {key: index for index, key in enumerate(inside)}
    regions = []
    for component in nx.connected_components(links):
        keys = sorted((key for key in component if key in inside), key=position.__getitem__)
        members = tuple(inside[key] for key in keys)
        regions.append(Region(members, _uses(members, component, named)))
    return regions


def _uses(nodes: Iterable[gs.Node], inside: Set[int], named: Set[int]) -> set[int]:
    return {
        id(tensor)
        for node in nodes
        for tensor in present(node.outputs)
        if id(tensor) in named or any(id(reader) not in inside for reader in tensor.outputs)
    }


def growth(region: Region, sizes: Mapping[int, int]) -> int:
    """Return the bytes by which the model grows when the whole region folds; negative when it shrinks.

    Args:
        region: what would fold.
        sizes: bytes of every tensor that the region reads or stores, by id.

    """
    inside = {id(node) for node in region.nodes}
    return sum(sizes[id(tensor)] for tensor in region.stored) - sum(
        sizes[id(tensor)] for tensor in constants_read(region) if all(id(reader) in inside for reader in tensor.outputs)
    )


def smallest_cut(region: Region, sizes: Mapping[int, int], max_growth: int) -> set[int]:
    """Return the ids of the nodes to fold by rule 2; `sizes` holds every tensor of the region."""
    flow: nx.DiGraph = nx.DiGraph()
    flow.add_nodes_from((_SOURCE, _SINK))
    inside = {id(node) for node in region.nodes}
    flow.add_nodes_from(inside)

    def add(start: Hashable, tensor: gs.Tensor, readers: Iterable[Hashable]) -> None:
        if sizes[id(tensor)] > max_growth:  # smaller ones are free: stored wherever that helps
            flow.add_edge(start, ("tensor", id(tensor)), capacity=sizes[id(tensor)])
            flow.add_edges_from((("tensor", id(tensor)), reader) for reader in readers)  # unlimited

    for tensor in constants_read(region):
        readers = [id(reader) for reader in tensor.outputs]
        if inside.issuperset(readers):  # one that something else reads is stored in any case
            add(_SOURCE, tensor, readers)
    for node in region.nodes:
        for tensor in present(node.outputs):
            readers = [id(reader) for reader in tensor.outputs if id(reader) in inside]
            flow.add_edges_from((reader, id(node)) for reader in readers)
            add(id(node), tensor, [*readers, *([_SINK] if id(tensor) in region.uses else [])])
    _, (_, kept) = nx.minimum_cut(flow, _SOURCE, _SINK)
    return {key for key in inside if key not in kept}


def constants_read(region: Region) -> list[gs.Tensor]:
    """Return the constants that the region reads, each once."""
    computed = {id(tensor) for node in region.nodes for tensor in node.outputs}
    read = {id(tensor): tensor for node in region.nodes for tensor in present(node.inputs)}
    return [tensor for key, tensor in read.items() if key not in computed]
