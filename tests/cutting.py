"""Cuts of channels between two operators by hand, where a test needs one and not the analysis of `prune`."""

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.cut import Cut
from graphopt.graph import constant_of, set_input
from graphopt.graph_copy import copy_graph

_KEEPS_CHANNELS = {
    "Identity",
    "Relu",
    "Clip",
    "LeakyRelu",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "BatchNormalization",
}


def cut_channels(graph: gs.Graph, producer: str, kept) -> Cut:
    """Cut the outputs of one operator, in place, and all that only they flow to.

    Args:
        graph: from the operator's output on there are only element-wise operators and depthwise Convs, and in the end
            Conv, ConvTranspose, Gemm and MatMul.
        producer: name of the operator's output.
        kept: the channels that stay, or how many: then those of the largest L2 norm.
    """
    original = copy_graph(graph)
    node = next(node for node in graph.nodes if node.outputs[0].name == producer)
    if isinstance(kept, int):
        axis = (
            1 if node.op in ("ConvTranspose", "MatMul") or (node.op == "Gemm" and not node.attrs.get("transB")) else 0
        )
        weight = np.moveaxis(constant_of(node.inputs[1]), axis, 0)
        norms = np.square(weight.reshape(len(weight), -1)).sum(axis=1)
        kept = np.sort(np.argsort(-norms, kind="stable")[:kept])
    kept = np.asarray(kept)
    by_name: dict[str, tuple] = {}
    _cut_outputs(node, kept, by_name)
    return Cut(original, by_name)


def joined(first: Cut, second: Cut) -> Cut:
    """Two cuts of different channels in a row as one."""
    return Cut(first.original, {**first.kept, **second.kept})


def _slice(node, index, axis, kept):
    tensor = node.inputs[index]
    set_input(node, index, gs.Constant(tensor.name, np.take(constant_of(tensor), kept, axis)))


def _cut_outputs(node, kept, by_name):
    _slice(node, 1, output_axis(node), kept)
    if len(node.inputs) > 2:
        _slice(node, 2, 0, kept)
    _follow(
        node.outputs[0], 1 if node.op in ("Conv", "ConvTranspose") else len(node.outputs[0].shape) - 1, kept, by_name
    )


def _follow(tensor, axis, kept, by_name):
    by_name[tensor.name] = (*[None] * axis, kept)
    if tensor.shape is not None:
        tensor.shape[axis] = len(kept)
    for reader in list(tensor.outputs):
        if reader.op in _KEEPS_CHANNELS:
            for index in range(1, len(reader.inputs) if reader.op == "BatchNormalization" else 0):
                _slice(reader, index, 0, kept)
            _follow(reader.outputs[0], axis, kept, by_name)
        elif reader.op == "Conv" and reader.attrs.get("group", 1) > 1:
            reader.attrs["group"] = len(kept)
            _cut_outputs(reader, kept, by_name)
        else:
            _slice(reader, 1, 1 - output_axis(reader), kept)


def output_axis(node):
    """The axis of an operator's weight along which its output channels lie."""
    return int(node.op in ("ConvTranspose", "MatMul") or (node.op == "Gemm" and not node.attrs.get("transB")))
