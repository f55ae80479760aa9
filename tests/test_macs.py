"""Multiply-accumulates by operator, against counts made by hand."""

from __future__ import annotations

import onnx.parser
import pytest
from texts import model_of

from graphopt.macs import count_macs, macs_by_node, macs_by_operator, macs_with_weight
from graphopt.model_io import load_model
from graphopt.sizes import at_assumed_sizes


def macs_of(inputs: str, nodes: str, output: str = "float[?] y") -> dict[str, int]:
    text = f'<ir_version: 8, opset_import: ["" : 17]> g ({inputs}) => ({output}) {{ {nodes} }}'
    return macs_by_node(load_model(onnx.parser.parse_model(text)).graph)


@pytest.mark.parametrize(
    ("inputs", "node", "macs"),
    [
        # output 1x4x6x6; each element sums over 3 channels and 3x3
        ("float[1,3,8,8] x, float[4,3,3,3] w", "y = Conv (x, w)", 4 * 36 * 27),
        (
            "float[1,3,8,8] x, float[4,3,3,3] w",
            "y = Conv <strides = [2, 2], pads = [1,1,1,1]> (x, w)",
            4 * 16 * 27,
        ),
        ("float[1,4,8,8] x, float[4,1,3,3] w", "y = Conv <group = 4> (x, w)", 4 * 36 * 9),
        ("float[2,3,10] x, float[4,3,5] w, float[4] b", "y = Conv (x, w, b)", 2 * 4 * 6 * 15),
        # each input element meets every weight of its channel: 5 output channels, 2x2
        ("float[1,3,8,8] x, float[3,5,2,2] w", "y = ConvTranspose <strides = [2, 2]> (x, w)", 3 * 64 * 20),
        ("float[1,4,8,8] x, float[4,2,2,2] w", "y = ConvTranspose <group = 2> (x, w)", 4 * 64 * 8),
        ("float[2,3] a, float[3,5] b", "y = Gemm (a, b)", 2 * 3 * 5),
        ("float[3,2] a, float[5,3] b", "y = Gemm <transA = 1, transB = 1> (a, b)", 2 * 3 * 5),
        ("float[2,3] a, float[3,5] b", "y = MatMul (a, b)", 2 * 3 * 5),
        ("float[7,1,2,3] a, float[4,3,5] b", "y = MatMul (a, b)", 7 * 4 * 2 * 3 * 5),
        ("float[3] a, float[3] b", "y = MatMul (a, b)", 3),
        ("float[4,2,3] a, float[4,3,5] b", 'y = Einsum <equation = "bij, bjk -> bik"> (a, b)', 4 * 2 * 3 * 5),
        ("float[2,3] a", 'y = Einsum <equation = "ij->ji"> (a)', 0),
        # 4 gates of hidden size 6 from 5 inputs and 6 hidden, 7 steps, batch 2; both directions
        (
            "float[7,2,5] x, float[1,24,5] w, float[1,24,6] r",
            "y = LSTM <hidden_size = 6> (x, w, r)",
            14 * 24 * 11,
        ),
        (
            "float[7,2,5] x, float[2,24,5] w, float[2,24,6] r",
            'y = LSTM <hidden_size = 6, direction = "bidirectional"> (x, w, r)',
            2 * 14 * 24 * 11,
        ),
        (
            "float[7,2,5] x, float[1,18,5] w, float[1,18,6] r",
            "y = GRU <hidden_size = 6> (x, w, r)",
            14 * 18 * 11,
        ),
        (
            "float[7,2,5] x, float[1,6,5] w, float[1,6,6] r",
            "y = RNN <hidden_size = 6> (x, w, r)",
            14 * 6 * 11,
        ),
        ("float[2,3] a, float[2,3] b", "y = Mul (a, b)", 0),
    ],
)
def test_counts_one_node_as_by_hand(inputs: str, node: str, macs: int) -> None:
    assert macs_of(inputs, node) == ({"y": macs} if macs else {})


@pytest.mark.parametrize(
    ("node", "macs"),
    [
        ("y = Conv <pads = [1,1,1,1]> (x, w)", 5 * 18),
        ("y = MatMul (x, m)", 7 * 3),
        ("y = MatMul (x, v)", 7),
        ("y = Gemm (x, m)", 7 * 3),
        ("y = Gemm <transB = 1> (x, m)", 7 * 4),
        ("y = MatMul (m, x)", 0),
        ("y = Mul (x, v)", 0),
        ("y = Relu (x)", 0),
    ],
)
def test_counts_from_the_number_of_values_where_the_weight_is_constant(node: str, macs: int) -> None:
    text = f"""<ir_version: 8, opset_import: ["" : 17]> g (float[?] x) => (float[?] y)
        <float[6,2,3,3] w, float[4,3] m, float[4] v> {{ {node} }}"""
    (found,) = load_model(model_of(text)).graph.nodes
    assert macs_with_weight(found, read=7, computed=5) == macs
    assert macs_with_weight(found, read=None, computed=None) == 0


