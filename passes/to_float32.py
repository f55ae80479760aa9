"""Let a model compute in float32 what it computes in float16 or bfloat16.

Targets quantize float32, so a model that was exported or converted to half precision comes here first; `optimize` and
`calibrate` see to it. Every tensor of a half type becomes float32, so operators whose inputs agreed in their type still
do, and compute at least as exactly. Inputs and outputs of the model keep their types, with a Cast between. Analyses
that ask for the model as it came in get this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from graphopt.graph import (
    Names,
    all_graphs,
    all_nodes,
    constants_in,
    label_of,
    producer,
    replace_uses,
    set_output,
)
from graphopt.half_precision import HALF_TYPES, computes_in_half, half_attributes, is_half
from graphopt.model_io import Model
from graphopt.pass_base import Context, Effect, Pass, PassResult, Skip
from graphopt.passes.inline_functions import InlineFunctions
from graphopt.sizes import numpy_dtype

_DOMAINS = (None, "", "ai.onnx", "ai.onnx.ml", "com.microsoft")  # whose operators compute in float32 as well


@dataclass(frozen=True, kw_only=True)
class ToFloat32(Pass):
    """Let the model compute in float32 what it computes in float16 or bfloat16; inputs and outputs keep their types."""

    name: ClassVar[str] = "to-float32"
    effect: ClassVar[Effect] = Effect.LOSSY

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Widen the tensors of `graph` and of the graphs in it; a rewrite is one of them."""
        if not computes_in_half(graph):
            return PassResult()
        skipped = InlineFunctions().apply(graph, context).skipped
        if foreign := [node for node in all_nodes(graph) if node.domain not in _DOMAINS]:
            reason = "an operator of another domain may need the type that it has, so nothing is widened"
            return PassResult(skipped=(*skipped, *(Skip(label_of(node), reason) for node in foreign)))
        context.infer_shapes(graph)
        names = Names(graph)
        casts_before = _widen_inputs(graph, names)
        casts_behind = _widen_outputs(graph, names)
        interface = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
        halves = [tensor for tensor in _tensors(graph) if is_half(tensor) and id(tensor) not in interface]
        for tensor in halves:
            if isinstance(tensor, gs.Constant):
                tensor.values = np.asarray(tensor.values).astype(np.float32)
            else:
                tensor.dtype = np.dtype(np.float32)
        for node in all_nodes(graph):
            node.attrs.update({key: int(TensorProto.FLOAT) for key in half_attributes(node)})
        graph.nodes[:] = [*casts_before, *graph.nodes, *casts_behind]
        context.original = Model(graph, context.frame).copy()
        note = "the model computes in float32 now, as targets quantize it; inputs and outputs keep their types"
        tensors = len(halves) + len(casts_before) + len(casts_behind)
        return PassResult(rewrites=tensors, skipped=skipped, parts={"tensors": tensors}, notes=(note,))


def _widen_inputs(graph: gs.Graph, names: Names) -> list[gs.Node]:
    """Let all that read an input of a half type read it behind a Cast."""
    halves = [tensor for tensor in graph.inputs if is_half(tensor)]
    wide = [_replaced(graph, tensor, names) for tensor in halves]
    return [_cast(*ends, TensorProto.FLOAT, names) for ends in zip(halves, wide, strict=True)]


def _widen_outputs(graph: gs.Graph, names: Names) -> list[gs.Node]:
    """Let an output of a half type be made from a float32, which all others read."""
    casts = []
    for tensor in {id(tensor): tensor for tensor in graph.outputs if is_half(tensor)}.values():
        if isinstance(tensor, gs.Constant):
            _replaced(graph, tensor, names).to_constant(np.asarray(tensor.values).astype(np.float32))
        elif (node := producer(tensor)) is not None:  # else it is an input too, which is read behind a Cast
            wide = _replaced(graph, tensor, names)
            wide.shape = None  # what the model states of an output need not be so
            set_output(node, next(index for index, each in enumerate(node.outputs) if each is tensor), wide)
            casts.append(_cast(wide, tensor, HALF_TYPES[numpy_dtype(tensor.dtype).name], names))
    return casts


def _replaced(graph: gs.Graph, tensor: gs.Tensor, names: Names) -> gs.Variable:
    """A float32 that all read in place of `tensor`, branches that return it included."""
    wide = gs.Variable(names.fresh(f"{tensor.name}_float32"), np.dtype(np.float32), tensor.shape)
    replace_uses(tensor, wide)
    for output in (output for each in all_graphs(graph) if each is not graph for output in each.outputs):
        if output.name == tensor.name and not output.inputs and not isinstance(output, gs.Constant):
            output.name = wide.name
    return wide


def _cast(before: gs.Tensor, behind: gs.Tensor, to: int, names: Names) -> gs.Node:
    return gs.Node("Cast", names.fresh(f"{behind.name}_Cast"), {"to": int(to)}, [before], [behind])


def _tensors(graph: gs.Graph) -> list[gs.Tensor]:
    """Of the graph and all graphs in it, each once."""
    found = {id(tensor): tensor for tensor in constants_in(graph)}
    for each in all_graphs(graph):
        computed = (tensor for node in each.nodes for tensor in node.outputs)
        found.update((id(tensor), tensor) for tensor in (*each.inputs, *computed, *each.outputs))
    return list(found.values())
