"""Random graphs, cut at random: each stays valid and equals the original with zeros in place of what was removed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from comparing import build
from hypothesis import given, settings
from hypothesis import strategies as st
from zeroing import prune_and_compare

from graphopt.channel_importance import Importance
from graphopt.passes.prune import Prune

SIZE = 4  # pixels a side


@dataclass
class Builder:
    """Appends operators to a net of images [N, C, 4, 4]; a tensor is its name and C."""

    rng: np.random.Generator
    lines: list[str] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    count: int = 0

    def new(self) -> str:
        self.count += 1
        return f"t{self.count}"

    def weight(self, *shape: int) -> str:
        name = f"{self.new()}_w"
        self.constants[name] = (self.rng.standard_normal(shape) / 3).astype(np.float32)
        return name

    def integers(self, *values: int) -> str:
        name = f"{self.new()}_i"
        self.constants[name] = np.array(values, np.int64)
        return name

    def add(self, text: str) -> str:
        name = self.new()
        self.lines.append(f"{name} = {text}")
        return name

    def conv(self, x: str, before: int, after: int, group: int = 1) -> str:
        return self.add(f"Conv<group={group}>({x}, {self.weight(after, before // group, 1, 1)}, {self.weight(after)})")


def conv(net: Builder, x: str, c: int) -> tuple[str, int]:
    return net.conv(x, c, 8), 8


def grouped_conv(net: Builder, x: str, c: int) -> tuple[str, int]:
    return net.conv(x, c, c, 4), c


def depthwise(net: Builder, x: str, c: int) -> tuple[str, int]:
    return net.conv(x, c, 2 * c, c), 2 * c


def residual(net: Builder, x: str, c: int) -> tuple[str, int]:
    inner = net.add(f"Relu({net.conv(x, c, 8)})")
    return net.add(f"Add({net.conv(inner, 8, c)}, {x})"), c


def gate(net: Builder, x: str, c: int) -> tuple[str, int]:
    pooled = net.add(f"GlobalAveragePool({x})")
    return net.add(f"Mul({x}, {net.conv(pooled, c, c)})"), c


def halves_swapped(net: Builder, x: str, c: int) -> tuple[str, int]:
    left, right = net.new(), net.new()
    net.lines.append(f"{left}, {right} = Split<axis=1>({x}, {net.integers(c // 2, c // 2)})")
    return net.add(f"Concat<axis=1>({net.add(f'Sigmoid({right})')}, {left})"), c


def every_other(net: Builder, x: str, c: int) -> tuple[str, int]:
    start, end, axis, step = (net.integers(each) for each in (1, c, 1, 2))
    odd = net.add(f"Slice({x}, {start}, {end}, {axis}, {step})")
    return net.add(f"Concat<axis=1>({x}, {odd})"), c + c // 2


def shuffle(net: Builder, x: str, c: int) -> tuple[str, int]:
    apart = net.add(f"Reshape({x}, {net.integers(0, 2, c // 2, SIZE, SIZE)})")
    turned = net.add(f"Transpose<perm=[0,2,1,3,4]>({apart})")
    return net.add(f"Reshape({turned}, {net.integers(0, c, SIZE, SIZE)})"), c


def permutation(net: Builder, x: str, c: int) -> tuple[str, int]:
    return net.add(f"Gather<axis=1>({x}, {net.integers(*net.rng.permutation(c).tolist())})"), c


def padding(net: Builder, x: str, c: int) -> tuple[str, int]:
    return net.add(f"Pad({x}, {net.integers(0, 2, 0, 0, 0, 2, 0, 0)})"), c + 4


def dense(net: Builder, x: str, c: int) -> tuple[str, int]:
    return net.add(f"Concat<axis=1>({x}, {net.conv(x, c, 4)})"), c + 4


def tokens(net: Builder, x: str, c: int) -> tuple[str, int]:
    rows = net.add(f"Reshape({x}, {net.integers(0, c, SIZE * SIZE)})")
    turned = net.add(f"Transpose<perm=[0,2,1]>({rows})")
    mixed = net.add(f"MatMul({turned}, {net.weight(c, 8)})")
    back = net.add(f"Transpose<perm=[0,2,1]>({mixed})")
    return net.add(f"Reshape({back}, {net.integers(-1, 8, SIZE, SIZE)})"), 8


STEPS = (
    *(conv, grouped_conv, depthwise, residual, gate, halves_swapped, every_other, shuffle, permutation, padding),
    *(dense, tokens),
)


def net_of(steps: list, seed: int) -> onnx.ModelProto:
    net = Builder(np.random.default_rng(seed))
    x, c = net.conv("x", 3, 8), 8
    for step in steps:
        if c % 4 == 0 and c <= 48:
            x, c = step(net, x, c)
    pooled = net.add(f"GlobalAveragePool({x})")
    net.lines.append(f"f = Flatten({pooled}) y = MatMul(f, {net.weight(c, 5)})")
    text = '<ir_version: 9, opset_import: ["" : 17]> net (float[N,3,4,4] x) => (float[N,5] y) '
    return build(f"{text} {{ {' '.join(net.lines)} }}", net.constants)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(STEPS), min_size=1, max_size=7),
    st.integers(0, 1000),
    st.sampled_from([0.25, 0.5, 0.75]),
    st.sampled_from([1, 4]),
)
def test_a_random_graph_equals_the_original_with_zeros(steps, seed, ratio, round_to):
    item = Prune(ratio=ratio, round_to=round_to, importance=Importance.RANDOM, seed=seed)
    prune_and_compare(net_of(steps, seed), item)
