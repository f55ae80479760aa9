"""Fold Mul, Add, Sub, Div and Neg with constants into the linear operators around them, or into each other.

A run of such nodes is one scale and one shift, for each channel or for all elements, which Conv, ConvTranspose, Gemm
and MatMul take into their weights: those of the operator before it, else those of the operators after it
(`graphopt.affine_folding` has the formulas, `graphopt.affine` how the axis of a constant is proved). What no operator
takes in becomes at most one Mul and one Add. The result differs from the original by float rounding only.

Left alone: integers, which wrap; a constant that runs along another axis than the channels, or along two; a constant
divided by x; x that something else reads too; a shift before a Conv with padding; scale and shift of a
LayerNormalization that is written out, which onnxruntime would no longer find. BatchNormalization, with its neighbours,
is fold-batch-norm's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from graphopt.affine import ELEMENTWISE
from graphopt.affine_folding import fold_chains
from graphopt.graph import all_graphs
from graphopt.pass_base import Context, Effect, Pass, PassResult


@dataclass(frozen=True, kw_only=True)
class FoldAffine(Pass):
    """Fold Mul, Add, Sub, Div and Neg with constants into linear operators, or into each other."""

    name: ClassVar[str] = "fold-affine"
    effect: ClassVar[Effect] = Effect.REASSOCIATES

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Fold where it can; `skipped` says of those beside a linear operator why not."""
        if not any(node.op in ELEMENTWISE for each in all_graphs(graph) for node in each.nodes):
            return PassResult()
        context.infer_shapes(graph)
        return fold_chains(graph, context, batch_norm=False)
