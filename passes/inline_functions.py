"""Inline model-local functions: put the nodes of a function in the place of each call of it.

Calls in functions, branches and bodies are inlined too. Formal inputs and outputs become the tensors of the call, and
the function's own tensors get new names, `call/tensor`. An attribute that refers to one of the function takes what the
call says, else the function's default, else it is left out, as ONNX defines it. Where a function returns one of its
inputs, or one tensor twice, an Identity stands for it. Functions that nothing calls afterwards are dropped, and the
domains they were in with them. Initializers of a function's branches are shared between its calls, not copied.

A function of a lower opset than the model's is raised to it, with onnx's converter. A call stays where that fails,
where the function is of a higher version of a domain and an operator in it changed in between, where graphsurgeon
cannot carry one of its attributes, where the call hands over a graph, and where the function calls itself.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import onnx
import onnx_graphsurgeon as gs
from onnx import NodeProto

from graphopt.errors import ModelError
from graphopt.frame import Frame, function_key, is_uncarried
from graphopt.graph import Names, all_graphs, bodies, disconnect, disconnect_all, present
from graphopt.opset import raise_opset
from graphopt.pass_base import Context, Effect, Pass, PassResult, Skip
from graphopt.protobuf import all_graph_protos

_Key = tuple[str, str]  # domain and name
_Scope = ChainMap[str, gs.Tensor]  # what a name in a function stands for, its own graph before outer ones


@dataclass(frozen=True, kw_only=True)
class InlineFunctions(Pass):
    """Put the nodes of model-local functions in the place of their calls."""

    name: ClassVar[str] = "inline-functions"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, graph: gs.Graph, context: Context) -> PassResult:
        """Inline calls in `graph` and the graphs in it, and drop the functions that nothing calls any more."""
        if not graph.functions:
            return PassResult()
        if any(function.opset < graph.opset for function in graph.functions):
            context.infer_shapes(graph)  # some operators change their form by the rank of an input
        inliner = _Inliner(graph, context.frame)
        for each in list(all_graphs(graph)):
            each.nodes[:] = inliner.expanded(each.nodes)
        kept = _called(graph, inliner.functions)
        parts = {"calls": inliner.inlined, "functions dropped": len(inliner.functions) - len(kept)}
        if any(parts.values()):
            _set_functions(graph, kept, [function for key, function in inliner.functions.items() if key not in kept])
        return PassResult(rewrites=sum(parts.values()), skipped=tuple(inliner.skipped), parts=parts)


@dataclass
class _Inliner:
    root: gs.Graph
    frame: Frame
    inlined: int = 0
    skipped: dict[Skip, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.functions: dict[_Key, gs.Function] = {_key(each.domain, each.name): each for each in self.root.functions}
        self._reasons = {key: self._why_not_function(key) for key in self.functions}
        self._names = Names(self.root)
        self._constants: dict[int, gs.Constant] = {}  # by id of the constant in a function's branch

    def expanded(self, nodes: Iterable[gs.Node], within: tuple[_Key, ...] = ()) -> list[gs.Node]:
        """Return the nodes with calls replaced by what the functions hold; `within` are those being expanded."""
        result = []
        for node in nodes:
            key = _key(node.domain, node.op)
            if key not in self.functions:
                result.append(node)
                continue
            try:
                new = self._replacement(node, key, within)
            except ModelError as reason:
                self.skipped[Skip(_label(node), f"function {node.op} is not inlined: {reason}")] = None
                result.append(node)
                continue
            self.inlined += 1
            for inner in [inner for each in new for body in bodies(each) for inner in all_graphs(body)]:
                inner.nodes[:] = self.expanded(inner.nodes, (*within, key))
            result += self.expanded(new, (*within, key))
        return result

    def _replacement(self, call: gs.Node, key: _Key, within: tuple[_Key, ...]) -> list[gs.Node]:
        """Return the nodes that take the place of a call, which is then disconnected.

        Raises:
            ModelError: the call must stay, for the reason given; it is as it was.

        """
        if (reason := self._reasons[key] or _why_not_call(call, key, within)) is not None:
            raise ModelError(reason)
        function = self.functions[key]
        nodes = self._instance(call, function)
        if function.opset < self.root.opset and _changed(function, "", function.opset, self.root.opset):
            nodes = self._raised(nodes, call, function)
        disconnect(call)
        return nodes

    def _raised(self, nodes: list[gs.Node], call: gs.Node, function: gs.Function) -> list[gs.Node]:
        """Return nodes of a function, which take the place of `call`, as the opset of the model has them."""
        inputs = [tensor for tensor in present(call.inputs) if isinstance(tensor, gs.Variable)]
        body = gs.Graph(nodes, inputs, present(call.outputs), opset=function.opset)
        body.import_domains = function.import_domains
        known = {id(tensor) for tensor in _tensors(body)}
        try:
            raise_opset(body, self.root.opset)
        except ModelError:
            disconnect_all(node for each in all_graphs(body) for node in each.nodes)
            raise
        for tensor in _tensors(body):
            if id(tensor) not in known:  # it is named after others of this function, which need not be free outside
                tensor.name = self._names.fresh(tensor.name)
                known.add(id(tensor))
        return list(body.nodes)

    def _why_not_function(self, key: _Key) -> str | None:
        function = self.functions[key]
        loaded = self.frame.functions.get(key)
        extras = self.frame.graphs.get(function_key(*key))
        protos = [*(extras.nodes.values() if extras else ()), *_nested_protos(loaded.node if loaded else ())]
        if any(is_uncarried(attribute) for proto in protos for attribute in proto.attribute):
            return "graphsurgeon cannot carry one of its attributes; inline it with onnx.inliner"
        imports = _imports(self.root)
        for domain, version in _imports(function).items():
            has = imports.get(domain, version)
            can_be_raised = not domain and version < has
            if not can_be_raised and (changed := _changed(function, domain, version, has)) is not None:
                return (
                    f"it is written for opset {version} of {domain or 'ai.onnx'} and the model for {has}, and "
                    f"{changed} differs; raise the opset of the model first"
                )
        return None

    def _instance(self, call: gs.Node, function: gs.Function) -> list[gs.Node]:
        """Return the nodes of a function for one call, connected to the call's tensors as the call still is."""
        inputs, outputs, prefix = call.inputs, call.outputs, _label(call)
        scope: _Scope = ChainMap({tensor.name: gs.Variable.empty() for tensor in function.inputs})
        scope.update({formal.name: actual for formal, actual in zip(function.inputs, inputs, strict=False)})
        returned_again = []
        for formal, actual in zip(function.outputs, outputs, strict=False):
            if actual.name and formal.name in scope:
                returned_again.append((formal.name, actual))
            elif actual.name:
                scope[formal.name] = actual
        nodes = self._copies(function.nodes, scope, {**function.attrs, **call.attrs}, prefix)
        return nodes + [
            gs.Node("Identity", self._names.fresh(f"{actual.name}/identity"), inputs=[scope[name]], outputs=[actual])
            for name, actual in returned_again
        ]

    def _copies(self, nodes: Iterable[gs.Node], scope: _Scope, given: Mapping[str, Any], prefix: str) -> list[gs.Node]:
        nodes = list(nodes)
        for tensor in (tensor for node in nodes for tensor in present(node.outputs)):
            if tensor.name not in scope.maps[0]:
                scope[tensor.name] = self._new(tensor, prefix)
        return [
            gs.Node(
                node.op,
                self._names.fresh(f"{prefix}/{node.name}") if node.name else "",
                attrs=dict(self._attributes(node, scope, given, prefix)),
                inputs=[self._tensor(tensor, scope) for tensor in node.inputs],
                outputs=[self._tensor(tensor, scope) for tensor in node.outputs],
                domain=node.domain,
            )
            for node in nodes
        ]

    def _attributes(
        self, node: gs.Node, scope: _Scope, given: Mapping[str, Any], prefix: str
    ) -> Iterator[tuple[str, Any]]:
        for name, stated in node.attrs.items():
            value = given.get(stated.name) if isinstance(stated, gs.Node.AttributeRef) else stated
            if isinstance(value, gs.Graph):
                yield name, self._body(value, scope.new_child(), given, prefix)
            elif value is not None:
                yield name, list(value) if isinstance(value, list) else value

    def _body(self, body: gs.Graph, scope: _Scope, given: Mapping[str, Any], prefix: str) -> gs.Graph:
        scope.update({tensor.name: self._new(tensor, prefix) for tensor in body.inputs})
        inputs = [scope[tensor.name] for tensor in body.inputs]
        nodes, outputs = self._copies(body.nodes, scope, given, prefix), []
        for output in body.outputs:
            tensor = self._tensor(output, scope)
            if output.name not in scope.maps[0] and not isinstance(output, gs.Constant):
                outer, tensor = tensor, self._new(output, prefix)  # the outer tensor is not the branch's own to return
                nodes.append(gs.Node("Identity", inputs=[outer], outputs=[tensor]))
            outputs.append(tensor)
        return gs.Graph(nodes, inputs, outputs, name=body.name, opset=self.root.opset, doc_string=body.doc_string)

    def _tensor(self, tensor: gs.Tensor, scope: _Scope) -> gs.Tensor:
        if not tensor.name:
            return gs.Variable.empty()
        if not isinstance(tensor, gs.Constant):
            stands_for = scope[tensor.name] if tensor.name in scope else self._new(tensor, "undefined")
            return stands_for if stands_for.name else gs.Variable.empty()  # an input that the call omits
        if id(tensor) not in self._constants:
            self._constants[id(tensor)] = gs.Constant(self._names.fresh(tensor.name), tensor._values)
        return self._constants[id(tensor)]

    def _new(self, tensor: gs.Tensor, prefix: str) -> gs.Variable:
        return gs.Variable(self._names.fresh(f"{prefix}/{tensor.name}"), tensor.dtype, tensor.shape, tensor.type)


