"""The contract of a pass: what it is given, what it may do, and what it reports.

A pass is a frozen dataclass whose fields are its options. `apply` changes a `gs.Graph` in place and returns a
`PassResult`; the pass manager works on a clone, so a caller's graph is never touched. A graph that was valid before is
valid after, with the same outputs within the tolerance of the pass's `effect`. Every place that looked like a match
and was left alone is a `Skip` whose reason a user can act on. A pass raises only when the request cannot be honoured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, NamedTuple

import onnx_graphsurgeon as gs

from graphopt.cut import Cut
from graphopt.feeds import Samples
from graphopt.frame import Frame
from graphopt.model_io import Model
from graphopt.progress import Progress, silent
from graphopt.ranges import Ranges
from graphopt.shapes import infer_shapes
from graphopt.targets import Target, target_named
from graphopt.weight_scales import WeightScales

MEMORY_BUDGET = 2**30


class Effect(Enum):
    """What a pass does to the outputs, and so how its result is verified."""

    EXACT = "exact"  # bit-equal, or the order in which onnxruntime adds
    REASSOCIATES = "reassociates"  # equal but for float rounding
    LOSSY = "lossy"  # quantization, removal: judged by the final check, not by a tolerance


class Skip(NamedTuple):
    """A place that looked like a match and was left alone."""

    where: str  # the node's or tensor's name
    reason: str  # a sentence that a user can act on


@dataclass(frozen=True, kw_only=True)
class PassResult:
    """What one run of a pass did.

    `rewrites` counts the changes made to the graph, and 0 means that it is as it was: the manager keeps a graph only
    when there are some. `parts` splits them by kind (for a group: by member pass).
    """

    rewrites: int = 0
    skipped: tuple[Skip, ...] = ()
    parts: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what a user should know besides: "opset raised from 11 to 13"
    warnings: tuple[str, ...] = ()  # what a user should act on
    growth: int = 0  # bytes that it took of a budget by which the model may grow


@dataclass(kw_only=True)
class Context:
    """What passes share while one pipeline runs: the request, and the values that analyses leave for rewrites."""

    target: Target = field(default_factory=lambda: target_named("ort-cpu"))
    samples: Samples | None = None  # calibration data; None: synthetic inputs
    ranges: Ranges | None = None  # written by `calibrate` or read from a file, consumed by `qdq`
    cut: Cut | None = None  # left by `prune`, consumed by `refit`
    too_small: Mapping[str, str] | None = None  # by first output, why int8 does not pay; None: `qdq` asks
    unquantized: gs.Graph | None = None  # left by `qdq`: the float graph before it; consumed by `correct-bias`
    weight_scales: WeightScales = field(default_factory=WeightScales)  # that `qdq` found, on this graph or its copies
    memory_budget: int = MEMORY_BUDGET  # bytes of activations that calibration may hold at a time
    frame: Frame = field(default_factory=Frame)  # what the model of the graph holds besides it
    original: Model | None = None  # the model as it came in, or in float32 (`to-float32`); no pass may change it
    progress: Progress = silent
    seed: int = 0
    shapes_inferred: bool = False  # set by a group that infers shapes once for all its members

    @property
    def defaults(self) -> Mapping[str, gs.Constant]:
        """The default values of graph inputs that a caller may override, by input name."""
        return self.frame.defaults

    def infer_shapes(self, graph: gs.Graph) -> None:
        """Fill in dtypes and shapes (`graphopt.shapes.infer_shapes`), unless the group that runs the pass has done so.

        Raises:
            ModelError: shape inference refuses the graph.
        """
        if not self.shapes_inferred:
            infer_shapes(graph)


class Pass(ABC):
    """One analysis or one rewrite of a graph.

    Subclasses are `@dataclass(frozen=True, kw_only=True)`. Field types are those of the pipeline text: bool, int,
    float, str, an `Enum`, or a tuple of these; each field needs a default and a `help` text in its metadata.
    """

    name: ClassVar[str]
    effect: ClassVar[Effect]

    @property
    def input_values(self) -> Mapping[str, str]:
        """What it makes of graph inputs, as text by name: whatever runs in the pipeline gives them these values."""
        return {}

    @abstractmethod
    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Change `graph` in place and say what was done.

        Raises:
            GraphoptError: the request cannot be honoured; the graph may then be half changed and is discarded.
        """


def input_values(passes: Iterable[Pass]) -> dict[str, str]:
    """What passes make of graph inputs from the start of their pipeline on, as text by name."""
    return {name: text for item in passes for name, text in item.input_values.items()}