def test_counts_a_convolution_between_dequantize_and_quantize() -> None:
    macs = macs_of(
        "uint8[1,3,8,8] q, int8[4,3,3,3] qw, float s, uint8 z, int8 zw",
        """
        x = DequantizeLinear (q, s, z)
        w = DequantizeLinear (qw, s, zw)
        c = Conv (x, w)
        y = QuantizeLinear (c, s, z)
        """,
        "uint8[?] y",
    )
    assert macs == {"c": 4 * 36 * 27}


def test_counts_operators_on_integers() -> None:
    macs = macs_of(
        "uint8[1,3,8,8] x, uint8[4,3,3,3] w, int8[2,3] a, int8[3,5] b",
        "c = ConvInteger (x, w) y = MatMulInteger (a, b)",
        "int32[?] y",
    )
    assert macs == {"c": 4 * 36 * 27, "y": 30}


def test_counts_quantized_operators() -> None:
    macs = macs_of(
        "uint8[1,3,8,8] x, uint8[4,3,3,3] w, uint8[2,3] a, uint8[3,5] b, float s, uint8 z",
        "c = QLinearConv (x, s, z, w, s, z, s, z) y = QLinearMatMul (a, s, z, b, s, z, s, z)",
        "uint8[?] y",
    )
    assert macs == {"c": 4 * 36 * 27, "y": 30}


def test_assumes_a_batch_of_one_and_carries_it_through() -> None:
    assert macs_of("float[N,3] a, float[3,5] b", "h = MatMul (a, b) y = Relu (h)", "float[N,5] y") == {"h": 15}


def test_keeps_nodes_without_a_name_apart() -> None:
    assert macs_of("float[2,3] a, float[3,3] b", "h = MatMul (a, b) y = MatMul (h, b)") == {"h": 18, "y": 18}


def test_leaves_the_graph_as_it_is() -> None:
    model = load_model(
        onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["" : 17]> g (float[N,3] a, float[3,5] b) => (float[N,5] y) '
            "{ h = MatMul (a, b) y = Relu (h) }"
        )
    )
    before = model.to_proto().SerializeToString(deterministic=True)
    assert macs_by_node(model.graph) == {"h": 15}
    assert model.to_proto().SerializeToString(deterministic=True) == before


def test_counts_the_larger_branch_of_an_if() -> None:
    assert macs_of(
        "bool c, float[2,3] a, float[3,5] b",
        """
        y = If (c) <
            then_branch = small () => (float[2,5] s) { s = MatMul (a, b) },
            else_branch = large () => (float[2,5] l) {
                h = MatMul (a, b)
                t = Transpose (b)
                k = MatMul (h, t)
                l = MatMul (k, b)
            }
        >
        """,
    ) == {"y": 90}


def test_names_the_operators_of_the_larger_branch() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (bool c, float[2,3] a, float[3,5] b) => (float[2,5] y) {
        h = MatMul (a, b)
        y = If (c) <
            then_branch = small () => (float[2,5] s) { s = Identity (h) },
            else_branch = large () => (float[2,5] l) { k = MatMul (a, b) l = Add (h, k) }
        >
    }"""
    graph = load_model(onnx.parser.parse_model(text)).graph
    assert macs_by_operator(graph) == {((), "h"): 30, (("y", "else_branch"), "k"): 30}


def test_says_how_many_nodes_have_no_known_shape() -> None:
    proto = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[4, 4] a, int64[2] shape) => (float[?, ?] y) {
            r = Reshape (a, shape)
            h = MatMul (a, a)
            t = MatMul (r, r)
            e = Einsum <equation = "...i,ij->...j"> (a, a)
            y = Add (t, h)
        }
        """
    )
    count = count_macs(at_assumed_sizes(load_model(proto).graph)[0])
    assert count.by_node == {"h": 64}
    assert count.total == 64
    assert count.unknown == 2


@pytest.mark.parametrize("opset", [11, 13, 17])
def test_follows_sizes_that_the_model_computes(opset: int) -> None:
    proto = onnx.parser.parse_model(
        f"""
        <ir_version: 7, opset_import: ["" : {opset}]>
        g (float[N, 4, 5] a, float[20, 3] b) => (float[N, 3] y)
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] rest = {{-1}}>
        {{
            shape = Shape (a)
            batch = Slice (shape, zero, one, zero)
            flat = Concat <axis = 0> (batch, rest)
            r = Reshape (a, flat)
            y = MatMul (r, b)
        }}
        """
    )
    assert macs_by_node(load_model(proto).graph) == {"y": 60}
