"""What a lint rule is, what it looks at, and what it finds.

A rule is one small function from a `Subject` to the places where it is broken, each with a message that says what is
wrong and what to do. Its id is stable, so that scripts can rely on it; its docstring is its title and its source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import onnx_graphsurgeon as gs

from graphopt.errors import ModelError
from graphopt.graph import all_graphs
from graphopt.model_io import Model
from graphopt.quantizers import Quantizer, quantizer_of
from graphopt.shapes import infer_shapes
from graphopt.sizes import Shape

if TYPE_CHECKING:  # a target names its rules, so it imports them
    from graphopt.targets.target import Target

Result = TypeVar("Result")
Places = Iterator[tuple[str, str]]
"""Name of a node or tensor, and the message about it."""


class Severity(Enum):
    """How much a finding matters."""

    ERROR = "error"  # the runtime refuses the model, or its result is undefined
    WARNING = "warning"  # it runs, but slower or less exactly than it could
    INFO = "info"  # what is good to know


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One place where a rule is broken."""

    rule: str
    severity: Severity
    where: str  # the node's or tensor's name; empty: the whole model
    message: str  # what is wrong and what to do


@dataclass(frozen=True, kw_only=True)
class LintRule:
    """One rule; `check` yields the places where it is broken."""

    id: str
    severity: Severity
    title: str
    source: str
    check: Callable[[Subject], Places]

    def findings(self, subject: Subject) -> list[Finding]:
        """The places in a model where the rule is broken."""
        return [
            Finding(rule=self.id, severity=self.severity, where=where, message=message)
            for where, message in self.check(subject)
        ]


def rule(name: str, severity: Severity) -> Callable[[Callable[[Subject], Places]], LintRule]:
    """Make a rule of a function: the first line of its docstring is the title, the rest says where it comes from."""

    def make(check: Callable[[Subject], Places]) -> LintRule:
        title, _, source = (check.__doc__ or "").partition("\n")
        return LintRule(
            id=name, severity=severity, title=title.rstrip("."), source=" ".join(source.split()), check=check
        )

    return make


class Subject:
    """A model as rules look at it; nothing in it may be changed.

    Attributes:
        model: a copy whose shapes are inferred as far as possible.
        target: what it is judged for.
        input_shapes: of what it will be given, by name; None: unknown where the model leaves sizes open.
        nodes: every node, those in branches and bodies too.

    """

    def __init__(self, model: Model, target: Target, input_shapes: Mapping[str, Shape] | None = None) -> None:
        self.model = model.copy()
        self.target = target
        self.input_shapes = input_shapes
        self.shape_error: str | None = None
        try:
            infer_shapes(self.model.graph)
        except ModelError as error:  # such files are what lint is for
            self.shape_error = str(error)
        self.nodes: tuple[gs.Node, ...] = tuple(node for graph in all_graphs(self.model.graph) for node in graph.nodes)
        self._shared: dict[object, object] = {}

    @property
    def opset(self) -> int:
        """The version of ONNX's operators that the model asks for."""
        return int(self.model.graph.opset)

    @cached_property
    def quantizers(self) -> tuple[Quantizer, ...]:
        """Every QuantizeLinear and DequantizeLinear."""
        return tuple(found for node in self.nodes if (found := quantizer_of(node)) is not None)

    @cached_property
    def _outputs(self) -> frozenset[int]:
        return frozenset(id(tensor) for graph in all_graphs(self.model.graph) for tensor in graph.outputs)

    def is_output(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor is an output of the model, or of a branch or body."""
        return id(tensor) in self._outputs

    def shared(self, analysis: Callable[[Subject], Result]) -> Result:
        """What `analysis` finds; it runs once, however many rules ask."""
        if analysis not in self._shared:
            self._shared[analysis] = analysis(self)
        return self._shared[analysis]  # type: ignore[return-value]  # by its key
