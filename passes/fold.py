"""The folding group: its members take turns until none of them finds anything left to do.

One member makes work for another: a folded shape makes a Reshape a no-op, an Identity removed lets a
BatchNormalization see the Conv before it, and constants that folded leave dead nodes behind.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_graphsurgeon as gs

from graphopt.errors import PipelineError
from graphopt.pass_base import Context, Effect, Pass, PassResult, Skip
from graphopt.passes.fold_affine import FoldAffine
from graphopt.passes.fold_batch_norm import FoldBatchNorm
from graphopt.passes.fold_constants import FoldConstants
from graphopt.passes.fold_pad import FoldPad
from graphopt.passes.remove_dead_nodes import RemoveDeadNodes
from graphopt.passes.remove_identities import RemoveIdentities

_MAX_ROUNDS = 20  # each round but the last removes a node or an input; real models need two to four


@dataclass(frozen=True, kw_only=True)
class Fold(Pass):
    """Fold constants, BatchNormalization and identities, and remove dead nodes, until nothing changes."""

    name: ClassVar[str] = "fold"
    effect: ClassVar[Effect] = Effect.REASSOCIATES

    max_growth: int = field(
        default=4096,
        metadata={"help": "bytes by which a connected group of constant nodes may grow the model when folded"},
    )
    skip: tuple[str, ...] = field(default=(), metadata={"help": "members to leave out, by name"})

    def __post_init__(self) -> None:
        """Refuse names that are no members.

        Raises:
            PipelineError: a name in `skip` is no member of the group.

        """
        known = [member.name for member in self._all_members()]
        for name in self.skip:
            if name not in known:
                raise PipelineError(f"fold: skip={name} is none of its members; they are {', '.join(known)}")

    def members(self) -> list[Pass]:
        """Return the passes of the group, in the order in which they take turns."""
        return [member for member in self._all_members() if member.name not in self.skip]

    def _all_members(self) -> list[Pass]:
        return [
            RemoveIdentities(),
            FoldConstants(max_growth=self.max_growth),
            FoldBatchNorm(),
            FoldAffine(),
            FoldPad(),
            RemoveDeadNodes(),
        ]

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Run the members; `parts` counts their rewrites, `skipped` is what the last round left alone."""
        members = self.members()
        parts: Counter[str] = Counter({member.name: 0 for member in members})
        notes: dict[str, None] = {}
        skipped: dict[Skip, None] = {}
        for _ in range(_MAX_ROUNDS):
            results = {member.name: member.apply(graph, context) for member in members}
            parts.update({name: result.rewrites for name, result in results.items()})
            notes.update(dict.fromkeys(note for result in results.values() for note in result.notes))
            skipped = dict.fromkeys(skip for result in results.values() for skip in result.skipped)
            if not any(result.rewrites for result in results.values()):
                break
        return PassResult(rewrites=parts.total(), skipped=tuple(skipped), parts=dict(parts), notes=tuple(notes))
