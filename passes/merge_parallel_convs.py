"""Merge parallel Convs of one input whose outputs are added: the re-parameterisation of RepVGG, ACNet or MobileOne.

Conv is linear in its weight, and a kernel stays the same function when zeros are put around it and the pads grow by as
much. So with W1 and W2 laid on a common grid of kernel positions, [Cout, Cin/g, k...],

    Conv(x, W1, b1) + Conv(x, W2, b2)  =  Conv(x, W1 + W2, b1 + b2)

as long as strides, groups and dilations agree (a kernel of size 1 has any dilation). An output at position o reads the
input at o * stride - begin + j * dilation, so along each axis kernel position j is number j + (P - begin) / dilation on
the common grid, with P the largest begin; both have outputs of the same size for every input where begin + end -
(k - 1) * dilation agrees. Also merged into such a Conv, where Cin == Cout and the strides are 1, is

    x                    a 1x1 kernel with 1 where the input channel is the output channel
    x * k [C, 1, 1]      the same with k there: what is left of a BatchNormalization beside the Convs
    x * k + c            and c in the bias

https://arxiv.org/abs/2101.03697 has the method. Sums are in float64 and cast once. Left alone: a Conv whose output
something else reads too; weights that are not constant; a kernel whose common grid is mostly zeros, as for a 3x1 beside
a 1x3: the model would grow and compute more.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field, replace
from typing import ClassVar

import onnx_graphsurgeon as gs

from graphopt.conv_kernels import ConvKernel, diagonal, joined, kernel_of, per_channel, why_not_known
from graphopt.graph import (
    Names,
    all_graphs,
    disconnect,
    disconnect_all,
    is_constant,
    named_tensors,
    producer,
    set_input,
    set_output,
)
from graphopt.pass_base import Context, Effect, Pass, PassResult, Skip


@dataclass(frozen=True, kw_only=True)
class MergeParallelConvs(Pass):
    """Merge Convs of one input whose outputs are added, and that input itself, into one Conv."""

    name: ClassVar[str] = "merge-parallel-convs"
    effect: ClassVar[Effect] = Effect.REASSOCIATES

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Merge in `graph` and the graphs in it; `rewrites` counts the terms that went into another's Conv."""
        if not any(node.op == "Conv" for each in all_graphs(graph) for node in each.nodes):
            return PassResult()
        merger = _Merger(named_tensors(graph), Names(graph))
        for each in all_graphs(graph):
            merger.merge_in(each)
        return PassResult(rewrites=merger.merged, skipped=tuple(merger.skipped))


