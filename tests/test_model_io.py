import stat
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from full_disk import fill_the_disk
from onnx import TensorProto, helper, numpy_helper
from zoo import NAMES, zoo_feed, zoo_model

from graphopt import model_io
from graphopt.errors import ModelError, OutputError
from graphopt.inspection import inspect_model
from graphopt.model_io import load_model, save_model
from graphopt.runtime import open_session
from graphopt.shapes import infer_shapes

SMALL = """
<ir_version: 8, opset_import: ["" : 17], producer_name: "maker", producer_version: "1", model_version: 3>
small (float[batch, 2] x) => (float[batch, 2] y) <float[2] w = {1, 2}, float[2] b = {3, 4}>
{ scaled = Mul (x, w)  y = Add (scaled, b) }
"""


def small() -> onnx.ModelProto:
    return onnx.parser.parse_model(SMALL)


def with_weight(array: np.ndarray | onnx.TensorProto) -> onnx.ModelProto:
    """A model that casts one weight; nothing in it needs the weight's type to be computed with."""
    tensor = array if isinstance(array, onnx.TensorProto) else numpy_helper.from_array(array, "w")
    node = helper.make_node("Identity", ["w"], ["y"])
    output = helper.make_tensor_value_info("y", tensor.data_type, tensor.dims)
    graph = helper.make_graph([node], "g", [], [output], [tensor])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def external(folder: Path, size: int = 2000) -> Path:
    """A model whose weight lies in a file beside it."""
    model = small()
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.arange(size, dtype=np.float32), "w"))
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.ones(size, np.float32), "b"))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[1].dim_value = size
    path = folder / "model.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


# --- what survives


def test_a_model_comes_back_as_it_was():
    assert load_model(small()).copy().to_proto() == small()


def test_loading_and_exporting_leave_a_given_proto_alone():
    proto = small()
    model = load_model(proto)
    model.graph.nodes[0].inputs[1].name = "renamed"
    model.to_proto()
    assert proto == small()


def test_metadata_and_doc_strings_survive():
    proto = small()
    proto.doc_string, proto.graph.doc_string, proto.domain = "model", "graph", "org.example"
    proto.metadata_props.add(key="character", value="abc\nä")
    proto.graph.metadata_props.add(key="where", value="graph")
    proto.graph.input[0].doc_string = "pixels"
    proto.graph.node[0].doc_string = "scale"
    proto.graph.node[0].metadata_props.add(key="source", value="line 3")
    proto.graph.initializer[0].doc_string = "weight"
    assert load_model(proto).copy().to_proto() == proto


def test_a_nodes_metadata_follow_its_name_when_its_output_is_renamed():
    proto = small()
    proto.graph.node[0].name = "scale"
    proto.graph.node[0].metadata_props.add(key="source", value="line 3")
    model = load_model(proto)
    model.graph.nodes[0].outputs[0].name = "renamed"
    assert model.to_proto().graph.node[0].metadata_props[0].value == "line 3"


def test_a_nodes_metadata_do_not_go_to_another_operator():
    proto = small()
    proto.graph.node[0].metadata_props.add(key="source", value="line 3")
    model = load_model(proto)
    model.graph.nodes[0].op = "Div"
    assert not model.to_proto().graph.node[0].metadata_props


@pytest.mark.parametrize("size", ["batch", "-1", "?"])
def test_symbolic_dimension_names_survive(size):
    proto = small()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = size
    assert load_model(proto).to_proto().graph.input[0] == proto.graph.input[0]


def test_a_dimension_stated_as_minus_one_survives():
    proto = small()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    assert load_model(proto).to_proto() == proto


def test_value_info_survives_until_the_shape_changes():
    proto = small()
    proto.graph.value_info.append(helper.make_tensor_value_info("scaled", TensorProto.FLOAT, ["batch", 2], "doc"))
    model = load_model(proto)
    assert list(model.to_proto().graph.value_info) == list(proto.graph.value_info)
    model.graph.nodes[0].outputs[0].shape = [7, 2]
    (entry,) = model.to_proto().graph.value_info
    assert [size.dim_value for size in entry.type.tensor_type.shape.dim] == [7, 2]
    assert entry.doc_string == "doc"


