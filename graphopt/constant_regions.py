"""Which constant nodes to fold so that the model does not grow: a cut of minimum size.

Folding a node stores its outputs unless only folded nodes read them, and lets a constant die once all its
readers are folded. A set of folded nodes is thus a cut through the constant part of the graph: what crosses
the cut is what the file holds. Connected regions are judged from the one that saves most to the one that
grows most, and share one budget of bytes by which the model may grow:

1.  Fold all of a region when that grows the model by no more than what is left.
2.  Else fold up to the cut that stores the fewest bytes, and of several such cuts the one nearest to the
    uses. Tensors of at most 4 KB count as free in the cut; the budget has the last word.

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
_SMALL = 4096  # bytes; a smaller tensor neither connects regions nor decides on a cut
_ENTRY = 16  # bytes of an initializer besides its name and its values


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


@dataclass
class Budget:
    """The bytes by which a model may still grow."""

    left: int

    def allows(self, growth: int) -> bool:
        """Take `growth` from what is left, unless that is less."""
        if growth > max(0, self.left):
            return False
        self.left -= max(0, growth)
        return True


def split(nodes: Sequence[gs.Node], named: Set[int]) -> list[Region]:
    """Split constant nodes, given in topological order, into regions.

    Args:
        nodes: the nodes whose inputs are all constants or outputs of other nodes of the list.
        named: ids of the tensors whose value is needed beside what consumer lists show: graph outputs.

    A constant of more than 4 KB connects the nodes that read it: only together can they let it die, as when a
    weight is cut into slices.
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
            if isinstance(tensor, gs.Constant) and tensor._values.nbytes > _SMALL
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


def region_of(nodes: Sequence[gs.Node], named: Set[int]) -> Region:
    """Return nodes, given in topological order, as one region, connected or not."""
    return Region(tuple(nodes), _uses(nodes, {id(node) for node in nodes}, named))


def growth(region: Region, sizes: Mapping[int, int]) -> int:
    """Return the bytes by which the file grows when the whole region folds; negative when it shrinks.

    Args:
        region: what would fold.
        sizes: bytes of every tensor that the region reads or stores, by id.

    """
    inside = {id(node) for node in region.nodes}
    dying = [tensor for tensor in constants_read(region) if all(id(reader) in inside for reader in tensor.outputs)]
    entries = sum(sizes[id(tensor)] + len(tensor.name) + _ENTRY for tensor in region.stored)
    entries -= sum(sizes[id(tensor)] + len(tensor.name) + _ENTRY for tensor in dying)
    return entries - sum(map(_least_bytes, region.nodes))


def _least_bytes(node: gs.Node) -> int:
    """Return the bytes that a node fills in a file, without those of its attributes."""
    names = (node.op, node.name, *(tensor.name for tensor in (*node.inputs, *node.outputs)))
    return 2 + sum(len(name) + 2 for name in names)


def smallest_cut(region: Region, sizes: Mapping[int, int]) -> set[int]:
    """Return the ids of the nodes to fold by rule 2; `sizes` holds every tensor of the region."""
    flow: nx.DiGraph = nx.DiGraph()
    flow.add_nodes_from((_SOURCE, _SINK))
    inside = {id(node) for node in region.nodes}
    flow.add_nodes_from(inside)

    def add(start: Hashable, tensor: gs.Tensor, readers: Iterable[Hashable]) -> None:
        if sizes[id(tensor)] > _SMALL:  # smaller ones are free: stored wherever that helps
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
