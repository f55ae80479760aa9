"""Put the nodes of a branch in the place of its If, when it is known which branch runs.

A branch has names of its own, which may clash with those of other branches or of outer graphs once it is no
longer nested; those are renamed, also where a deeper branch returns one by name.
"""

from __future__ import annotations

from collections import ChainMap, defaultdict
from collections.abc import Mapping

import onnx_graphsurgeon as gs

from graphopt.graph import Names, all_graphs, bodies, constant_of, disconnect, present

_Scope = ChainMap[str, gs.Tensor]  # the tensors that a graph can read by name, its own before those of outer graphs


def inline_branches(root: gs.Graph) -> int:
    """Inline every If of `root`, nested ones too, whose condition is a constant; return how many."""
    inlined = 0
    while batch := _inline_outermost(root):
        inlined += batch
    return inlined


def _inline_outermost(root: gs.Graph) -> int:
    """Do one sweep: an If inside an inlined branch waits for the next, in which its graph is another."""
    if all(_chosen_branch(node) is None for graph in all_graphs(root) for node in graph.nodes):
        return 0
    return _inline_in(root, ChainMap(), Names(root), _owners(root))


def _inline_in(graph: gs.Graph, outer: _Scope, names: Names, owners: Mapping[str, set[int]]) -> int:
    scope = outer.new_child(_local_tensors(graph))
    nodes: list[gs.Node] = []
    inlined = 0
    for node in graph.nodes:
        branch = _chosen_branch(node)
        if branch is None:
            inlined += sum(_inline_in(body, scope, names, owners) for body in bodies(node))
            nodes.append(node)
        else:
            nodes += _inline(node, branch, scope, names, owners)
            inlined += 1
    graph.nodes[:] = nodes
    return inlined


def _chosen_branch(node: gs.Node) -> gs.Graph | None:
    if node.op != "If" or node.domain:
        return None
    condition = constant_of(node.inputs[0])
    if condition is None:
        return None
    branch = node.attrs["then_branch" if condition.reshape(-1)[0] else "else_branch"]
    return branch if isinstance(branch, gs.Graph) else None


def _inline(
    node: gs.Node,
    branch: gs.Graph,
    scope: _Scope,
    names: Names,
    owners: Mapping[str, set[int]],
) -> list[gs.Node]:
    """Return the nodes that take the place of `node`: those of the branch, and one Identity for each output."""
    _rename(branch, scope, names, owners)
    results = list(node.outputs)
    for attribute in node.attrs.values():
        if isinstance(attribute, gs.Graph) and attribute is not branch:
            _release(attribute)
    disconnect(node)
    local = {id(tensor) for inner in branch.nodes for tensor in inner.outputs}
    return [
        *branch.nodes,
        *(
            gs.Node(
                "Identity",
                name=names.fresh(f"{result.name}/identity"),
                inputs=[
                    returned
                    if id(returned) in local or isinstance(returned, gs.Constant)
                    else scope[returned.name]  # an outer tensor, which the branch returns by its name
                ],
                outputs=[result],
            )
            for returned, result in zip(branch.outputs, results, strict=True)
            if result.name
        ),
    ]


def _release(graph: gs.Graph) -> None:
    """Take the nodes of a graph that goes away out of the consumer lists of outer tensors."""
    for each in all_graphs(graph):
        for node in each.nodes:
            disconnect(node)


def _rename(branch: gs.Graph, scope: _Scope, names: Names, owners: Mapping[str, set[int]]) -> None:
    renamed = {}
    for tensor in _local_tensors(branch).values():
        if len(owners[tensor.name]) > 1 and scope.get(tensor.name) is not tensor:
            renamed[tensor.name] = names.fresh(tensor.name)
            tensor.name = renamed[tensor.name]
    for node in branch.nodes:
        if len(owners[node.name]) > 1:
            node.name = names.fresh(node.name)
    if renamed:
        _rename_returned(branch, renamed)


def _rename_returned(branch: gs.Graph, renamed: Mapping[str, str]) -> None:
    """Follow renamed tensors into the outputs of deeper graphs that return them by name."""
    for node in branch.nodes:
        for body in bodies(node):
            own = {id(tensor) for tensor in _local_tensors(body).values()}
            for output in body.outputs:
                if id(output) not in own:
                    output.name = renamed.get(output.name, output.name)
            _rename_returned(body, renamed)


def _local_tensors(graph: gs.Graph) -> dict[str, gs.Tensor]:
    """Return the tensors that a graph defines, by name; constants are counted where they are read."""
    tensors = {tensor.name: tensor for tensor in graph.inputs}
    for node in graph.nodes:
        tensors.update((tensor.name, tensor) for tensor in node.inputs if isinstance(tensor, gs.Constant))
        tensors.update((tensor.name, tensor) for tensor in present(node.outputs))
    tensors.update((tensor.name, tensor) for tensor in graph.outputs if isinstance(tensor, gs.Constant))
    return tensors


def _owners(root: gs.Graph) -> Mapping[str, set[int]]:
    """Return, for each name, the ids of the tensors, or of the nodes, that bear it."""
    owners: defaultdict[str, set[int]] = defaultdict(set)
    for graph in all_graphs(root):
        for tensor in (*graph.inputs, *graph.outputs):
            owners[tensor.name].add(id(tensor))
        for node in graph.nodes:
            owners[node.name].add(id(node))
            for tensor in (*node.inputs, *node.outputs):
                owners[tensor.name].add(id(tensor))
    return owners
