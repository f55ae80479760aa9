"""How long channel groups take to find, at three sizes of a graph.

    python benchmarks/group_scaling.py

Nets of bottlenecks with squeeze and excitation, of 64 to 512 channels; nothing but the number of blocks differs.
Prints nodes, channels, groups and seconds, the least of three runs each.
"""

from __future__ import annotations

import time

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from graphopt.channels import find_groups
from graphopt.model_io import load_model

NODES_A_BLOCK = 10


def block(x: str, number: int, width: int, weights: list[onnx.TensorProto]) -> tuple[str, list[onnx.NodeProto]]:
    """A residual bottleneck with squeeze and excitation."""

    def weight(*shape: int) -> str:
        name = f"w{len(weights)}"
        weights.append(numpy_helper.from_array(np.zeros(shape, np.float32), name))
        return name

    def node(op: str, *inputs: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, [f"b{number}_{len(nodes)}"], **attributes))
        return str(nodes[-1].output[0])

    nodes: list[onnx.NodeProto] = []
    inner = width // 2
    a = node("Relu", node("Conv", x, weight(inner, width, 1, 1), weight(inner)))
    b = node("Relu", node("Conv", a, weight(inner, 1, 3, 3), weight(inner), group=inner, pads=[1, 1, 1, 1]))
    c = node("Conv", b, weight(width, inner, 1, 1), weight(width))
    squeezed = node("Conv", node("GlobalAveragePool", c), weight(inner, width, 1, 1))
    gate = node("Sigmoid", node("Conv", squeezed, weight(width, inner, 1, 1)))
    return node("Add", x, node("Mul", c, gate)), nodes


def net(blocks: int) -> onnx.ModelProto:
    """A net of four stages."""
    weights: list[onnx.TensorProto] = [numpy_helper.from_array(np.zeros((64, 3, 3, 3), np.float32), "stem")]
    nodes = [helper.make_node("Conv", ["x", "stem"], ["s"], pads=[1, 1, 1, 1])]
    last, width = "s", 64
    for number in range(blocks):
        wanted = 64 * 2 ** (4 * number // blocks)
        if wanted != width:
            weights.append(numpy_helper.from_array(np.zeros((wanted, width, 1, 1), np.float32), f"wider{wanted}"))
            nodes.append(helper.make_node("Conv", [last, f"wider{wanted}"], [f"stage{wanted}"], strides=[2, 2]))
            last, width = f"stage{wanted}", wanted
        last, more = block(last, number, width, weights)
        nodes += more
    interface = [helper.make_tensor_value_info(each, TensorProto.FLOAT, None) for each in (last,)]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 64, 64])]
    graph = helper.make_graph(nodes, "net", inputs, interface, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def main() -> None:
    """Print the table."""
    print(f"{'nodes':>6} {'groups':>7} {'units':>8} {'seconds':>8}")
    for blocks in (45, 90, 180, 360):
        model = load_model(net(blocks))
        least = np.inf
        for _ in range(3):
            start = time.perf_counter()
            found = find_groups(model.graph)
            least = min(least, time.perf_counter() - start)
        print(f"{len(model.graph.nodes):>6} {len(found.groups):>7} {found.count:>8} {least:>8.2f}")


if __name__ == "__main__":
    main()
