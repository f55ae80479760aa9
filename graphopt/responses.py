"""What the rest of a graph sees of a tensor that elementwise operators alone read.

The values of x in x * clip(x + 3, 0, 6) / 6 below -3 might as well be -3, and errors of large ones count for more than
those of small ones. So the range of a quantizer on x is judged by the errors of f(x), the last tensor in which the
operators behind x come together, as long as all they read besides is single constants. f is had by running them on
`POINTS`, and is linear between two of these.
"""

from __future__ import annotations

import base64
import heapq
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graphopt.evaluate import evaluate
from graphopt.graph import constant_of, present
from graphopt.graph_export import opset_imports
from graphopt.nested_tensors import nested_graphs, range_names
from graphopt.operators import ELEMENTWISE

_Floats = NDArray[np.float64]

_POSITIVE = 2.0 ** (np.arange(-24 * 16, 40 * 16 + 1) / 16)
POINTS: _Floats = np.concatenate((-_POSITIVE[::-1], [0.0], _POSITIVE)).astype(np.float32).astype(np.float64)
"""Where f is known: zero, and sixteen points an octave from 2**-24 to 2**40, of both signs; whatever the data, so that
all shards of it have the same responses."""

_MOST_NODES = 64  # behind one tensor; activation functions have fewer than ten


@dataclass(frozen=True)
class Response:
    """The function f of a tensor's values."""

    values: _Floats  # [len(POINTS)], f(POINTS); NaN or infinite where f is

    def at(self, x: NDArray[np.floating]) -> _Floats:
        """f(x), of any shape; NaN beyond `POINTS`."""
        return np.asarray(np.interp(x, POINTS, self.values, left=np.nan, right=np.nan), np.float64)

    def to_text(self) -> str:
        """As float32, compressed, in base64."""
        return base64.b64encode(zlib.compress(self.values.astype("<f4").tobytes(), 9)).decode()

    @classmethod
    def from_text(cls, text: str) -> Response:
        """A response from what `to_text` gave.

        Raises:
            ValueError: the text is damaged.
        """
        try:
            values = np.frombuffer(zlib.decompress(base64.b64decode(text, validate=True)), "<f4").astype(np.float64)
        except (ValueError, zlib.error) as error:
            raise ValueError(f"its response is damaged: {error}") from error
        if values.shape != POINTS.shape:
            raise ValueError(f"its response has {len(values)} values, not {len(POINTS)}")
        return cls(values)


def responses(graph: gs.Graph, names: Iterable[str]) -> dict[str, Response]:
    """The responses that tensors have, those in nested graphs too, by the names that ranges have for them."""
    wanted, imports, known_as = set(names), opset_imports(graph), range_names(graph)
    found: dict[str, Response] = {}
    for each, _ in nested_graphs(graph):
        position = {id(node): index for index, node in enumerate(each.nodes)}
        ends = {id(tensor) for tensor in each.outputs}
        for tensor in (*each.inputs, *(tensor for node in each.nodes for tensor in present(node.outputs))):
            name = known_as.get(id(tensor), tensor.name)
            if name not in wanted or tensor.dtype != np.float32 or id(tensor) in ends:
                continue
            nodes = _nodes_behind(tensor, position, ends)
            if nodes and (response := _response(tensor, nodes, imports)) is not None:
                found[name] = response
    return found


def _nodes_behind(tensor: gs.Tensor, position: dict[int, int], ends: set[int]) -> list[gs.Node]:
    """The operators, in order, up to the last whose output is all that others see of `tensor`; empty if there is none.

    They are taken in topological order. `unread` holds the tensors that something besides them reads: where one
    alone is left, the rest of the graph depends on `tensor` through it.
    """
    waiting: list[tuple[int, gs.Node]] = []
    seen: set[int] = set()
    derived, unread = {id(tensor)}, {id(tensor): {id(reader) for reader in tensor.outputs}}
    taken: list[gs.Node] = []
    last = 0

    def reach(reached: gs.Tensor) -> None:
        for reader in reached.outputs:
            if id(reader) in position and id(reader) not in seen:  # else it is in a body, and reads for ever
                seen.add(id(reader))
                heapq.heappush(waiting, (position[id(reader)], reader))

    reach(tensor)
    while waiting and len(taken) < _MOST_NODES:
        _, node = heapq.heappop(waiting)
        if not _is_function_of(node, derived):
            continue
        taken.append(node)
        (output,) = node.outputs
        for operand in present(node.inputs):
            if id(operand) in unread:
                unread[id(operand)].discard(id(node))
                if not unread[id(operand)] and id(operand) not in ends:
                    del unread[id(operand)]
        derived.add(id(output))
        unread[id(output)] = {id(reader) for reader in output.outputs}
        if list(unread) == [id(output)]:
            last = len(taken)
        reach(output)
    return taken[:last]


def _is_function_of(node: gs.Node, derived: set[int]) -> bool:
    if node.domain not in (None, "", "ai.onnx") or node.op not in ELEMENTWISE or len(node.outputs) != 1:
        return False
    others = [tensor for tensor in present(node.inputs) if id(tensor) not in derived]
    return all((value := constant_of(tensor)) is not None and value.size == 1 for tensor in others)


def _response(tensor: gs.Tensor, nodes: list[gs.Node], imports: list[onnx.OperatorSetIdProto]) -> Response | None:
    known = {id(tensor): POINTS.astype(np.float32)}
    for operand in (operand for node in nodes for operand in present(node.inputs)):
        if (value := constant_of(operand)) is not None:
            known[id(operand)] = value.reshape(())
    last = nodes[-1].outputs[0]
    values = evaluate(nodes, known, [last], imports).values.get(id(last))
    return None if values is None or values.shape != POINTS.shape else Response(values.astype(np.float64))