def _key(domain: str | None, name: str) -> _Key:
    return domain or "", name


def _label(call: gs.Node) -> str:
    return str(call.name or next((tensor.name for tensor in call.outputs if tensor.name), call.op))


def _why_not_call(call: gs.Node, key: _Key, within: tuple[_Key, ...]) -> str | None:
    if key in within:
        return "it calls itself, which ONNX forbids"
    return "the call hands it a graph" if bodies(call) else None


def _imports(graph: gs.Graph) -> dict[str, int]:
    others = {each.domain: each.version for each in graph.import_domains or () if each.domain not in ("", "ai.onnx")}
    return {"": int(graph.opset), **others}


def _changed(function: gs.Function, domain: str, version: int, other: int) -> str | None:
    """Return an operator of the function that two versions of a domain define in different ways, if there is one."""
    used = {node.op for each in all_graphs(function) for node in each.nodes if _key(node.domain, "")[0] == domain}
    return next((op for op in sorted(used) if _defined_in(op, domain, version) != _defined_in(op, domain, other)), None)


def _defined_in(op: str, domain: str, version: int) -> int:
    """Return the version of the domain that defines the operator as `version` has it."""
    try:
        return int(onnx.defs.get_schema(op, version, domain).since_version)
    except onnx.defs.SchemaError:
        return version


