"""Fold BatchNormalization into the linear operator before it.

At inference BatchNormalization is affine per channel c
(https://onnx.ai/onnx/operators/onnx__BatchNormalization.html):

    y = scale[c] * (x - mean[c]) / sqrt(var[c] + epsilon) + bias[c]  =  s[c] * x + t[c]
    s[c] = scale[c] / sqrt(var[c] + epsilon)        t[c] = bias[c] - s[c] * mean[c]

with x [N, C, ...] and the four parameters [C]; Conv, ConvTranspose, Gemm and MatMul absorb s and t into their
weights (`graphopt.affine`). The result differs from the original by float rounding only.

Left alone: training mode; an x that something else reads too, since the operator could no longer return it;
an operator that is not linear, such as the Relu in Conv -> Relu -> BatchNormalization; parameters that are
not constant.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.affine import (
    Affine,
    LinearWeights,
    absorbed,
    set_weights,
    why_not_constant,
    why_not_linear,
)
from graphopt.graph import (
    Names,
    all_graphs,
    constant_of,
    disconnect,
    is_output,
    nested_output_names,
    present,
    producer,
    set_output,
)
from graphopt.pass_base import Context, Effect, Pass, PassResult, Skip

_DEFAULT_EPSILON = 1e-5  # of the operator page
_PARAMETERS = ("scale", "bias", "mean", "variance")  # inputs 1 to 4


@dataclass(frozen=True, kw_only=True)
class FoldBatchNorm(Pass):
    """Fold BatchNormalization into the Conv, ConvTranspose, Gemm or MatMul before it."""

    name: ClassVar[str] = "fold-batch-norm"
    effect: ClassVar[Effect] = Effect.REASSOCIATES

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Fold where it can; `skipped` says of each other BatchNormalization why not."""
        sources = [
            producer(node.inputs[0]) for each in all_graphs(graph) for node in each.nodes if _is_batch_norm(node)
        ]
        if not sources:
            return PassResult()
        if any(source is not None and source.op == "MatMul" for source in sources):
            context.infer_shapes(graph)  # the one operator whose channels may lie on another axis
        folder = _Folder(graph, context.defaults)
        for each in all_graphs(graph):
            folder.fold_in(each)
        notes = (f"{folder.duplicated} bytes of shared weights duplicated",) if folder.duplicated else ()
        return PassResult(rewrites=folder.folded, skipped=tuple(folder.skipped), notes=notes)


def _is_batch_norm(node: gs.Node) -> bool:
    return node.op == "BatchNormalization" and not node.domain


@dataclass
class _Folder:
    root: gs.Graph
    overridable: Container[str]
    folded: int = 0
    duplicated: int = 0  # bytes
    skipped: list[Skip] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._names = Names(self.root)
        self._returned = nested_output_names(self.root)

    def fold_in(self, graph: gs.Graph) -> None:
        """Fold each BatchNormalization of one graph; those in its branches are not its own."""
        own = {id(node) for node in graph.nodes}
        following: dict[int, list[gs.Node]] = {}
        gone: set[int] = set()
        for node in [node for node in graph.nodes if _is_batch_norm(node)]:
            linear = producer(node.inputs[0])
            reason = (
                _why_not_inference(node, graph.opset)
                or self._why_not_affine(node)
                or why_not_linear(linear, self.overridable)
                or self._why_not_rewire(node, graph, own)
            )
            if reason is None and linear is not None:
                weights = absorbed(linear, _affine(node))
                if weights.finite:
                    following[id(linear)] = self._fold(node, linear, weights) + following.get(id(linear), [])
                    gone.add(id(node))
                    continue
                reason = f"the folded weights would not be finite in {weights.weight.dtype}"
            self.skipped.append(Skip(node.name or node.outputs[0].name, f"not folded: {reason}"))
        self.folded += len(gone)
        kept = [node for node in graph.nodes if id(node) not in gone]
        graph.nodes[:] = [each for node in kept for each in (node, *following.get(id(node), []))]

    def _why_not_affine(self, node: gs.Node) -> str | None:
        for role, tensor in zip(_PARAMETERS, node.inputs[1:5], strict=True):
            reason = why_not_constant(tensor, self.overridable)
            if reason is not None:
                return f"its {role} {reason}"
        return None

    def _why_not_rewire(self, node: gs.Node, graph: gs.Graph, own: Container[int]) -> str | None:
        tensor = node.inputs[0]
        if id(tensor.inputs[0]) not in own:
            return f"its input {tensor.name} is computed outside the branch that it is in"
        if is_output(graph, tensor) or tensor.name in self._returned:
            return f"its input {tensor.name} is a graph output too"
        if len(tensor.outputs) > 1:
            return f"its input {tensor.name} is read by {len(tensor.outputs) - 1} other nodes too"
        return None

    def _fold(self, node: gs.Node, linear: gs.Node, weights: LinearWeights) -> list[gs.Node]:
        if len(linear.inputs[1].outputs) > 1:
            self.duplicated += weights.weight.nbytes
        (output,) = present(node.outputs)
        disconnect(node)
        set_output(linear, 0, output)
        return set_weights(linear, weights, self._names)


def _why_not_inference(node: gs.Node, opset: int) -> str | None:
    if opset < 7:
        return f"BatchNormalization of opset {opset} may mean training; raise the opset to 9 or later first"
    if node.attrs.get("spatial", 1) != 1:
        return "spatial=0 normalizes every element on its own, not every channel"
    if node.attrs.get("training_mode", 0):
        return "training_mode=1 normalizes with the statistics of each batch; export the model in inference mode"
    if len(present(node.outputs)) > 1:
        return "its extra outputs ask for the statistics of each batch; export the model in inference mode"
    return None


def _affine(node: gs.Node) -> Affine:
    scale, bias, mean, variance = (
        np.asarray(constant_of(tensor), np.float64).reshape(-1) for tensor in node.inputs[1:5]
    )
    with np.errstate(divide="ignore", invalid="ignore"):  # weights that are not finite are refused
        factor = scale / np.sqrt(variance + node.attrs.get("epsilon", _DEFAULT_EPSILON))
    return Affine(factor, bias - factor * mean)
