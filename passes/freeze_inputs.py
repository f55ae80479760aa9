"""Turn graph inputs with default values into constants.

From IR version 4 on, an initializer that is a graph input too is a default that a caller may override
(https://onnx.ai/onnx/repo-docs/IR.html), so no other pass may rely on its value. Many exporters list their
weights that way without meaning it. Once frozen, the names are no inputs any more: a caller can no longer
feed them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar

import onnx_graphsurgeon as gs

from graphopt.graph import is_output
from graphopt.pass_base import Context, Effect, Pass, PassResult, Skip


@dataclass(frozen=True, kw_only=True)
class FreezeInputs(Pass):
    """Turn graph inputs with default values, which a caller may override, into constants."""

    name: ClassVar[str] = "freeze-inputs"
    effect: ClassVar[Effect] = Effect.EXACT

    names: tuple[str, ...] = field(
        default=("*",), metadata={"help": "which inputs: names, where * stands for anything"}
    )

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Freeze the inputs in `names` for which `context.defaults` has a value."""
        frozen: set[int] = set()
        skipped = [
            Skip(pattern, "no graph input with a default value has this name")
            for pattern in self.names
            if pattern != "*" and not any(_matches(name, (pattern,)) for name in context.defaults)
        ]
        for tensor in graph.inputs:
            default = context.defaults.get(tensor.name)
            if default is None or not _matches(tensor.name, self.names):
                continue
            if is_output(graph, tensor):
                skipped.append(Skip(tensor.name, "is a graph output too, so it stays an input"))
                continue
            tensor.to_constant(default._values)  # shared, and not loaded
            frozen.add(id(tensor))
        graph.inputs = [tensor for tensor in graph.inputs if id(tensor) not in frozen]
        return PassResult(rewrites=len(frozen), skipped=tuple(skipped))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of the patterns fits; a name that holds a bracket fits itself."""
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)