def test_value_info_goes_with_its_tensor():
    proto = small()
    proto.graph.value_info.append(helper.make_tensor_value_info("scaled", TensorProto.FLOAT, ["batch", 2]))
    model = load_model(proto)
    model.graph.nodes[0].outputs[0].name = "other"
    assert [entry.name for entry in model.to_proto().graph.value_info] == ["other"]


def test_quantization_annotations_stay_while_their_tensors_do():
    proto = small()
    annotation = proto.graph.quantization_annotation.add(tensor_name="scaled")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w")
    model = load_model(proto)
    assert model.to_proto() == proto
    model.graph.nodes[0].outputs[0].name = "other"
    assert not model.to_proto().graph.quantization_annotation


def test_training_info_survives():
    proto = small()
    proto.training_info.add().initialization.name = "start"
    assert load_model(proto).copy().to_proto() == proto


def test_an_opset_that_no_node_uses_survives():
    proto = small()
    proto.opset_import.add(domain="ai.onnx.ml", version=2)
    assert load_model(proto).to_proto() == proto


def test_the_domain_of_a_new_node_is_imported():
    model = load_model(small())
    model.graph.nodes[0].domain = "com.example"
    assert {each.domain: each.version for each in model.to_proto().opset_import} == {"": 17, "com.example": 1}


def test_attributes_that_graphsurgeon_cannot_read_survive():
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "com.example" : 1]>g (float[2] x) => (y) { y = com.example.Op (x) }'
    )
    attributes = proto.graph.node[0].attribute
    attributes.append(helper.make_attribute("kind", helper.make_tensor_type_proto(1, [2])))
    attributes.append(helper.make_attribute("raw", b"\xff\xfe"))
    attributes.append(helper.make_attribute("none", [], attr_type=onnx.AttributeProto.FLOATS))
    written = load_model(proto).copy().to_proto().graph.node[0].attribute
    assert sorted(written, key=lambda each: each.name) == sorted(attributes, key=lambda each: each.name)


def test_model_local_functions_survive():
    proto = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 17, "local" : 1]>
        g (float[2] x) => (float[2] y) { y = local.double (x) }
        <domain: "local", opset_import: ["" : 17]>
        double (x) => (y) { two = Constant <value = float {2.0}> ()  y = Mul (x, two) }
    """)
    proto.functions[0].metadata_props.add(key="source", value="here")
    assert load_model(proto).copy().to_proto() == proto


def test_the_types_of_sequences_survive_a_copy():
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x) => (seq(float[2]) s) { s = SequenceConstruct (x, x) }
    """)
    assert load_model(proto).copy().to_proto() == proto


# --- weights


DTYPES = [np.float16, np.bool_, np.int64, *(
    getattr(ml_dtypes, name)
    for name in ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2fnuz", "int4", "uint4",
                 "float4_e2m1fn")
)]  # fmt: skip


@pytest.mark.parametrize("read", [False, True], ids=["untouched", "read"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_weights_of_every_type_survive(dtype, read):
    proto = with_weight(np.array([0, 1, 1], np.float32).astype(dtype))
    model = load_model(proto)
    constant = model.graph.nodes[0].inputs[0]
    assert constant.dtype == np.dtype(dtype)
    if read:
        assert constant.values.dtype == np.dtype(dtype)
    assert model.copy().to_proto() == proto


@pytest.mark.parametrize("array", [np.array(["a", "ä"], object), np.array(["a", "ä"])], ids=["object", "str"])
def test_string_weights_can_be_set(array):
    proto = with_weight(np.array(["x"], object))
    model = load_model(proto)
    model.graph.nodes[0].inputs[0].values = array
    assert numpy_helper.to_array(model.to_proto().graph.initializer[0]).tolist() == ["a", "ä"]


def test_a_weight_of_a_type_that_onnx_lacks_is_refused():
    model = load_model(small())
    model.graph.nodes[0].inputs[1].values = np.array(["2020-01-01"], "datetime64[D]")
    with pytest.raises(ModelError, match=r"'w'.*datetime64"):
        model.to_proto()


@pytest.mark.parametrize("indices", [[1, 3], [[0, 1], [1, 1]]], ids=["linear", "coordinates"])
def test_sparse_weights_stay_sparse_unless_they_change(indices):
    proto = small()
    del proto.graph.initializer[0]
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.array([5, 6], np.float32), "w"),
        numpy_helper.from_array(np.array(indices)),
        [2, 2],
    )
    proto.graph.sparse_initializer.append(sparse)
    model = load_model(proto)
    weight = model.graph.nodes[0].inputs[1]
    assert model.copy().to_proto() == proto
    np.testing.assert_array_equal(weight.values, np.array([[0, 5], [0, 6]], np.float32))
    assert weight.values.dtype == np.float32
    assert model.to_proto() == proto
    weight.values = weight.values + 1
    changed = model.to_proto()
    assert not changed.graph.sparse_initializer
    assert {tensor.name for tensor in changed.graph.initializer} == {"b", "w"}


