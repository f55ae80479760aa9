"""Turn graph inputs into constants: those with default values, and those that are given one here.

From IR version 4 on, an initializer that is a graph input too is a default that a caller may override
(https://onnx.ai/onnx/repo-docs/IR.html), so no other pass may rely on its value. Many exporters list their
weights that way without meaning it. Other inputs choose between branches or name a size, and a runtime that builds
the graph beforehand needs to know them: a sample rate, whether a cache is used. Once frozen, the names are no inputs
any more: a caller can no longer feed them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar

import onnx_graphsurgeon as gs

from graphopt.errors import PipelineError
from graphopt.graph import is_output
from graphopt.input_values import give_defaults
from graphopt.pass_base import Context, Effect, Pass, PassResult, Skip


@dataclass(frozen=True, kw_only=True)
class FreezeInputs(Pass):
    """Turn graph inputs with default values, which a caller may override, into constants, and any input to a value."""

    name: ClassVar[str] = "freeze-inputs"
    effect: ClassVar[Effect] = Effect.EXACT

    names: tuple[str, ...] = field(
        default=("*",), metadata={"help": "which inputs: names, where * stands for anything"}
    )

    values: tuple[str, ...] = field(
        default=(), metadata={"help": "other inputs and the number that all of each is, as name=16000"}
    )

    def __post_init__(self) -> None:
        for item in self.values:
            name, equals, value = item.rpartition("=")
            if not (name and equals and value):
                raise PipelineError(f"freeze-inputs:values takes NAME=NUMBER, not '{item}'")

    @property
    def input_values(self) -> Mapping[str, str]:
        """What `values` says, by name."""
        return {name: value for name, _, value in (item.rpartition("=") for item in self.values)}

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Freeze the inputs in `names` and `values`; `context.defaults` has the value of each.

        Raises:
            PipelineError: the model has no such input, or it cannot have the value.
        """
        values = self.input_values
        give_defaults(graph, context.frame, values)
        frozen: set[int] = set()
        skipped = [
            Skip(pattern, "no graph input with a default value has this name")
            for pattern in self.names
            if pattern != "*" and not any(_matches(name, (pattern,)) for name in context.defaults)
        ]
        for tensor in graph.inputs:
            default = context.defaults.get(tensor.name)
            if default is None or not (tensor.name in values or _matches(tensor.name, self.names)):
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