@dataclass
class _Merger:
    named: Set[int]  # ids of the tensors whose names stay
    names: Names
    merged: int = 0
    skipped: list[Skip] = field(default_factory=list)
    _own: Set[int] = frozenset()  # ids of the nodes of the graph in work
    _gone: set[int] = field(default_factory=set)

    def merge_in(self, graph: gs.Graph) -> None:
        self._own = {id(node) for node in graph.nodes}
        for node in list(graph.nodes):
            if _is_sum(node) and not self._is_inner(node):
                self._merge_terms(node)
        graph.nodes[:] = [node for node in graph.nodes if id(node) not in self._gone]

    def _is_inner(self, node: gs.Node) -> bool:
        """Whether a sum is only a term of another one."""
        return self._is_private(node.outputs[0]) and _is_sum(node.outputs[0].outputs[0])

    def _is_private(self, tensor: gs.Tensor) -> bool:
        """Whether nothing but one node of the graph reads a tensor, which is computed in it too."""
        if id(tensor) in self.named or len(tensor.inputs) != 1 or len(tensor.outputs) != 1:
            return False
        return id(tensor.inputs[0]) in self._own and id(tensor.outputs[0]) in self._own

    def _merge_terms(self, root: gs.Node) -> None:
        sums, leaves = self._flattened(root)
        convs: dict[int, list[tuple[gs.Tensor, gs.Node]]] = {}  # by id of what they read
        for leaf in leaves:
            conv = producer(leaf)
            if conv is not None and conv.op == "Conv" and not conv.domain and id(conv) in self._own:
                convs.setdefault(id(conv.inputs[0]), []).append((leaf, conv))
        scaled: dict[int, list[tuple[gs.Tensor, gs.Tensor | None]]] = {}
        for leaf in leaves:
            x, factor = self._scaled_input(leaf)
            scaled.setdefault(id(x), []).append((leaf, factor))
        shifts = [leaf for leaf in leaves if is_constant(leaf)]
        taken: set[int] = set()  # ids of leaves
        for x_id, beside in convs.items():
            if len(beside) + len(scaled.get(x_id, ())) > 1:
                taken |= self._merge(beside, scaled.get(x_id, []), [leaf for leaf in shifts if id(leaf) not in taken])
        if taken:
            dead = [source for leaf in leaves if id(leaf) in taken and (source := producer(leaf)) is not None]
            dead = [node for node in dead if self._is_private(node.outputs[0])]
            self._gone |= {id(node) for node in dead}
            self._leave_out(taken, sums)
            disconnect_all(dead)

    def _flattened(self, root: gs.Node) -> tuple[list[gs.Node], list[gs.Tensor]]:
        """The sums that a sum is made of, each before those in it, and the terms."""
        sums, leaves = [root], []
        for node in sums:  # grows while it is read
            for tensor in node.inputs:
                source = producer(tensor)
                if source is not None and _is_sum(source) and self._is_private(tensor):
                    sums.append(source)
                else:
                    leaves.append(tensor)
        return sums, leaves

    def _scaled_input(self, leaf: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor | None]:
        """Return x and k of a term x * k; a term of another kind is itself times nothing."""
        node = producer(leaf)
        if node is not None and node.op == "Mul" and not node.domain and self._is_private(leaf):
            for factor, x in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
                if is_constant(factor):
                    return x, factor
        return leaf, None

    def _merge(
        self,
        convs: list[tuple[gs.Tensor, gs.Node]],
        scaled: list[tuple[gs.Tensor, gs.Tensor | None]],
        shifts: list[gs.Tensor],
    ) -> set[int]:
        """Merge terms that read one tensor into one Conv; return the ids of those that it took in."""
        kernels = []
        for leaf, conv in convs:
            reason = None if self._is_private(leaf) else f"something else reads {leaf.name} too"
            reason = reason or why_not_known(conv)
            if reason is None:
                kernels.append((leaf, conv, kernel_of(conv)))
            else:
                self._skip(leaf, reason)
        if not kernels:
            return set()
        (first, base, merged), *others = sorted(kernels, key=lambda each: -each[2].weight.size)
        terms: list[tuple[gs.Tensor, ConvKernel | None]] = [(leaf, kernel) for leaf, _, kernel in others]
        terms += [(leaf, diagonal(merged, factor)) for leaf, factor in scaled]
        taken: set[int] = set()
        for leaf, kernel in terms:
            sum_or_reason = "its channels are not those of the Conv" if kernel is None else joined(merged, kernel)
            if isinstance(sum_or_reason, str):
                self._skip(leaf, sum_or_reason)
            else:
                merged = sum_or_reason
                taken.add(id(leaf))
        if not taken:
            return taken
        for leaf in shifts:
            shift = per_channel(leaf, merged)
            if shift is not None:
                merged = replace(merged, bias=merged.bias + shift)
                taken.add(id(leaf))
        if not merged.finite:
            self._skip(first, f"the merged weights would not be finite in {merged.dtype}")
            return set()
        self._write(base, merged)
        self.merged += len(taken)
        return taken

    def _skip(self, leaf: gs.Tensor, reason: str) -> None:
        source = producer(leaf)
        where = leaf.name if source is None else source.name or leaf.name
        self.skipped.append(Skip(where, f"not merged with the Conv beside it: {reason}"))

    def _write(self, conv: gs.Node, kernel: ConvKernel) -> None:
        weight, *bias = conv.inputs[1:]
        set_input(conv, 1, gs.Constant(self.names.fresh(weight.name), kernel.weight.astype(kernel.dtype)))
        if bias or kernel.bias.any():
            name = self.names.fresh(bias[0].name if bias and bias[0].name else f"{conv.outputs[0].name}/bias")
            added = gs.Constant(name, kernel.bias.astype(kernel.dtype))
            if bias:
                set_input(conv, 2, added)
            else:
                conv.inputs.append(added)
        conv.attrs.pop("auto_pad", None)
        conv.attrs.update(
            kernel_shape=list(kernel.sizes), pads=[*kernel.begins, *kernel.ends], dilations=list(kernel.dilations)
        )

    def _leave_out(self, taken: Set[int], sums: list[gs.Node]) -> None:
        """Take terms out of the sums; a sum of one term gives way to it."""
        instead: dict[int, gs.Tensor | None] = dict.fromkeys(taken)
        for node in reversed(sums):  # inner ones first
            left = [instead.get(id(tensor), tensor) for tensor in node.inputs]
            terms = [tensor for tensor in left if tensor is not None]
            (output,) = node.outputs
            if all(new is old for new, old in zip(left, node.inputs, strict=True)):
                continue
            disconnect(node)
            if len(terms) > 1:
                node.inputs.extend(terms)
                node.outputs.append(output)
                continue
            self._gone.add(id(node))
            if node is not sums[0]:
                instead[id(output)] = terms[0] if terms else None
                continue
            source = producer(terms[0])
            assert source is not None  # the Conv that took the others in, or an inner sum with it
            set_output(source, 0, output)


def _is_sum(node: gs.Node) -> bool:
    return node.op in ("Add", "Sum") and not node.domain and not node.attrs  # which opsets before 7 have