def test_a_weight_that_branches_share_is_written_once():
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (bool c, float[2] x) => (float[2] y) <float[2] w = {1, 2}> {
            y = If (c) <
                then_branch = t () => (float[2] a) { a = Mul (x, w) },
                else_branch = e () => (float[2] b) { b = Add (x, w) }
            >
        }
    """)
    for model in (load_model(proto), load_model(proto).copy(), load_model(load_model(proto).graph.copy())):
        written = model.to_proto()
        assert [tensor.name for tensor in written.graph.initializer] == ["w"]
        assert not any(attribute.g.initializer for attribute in written.graph.node[0].attribute)


def test_two_constants_of_one_name_are_refused():
    model = load_model(small())
    model.graph.nodes[1].inputs[1].name = "w"
    with pytest.raises(ModelError, match="two different constants are named 'w'"):
        model.to_proto()


# --- overridable inputs and old files

OVERRIDABLE = """
<ir_version: IR, opset_import: ["" : 11]>
g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}> { y = Mul (x, w) }
"""


def test_from_ir_4_an_initializer_that_is_an_input_is_a_default():
    proto = onnx.parser.parse_model(OVERRIDABLE.replace("IR", "4"))
    model = load_model(proto)
    assert [tensor.name for tensor in model.graph.inputs] == ["x", "w"]
    assert isinstance(model.graph.nodes[0].inputs[1], gs.Variable)
    assert model.copy().to_proto() == proto
    assert model.frame.defaults["w"].values.tolist() == [1, 2]


def test_a_default_goes_with_its_input():
    model = load_model(onnx.parser.parse_model(OVERRIDABLE.replace("IR", "4")))
    del model.graph.inputs[1]
    assert not model.to_proto().graph.initializer


def test_before_ir_4_it_is_a_constant_and_listed_as_an_input_again():
    proto = onnx.parser.parse_model(OVERRIDABLE.replace("IR", "3"))
    model = load_model(proto)
    assert [tensor.name for tensor in model.graph.inputs] == ["x"]
    assert isinstance(model.graph.nodes[0].inputs[1], gs.Constant)
    assert model.to_proto() == proto


# --- clones and order


def test_a_clone_shares_weights_and_nothing_else():
    model = load_model(small())
    clone = model.copy()
    clone.graph.nodes[0].attrs["new"] = 1
    clone.graph.nodes[0].outputs[0].name = "other"
    clone.graph.inputs[0].shape[0] = 5
    clone.graph.import_domains[0].version = 1
    clone.graph.nodes[0].inputs[1].values = np.zeros(2, np.float32)
    assert model.to_proto() == small()


def test_nodes_are_sorted_and_sorted_ones_keep_their_order():
    model = load_model(small())
    model.graph.nodes.reverse()
    assert [node.op_type for node in model.to_proto().graph.node] == ["Mul", "Add"]
    assert [node.op for node in model.graph.nodes] == ["Add", "Mul"]


def test_a_node_comes_after_what_its_branches_return_from_outside():
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (bool c, float[2] x) => (float[2] y) {
            r = Relu (x)
            y = If (c) <
                then_branch = t () => (float[2] r) {},
                else_branch = e () => (float[2] b) { b = Neg (x) }
            >
        }
    """)
    model = load_model(proto)
    model.graph.nodes.reverse()
    assert [node.op_type for node in model.to_proto().graph.node] == ["Relu", "If"]


