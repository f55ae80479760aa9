"""The folding group: its members take turns until none of them finds anything left to do.

One member makes work for another: a folded shape makes a Reshape a no-op, an Identity removed lets a
BatchNormalization see the Conv before it, and constants that folded leave dead nodes behind. A member takes its next
turn only when another has changed the graph since its last one. Shapes are inferred once, and again only while some
are unknown: members keep those of the tensors that they rewrite.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import ClassVar

import onnx_graphsurgeon as gs

from graphopt.errors import PipelineError
from graphopt.graph import all_graphs, present
from graphopt.pass_base import Context, Effect, Pass, PassResult, Skip
from graphopt.passes.fold_affine import FoldAffine
from graphopt.passes.fold_batch_norm import FoldBatchNorm
from graphopt.passes.fold_constants import FoldConstants
from graphopt.passes.fold_pad import FoldPad
from graphopt.passes.forget_unknown_sizes import ForgetUnknownSizes
from graphopt.passes.fuse_gemm import FuseGemm
from graphopt.passes.inline_functions import InlineFunctions
from graphopt.passes.merge_common_subexpressions import MergeCommonSubexpressions
from graphopt.passes.merge_duplicate_initializers import MergeDuplicateInitializers
from graphopt.passes.merge_parallel_convs import MergeParallelConvs
from graphopt.passes.merge_reshaped_transposes import MergeReshapedTransposes
from graphopt.passes.merge_reshapes import MergeReshapes
from graphopt.passes.merge_transposes import MergeTransposes
from graphopt.passes.remove_dead_nodes import RemoveDeadNodes
from graphopt.passes.remove_default_inputs import RemoveDefaultInputs
from graphopt.passes.remove_identities import RemoveIdentities
from graphopt.passes.remove_invariant_states import RemoveInvariantStates
from graphopt.passes.replace_concat import ReplaceConcat
from graphopt.passes.replace_sum import ReplaceSum
from graphopt.shapes import infer_shapes, is_name

_MAX_ROUNDS = 100  # of all members; most need two to four, chains of computed Pads one for each
_MAX_REPEATS = 3  # how often the same nodes may come back, with other constants, before that is an oscillation


@dataclass(frozen=True, kw_only=True)
class Fold(Pass):
    """Fold constants, affine nodes, identities and duplicates, and remove dead nodes, until nothing changes."""

    name: ClassVar[str] = "fold"
    effect: ClassVar[Effect] = Effect.REASSOCIATES

    max_growth: int = field(
        default=4096, metadata={"help": "bytes by which folding constants may grow the model, all in all"}
    )
    skip: tuple[str, ...] = field(default=(), metadata={"help": "members to leave out, by name"})

    def __post_init__(self) -> None:
        """Refuse names that are no members.

        Raises:
            PipelineError: a name in `skip` is no member of the group.

        """
        known = [member.name for member in MEMBERS]
        for name in self.skip:
            if name not in known:
                raise PipelineError(f"fold: skip={name} is none of its members; they are {', '.join(known)}")

    def members(self) -> list[Pass]:
        """Return the passes of the group, in the order in which they take turns."""
        return [member() for member in MEMBERS if member.name not in self.skip]

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Run the members; `parts` counts their rewrites, `skipped` is what their last turns left alone."""
        return _Turns(graph, context, self.members(), self.max_growth).run()


MEMBERS: tuple[type[Pass], ...] = (
    ForgetUnknownSizes,
    InlineFunctions,
    RemoveIdentities,
    RemoveInvariantStates,
    FoldConstants,
    RemoveDefaultInputs,
    ReplaceConcat,
    MergeDuplicateInitializers,
    MergeCommonSubexpressions,
    MergeReshapes,
    MergeTransposes,
    MergeReshapedTransposes,
    FoldBatchNorm,
    FoldAffine,
    MergeParallelConvs,
    ReplaceSum,
    FuseGemm,
    FoldPad,
    RemoveDeadNodes,
)


class _Turns:
    """The turns that members take on one graph."""

    def __init__(self, graph: gs.Graph, context: Context, members: list[Pass], max_growth: int) -> None:
        self._graph = graph
        self._context = replace(context, shapes_inferred=True)
        self._members = members
        self._left = max_growth
        self._parts: Counter[str] = Counter({member.name: 0 for member in members})
        self._notes: dict[str, None] = {}
        self._skipped: dict[str, tuple[Skip, ...]] = {}  # of each member's last turn
        self._learned = True  # whether shapes have been inferred since the last change

    def run(self) -> PassResult:
        """Let the members take turns until as many in a row as there are change nothing."""
        infer_shapes(self._graph)
        seen: Counter[int] = Counter()
        quiet = 0  # turns in a row that changed nothing
        for turn in range(_MAX_ROUNDS * len(self._members)):
            place = turn % len(self._members)
            if (place == 0 or quiet == len(self._members)) and self._learn_shapes():
                quiet = 0
            if quiet == len(self._members):
                break
            if place == 0:
                seen[_fingerprint(self._graph)] += 1
                if max(seen.values()) > _MAX_REPEATS:
                    self._note_end("its members undo each other's changes")
                    break
            if self._take_turn(self._members[place]):
                self._learned, quiet = False, 0
            else:
                quiet += 1
        else:
            self._note_end(f"{_MAX_ROUNDS} rounds were not enough")
        skipped = dict.fromkeys(skip for skips in self._skipped.values() for skip in skips)
        return PassResult(
            rewrites=self._parts.total(), skipped=tuple(skipped), parts=dict(self._parts), notes=tuple(self._notes)
        )

    def _learn_shapes(self) -> bool:
        """Infer shapes if the graph has changed since and some are unknown; tell whether that found any."""
        if self._learned:
            return False
        self._learned = True
        return _has_unknown_sizes(self._graph) and infer_shapes(self._graph) > 0

    def _take_turn(self, member: Pass) -> int:
        if isinstance(member, FoldConstants):
            member = replace(member, max_growth=self._left)
        result = member.apply(self._graph, self._context)
        self._left -= result.growth
        self._parts[member.name] += result.rewrites
        self._notes.update(dict.fromkeys(result.notes))
        self._skipped[member.name] = result.skipped
        return result.rewrites

    def _note_end(self, reason: str) -> None:
        last = ", ".join(name for name, count in self._parts.items() if count)
        self._notes[f"stopped before a fixed point: {reason} ({last}); the graph is valid as it is"] = None


def _fingerprint(graph: gs.Graph) -> int:
    """Return a number that is the same for the same nodes in the same order, whatever their constants."""
    return hash(
        tuple((node.op, *(tensor.name for tensor in node.outputs)) for each in all_graphs(graph) for node in each.nodes)
    )


def _has_unknown_sizes(graph: gs.Graph) -> bool:
    """Whether a size may become known: those of the inputs have names that no inference replaces by numbers."""
    names = {size for tensor in graph.inputs for size in tensor.shape or () if is_name(size)}
    interface = {id(tensor) for tensor in graph.outputs}  # stays as it is stated
    return any(
        tensor.shape is None or not all(isinstance(size, int) or size in names for size in tensor.shape)
        for each in all_graphs(graph)
        for node in each.nodes
        for tensor in present(node.outputs)
        if id(tensor) not in interface
    )