def _nested_protos(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    for node in nodes:
        for attribute in node.attribute:
            for graph in all_graph_protos(attribute.g):
                yield from graph.node


def _tensors(graph: gs.Graph) -> list[gs.Tensor]:
    return [
        tensor
        for each in all_graphs(graph)
        for node in each.nodes
        for tensor in (*present(node.inputs), *present(node.outputs))
    ]


def _called(root: gs.Graph, functions: Mapping[_Key, gs.Function]) -> dict[_Key, gs.Function]:
    """Return the functions that the graph calls, through others too."""
    found: dict[_Key, gs.Function] = {}
    graphs = [root]
    while graphs:
        for node in (node for each in all_graphs(graphs.pop()) for node in each.nodes):
            key = _key(node.domain, node.op)
            if key in functions and key not in found:
                found[key] = functions[key]
                graphs.append(functions[key])
    return {key: function for key, function in functions.items() if key in found}


def _set_functions(root: gs.Graph, kept: Mapping[_Key, gs.Function], dropped: Iterable[gs.Function]) -> None:
    """Leave `kept` in the model, import what the dropped ones import, and forget domains that they alone were in."""
    used = {node.domain or "" for top in (root, *kept.values()) for each in all_graphs(top) for node in each.nodes}
    gone = {function.domain for function in dropped} - used
    imports = {each.domain: each for function in dropped for each in function.import_domains or ()}
    own = {each.domain: each for each in root.import_domains or ()}
    names = [*own, *(domain for domain in imports if domain in used and domain not in ("", "ai.onnx", *own))]
    for each in all_graphs(root):
        each._functions = list(kept.values())
        each.import_domains = [(imports | own)[domain] for domain in names if domain not in gone]