def test_a_cycle_is_refused():
    model = load_model(small())
    model.graph.nodes[0].inputs[0] = model.graph.outputs[0]
    with pytest.raises(ModelError, match="cycle"):
        model.to_proto()


def test_a_graph_is_taken_as_it_is():
    graph = gs.import_onnx(small())
    model = load_model(graph)
    assert model.graph is graph
    onnx.checker.check_model(model.to_proto())


# --- files beside the model


def test_weights_beside_the_model_are_mapped(tmp_path):
    model = load_model(external(tmp_path))
    values = model.graph.nodes[0].inputs[1].values
    assert isinstance(values, np.memmap)
    assert values.mode == "r"
    np.testing.assert_array_equal(values, np.arange(2000, dtype=np.float32))
    np.testing.assert_array_equal(
        numpy_helper.to_array(load_model(tmp_path / "model.onnx").to_proto().graph.initializer[0]), values
    )


def test_a_missing_file_of_weights_is_named(tmp_path):
    path = external(tmp_path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"weights\.bin: no such file, but the model keeps the weight 'w' in it"):
        load_model(path)


def test_a_short_file_of_weights_is_refused(tmp_path):
    path = external(tmp_path)
    (tmp_path / "weights.bin").write_bytes(bytes(100))
    with pytest.raises(ModelError, match="too short"):
        load_model(path)


@pytest.mark.parametrize("name", ["../weights.bin", "/etc/passwd", "C:\\weights.bin", ""])
def test_weights_outside_the_models_folder_are_refused(tmp_path, name):
    path = external(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer[0].external_data[0].value = name
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="outside the model's folder"):
        load_model(path)


def test_a_proto_whose_weights_are_elsewhere_is_refused(tmp_path):
    with pytest.raises(ModelError, match="give the path of the model"):
        load_model(onnx.load(external(tmp_path), load_external_data=False))


@pytest.mark.parametrize("as_proto", [False, True], ids=["Model", "ModelProto"])
def test_a_model_beyond_protobufs_limit_is_saved_in_two_files(tmp_path, monkeypatch, as_proto):
    whole = load_model(external(tmp_path)).to_proto()
    monkeypatch.setattr(model_io, "PROTOBUF_LIMIT", 5000)
    target = tmp_path / "out.onnx"
    save_model(whole if as_proto else load_model(whole), target)
    assert target.stat().st_size < 2000
    assert (tmp_path / "out.onnx.data").stat().st_size >= 16000
    assert {each.name for each in tmp_path.iterdir()} == {
        "model.onnx",
        "weights.bin",
        "out.onnx",
        "out.onnx.data",
    }
    assert [numpy_helper.to_array(tensor).sum() for tensor in onnx.load(target).graph.initializer] == [
        1999000,
        2000,
    ]
    feed = {"x": np.ones((1, 2000), np.float32)}
    np.testing.assert_array_equal(open_session(target).run(feed)["y"], open_session(whole).run(feed)["y"])


