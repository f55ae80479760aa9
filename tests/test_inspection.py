"""What `inspect` says of models small enough to count by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs

from graphopt.inspection import Inspection, Weights, inspect_model
from graphopt.model_io import load_model

CNN = """
<ir_version: 8, opset_import: ["" : 17], producer_name: "by hand", producer_version: "1">
cnn (float[N, 3, 8, 8] x) => (float[N, 10] y) <float[4, 3, 3, 3] w, float[4] b, int64[2] shape = {0, -1}>
{
    c = Conv <pads = [1, 1, 1, 1]> (x, w, b)
    r = Relu (c)
    f = Reshape (r, shape)
    v = Constant <value = float[256, 10] {0}> ()
    y = MatMul (f, v)
}
"""


def cnn() -> onnx.ModelProto:
    """Return `CNN` with its weights."""
    model = onnx.parser.parse_model(CNN.replace("float[256, 10] {0}", "float[1] {0}"))
    weights = {"w": np.ones((4, 3, 3, 3), np.float32), "b": np.ones(4, np.float32)}
    del model.graph.initializer[:]
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, -1]), "shape"))
    model.graph.node[3].attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(np.ones((256, 10), np.float32)))
    return model


def inspected(text: str) -> Inspection:
    return inspect_model(load_model(onnx.parser.parse_model(text)))


def test_counts_parameters_in_initializers_and_constant_nodes() -> None:
    found = inspect_model(load_model(cnn()))
    assert found.parameters == 108 + 4 + 2560
    assert found.weight_nbytes == 4 * (108 + 4 + 2560) + 8 * 2
    assert found.weight_dtypes == {"float32": Weights(3, 10688), "int64": Weights(1, 16)}


def test_counts_macs_and_memory_at_sizes_that_it_states() -> None:
    found = inspect_model(load_model(cnn()))
    assert found.assumed_shapes == {"x": (1, 3, 8, 8)}
    assert found.macs == 4 * 64 * 27 + 256 * 10
    assert found.macs_unknown == found.activations_unknown == 0
    assert found.peak_activation_nbytes == 4 * (256 + 256)  # the output of Conv and that of Relu


def test_tells_what_the_file_says() -> None:
    found = inspect_model(load_model(cnn()))
    assert (found.opset, found.ir_version, found.producer) == ({"ai.onnx": 17}, 8, "by hand 1")
    assert found.nodes == 5
    assert found.ops == {"Conv": 1, "Relu": 1, "Reshape": 1, "Constant": 1, "MatMul": 1}
    ((x,), (y,)) = found.inputs, found.outputs
    assert (x.name, x.dtype, x.shape) == ("x", "float32", ("N", 3, 8, 8))
    assert (y.name, y.dtype, y.shape) == ("y", "float32", ("N", 10))
    assert (found.path, found.file_nbytes) == (None, None)


def test_gives_the_size_of_the_file_and_of_the_weights_beside_it(tmp_path: Path) -> None:
    plain, beside = tmp_path / "plain.onnx", tmp_path / "beside.onnx"
    onnx.save(cnn(), plain)
    onnx.save(cnn(), beside, save_as_external_data=True, location="beside.data", size_threshold=0)
    assert inspect_model(load_model(plain)).file_nbytes == plain.stat().st_size
    found = inspect_model(load_model(beside))
    assert found.file_nbytes == beside.stat().st_size + (tmp_path / "beside.data").stat().st_size
    assert found.path == str(beside)
    assert found.parameters == 2672


def test_counts_a_weight_that_is_used_twice_once() -> None:
    found = inspected(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[2, 2] x) => (float[2, 2] y) <float[2, 2] w = {1, 2, 3, 4}> {
            h = MatMul (x, w)
            y = MatMul (h, w)
        }
        """
    )
    assert (found.parameters, found.macs) == (4, 16)


def test_counts_weights_and_operators_inside_branches() -> None:
    found = inspected(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (bool c, float[2] x) => (float[2] y) <float[2] w = {1, 2}> {
            y = If (c) <
                then_branch = one () => (float[2] a) {
                    v = Constant <value = float[2] {3, 4}> ()
                    a = Add (x, v)
                },
                else_branch = two () => (float[2] b) { b = Mul (x, w) }
            >
        }
        """
    )
    assert found.parameters == 4
    assert found.ops == {"If": 1, "Constant": 1, "Add": 1, "Mul": 1}


def test_counts_quantized_weights_as_parameters_but_not_their_zero_points() -> None:
    found = inspected(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[2, 2] x) => (float[2, 2] y)
        <int8[2, 2] q = {1, 2, 3, 4}, float s = {0.5}, int8 z = {0}, int64[1] unused_axis = {0}>
        {
            w = DequantizeLinear (q, s, z)
            m = MatMul (x, w)
            y = Unsqueeze (m, unused_axis)
        }
        """
    )
    assert found.parameters == 4 + 1
    assert found.weight_dtypes["int8"] == Weights(2, 5)


def test_takes_an_input_with_a_default_value_for_a_weight() -> None:
    found = inspected(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[2, 2] x, float[2, 2] w = {1, 2, 3, 4}) => (float[2, 2] y) { y = MatMul (x, w) }
        """
    )
    assert [each.name for each in found.inputs] == ["x"]
    assert found.assumed_shapes == {"x": (2, 2)}
    assert (found.parameters, found.macs) == (4, 8)
    assert found.peak_activation_nbytes == 32


def test_keeps_a_tensor_alive_for_a_branch_that_reads_it() -> None:
    found = inspected(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (bool c, float[100] x) => (float[100] y) {
            a = Relu (x)
            b = Neg (x)
            d = Exp (b)
            y = If (c) <
                then_branch = one () => (float[100] t) { t = Add (a, d) },
                else_branch = two () => (float[100] e) { e = Identity (d) }
            >
        }
        """
    )
    assert found.peak_activation_nbytes == 3 * 400 + 1  # a, b and x or d, and c


def test_names_operators_of_other_domains_with_their_domain() -> None:
    found = inspected(
        """
        <ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
        g (float[2] x) => (float[2] y) { y = com.microsoft.Gelu (x) }
        """
    )
    assert found.ops == {"com.microsoft.Gelu": 1}
    assert found.opset == {"ai.onnx": 17, "com.microsoft": 1}


def test_says_how_many_tensors_have_no_known_size() -> None:
    found = inspected(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[4] x, int64[1] shape) => (float[?] y) { r = Reshape (x, shape) y = Relu (r) }
        """
    )
    assert found.activations_unknown == 2
    assert found.peak_activation_nbytes == 16 + 8


def test_takes_a_graph_that_never_was_a_file() -> None:
    x, y = gs.Variable("x", np.float32, (2, 2)), gs.Variable("y", np.float32, (2, 2))
    graph = gs.Graph([gs.Node("Relu", "", {}, [x], [y])], [x], [y], opset=17)
    found = inspect_model(load_model(graph))
    assert (found.parameters, found.macs, found.peak_activation_nbytes) == (0, 0, 32)


def test_gives_json() -> None:
    document = json.loads(json.dumps(inspect_model(load_model(cnn())).to_json()))
    assert document["parameters"] == 2672
    assert document["weight_dtypes"]["float32"] == {"tensors": 3, "nbytes": 10688}
    assert document["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["N", 3, 8, 8]}]
    assert document["assumed_shapes"] == {"x": [1, 3, 8, 8]}


def test_leaves_the_model_as_it_is() -> None:
    model = load_model(cnn())
    before = model.to_proto().SerializeToString(deterministic=True)
    inspect_model(model)
    assert model.to_proto().SerializeToString(deterministic=True) == before
