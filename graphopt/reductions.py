"""A model that gives the extremes of its tensors instead of the tensors: ReduceMin and ReduceMax inside the graph.

onnxruntime's reductions pass over a NaN in silence, so a ReduceSum beside them tells whether there was one: a sum of
finite values, in whatever order, is never NaN unless they come near the largest that there is. What onnxruntime does
not reduce on the CPU, float16 and bfloat16, is cast to float32 first, which changes no value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.feeds import Feed
from graphopt.graph import Names
from graphopt.histogram import NonFiniteError
from graphopt.model_io import Model
from graphopt.runtime import open_session


@dataclass(frozen=True)
class Reduced:
    """Of one tensor in one sample: its extremes, meaningless where there are no values, and how many these are."""

    minimum: float
    maximum: float
    count: int


class Reductions:
    """A session on a copy of a model whose only outputs are the reductions of tensors of these floating-point types."""

    def __init__(self, model: Model, dtypes: Mapping[str, np.dtype[Any]], *, threads: int = 0) -> None:
        self._tensors = tuple(dtypes)
        reducing, self._outputs = _reducing(model, dtypes)
        self._session = open_session(reducing, threads=threads, plan_memory=False)

    def run(self, feed: Feed) -> dict[str, Reduced | NonFiniteError]:
        """Run once: for each tensor what it reduces to, or what is not finite in it."""
        values = iter(self._session.run(feed, self._outputs).values())
        return {name: _checked(*(next(values) for _ in _OPS)) for name in self._tensors}


_REDUCED = (np.float32, np.float64)
_OPS = ("ReduceMin", "ReduceMax", "ReduceSum", "Size")


def _checked(minimum: float, maximum: float, total: float, count: int) -> Reduced | NonFiniteError:
    if math.isnan(total) or math.isnan(minimum) or math.isnan(maximum):
        return NonFiniteError("NaN")
    if count and not (math.isfinite(minimum) and math.isfinite(maximum)):
        return NonFiniteError("infinite")
    return Reduced(float(minimum), float(maximum), int(count))


def _reducing(model: Model, dtypes: Mapping[str, np.dtype[Any]]) -> tuple[Model, list[str]]:
    """A copy of the model that computes the reductions of the named tensors, and what these are called, in order."""
    copy = model.copy()
    graph = copy.graph
    fresh = Names(graph).fresh
    tensors = {tensor.name: tensor for node in graph.nodes for tensor in (*node.inputs, *node.outputs)}
    tensors |= {tensor.name: tensor for tensor in graph.inputs}
    outputs: list[gs.Variable] = []
    for name, dtype in dtypes.items():
        tensor = tensors[name]
        if dtype not in _REDUCED:
            tensor = gs.Variable(fresh(f"{name}_float32"), np.float32)
            graph.nodes.append(gs.Node("Cast", tensor.name, {"to": onnx.TensorProto.FLOAT}, [tensors[name]], [tensor]))
        for op in _OPS:
            output = gs.Variable(fresh(f"{name}_{op}"), np.int64 if op == "Size" else tensor.dtype, [])
            attributes = {} if op == "Size" else {"keepdims": 0}
            graph.nodes.append(gs.Node(op, output.name, attributes, [tensor], [output]))
            outputs.append(output)
    graph.outputs = outputs
    return copy, [output.name for output in outputs]
