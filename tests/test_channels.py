"""Every topology that channels are known to run through, cut by half: valid, and equal to the zeroed original."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import onnx
import pytest
from comparing import build
from zeroing import parameters, prune_and_compare, weights

from graphopt.channels import find_groups
from graphopt.model_io import load_model
from graphopt.passes.prune import Prune


class Net(NamedTuple):
    """A small net: its interface, its nodes, and the shapes of its weights."""

    interface: str
    nodes: str
    shapes: dict[str, tuple[int, ...]]
    constants: Mapping[str, list[int] | int] = MappingProxyType({})
    exact: bool = True
    opset: int = 18

    def model(self) -> onnx.ModelProto:
        text = f'<ir_version: 9, opset_import: ["" : {self.opset}]> net {self.interface} {{ {self.nodes} }}'
        integers = {
            name: np.array(value, np.int32 if "to=6" in self.nodes else np.int64)
            for name, value in self.constants.items()
        }
        return build(text, {**weights(self.shapes), **integers})


IMAGE = "(float[N,3,8,8] x) => (float[N,5,H,W] y)"
SCORES = "(float[N,3,8,8] x) => (float[N,5] y)"
TOKENS = "(float[N,6,8] x) => (float[N,6,5] y)"
TAIL = "g = GlobalAveragePool(last) f = Flatten(g) y = Gemm<transB=1>(f, wf, bf)"
P = "<kernel_shape=[3,3], pads=[1,1,1,1]>"


def tail(channels: int) -> dict[str, tuple[int, ...]]:
    return {"wf": (5, channels), "bf": (5,)}


def bn(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}{part}": (channels,) for part in ("_scale", "_bias", "_mean", "_var")}


def bn_node(out: str, data: str, name: str) -> str:
    parts = ", ".join(f"{name}{part}" for part in ("_scale", "_bias", "_mean", "_var"))
    return f"{out} = BatchNormalization({data}, {parts})"


NETS = {
    "a chain": Net(
        SCORES,
        f"a = Conv{P}(x, w1, b1) b = Relu(a) last = Conv{P}(b, w2) {TAIL}",
        {"w1": (16, 3, 3, 3), "b1": (16,), "w2": (16, 16, 3, 3), **tail(16)},
    ),
    "unfused Conv, BatchNormalization and Relu": Net(
        SCORES,
        f"a = Conv{P}(x, w1) {bn_node('n', 'a', 'n1')} b = Relu(n) c = Conv{P}(b, w2) {bn_node('m', 'c', 'n2')} "
        f"last = Relu(m) {TAIL}",
        {"w1": (16, 3, 3, 3), "w2": (16, 16, 3, 3), **bn("n1", 16), **bn("n2", 16), **tail(16)},
    ),
    "a MobileNet block": Net(
        SCORES,
        f"s = Conv{P}(x, w0) a = Conv(s, w1) b = Clip(a, zero, six) d = Conv<group=32, pads=[1,1,1,1]>(b, w2) "
        f"e = Clip(d, zero, six) p = Conv(e, w3) last = Add(p, s) {TAIL}",
        {
            "w0": (8, 3, 3, 3),
            "w1": (32, 8, 1, 1),
            "w2": (32, 1, 3, 3),
            "w3": (8, 32, 1, 1),
            "zero": (),
            "six": (),
            **tail(8),
        },
    ),
    "VGG, Flatten with spatial extent": Net(
        SCORES,
        f"a = Conv{P}(x, w1, b1) r = Relu(a) p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r) f = Flatten(p) "
        "h = Gemm<transB=1>(f, w2, b2) i = Relu(h) y = Gemm<transB=1>(i, w3, b3)",
        {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (16, 128), "b2": (16,), "w3": (5, 16), "b3": (5,)},
    ),
    "ReduceMean, Reshape and Gemm": Net(
        SCORES,
        f"a = Conv{P}(x, w1, b1) b = Relu(a) m = ReduceMean<keepdims=1>(b, spatial) f = Reshape(m, target) "
        "y = Gemm<transB=1>(f, wf, bf)",
        {"w1": (16, 3, 3, 3), "b1": (16,), **tail(16)},
        {"spatial": [2, 3], "target": [-1, 16]},
    ),
    "a residual block": Net(
        SCORES,
        f"s = Conv{P}(x, w0) a = Conv{P}(s, w1) b = Relu(a) c = Conv{P}(b, w2) d = Add(c, s) last = Relu(d) {TAIL}",
        {"w0": (16, 3, 3, 3), "w1": (16, 16, 3, 3), "w2": (16, 16, 3, 3), **tail(16)},
    ),
    "ResNet with a downsampling branch": Net(
        SCORES,
        f"s = Conv{P}(x, w0) a = Conv<strides=[2,2], pads=[1,1,1,1]>(s, w1) b = Relu(a) c = Conv{P}(b, w2) "
        f"d = Conv<strides=[2,2]>(s, w3) e = Add(c, d) last = Relu(e) {TAIL}",
        {"w0": (8, 3, 3, 3), "w1": (16, 8, 3, 3), "w2": (16, 16, 3, 3), "w3": (16, 8, 1, 1), **tail(16)},
    ),
    "DenseNet": Net(
        SCORES,
        f"a = Conv{P}(x, w1) b = Conv{P}(a, w2) c = Concat<axis=1>(a, b) d = Conv{P}(c, w3) "
        f"last = Concat<axis=1>(c, d) {TAIL}",
        {"w1": (8, 3, 3, 3), "w2": (8, 8, 3, 3), "w3": (8, 16, 3, 3), **tail(24)},
    ),
    "C2f, Split and Concat": Net(
        SCORES,
        f"a = Conv{P}(x, w1) l, r = Split<axis=1>(a, halves) b = Conv{P}(r, w2) c = Add(b, r) "
        f"d = Concat<axis=1>(l, r, c) last = Conv(d, w3) {TAIL}",
        {"w1": (16, 3, 3, 3), "w2": (8, 8, 3, 3), "w3": (16, 24, 1, 1), **tail(16)},
        {"halves": [8, 8]},
    ),
    "Split by number of outputs": Net(
        SCORES,
        f"a = Conv{P}(x, w1) l, r = Split<axis=1, num_outputs=2>(a) s = Sigmoid(l) last = Mul(s, r) {TAIL}",
        {"w1": (16, 3, 3, 3), **tail(8)},
    ),
    "Slice of channels": Net(
        SCORES,
        f"a = Conv{P}(x, w1) l = Slice(a, s0, s8, one) r = Slice(a, s8, s16, one) t = Relu(r) "
        f"c = Concat<axis=1>(t, l) last = Conv(c, w2) {TAIL}",
        {"w1": (16, 3, 3, 3), "w2": (16, 16, 1, 1), **tail(16)},
        {"s0": [0], "s8": [8], "s16": [16], "one": [1]},
    ),
    "Slice of every other channel": Net(
        SCORES,
        f"a = Conv{P}(x, w1) l = Slice(a, s0, s16, one, two) r = Slice(a, one, s16, one, two) last = Add(l, r) {TAIL}",
        {"w1": (16, 3, 3, 3), **tail(8)},
        {"s0": [0], "s16": [16], "one": [1], "two": [2]},
    ),
    "a channel shuffle": Net(
        SCORES,
        f"a = Conv{P}(x, w1) g1 = Conv<group=2>(a, w2) r = Reshape(g1, t1) t = Transpose<perm=[0,2,1,3,4]>(r) "
        f"u = Reshape(t, t2) last = Conv<group=2>(u, w3) {TAIL}",
        {"w1": (16, 3, 3, 3), "w2": (32, 8, 1, 1), "w3": (16, 16, 1, 1), **tail(16)},
        {"t1": [-1, 2, 16, 8, 8], "t2": [-1, 32, 8, 8]},
    ),
    "DepthToSpace": Net(
        IMAGE,
        f'a = Conv{P}(x, w1) b = Conv{P}(a, w2) d = DepthToSpace<blocksize=2, mode="CRD">(b) y = Conv{P}(d, w3)',
        {"w1": (16, 3, 3, 3), "w2": (32, 16, 3, 3), "w3": (5, 8, 3, 3)},
    ),
    "PixelShuffle by Reshape": Net(
        IMAGE,
        f"a = Conv{P}(x, w1) b = Reshape(a, t1) c = Transpose<perm=[0,1,4,2,5,3]>(b) d = Reshape(c, t2) "
        f"y = Conv{P}(d, w2)",
        {"w1": (32, 3, 3, 3), "w2": (5, 8, 3, 3)},
        {"t1": [-1, 8, 2, 2, 8, 8], "t2": [-1, 8, 16, 16]},
    ),
    "SpaceToDepth": Net(
        IMAGE,
        f"a = Conv{P}(x, w1) b = SpaceToDepth<blocksize=2>(a) y = Conv{P}(b, w2)",
        {"w1": (8, 3, 3, 3), "w2": (5, 32, 3, 3)},
    ),
    "a fan-out to two Convs": Net(
        SCORES,
        f"a = Conv{P}(x, w1) b = Conv{P}(a, w2) c = Conv(a, w3) last = Add(b, c) {TAIL}",
        {"w1": (16, 3, 3, 3), "w2": (16, 16, 3, 3), "w3": (16, 16, 1, 1), **tail(16)},
    ),
    "squeeze and excitation": Net(
        SCORES,
        f"a = Conv{P}(x, w1) p = GlobalAveragePool(a) q = Conv(p, w2, b2) r = Relu(q) s = Conv(r, w3, b3) "
        f"t = HardSigmoid(s) last = Mul(a, t) {TAIL}",
        {"w1": (16, 3, 3, 3), "w2": (8, 16, 1, 1), "b2": (8,), "w3": (16, 8, 1, 1), "b3": (16,), **tail(16)},
    ),
    "PRelu": Net(
        SCORES,
        f"a = Conv{P}(x, w1) b = PRelu(a, slope) last = Conv{P}(b, w2) {TAIL}",
        {"w1": (16, 3, 3, 3), "slope": (16, 1, 1), "w2": (16, 16, 3, 3), **tail(16)},
    ),
    "InstanceNormalization": Net(
        SCORES,
        f"a = Conv{P}(x, w1) b = InstanceNormalization(a, s1, o1) last = Conv{P}(b, w2) {TAIL}",
        {"w1": (16, 3, 3, 3), "s1": (16,), "o1": (16,), "w2": (16, 16, 3, 3), **tail(16)},
    ),
    "GroupNormalization by Reshape": Net(
        SCORES,
        f"a = Conv{P}(x, w1) r = Reshape(a, t1) n = InstanceNormalization(r, s1, o1) k = Shape(a) b = Reshape(n, k) "
        f"c = Mul(b, s2) last = Add(c, o2) {TAIL}",
        {"w1": (16, 3, 3, 3), "s1": (8,), "o1": (8,), "s2": (16, 1, 1), "o2": (16, 1, 1), **tail(16)},
        {"t1": [0, 8, -1]},
    ),
    "Pad and Resize": Net(
        SCORES,
        f'a = Conv{P}(x, w1) b = Pad(a, pads) c = Resize<mode="nearest">(b, roi, scales) last = Conv{P}(c, w2) {TAIL}',
        {"w1": (16, 3, 3, 3), "w2": (16, 16, 3, 3), "roi": (0,), **tail(16)},
        {"pads": [0, 0, 1, 1, 0, 0, 1, 1]},
    ),
    "ConvTranspose": Net(
        IMAGE,
        f"a = Conv{P}(x, w1) b = ConvTranspose<strides=[2,2]>(a, w2, b2) y = Conv{P}(b, w3)",
        {"w1": (16, 3, 3, 3), "w2": (16, 8, 2, 2), "b2": (8,), "w3": (5, 8, 3, 3)},
    ),
    "a grouped ConvTranspose": Net(
        IMAGE,
        f"a = Conv{P}(x, w1) b = ConvTranspose<strides=[2,2], group=8>(a, w2) y = Conv{P}(b, w3)",
        {"w1": (32, 3, 3, 3), "w2": (32, 2, 2, 2), "w3": (5, 16, 3, 3)},
    ),
    "a grouped Conv": Net(
        SCORES,
        f"a = Conv{P}(x, w1) b = Conv<group=4, pads=[1,1,1,1]>(a, w2) c = Relu(b) last = Conv(c, w3) {TAIL}",
        {"w1": (32, 3, 3, 3), "w2": (32, 8, 3, 3), "w3": (16, 32, 1, 1), **tail(16)},
    ),
    "ConvNeXt, NHWC MatMul": Net(
        SCORES,
        f"s = Conv{P}(x, w0) d = Conv<group=16, pads=[1,1,1,1]>(s, w1) t = Transpose<perm=[0,2,3,1]>(d) "
        "n = LayerNormalization(t, g1, o1) m = MatMul(n, w2) a = Add(m, b2) e = Relu(a) p = MatMul(e, w3) "
        f"u = Transpose<perm=[0,3,1,2]>(p) last = Add(u, s) {TAIL}",
        {
            "w0": (16, 3, 3, 3),
            "w1": (16, 1, 3, 3),
            "g1": (16,),
            "o1": (16,),
            "w2": (16, 64),
            "b2": (64,),
            "w3": (64, 16),
            **tail(16),
        },
        exact=False,
    ),
    "attention with a fused QKV": Net(
        TOKENS,
        "e = MatMul(x, w0) f = MatMul(e, w1) b = Add(f, b1) r = Reshape(b, t1) t = Transpose<perm=[2,0,3,1,4]>(r) "
        "q = Gather<axis=0>(t, i0) k = Gather<axis=0>(t, i1) v = Gather<axis=0>(t, i2) "
        "kt = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, kt) p = Softmax<axis=-1>(s) o = MatMul(p, v) "
        "m = Transpose<perm=[0,2,1,3]>(o) c = Reshape(m, t2) z = MatMul(c, w2) u = Add(z, e) y = MatMul(u, w3)",
        {"w0": (8, 32), "w1": (32, 96), "b1": (96,), "w2": (32, 32), "w3": (32, 5)},
        {"t1": [0, 0, 3, 4, 8], "t2": [0, 0, 32], "i0": 0, "i1": 1, "i2": 2},
    ),
    "attention with a Split": Net(
        TOKENS,
        "e = MatMul(x, w0) f = MatMul(e, w1) q0, k0, v0 = Split<axis=2>(f, thirds) q1 = Reshape(q0, t1) "
        "k1 = Reshape(k0, t1) v1 = Reshape(v0, t1) q = Transpose<perm=[0,2,1,3]>(q1) "
        "kt = Transpose<perm=[0,2,3,1]>(k1) v = Transpose<perm=[0,2,1,3]>(v1) s = MatMul(q, kt) "
        "p = Softmax<axis=-1>(s) o = MatMul(p, v) m = Transpose<perm=[0,2,1,3]>(o) "
        "c = Reshape(m, t2) y = MatMul(c, w2)",
        {"w0": (8, 32), "w1": (32, 96), "w2": (32, 5)},
        {"t1": [0, 0, 4, 8], "t2": [0, 0, 32], "thirds": [32, 32, 32]},
    ),
    "LSTM, both directions": Net(
        "(float[6,N,8] x) => (float[6,N,5] y)",
        'e = MatMul(x, w0) h, h1, c1 = LSTM<hidden_size=16, direction="bidirectional">(e, w, r, b) '
        "t = Transpose<perm=[0,2,1,3]>(h) f = Reshape(t, target) y = MatMul(f, w1)",
        {"w0": (8, 16), "w": (2, 64, 16), "r": (2, 64, 16), "b": (2, 128), "w1": (32, 5)},
        {"target": [0, 0, 32]},
    ),
    "GRU": Net(
        "(float[6,N,8] x) => (float[6,N,5] y)",
        "h, h1 = GRU<hidden_size=16>(x, w, r, b) f = Squeeze(h, one) y = MatMul(f, w1)",
        {"w": (1, 48, 8), "r": (1, 48, 16), "b": (1, 96), "w1": (16, 5)},
        {"one": [1]},
    ),
    "U-Net with cropped skips": Net(
        IMAGE,
        f"a = Conv{P}(x, w1) p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a) b = Conv{P}(p, w2) "
        "u = ConvTranspose<strides=[2,2]>(b, w3) c = Slice(a, starts, ends, axes) v = Slice(u, starts, ends, axes) "
        f"d = Concat<axis=1>(c, v) y = Conv{P}(d, w4)",
        {"w1": (8, 3, 3, 3), "w2": (16, 8, 3, 3), "w3": (16, 8, 2, 2), "w4": (5, 16, 3, 3)},
        {"starts": [1, 1], "ends": [7, 7], "axes": [2, 3]},
    ),
    "channels padded by ConstantOfShape and Concat": Net(
        SCORES,
        f"a = Conv{P}(x, w1) k = Shape<start=0, end=1>(a) l = Concat<axis=0>(k, rest) z = ConstantOfShape(l) "
        f"c = Concat<axis=1>(a, z) b = Conv{P}(x, w2) last = Add(b, c) {TAIL}",
        {"w1": (8, 3, 3, 3), "w2": (16, 3, 3, 3), **tail(16)},
        {"rest": [8, 8, 8]},
    ),
    "a target behind Cast": Net(
        SCORES,
        f"a = Conv{P}(x, w1) k = Shape<start=0, end=1>(a) j = Cast<to=6>(k) l = Concat<axis=0>(j, rest) "
        f"t = Cast<to=7>(l) last = Reshape(a, t) {TAIL}",
        {"w1": (16, 3, 3, 3), **tail(16)},
        {"rest": [16, 8, 8]},
    ),
    "channels padded by Pad": Net(
        SCORES,
        f"a = Conv{P}(x, w1) c = Pad(a, pads) b = Conv{P}(x, w2) last = Add(b, c) {TAIL}",
        {"w1": (8, 3, 3, 3), "w2": (16, 3, 3, 3), **tail(16)},
        {"pads": [0, 4, 0, 0, 0, 4, 0, 0]},
    ),
    "Einsum": Net(
        TOKENS,
        'a = Einsum<equation="ntc,cd->ntd">(x, w1) b = Relu(a) y = Einsum<equation="ntd,ed->nte">(b, w2)',
        {"w1": (8, 32), "w2": (5, 32)},
    ),
    "Tile, Expand and a permutation by Gather": Net(
        SCORES,
        f"a = Conv{P}(x, w1) r = Gather<axis=1>(a, order) t = Tile(r, twice) e = Expand(one, to) m = Mul(t, e) "
        f"last = Conv(m, w2) {TAIL}",
        {"w1": (8, 3, 3, 3), "w2": (16, 16, 1, 1), "one": (1, 1, 1), **tail(16)},
        {"order": [7, 6, 5, 4, 3, 2, 1, 0], "twice": [1, 2, 1, 1], "to": [16, 1, 1]},
    ),
}


def net_with_resize_scales(net: Net) -> onnx.ModelProto:
    model = net.model()
    if "scales" in net.nodes:
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"))
    return model


@pytest.mark.parametrize("name", NETS)
def test_half_of_the_channels_go_and_the_rest_computes_what_it_did(name):
    net = NETS[name]
    model = net_with_resize_scales(net)
    result, after = prune_and_compare(model, Prune(ratio=0.5), exact=net.exact)
    assert result.rewrites > 0, result.skipped
    assert parameters(after) <= 0.6 * parameters(model)


def test_softmax_over_the_channels_keeps_them():
    net = Net(SCORES, f"a = Conv{P}(x, w1) last = Softmax<axis=1>(a) {TAIL}", {"w1": (16, 3, 3, 3), **tail(16)})
    result, _ = prune_and_compare(net.model(), Prune(ratio=0.5))
    assert result.rewrites == 0
    assert any("Softmax last compares them with each other" in skip.reason for skip in result.skipped)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ("last = LRN<size=3>(a)", "normalises each by its neighbours"),
        ("s = ArgMax<axis=1>(a) t = Cast<to=1>(s) last = Add(a, t)", "compares them with each other"),
        ("s = ReduceMax(a, one) last = Add(a, s)", "is no sum or mean"),
        ("last = CumSum(a, axis)", "sums them one after the other"),
        ("last = com.example.Unknown(a)", "is an operator without a rule"),
        ("last = Trilu(a)", "is an operator without a rule"),
    ],
)
def test_an_operator_that_needs_all_channels_keeps_them_and_says_so(nodes, reason):
    shapes = {"w1": (16, 3, 3, 3), **tail(16)}
    header = '<ir_version: 9, opset_import: ["" : 18, "com.example" : 1]>'
    text = f"{header} net {SCORES} {{ a = Conv{P}(x, w1) {nodes} {TAIL} }}"
    model = build(text, {**weights(shapes), "one": np.array([1]), "axis": np.array(1)})
    groups = find_groups(load_model(model).graph)
    assert [group.frozen for group in groups.groups if group.frozen and reason in group.frozen]
    assert not [group for group in groups.groups if group.frozen is None and group.name == "a"]


def test_outputs_and_inputs_of_the_graph_stay_as_they_are():
    groups = find_groups(load_model(NETS["a chain"].model()).graph)
    frozen = {group.frozen for group in groups.groups if group.frozen}
    assert frozen == {"it is the graph input x", "it is the graph output y"}


def test_what_a_body_reads_stays_as_it_is():
    text = f"""<ir_version: 9, opset_import: ["" : 18]> net (float[N,3,8,8] x, bool c) => (float[N,5] y) {{
        a = Conv{P}(x, w1)
        last = If(c) <then_branch = t () => (float[N,16,8,8] p) {{ p = Relu(a) }},
                      else_branch = e () => (float[N,16,8,8] q) {{ q = Neg(a) }}>
        {TAIL} }}"""
    model = build(text, weights({"w1": (16, 3, 3, 3), **tail(16)}))
    groups = find_groups(load_model(model).graph)
    assert [group.frozen for group in groups.groups if group.name == "a"] == ["a body of If, Loop or Scan reads a"]


def test_a_bias_that_two_convs_share_does_not_tie_their_channels_together():
    net = Net(
        SCORES,
        f"a = Conv{P}(x, w1, b) c = Conv{P}(a, w2, b) last = Relu(c) {TAIL}",
        {"w1": (16, 3, 3, 3), "w2": (16, 16, 3, 3), "b": (16,), **tail(16)},
    )
    groups = find_groups(load_model(net.model()).graph)
    assert [(group.name, group.size) for group in groups.groups if group.frozen is None] == [("a", 16), ("c", 16)]
    prune_and_compare(net.model(), Prune(ratio=0.5))


def test_a_weight_that_two_convs_share_stays_shared():
    net = Net(
        SCORES,
        f"s = Conv{P}(x, w1) a = Conv{P}(s, w2) b = Relu(a) last = Conv{P}(b, w2) {TAIL}",
        {"w1": (16, 3, 3, 3), "w2": (16, 16, 3, 3), **tail(16)},
    )
    _, after = prune_and_compare(net.model(), Prune(ratio=0.5))
    assert [list(each.dims) for each in after.graph.initializer if len(each.dims) == 4] == [[8, 3, 3, 3], [8, 8, 3, 3]]


def test_heads_and_places_in_a_head_are_groups_of_their_own():
    groups = find_groups(load_model(NETS["attention with a fused QKV"].model()).graph)
    free = {(group.size, group.width) for group in groups.groups if group.frozen is None}
    assert {(4, 8), (8, 4)} <= {(size, width // 3) if width % 3 == 0 else (size, width) for size, width in free}


def test_a_size_that_the_model_computes_with_keeps_its_channels():
    net = Net(
        SCORES,
        f"a = Conv{P}(x, w1) k = Shape<start=1, end=2>(a) f2 = Cast<to=1>(k) s = Sqrt(f2) last = Div(a, s) {TAIL}",
        {"w1": (16, 3, 3, 3), **tail(16)},
    )
    groups = find_groups(load_model(net.model()).graph)
    assert [group.frozen for group in groups.groups if group.name == "a"] == [
        "Sqrt s computes with the size of this axis"
    ]


def test_the_groups_print_and_export():
    groups = find_groups(load_model(NETS["a chain"].model()).graph)
    assert "a: 16 x 1" in str(groups)
    exported = groups.to_networkx()
    assert exported.nodes["a"]["size"] == 16
    assert exported.edges["a", "tensor w2"]["axis"] == 1
    assert {each["name"] for each in groups.to_json()} >= {"a", "last"}
