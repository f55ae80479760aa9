"""Patterns that TensorRT's rules about Q/DQ graphs look for: operators with weights, pairs, residual Adds."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from graphopt.graph import all_graphs, is_constant, producer
from graphopt.lint_rule import Subject
from graphopt.quantizers import Quantizer, dequantizer_of, is_weight, quantizer_of, quantizers_after

_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def weighted(subject: Subject) -> list[gs.Node]:
    """The operators with weights, or products of two activations."""
    return [node for node in subject.nodes if node.op in _WEIGHTED and not node.domain and len(node.inputs) > 1]


def is_quantized(node: gs.Node) -> bool:
    """Whether both factors of an operator come from a DequantizeLinear."""
    return all(dequantizer_of(tensor) is not None for tensor in node.inputs[:2])


def first_of(nodes: list[gs.Node], operators: frozenset[str]) -> gs.Node | None:
    """The first node that is one of these operators."""
    return next((node for node in nodes if node.op in operators), None)


def next_quantizer(tensor: gs.Tensor) -> Quantizer | None:
    """The QuantizeLinear that reads a tensor."""
    return next(quantizers_after(tensor), None)


def pairs_behind(nodes: list[gs.Node]) -> Iterator[tuple[gs.Node, Quantizer]]:
    """Nodes with the DequantizeLinear of each pair behind."""
    for node in nodes:
        for quantizer in quantizers_after(node.outputs[0]):
            for reader in quantizer.output.outputs:
                found = quantizer_of(reader)
                if found is not None and not found.quantizes:
                    yield node, found


def residual_adds(subject: Subject) -> Iterator[gs.Node]:
    """Adds of two tensors that are computed at run time."""
    for node in subject.nodes:
        if node.op == "Add" and not any(is_constant(tensor) or is_weight_tensor(tensor) for tensor in node.inputs):
            yield node


def is_weight_tensor(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a quantized constant."""
    found = dequantizer_of(tensor)
    return found is not None and is_weight(found)


def weighted_producer(tensor: gs.Tensor) -> gs.Node | None:
    """The operator with weights that computes a tensor which nothing else reads."""
    node = producer(tensor)
    return node if node is not None and node.op in _WEIGHTED and len(tensor.outputs) == 1 else None


def weighted_before_pair(tensor: gs.Tensor) -> gs.Node | None:
    """The operator with weights before a pair that nothing else reads."""
    dequantizer = dequantizer_of(tensor)
    quantizer = None if dequantizer is None else quantizer_of(producer(dequantizer.data))
    if quantizer is None or not quantizer.quantizes or len(tensor.outputs) != 1 or len(quantizer.output.outputs) != 1:
        return None
    return weighted_producer(quantizer.data)


def reads_a_quantized_operator(node: gs.Node) -> bool:
    """Whether it is a residual Add with a pair on a Conv's side: another rule speaks of it."""
    return node.op == "Add" and any(weighted_before_pair(tensor) is not None for tensor in node.inputs)


def second_quantizers(subject: Subject) -> Iterator[tuple[Quantizer, Quantizer]]:
    """The first quantizer of a tensor with each other one of the same graph: each branch of an If has its own."""
    for graph in all_graphs(subject.model.graph):
        first: dict[int, Quantizer] = {}
        for each in filter(None, map(quantizer_of, graph.nodes)):
            if each.quantizes and first.setdefault(id(each.data), each) is not each:
                yield first[id(each.data)], each
