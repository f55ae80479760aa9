"""Clones of a `gs.Graph` that share nothing but the weights.

graphsurgeon's own `copy` forgets producer and tensor types, shares attribute lists, and gives each branch a
constant of its own where the branches share one.
"""

from __future__ import annotations

from typing import Any

import onnx_graphsurgeon as gs
from onnx_graphsurgeon.util.misc import SynchronizedList

from graphopt.graph import all_graphs


def copy_graph(graph: gs.Graph) -> gs.Graph:
    """Return a clone. The values of constants are shared with it and must not be written in place."""
    clone = _Copier().graph(graph)
    clone._functions = [_Copier().function(function) for function in graph.functions]
    for nested in (graph for each in (clone, *clone._functions) for graph in all_graphs(each)):
        nested._functions = clone._functions
    return clone


class _Copier:
    def __init__(self) -> None:
        self._tensors: dict[int, gs.Tensor] = {}
        self._originals: list[gs.Tensor] = []  # alive as long as their ids are keys

    def graph(self, graph: gs.Graph) -> gs.Graph:
        copy = gs.Graph(
            nodes=[self._node(node) for node in graph.nodes],
            inputs=[self._tensor(tensor) for tensor in graph.inputs],
            outputs=[self._tensor(tensor) for tensor in graph.outputs],
            name=graph.name,
            doc_string=graph.doc_string,
            opset=graph.opset,
            import_domains=None if graph.import_domains is None else list(graph.import_domains),
            producer_name=graph.producer_name,
            producer_version=graph.producer_version,
            ir_version=graph.ir_version,
        )
        copy.name_idx = graph.name_idx
        return copy

    def function(self, function: gs.Function) -> gs.Function:
        return gs.Function(
            function.name,
            function.domain,
            nodes=[self._node(node) for node in function.nodes],
            inputs=[self._tensor(tensor) for tensor in function.inputs],
            outputs=[self._tensor(tensor) for tensor in function.outputs],
            doc_string=function.doc_string,
            opset=function.opset,
            import_domains=None if function.import_domains is None else list(function.import_domains),
            attrs={name: self._attribute(value) for name, value in function.attrs.items()},
            ir_version=function.ir_version,
        )

    def _node(self, node: gs.Node) -> gs.Node:
        return gs.Node(
            op=node.op,
            name=node.name,
            attrs={name: self._attribute(value) for name, value in node.attrs.items()},
            inputs=[self._tensor(tensor) for tensor in node.inputs],
            outputs=[self._tensor(tensor) for tensor in node.outputs],
            domain=node.domain,
        )

    def _attribute(self, value: Any) -> Any:
        if isinstance(value, gs.Graph):
            return self.graph(value)
        if isinstance(value, gs.Tensor):
            return self._tensor(value)
        return list(value) if isinstance(value, list) else value

    def _tensor(self, tensor: gs.Tensor) -> gs.Tensor:
        copy = self._tensors.get(id(tensor))
        if copy is None:
            copy = self._tensors[id(tensor)] = _copy_tensor(tensor)
            self._originals.append(tensor)
        return copy


def _copy_tensor(tensor: gs.Tensor) -> gs.Tensor:
    """Return a tensor with the same attributes and no producers or readers; its constructor takes twice the time."""
    copy: gs.Tensor = object.__new__(type(tensor))
    state = dict(tensor.__dict__)
    state["inputs"] = SynchronizedList(copy, field_name="outputs", initial=())
    state["outputs"] = SynchronizedList(copy, field_name="inputs", initial=())
    if state.get("shape") is not None:
        state["shape"] = list(state["shape"])
    copy.__dict__.update(state)
    return copy
