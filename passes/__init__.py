"""The passes that come with graphopt, and the table that names them.

Third parties add theirs through the entry-point group `graphopt.passes`: name = "module:Class".
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from graphopt.errors import PipelineError
from graphopt.pass_base import Pass
from graphopt.passes.calibrate import Calibrate
from graphopt.passes.correct_bias import CorrectBias
from graphopt.passes.fold import MEMBERS, Fold
from graphopt.passes.fold_affine import FoldAffine
from graphopt.passes.fold_batch_norm import FoldBatchNorm
from graphopt.passes.fold_constants import FoldConstants
from graphopt.passes.fold_pad import FoldPad
from graphopt.passes.forget_unknown_sizes import ForgetUnknownSizes
from graphopt.passes.freeze_inputs import FreezeInputs
from graphopt.passes.fuse_gemm import FuseGemm
from graphopt.passes.inline_functions import InlineFunctions
from graphopt.passes.insert_qdq import InsertQdq
from graphopt.passes.merge_common_subexpressions import MergeCommonSubexpressions
from graphopt.passes.merge_duplicate_initializers import MergeDuplicateInitializers
from graphopt.passes.merge_parallel_convs import MergeParallelConvs
from graphopt.passes.merge_reshaped_transposes import MergeReshapedTransposes
from graphopt.passes.merge_reshapes import MergeReshapes
from graphopt.passes.merge_transposes import MergeTransposes
from graphopt.passes.prune import Prune
from graphopt.passes.refit import Refit
from graphopt.passes.remove_dead_nodes import RemoveDeadNodes
from graphopt.passes.remove_default_inputs import RemoveDefaultInputs
from graphopt.passes.remove_identities import RemoveIdentities
from graphopt.passes.remove_invariant_states import RemoveInvariantStates
from graphopt.passes.replace_concat import ReplaceConcat
from graphopt.passes.replace_sum import ReplaceSum
from graphopt.passes.strip_qdq import StripQdq
from graphopt.passes.to_float32 import ToFloat32

__all__ = [
    "Calibrate",
    "CorrectBias",
    "Fold",
    "FoldAffine",
    "FoldBatchNorm",
    "FoldConstants",
    "FoldPad",
    "ForgetUnknownSizes",
    "FreezeInputs",
    "FuseGemm",
    "InlineFunctions",
    "InsertQdq",
    "MergeCommonSubexpressions",
    "MergeDuplicateInitializers",
    "MergeParallelConvs",
    "MergeReshapedTransposes",
    "MergeReshapes",
    "MergeTransposes",
    "Prune",
    "Refit",
    "RemoveDeadNodes",
    "RemoveDefaultInputs",
    "RemoveIdentities",
    "RemoveInvariantStates",
    "ReplaceConcat",
    "ReplaceSum",
    "StripQdq",
    "ToFloat32",
    "registry",
]

_OWN: tuple[type[Pass], ...] = (
    Fold,
    *MEMBERS,
    FreezeInputs,
    ToFloat32,
    Prune,
    Refit,
    Calibrate,
    InsertQdq,
    CorrectBias,
    StripQdq,
)


@cache
def registry() -> dict[str, type[Pass]]:
    """Every pass by its name: graphopt's own, then those of installed packages.

    Raises:
        PipelineError: a package's pass cannot be imported, is no `Pass`, has another name, or one that is taken.
    """
    table = {kind.name: kind for kind in _OWN}
    for entry in entry_points(group="graphopt.passes"):
        try:
            kind = entry.load()
        except Exception as error:  # whatever a foreign module raises when it is imported
            raise PipelineError(f"pass '{entry.name}' ({entry.value}) cannot be imported: {error}") from error
        if not (isinstance(kind, type) and issubclass(kind, Pass)):
            raise PipelineError(f"pass '{entry.name}' ({entry.value}) is no graphopt.Pass")
        if getattr(kind, "name", None) != entry.name:
            raise PipelineError(f"pass '{entry.name}' ({entry.value}) must have that name: name = '{entry.name}'")
        if entry.name in table:
            raise PipelineError(f"pass '{entry.name}' ({entry.value}) takes a name that is taken")
        table[entry.name] = kind
    return table
