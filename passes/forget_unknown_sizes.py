"""Leave sizes of inputs and outputs open that exporters call "?", -1 or unk__3.

Equal names mean equal sizes (https://onnx.ai/onnx/repo-docs/IR.html), and TensorRT takes them at their word: it refuses
a picture of "?" x "?" that is not square. Such names only say that a size is unknown, which a size without a name says
too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from graphopt.pass_base import Context, Effect, Pass, PassResult
from graphopt.shapes import is_name


@dataclass(frozen=True, kw_only=True)
class ForgetUnknownSizes(Pass):
    """Leave sizes open that are called "?" or -1: equal names would say that they are equal."""

    name: ClassVar[str] = "forget-unknown-sizes"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Rewrite the inputs and outputs of `graph`; a rewrite is one of them."""
        rewrites = 0
        for tensor in (*graph.inputs, *graph.outputs):
            if tensor.shape is None or not any(map(_is_no_name, tensor.shape)):
                continue
            tensor.shape = [None if _is_no_name(size) else size for size in tensor.shape]
            rewrites += 1
        return PassResult(rewrites=rewrites)


def _is_no_name(size: object) -> bool:
    return (isinstance(size, str) and not is_name(size)) or (isinstance(size, int) and size < 0)