def test_large_constant_nodes_go_beside_the_model_too(tmp_path, monkeypatch):
    model = load_model(external(tmp_path))
    weight = model.graph.nodes[0].inputs[1]
    moved = gs.Variable("from_node", np.float32, [2000])
    model.graph.nodes.insert(0, gs.Node("Constant", attrs={"value": weight}, outputs=[moved]))
    model.graph.nodes[1].inputs[1] = moved
    feed = {"x": np.ones((1, 2000), np.float32)}
    expected = open_session(model).run(feed)["y"]
    monkeypatch.setattr(model_io, "PROTOBUF_LIMIT", 5000)
    save_model(model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").stat().st_size < 2000
    np.testing.assert_array_equal(open_session(tmp_path / "out.onnx").run(feed)["y"], expected)


# --- what is refused


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as error:
        load_model(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_files_that_are_no_models_are_named_for_what_they_are(tmp_path):
    path = tmp_path / "model.onnx"
    assert "no such file" in refused(path)
    assert "is a folder" in refused(tmp_path)
    path.write_bytes(b"")
    assert "is empty" in refused(path)
    path.write_text("<ir_version: 8>\nagraph () => () {}\n")
    assert "is a text file" in refused(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in refused(path)
    path.write_bytes(bytes(range(256)))
    assert "no ONNX model" in refused(path)


def test_a_model_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "model.onnx"
    content = small().SerializeToString()
    for length in range(1, len(content)):
        path.write_bytes(content[:length])
        refused(path)


# --- saving


def test_a_saved_model_loads_again(tmp_path):
    save_model(load_model(small()), tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx") == small()
    assert [each.name for each in tmp_path.iterdir()] == ["out.onnx"]


def test_an_existing_file_needs_overwrite(tmp_path):
    target = tmp_path / "out.onnx"
    target.write_text("old")
    with pytest.raises(OutputError, match=r"exists already.*--overwrite"):
        save_model(small(), target)
    assert target.read_text() == "old"
    save_model(small(), target, overwrite=True)
    assert onnx.load(target) == small()


def test_an_existing_file_of_weights_needs_overwrite_too(tmp_path, monkeypatch):
    monkeypatch.setattr(model_io, "PROTOBUF_LIMIT", 1)
    (tmp_path / "out.onnx.data").write_text("old")
    with pytest.raises(OutputError, match=r"out\.onnx\.data: it exists already"):
        save_model(small(), tmp_path / "out.onnx")
    assert [each.name for each in tmp_path.iterdir()] == ["out.onnx.data"]


def test_the_input_is_never_written(tmp_path):
    source = tmp_path / "model.onnx"
    save_model(small(), source)
    link = tmp_path / "link.onnx"
    link.symlink_to(source)
    for target in (source, link):
        with pytest.raises(OutputError, match="it is an input"):
            save_model(load_model(source), target, overwrite=True)
        with pytest.raises(OutputError, match="it is an input"):
            save_model(small(), target, overwrite=True, protect=[source])
    assert onnx.load(source) == small()


def test_the_inputs_weights_are_never_written(tmp_path):
    model = load_model(external(tmp_path))
    with pytest.raises(OutputError, match="it is an input"):
        save_model(model, tmp_path / "weights.bin", overwrite=True)


def test_folders_that_cannot_take_the_result_are_refused(tmp_path):
    with pytest.raises(OutputError, match="there is no folder"):
        save_model(small(), tmp_path / "missing" / "out.onnx")
    with pytest.raises(OutputError, match="is a folder"):
        save_model(small(), tmp_path, overwrite=True)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    fill_the_disk(monkeypatch)
    for limit in (model_io.PROTOBUF_LIMIT, 1):
        monkeypatch.setattr(model_io, "PROTOBUF_LIMIT", limit)
        with pytest.raises(OutputError, match="No space left on device"):
            save_model(small(), tmp_path / "out.onnx")
        assert not list(tmp_path.iterdir())
        with pytest.raises(OutputError, match="No space left on device"):
            save_model(load_model(small()), tmp_path / "out.onnx")
        assert not list(tmp_path.iterdir())


def test_weights_whose_model_cannot_take_its_name_are_removed(tmp_path, monkeypatch):
    replace = Path.replace

    def failing(path: Path, target: Path) -> Path:
        if target.suffix == ".onnx":
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", failing)
    monkeypatch.setattr(model_io, "PROTOBUF_LIMIT", 1)
    with pytest.raises(OutputError, match=r"out\.onnx: No space left on device"):
        save_model(small(), tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


def test_a_saved_model_has_the_permissions_of_any_new_file(tmp_path):
    save_model(small(), tmp_path / "out.onnx")
    (tmp_path / "other").touch()
    assert stat.S_IMODE((tmp_path / "out.onnx").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


# --- real models


@pytest.mark.zoo
@pytest.mark.parametrize("name", NAMES)
def test_real_models_give_the_same_outputs_after_a_round_trip(name):
    path = zoo_model(name)
    original, again = open_session(path), open_session(load_model(path).copy().to_proto())
    assert (original.inputs, original.outputs) == (again.inputs, again.outputs)
    for seed in range(3):
        feed = zoo_feed(name, original, seed)
        expected, outputs = original.run(feed), again.run(feed)
        for output in original.outputs:
            np.testing.assert_array_equal(outputs[output], expected[output])


@pytest.mark.zoo
@pytest.mark.parametrize("name", NAMES)
def test_real_models_keep_everything_but_unused_weights(name):
    path = zoo_model(name)
    original, again = onnx.load(path), load_model(path).copy().to_proto()
    for field in onnx.ModelProto.DESCRIPTOR.fields_by_name:
        if field != "graph":
            assert getattr(again, field) == getattr(original, field)
    assert list(again.graph.output) == list(original.graph.output)
    assert len(again.graph.node) == len(original.graph.node)


@pytest.mark.zoo
def test_the_metadata_of_real_models_survive():
    for name, count in (("ppocrv4_rec", 1), ("yolov8n_doclaynet", 14)):
        path = zoo_model(name)
        metadata = {entry.key: entry.value for entry in load_model(path).to_proto().metadata_props}
        assert metadata == {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        assert len(metadata) >= count
    magika = load_model(zoo_model("magika_standard_v3_3")).to_proto()
    assert "ai.onnx.ml" in {each.domain for each in magika.opset_import}


def test_a_name_that_is_no_text_is_refused(tmp_path):
    content = small().SerializeToString().replace(b"scaled", b"scal\xff\xfe")
    (tmp_path / "damaged.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=r"damaged.onnx: the name b'scal\\xff\\xfe' is not UTF-8"):
        load_model(tmp_path / "damaged.onnx")


def test_a_weight_with_too_few_values_is_named():
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [4], np.ones(4, np.float32).tobytes(), raw=True)
    tensor.dims[0] = 8
    values = load_model(with_weight(tensor)).graph.nodes[0].inputs[0]._values
    with pytest.raises(ModelError, match="weight 'w' is damaged"):
        values.load()


@pytest.mark.parametrize("offset", ["-4096", "here"])
def test_a_weight_at_no_place_in_its_file_is_refused(tmp_path, offset):
    path = external(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = offset if entry.key == "offset" else entry.value
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="no place in a file"):
        load_model(path)


def test_a_model_knows_all_its_files_also_when_a_pass_replaced_the_weights(tmp_path):
    path = external(tmp_path)
    model = load_model(path)
    (weights,) = [each for each in tmp_path.iterdir() if each != path]
    assert model.files == (path, weights)
    changed = model.copy()
    for node in changed.graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant):
                tensor.values = np.array(tensor.values)
    with pytest.raises(OutputError, match="it is an input"):
        save_model(changed, weights, overwrite=True)


def test_default_values_count_as_weights():
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x, float[2] w = {1, 2}) => (float[2] y) { y = Mul (x, w) }"""
    assert load_model(onnx.parser.parse_model(text)).nbytes == 8


def test_a_model_that_is_loaded_stays_itself_and_prints_short():
    model = load_model(small())
    assert load_model(model) is model
    assert len(repr(model)) < 100


@pytest.mark.parametrize(
    "text",
    [
        "g (optional(float[N]) x) => (float[N] y) { y = OptionalGetElement (x) }",
        "g (float[N] x) => (optional(float[N]) y) { y = Optional (x) }",
        "g (seq(float[N]) x) => (float[M] y) { y = ConcatFromSequence <axis = 0> (x) }",
    ],
)
def test_types_that_are_no_tensors_survive_and_can_be_inferred_and_inspected(text):
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    model = load_model(proto)
    infer_shapes(model.graph)
    again = model.to_proto()
    assert (again.graph.input, again.graph.output) == (proto.graph.input, proto.graph.output)
    assert inspect_model(model).nodes == 1


def test_shape_inference_that_cannot_go_on_is_an_error_of_the_model():
    proto = onnx.parser.parse_model(SMALL)
    proto.graph.node[0].op_type = "GlobalAveragePool"
    del proto.graph.node[0].input[:]
    with pytest.raises(ModelError, match="shape inference"):
        infer_shapes(load_model(proto).graph)


@pytest.mark.parametrize("stated", [True, False])
def test_types_that_a_pass_infers_are_written_where_the_file_states_types(stated):
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x) => (float[N,4] y)'
        " { a = Relu (x) b = Neg (a) y = Abs (b) }"
    )
    if stated:
        proto.graph.value_info.append(onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, ["N", 4]))
    model = load_model(proto)
    infer_shapes(model.graph)
    assert [each.name for each in model.to_proto().graph.value_info] == (["a", "b"] if stated else [])
