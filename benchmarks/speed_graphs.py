"""Graphs of any size that simplifiers are timed on, with seeded weights.

conv_chain         Conv -> BatchNormalization -> Relu, repeated: two of three nodes stay
shape_arithmetic   Shape -> Gather -> Unsqueeze -> Concat -> Reshape, repeated, with an open batch: one node is enough
weight_transposes  MatMul with a weight behind a Transpose, repeated: half of the nodes go, and no byte is added
mixed              the first two in turns, as where an exporter traced `view` between convolutions
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

OPSET = 17
SEED = 0
CHANNELS = 8
SIDES = ((8, 8), (16, 4), (4, 16))  # heights and widths that `mixed` reshapes between
CONV_NODES, SHAPE_NODES = 3, 5  # of one block
WIDTH = 1024  # of the weights in `weight_transposes`: 4 MiB each


class _Builder:
    """Nodes in a row, each new one reading `last`."""

    def __init__(self, input_shape: tuple[int | str, ...]) -> None:
        self.rng = np.random.default_rng(SEED)
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []
        self.input = helper.make_tensor_value_info("x", TensorProto.FLOAT, input_shape)
        self.rank = len(input_shape)
        self.last = "x"

    def constant(self, value: object, dtype: type = np.float32) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Append a node; `last` becomes its output, which is returned."""
        self.last = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [self.last], self.last, **attributes))
        return self.last

    def add_conv(self) -> None:
        """Conv, BatchNormalization and Relu that keep the scale of what passes through (He et al. 2015)."""
        rng, fan_in = self.rng, CHANNELS * 9
        weight = self.constant(rng.standard_normal((CHANNELS, CHANNELS, 3, 3)) * np.sqrt(1 / fan_in))
        self.add("Conv", self.last, weight, pads=[1, 1, 1, 1])
        scale, variance = (self.constant(rng.uniform(0.8, 1.2, CHANNELS)) for _ in range(2))
        bias, mean = (self.constant(rng.normal(0.1, 0.1, CHANNELS)) for _ in range(2))
        self.add("BatchNormalization", self.last, scale, bias, mean, variance)
        self.add("Relu", self.last)

    def add_reshape(self, *sizes: int) -> None:
        """Reshape to the sizes that an exporter writes for `x.view(len(x), *sizes)`."""
        tensor = self.last
        batch = self.add("Gather", self.add("Shape", tensor), self.constant(0, np.int64), axis=0)
        batch = self.add("Unsqueeze", batch, self.constant([0], np.int64))
        shape = self.add("Concat", batch, self.constant(sizes, np.int64), axis=0)
        self.add("Reshape", tensor, shape)

    def model(self) -> onnx.ModelProto:
        output = helper.make_tensor_value_info(self.last, TensorProto.FLOAT, [None] * self.rank)
        graph = helper.make_graph(self.nodes, "speed", [self.input], [output], self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)


def conv_chain(nodes: int) -> onnx.ModelProto:
    """Convolutions of 8 channels on 8 x 8."""
    builder = _Builder((1, CHANNELS, *SIDES[0]))
    for _ in range(nodes // CONV_NODES):
        builder.add_conv()
    return builder.model()


def shape_arithmetic(nodes: int) -> onnx.ModelProto:
    """Reshapes of N x 8 x 8 x 8 to other sides."""
    builder = _Builder(("N", CHANNELS, *SIDES[0]))
    for block in range(nodes // SHAPE_NODES):
        builder.add_reshape(CHANNELS, *SIDES[(block + 1) % len(SIDES)])
    return builder.model()


def weight_transposes(megabytes: int) -> onnx.ModelProto:
    """Products of N x 1024 with that much weights."""
    builder = _Builder(("N", WIDTH))
    for _ in range(megabytes * 10**6 // (WIDTH * WIDTH * 4)):
        tensor = builder.last
        weight = builder.constant(builder.rng.standard_normal((WIDTH, WIDTH), np.float32) / np.sqrt(WIDTH))
        builder.add("MatMul", tensor, builder.add("Transpose", weight, perm=[1, 0]))
    return builder.model()


def mixed(nodes: int) -> onnx.ModelProto:
    """Convolutions, each on another height and width than the one before."""
    builder = _Builder(("N", CHANNELS, *SIDES[0]))
    for block in range(nodes // (CONV_NODES + SHAPE_NODES)):
        builder.add_conv()
        builder.add_reshape(CHANNELS, *SIDES[(block + 1) % len(SIDES)])
    return builder.model()


GRAPHS: dict[str, Callable[[], onnx.ModelProto]] = {
    "conv_chain_900": partial(conv_chain, 900),
    "shape_arithmetic_2000": partial(shape_arithmetic, 2000),
    "weight_transposes_240mb": partial(weight_transposes, 240),
}
TINY_GRAPHS: dict[str, Callable[[], onnx.ModelProto]] = {
    "conv_chain_90": partial(conv_chain, 90),
    "shape_arithmetic_100": partial(shape_arithmetic, 100),
    "weight_transposes_20mb": partial(weight_transposes, 20),
    "mixed_160": partial(mixed, 160),
}
