"""What int8 saves operator by operator in onnxruntime on this machine: the figures behind `Costs` of ort-cpu.

    python benchmarks/measure_costs.py [--seconds 0.5]

A chain of 1x1 Convs, with the operator behind each of them and without, in float and in int8: so the operator reads
and writes the layout that its neighbours like, and what is fused into them counts. The four models take turns. The
table has the time of one operator in float and in int8; Tanh, which stays float, costs a DQ and a Q more, with the
change of layout at each. A second table has matrix products: a chain of Gemms beside one of them. A third has the
first Conv of a net, on its own, in float, in int8 and in int8 with channels of zeros (`DenseConvs` of ort-cpu).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt.data import load_samples
from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.passes.calibrate import Calibrate
from graphopt.passes.insert_qdq import InsertQdq
from graphopt.runtime import measure_latency, open_session
from graphopt.targets import DenseConvs, Target
from graphopt.targets.ort_cpu import ORT_CPU
from graphopt.thresholds import Method

SIZES = ((8, 24, 96), (32, 12, 48), (32, 56, 56), (96, 3, 96), (128, 14, 14), (200, 2, 96), (256, 28, 28))  # [C, H, W]
MATRICES = ((1, 64), (1, 256), (1, 1024), (16, 64), (16, 256), (128, 256), (128, 768))  # [rows, features]
FIRST = (  # [C, size], channels out, kernel, stride
    *((3, 1024, 16, 3, 2), (3, 224, 32, 3, 2), (3, 224, 64, 7, 2), (1, 112, 16, 3, 1), (1, 112, 8, 3, 1)),
    *((3, 227, 96, 11, 4), (3, 224, 192, 16, 16), (3, 48, 32, 3, 1), (1, 28, 16, 3, 1)),
)
LENGTH = 8
ANY_CONVS = DenseConvs(multiple=4, least_outputs=1, largest_kernel=1024, least_work=0)


@dataclass(frozen=True)
class Kind:
    """One kind of operator."""

    label: str
    op: str
    attributes: dict[str, Any]
    kernel: int = 0  # of a Conv; else 0
    depthwise: bool = False
    second: str = ""  # the other operand: "same" shape, or "channel" for one value a channel


KINDS = (
    Kind("Conv 1x1", "Conv", {}, kernel=1),
    Kind("Conv 3x3", "Conv", {"pads": [1, 1, 1, 1]}, kernel=3),
    Kind("depthwise Conv 3x3", "Conv", {"pads": [1, 1, 1, 1]}, kernel=3, depthwise=True),
    Kind("depthwise Conv 5x5", "Conv", {"pads": [2, 2, 2, 2]}, kernel=5, depthwise=True),
    Kind("Add", "Add", {}, second="same"),
    Kind("Mul", "Mul", {}, second="same"),
    Kind("Mul by channel", "Mul", {}, second="channel"),
    Kind("MaxPool 3x3", "MaxPool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    Kind("AveragePool 3x3", "AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    Kind("LeakyRelu", "LeakyRelu", {}),
    Kind("Sigmoid", "Sigmoid", {}),
    Kind("HardSwish", "HardSwish", {}),
    Kind("HardSigmoid", "HardSigmoid", {}),
    Kind("Tanh, in float", "Tanh", {}),
)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each operator and size")
    arguments = parser.parse_args()
    print_head(SIZES)
    for kind in KINDS:
        cells = [
            compared([network(None, shape), network(kind, shape)], {"x": values((1, *shape))}, arguments.seconds)
            for shape in SIZES
        ]
        print(f"| {kind.label} | " + " | ".join(cells) + " |", flush=True)
    print()
    print_head(MATRICES)
    cells = [
        compared([products(1, *shape), products(1 + LENGTH, *shape)], {"x": values(shape)}, arguments.seconds)
        for shape in MATRICES
    ]
    print("| Gemm | " + " | ".join(cells) + " |\n")
    print("| first Conv | float | int8 | with zeros |\n|---|---|---|---|")
    for channels, size, outputs, kernel, stride in FIRST:
        model, feed = first_conv(channels, outputs, kernel, stride), {"x": values((1, channels, size, size))}
        models = [model, *(quantized(model, feed, replace(ORT_CPU, dense_convs=each)) for each in (None, ANY_CONVS))]
        sessions = [open_session(load_model(each), threads=2) for each in models]
        cells = [f"{each * 1e6:.0f}" for each in measure_latency(sessions, feed, seconds=arguments.seconds)]
        what = f"{channels} x {size} x {size}, {outputs} of {kernel} x {kernel}, stride {stride}"
        print(f"| {what} | " + " | ".join(cells) + " |")
    return 0


def print_head(sizes: Sequence[tuple[int, ...]]) -> None:
    """The first lines of a table."""
    print("| operator, us in float → int8 | " + " | ".join(" x ".join(map(str, size)) for size in sizes) + " |")
    print("|---|" + "---|" * len(sizes))


def values(shape: tuple[int, ...]) -> Any:
    """Seeded noise."""
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def compared(models: list[onnx.ModelProto], feed: dict[str, Any], seconds: float) -> str:
    """How long what the second of two models has more takes, an operator, in float and in int8."""
    sessions = [
        open_session(load_model(each), threads=2) for each in [*models, *(quantized(one, feed) for one in models)]
    ]
    old_without, old, new_without, new = measure_latency(sessions, feed, seconds=seconds)
    old, new = (old - old_without) / LENGTH, (new - new_without) / LENGTH
    return f"{old * 1e6:.1f} → {new * 1e6:.1f}"


def products(length: int, rows: int, features: int) -> onnx.ModelProto:
    """A chain of Gemms, each with a Relu behind it."""
    names = ["x", *(f"y_{number}" for number in range(length))]
    nodes = []
    for number, (before, after) in enumerate(pairwise(names)):
        nodes += [
            helper.make_node("Gemm", [before, f"w_{number}"], [f"gemm_{number}"], f"gemm_{number}"),
            helper.make_node("Relu", [f"gemm_{number}"], [after]),
        ]
    weights = [
        numpy_helper.from_array(values((features, features)) / np.sqrt(features).astype(np.float32), f"w_{number}")
        for number in range(length)
    ]
    return model_of(nodes, [rows, features], names[-1], weights)


def first_conv(channels: int, outputs: int, kernel: int, stride: int) -> onnx.ModelProto:
    """A Conv, and a Relu behind it."""
    attributes = {"pads": [kernel // 2] * 4, "strides": [stride] * 2}
    nodes = [helper.make_node("Conv", ["x", "w"], ["conv"], **attributes), helper.make_node("Relu", ["conv"], ["y"])]
    weight = numpy_helper.from_array(values((outputs, channels, kernel, kernel)) / np.float32(kernel), "w")
    return model_of(nodes, [1, channels, None, None], "y", [weight])


def network(kind: Kind | None, shape: tuple[int, int, int]) -> onnx.ModelProto:
    """A chain of Convs, with the operator behind each or without."""
    random = np.random.default_rng(0)
    channels = shape[0]
    nodes, weights, previous = [], {"w1": [channels, channels, 1, 1]}, "x"
    if kind is not None and kind.second == "channel":
        nodes.append(helper.make_node("GlobalAveragePool", ["x"], ["channel"], "pool"))
    for number in range(LENGTH):
        conv = f"conv_{number}"
        nodes.append(helper.make_node("Conv", [previous, "w1"], [conv], conv))
        if kind is not None:
            inputs = [conv, *{"": [], "same": ["x"], "channel": ["channel"]}[kind.second]]
            if kind.kernel:
                weights["w"] = [channels, 1 if kind.depthwise else channels, kind.kernel, kind.kernel]
                inputs.append("w")
            attributes = kind.attributes | ({"group": channels} if kind.depthwise else {})
            conv = f"middle_{number}"
            nodes.append(helper.make_node(kind.op, inputs, [conv], conv, **attributes))
        previous = conv
    constants = [
        numpy_helper.from_array((random.standard_normal(size) / np.sqrt(np.prod(size[1:]))).astype(np.float32), name)
        for name, size in weights.items()
    ]
    return model_of(nodes, [1, *shape], previous, constants)


def model_of(
    nodes: list[onnx.NodeProto], shape: list[int | None], output: str, constants: list[onnx.TensorProto]
) -> onnx.ModelProto:
    """A model from x of that shape to one output."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def quantized(model: onnx.ModelProto, feed: dict[str, Any], target: Target = ORT_CPU) -> onnx.ModelProto:
    """The model with everything in int8 that onnxruntime runs in it."""
    passes = [Calibrate(method=Method.MINMAX), InsertQdq(small_islands=True)]
    context = Context(target=target, samples=load_samples([feed] * 4, open_session(load_model(model)).inputs))
    return graphopt.PassManager(passes, verify=False).run(model, context).model


if __name__ == "__main__":
    sys.exit(main())
