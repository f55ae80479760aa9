"""Tensors inside the branches of Ifs: what they are called from outside, and a model that gives their values.

A tensor of a branch leaves it as one more output of the If, and of each If around that one. The other branch must give
such an output too: an empty tensor, so that a branch that is not taken gives no values. A Loop or a Scan runs its body
many times, with tensors that may change their shape, so those inside one stay where they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.graph import Names, all_graphs, label_of, present
from graphopt.model_io import Model

Holders = tuple[tuple[gs.Node, str], ...]
"""The Ifs around a branch, outermost first, each with the attribute that the branch is, or is in."""


@dataclass(frozen=True)
class BranchTensor:
    """A tensor that a branch computes, and where the branch is."""

    tensor: gs.Tensor
    holders: Holders


def with_branches(graph: gs.Graph, holders: Holders = ()) -> Iterator[tuple[gs.Graph, Holders]]:
    """The graph and all branches of Ifs in it, nested ones too, outermost first, each with the Ifs around it.

    Bodies of Loop and Scan are left out, with the Ifs in them.
    """
    yield graph, holders
    for node in graph.nodes:
        if node.op == "If" and not node.domain:
            for attribute, branch in node.attrs.items():
                yield from with_branches(branch, (*holders, (node, attribute)))


def branch_label(holders: Holders) -> str:
    """What reports call a branch: "If_0/then_branch"."""
    return "/".join(part for node, branch in holders for part in (label_of(node), branch))


def range_names(graph: gs.Graph) -> dict[int, str]:
    """By id of a tensor that a branch computes, the name that ranges have for it; others bear their own."""
    return {id(each.tensor): name for name, each in branch_tensors(graph).items()}


def branch_tensors(graph: gs.Graph) -> dict[str, BranchTensor]:
    """All tensors that nodes in branches of Ifs compute, nested ones too, by the names that ranges have for them.

    That is the tensor's own name where no other tensor of the model bears it. Two branches may use the same one, as
    only one of them runs: then the Ifs and branches that it is in precede it, as in "If_0/then_branch/name". A copy of
    the graph has the same names.
    """
    bearers = Counter(
        tensor.name for each in all_graphs(graph) for node in each.nodes for tensor in present(node.outputs)
    )
    bearers.update(tensor.name for each in all_graphs(graph) for tensor in each.inputs)
    names = Names(graph)
    found: dict[str, BranchTensor] = {}
    for body, holders in with_branches(graph):
        for tensor in (tensor for node in body.nodes if holders for tensor in present(node.outputs)):
            name = tensor.name
            if bearers[name] > 1:
                name = names.fresh(f"{branch_label(holders)}/{name}")
            found[name] = BranchTensor(tensor, holders)
    return found


def with_branch_outputs(model: Model, tensors: Mapping[str, np.dtype[Any]]) -> tuple[Model, dict[str, str]]:
    """A copy of a model in which tensors of branches are tensors of the main graph too.

    Args:
        model: is left as it is.
        tensors: names as in `branch_tensors`, with the dtypes, which other branches give an empty tensor of.

    Returns:
        the copy, and by name what the tensor is called in its main graph; it is empty where the branch is not taken.
    """
    copy = model.copy()
    found = branch_tensors(copy.graph)
    names = Names(copy.graph)
    outer = {}
    for name, dtype in tensors.items():
        tensor = found[name].tensor
        *others, main = reversed(found[name].holders)
        for holder in others:
            tensor = _given_out(tensor, holder, dtype, names, f"{name} (in an inner branch)")
        outer[name] = _given_out(tensor, main, dtype, names, f"{name} (in a branch)").name
    return copy, outer


def _given_out(
    tensor: gs.Tensor, holder: tuple[gs.Node, str], dtype: np.dtype[Any], names: Names, wanted: str
) -> gs.Tensor:
    """The new output of an If that has the value of a tensor of one of its branches."""
    node, attribute = holder
    for each, branch in node.attrs.items():
        returned = gs.Variable(names.fresh(f"{wanted}, returned"), dtype)  # the tensor itself may be an output already
        if each == attribute:
            branch.nodes.append(gs.Node("Identity", returned.name, {}, [tensor], [returned]))
        else:
            empty = gs.Constant(names.fresh(f"{wanted}, empty"), np.empty(0, dtype))
            branch.nodes.append(gs.Node("Constant", returned.name, {"value": empty}, [], [returned]))
        branch.outputs.append(returned)
    output = gs.Variable(names.fresh(wanted), dtype)
    node.outputs.append(output)
    return output
