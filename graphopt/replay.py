"""Two graphs run over the same samples piece by piece, so that one can be changed on the way.

A pass that sets the weights of one operator after another needs, for each, what flows into it once those before are
set. Running the whole graph each time would take a time that grows with the square of its length. Here each graph
keeps, for every sample, the tensors that cross from the nodes before a place to those after it: the next piece starts
from there. Where these would not fit into the memory budget, it starts from the last place where they did, at the
latest from the samples themselves. Large tensors are mostly near the inputs, where that costs little.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.errors import DataError, GraphoptError
from graphopt.feeds import Array, Samples, place_of
from graphopt.frame import Frame, GraphFrame
from graphopt.graph import present
from graphopt.model_io import Model
from graphopt.node_order import names_read, sorted_nodes
from graphopt.runtime import Session, open_session

Values = dict[str, Array]


@dataclass(frozen=True)
class Piece:
    """What to run one graph for.

    Attributes:
        before: the node that comes next; all that was computed before it may be kept for the piece after.
        tensors: names of the tensors to return.
    """

    before: gs.Node
    tensors: Sequence[str]


@dataclass
class _Graph:
    """One graph, and what is held of each sample in it."""

    graph: gs.Graph
    frame: Frame
    budget: int
    optimize: bool
    held: list[Values] = field(default_factory=list)  # by sample; empty until something is kept

    def next(self, piece: Piece) -> _Step:
        """How to run a piece, from what is held or else from the inputs."""
        nodes = sorted_nodes(self.graph)
        crossing = _crossing(self.graph, nodes, piece.before)
        known = dict.fromkeys(self.held[0] if self.held else (tensor.name for tensor in self.graph.inputs))
        computed = [name for name in dict.fromkeys((*piece.tensors, *crossing)) if name not in known]
        part, inputs = _nodes_between(nodes, known, computed)
        return _Step(self, piece.tensors, crossing, computed, part, inputs)


class _Step:
    """The run of one piece, sample by sample."""

    def __init__(
        self,
        owner: _Graph,
        tensors: Sequence[str],
        crossing: Sequence[str],
        computed: Sequence[str],
        part: list[gs.Node],
        inputs: Sequence[str],
    ) -> None:
        self._owner, self._tensors, self._crossing = owner, tensors, crossing
        self._computed, self._part, self._inputs = computed, part, inputs
        self._session: Session | None = None  # opened for the first sample, which shows the inputs' types
        self._keeps: bool | None = None

    def run(self, index: int, count: int, feed: Values) -> Values:
        """Run sample number `index` of `count`; `feed` is read only as long as nothing is held."""
        owner = self._owner
        known = dict(owner.held[index] if index < len(owner.held) else feed)
        for name in self._inputs:
            if name not in known and name in owner.frame.defaults:
                known[name] = np.asarray(owner.frame.defaults[name].values)
        if self._computed:
            self._session = self._session or self._opened(known)
            known.update(self._session.run({name: known[name] for name in self._inputs}, self._computed))
        crossing = {name: known[name] for name in self._crossing}
        if self._keeps is None:
            self._keeps = _fits(crossing, owner.budget // count)
        if self._keeps:  # in place of what is not needed any more; a source may fill the arrays of a feed again
            owner.held[index : index + 1] = [
                {name: array.copy() if name in feed else array for name, array in crossing.items()}
            ]
        return {name: known[name] for name in self._tensors}

    def _opened(self, known: Values) -> Session:
        whole, frame = self._owner.graph, self._owner.frame
        part = gs.Graph(
            nodes=self._part,
            inputs=[gs.Variable(name, known[name].dtype, None) for name in self._inputs],
            outputs=[],
            opset=whole.opset,
            import_domains=whole.import_domains,
            functions=list(whole.functions),
            ir_version=whole.ir_version,
        )
        # without entries for its tensors: their stated shapes are those of before a pass changed them
        bare = Frame(header=frame.header, graphs={(): GraphFrame()}, functions=frame.functions)
        return open_session(Model(part, bare), optimize=self._owner.optimize, extra_outputs=self._computed)


class Replay:
    """Two graphs over the same samples.

    Args:
        graphs: the graphs; the weights of their nodes may change between pieces, and nodes may join, as long as what
            comes before the node of the last piece stays.
        frame: what their model holds besides.
        samples: feeds for both.
        count: how many there are.
        memory_budget: bytes that all kept tensors may take.
        optimize: whether onnxruntime may rewrite the pieces; if not, Q and DQ compute what they stand for.
    """

    def __init__(
        self,
        graphs: tuple[gs.Graph, gs.Graph],
        frame: Frame,
        samples: Samples,
        count: int,
        memory_budget: int,
        *,
        optimize: bool = True,
    ) -> None:
        self._samples, self._count = samples, count
        self._graphs = tuple(_Graph(graph, frame, memory_budget // 2, optimize) for graph in graphs)

    def run(self, *pieces: Piece) -> Iterator[tuple[Values, ...]]:
        """Yield, sample by sample, the tensors that each graph's piece asks for; to be read to the end.

        Raises:
            DataError: a graph does not run on a sample; the message says which.
            ModelError: onnxruntime cannot load a piece.
        """
        steps = [graph.next(piece) for graph, piece in zip(self._graphs, pieces, strict=True)]
        for index, feed in enumerate(self._feeds()):
            try:
                yield tuple(step.run(index, self._count, feed) for step in steps)
            except GraphoptError as error:
                raise DataError(f"the model does not run on {place_of(feed, index)}: {error}") from error

    def _feeds(self) -> Iterator[Values]:
        if all(graph.held for graph in self._graphs):
            return iter([{}] * self._count)
        return iter(self._samples)


def _fits(values: Mapping[str, object], budget: int) -> bool:
    """Whether all values are tensors that a piece can start from, and take together at most `budget` bytes."""
    arrays = [value for value in values.values() if isinstance(value, np.ndarray) and value.dtype.kind != "O"]
    return len(arrays) == len(values) and sum(array.nbytes for array in arrays) <= budget


def _crossing(graph: gs.Graph, nodes: Sequence[gs.Node], before: gs.Node) -> list[str]:
    """Names of the tensors that are there before a node runs and are read by it or after it.

    Those that depend on constants alone, such as dequantized weights, are left out: each sample would hold them.
    """
    place = next(index for index, node in enumerate(nodes) if node is before)
    there = {tensor.name for tensor in graph.inputs}
    for node in nodes[:place]:
        if not there.isdisjoint(names_read(node)):
            there.update(tensor.name for tensor in present(node.outputs))
    return [name for name in dict.fromkeys(n for node in nodes[place:] for n in names_read(node)) if name in there]


def _nodes_between(
    nodes: Sequence[gs.Node], known: Collection[str], wanted: Sequence[str]
) -> tuple[list[gs.Node], list[str]]:
    """The nodes that compute `wanted` from `known`, in order, and which of `known` they read."""
    needed, chosen = set(wanted), []
    for node in reversed(nodes):
        if any(tensor.name in needed and tensor.name not in known for tensor in present(node.outputs)):
            chosen.append(node)
            needed.update(names_read(node))
    return chosen[::-1], [name for name in known if name in needed]
