"""Shapes as numbers: which input sizes are assumed, and what is left alone."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_graphsurgeon as gs
import pytest

from graphopt.graph import all_graphs
from graphopt.model_io import load_model
from graphopt.sizes import at_assumed_sizes, at_sizes, fixed_shape, nbytes


def graph_of(text: str, opset: int = 17) -> gs.Graph:
    return load_model(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {text}')).graph


def shape_in(graph: gs.Graph, name: str) -> tuple[int, ...] | None:
    return fixed_shape(graph.tensors()[name])


def test_carries_assumed_sizes_through_symbols_that_the_model_states() -> None:
    graph = graph_of("g (float[N, 3, H, W] x) => (float[N, 3, H, W] y) { a = Relu (x) y = Neg (a) }")
    sized, assumed = at_assumed_sizes(graph)
    assert assumed == {"x": (1, 3, 224, 224)}
    assert shape_in(sized, "a") == shape_in(sized, "y") == (1, 3, 224, 224)
    assert graph.outputs[0].shape == ["N", 3, "H", "W"]


def test_chooses_sizes_that_leave_nothing_empty() -> None:
    graph = graph_of("g (float[N, 1, samples] x, float[4, 1, 400] w) => (float[N, 4, T] y) { y = Conv (x, w) }")
    sized, assumed = at_assumed_sizes(graph)
    assert assumed["x"] == (1, 1, 512)
    assert shape_in(sized, "y") == (1, 4, 113)


def test_keeps_inputs_that_have_a_default_value() -> None:
    graph = graph_of("g (float[N, 2] x, float[2, 2] w) => (float[N, 2] y) { y = MatMul (x, w) }")
    _, assumed = at_assumed_sizes(graph, defaults={"w"})
    assert assumed == {"x": (1, 2)}


def test_leaves_unknown_what_depends_on_an_input_without_a_shape() -> None:
    x, y = gs.Variable("x", np.float32, None), gs.Variable("y", np.float32, None)
    sized, assumed = at_assumed_sizes(gs.Graph([gs.Node("Relu", "", {}, [x], [y])], [x], [y], opset=17))
    assert assumed == {}
    assert shape_in(sized, "y") is None


def test_branches_know_the_constants_that_they_read_from_outside() -> None:
    graph = graph_of("""g (bool c, float[2, 3] x) => (float[?, ?, ?] y) <int64[1] axis = {1}> {
        y = If (c) <
            then_branch = t () => (float[?, ?, ?] a) { a = Unsqueeze (x, axis) },
            else_branch = e () => (float[?, ?, ?] b) {
                b = If (c) <then_branch = tt () => (float[?, ?, ?] d) { d = Unsqueeze (x, axis) },
                            else_branch = te () => (float[?, ?, ?] f) { g = Neg (x) f = Unsqueeze (g, axis) }>
            }
        >
    }""")
    sized, _ = at_assumed_sizes(graph)
    assert {fixed_shape(each.outputs[0]) for each in all_graphs(sized)} == {(2, 1, 3)}


@pytest.mark.parametrize("opset", [11, 13, 17])
def test_follows_sizes_that_the_model_computes_from_those_of_the_inputs(opset: int) -> None:
    graph = graph_of(
        """g (float[N, 4, W] x) => (float[A, B] y) <int64[1] zero = {0}, int64[1] one = {1}, int64[1] rest = {-1}>
        { s = Shape (x) n = Slice (s, zero, one, zero) t = Concat <axis = 0> (n, rest) y = Reshape (x, t) }""",
        opset,
    )
    assert shape_in(at_sizes(graph, {"x": (2, 4, 5)}), "y") == (2, 20)
    assert graph.opset == opset


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [
        (np.float32, [2, 3], 24),
        (np.float32, [], 4),
        (np.int8, [0, 3], 0),
        (onnx.TensorProto.BFLOAT16, [2], 4),
        (np.float32, ["N", 3], None),
        (np.float32, [-1, 3], None),
        (np.float32, None, None),
        (None, [2], None),
    ],
)
def test_gives_the_bytes_of_a_tensor_of_known_size(dtype: object, shape: list[object], size: int | None) -> None:
    assert nbytes(gs.Variable("x", dtype, shape)) == size
