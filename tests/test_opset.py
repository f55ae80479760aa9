import numpy as np
import onnx
import onnx.parser
import pytest
from zoo import zoo_feed, zoo_model

from graphopt.errors import ModelError
from graphopt.model_io import load_model
from graphopt.opset import raise_opset
from graphopt.runtime import open_session
from graphopt.shapes import hollow

SQUEEZE = """
<ir_version: 7, opset_import: ["" : 11]>
g (float[2,1,3] x) => (float[2,3] y) <float[2,1,3] w = {1, 2, 3, 4, 5, 6}>
{ sum = Add (x, w)  y = Squeeze <axes = [1]> (sum) }
"""


def raised(text: str, version: int) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    original = onnx.parser.parse_model(text)
    model = load_model(original)
    raise_opset(model.graph, version)
    result = model.to_proto()
    onnx.checker.check_model(result, full_check=True)
    return original, result


def assert_same_outputs(original: onnx.ModelProto, other: onnx.ModelProto, **feed: np.ndarray) -> None:
    expected, outputs = open_session(original).run(feed), open_session(other).run(feed)
    for name, value in expected.items():
        np.testing.assert_array_equal(outputs[name], value)


def test_changed_operators_are_converted_and_others_are_left_alone():
    model = load_model(onnx.parser.parse_model(SQUEEZE))
    add = model.graph.nodes[0]
    note = raise_opset(model.graph, 13)
    assert note == "opset raised from 11 to 13; nodes rewritten for it: 1 Squeeze"
    assert model.graph.nodes[0] is add
    assert [node.op for node in model.graph.nodes] == ["Add", "Constant", "Squeeze"]
    result = model.to_proto()
    onnx.checker.check_model(result, full_check=True)
    assert_same_outputs(onnx.parser.parse_model(SQUEEZE), result, x=np.ones((2, 1, 3), np.float32))


def test_an_opset_that_is_high_enough_stays():
    model = load_model(onnx.parser.parse_model(SQUEEZE))
    assert raise_opset(model.graph, 11) is None
    assert raise_opset(model.graph, 9) is None
    assert model.to_proto() == onnx.parser.parse_model(SQUEEZE)


def test_softmax_over_several_axes_keeps_its_meaning():
    original, result = raised(
        '<ir_version: 7, opset_import: ["" : 11]>g (float[n,3,4] x) => (float[n,3,4] y) { y = Softmax <axis = 1> (x) }',
        13,
    )
    assert_same_outputs(original, result, x=np.random.default_rng(0).random((2, 3, 4), np.float32))


def test_nodes_in_branches_are_converted():
    original, result = raised(
        """
        <ir_version: 7, opset_import: ["" : 11]>
        g (bool c, float[1,3] x) => (float[3] y) {
            y = If (c) <
                then_branch = t () => (float[3] a) { a = Squeeze <axes = [0]> (x) },
                else_branch = e () => (float[3] b) { n = Neg (x)  b = Squeeze <axes = [0]> (n) }
            >
        }
        """,
        13,
    )
    for condition in (True, False):
        assert_same_outputs(original, result, c=np.array(condition), x=np.ones((1, 3), np.float32))


def test_an_operator_that_was_replaced_reads_its_constants():
    original, result = raised(
        """
        <ir_version: 7, opset_import: ["" : 10]>
        g (float[1,1,2,2] x) => (float[1,1,4,4] y) <float[4] scales = {1, 1, 2, 2}>
        { y = Resize <mode = "nearest"> (x, scales) }
        """,
        13,
    )
    assert_same_outputs(original, result, x=np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2))


def test_the_ir_version_rises_only_as_far_as_the_opset_needs():
    assert raised(SQUEEZE, 13)[1].ir_version == 7
    assert raised(SQUEEZE.replace("ir_version: 7", "ir_version: 4"), 13)[1].ir_version == 7
    assert raised(SQUEEZE.replace("ir_version: 7", "ir_version: 9"), 13)[1].ir_version == 9


def test_other_domains_keep_their_version_and_their_nodes():
    text = """
        <ir_version: 7, opset_import: ["" : 11, "com.example" : 3]>
        g (float[2] x) => (y) { r = Relu (x)  y = com.example.Op <k = 1> (r) }
    """
    model = load_model(onnx.parser.parse_model(text))
    raise_opset(model.graph, 13)
    assert {each.domain: each.version for each in model.to_proto().opset_import} == {"": 13, "com.example": 3}
    assert model.to_proto().graph.node[1] == onnx.parser.parse_model(text).graph.node[1]


def test_a_node_that_onnx_does_not_know_is_named_and_nothing_changes():
    text = '<ir_version: 7, opset_import: ["" : 11]> g (float[2] x) => (y) { r = Relu (x) y = Unheard (r) }'
    model = load_model(onnx.parser.parse_model(text))
    with pytest.raises(ModelError, match=r"node 'y' \(Unheard\): ONNX has no such operator"):
        raise_opset(model.graph, 13)
    assert model.graph.opset == 11
    assert [node.op for node in model.graph.nodes] == ["Relu", "Unheard"]


def test_a_node_that_onnx_cannot_convert_is_found_among_others():
    text = """
        <ir_version: 7, opset_import: ["" : 8]>
        g (float[1,1,2,2] x, float[4] s) => (y) { r = Relu (x)  t = Neg (r)  y = Upsample (t, s)  }
    """
    model = load_model(onnx.parser.parse_model(text))
    with pytest.raises(ModelError, match=r"node 'y' \(Upsample\): onnx cannot raise it"):
        raise_opset(model.graph, 13)


def test_models_with_local_functions_are_refused():
    model = load_model(
        onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 11, "local" : 1]>
        g (float[2] x) => (float[2] y) { y = local.f (x) }
        <domain: "local", opset_import: ["" : 11]> f (x) => (y) { y = Neg (x) }
    """)
    )
    with pytest.raises(ModelError, match="local functions"):
        raise_opset(model.graph, 13)


OLD = (
    "waifu2x_upconv7_x2",
    "espcn_nn_resize_x2",
    "blazeface_front",
    "mtcnn_onet",
    "yolov8n_doclaynet",
    "ppocr_cls_mobile_v2",
    "ppocrv4_det",
    "ppocrv4_rec",
)


@pytest.mark.zoo
@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("version", [13, 21])
def test_real_models_give_the_same_outputs_at_a_higher_opset(name, version):
    path = zoo_model(name)
    model = load_model(path)
    raise_opset(model.graph, version)
    proto = model.to_proto()
    onnx.checker.check_model(hollow(proto))
    original, other = open_session(path), open_session(proto)
    assert original.outputs == other.outputs
    for seed in range(2):
        feed = zoo_feed(name, original, seed)
        expected, outputs = original.run(feed), other.run(feed)
        for output in original.outputs:
            largest = float(np.abs(expected[output]).max())
            np.testing.assert_allclose(outputs[output], expected[output], rtol=0, atol=1e-6 * largest)
