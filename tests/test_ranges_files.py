import json
import struct
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnxruntime.quantization import CalibrationMethod, create_calibrator
from onnxruntime.quantization.quant_utils import write_calibration_table

import graphopt
from graphopt.api import calibrate
from graphopt.cli import main
from graphopt.errors import DataError, PipelineError
from graphopt.ranges import Ranges
from graphopt.ranges_files import read_ranges, write_ranges
from graphopt.tensorrt_cache import imported_range, read_tensorrt_cache

MODELS = Path(__file__).parents[1] / "models"
MODEL = MODELS / "fmnist_resnet.onnx"
DATA = MODELS / "fashion_mnist_calibration.npz"


def ranges_of(**bounds):
    return Ranges(
        tensors={name: imported_range(low, high, "by hand") for name, (low, high) in bounds.items()},
        source="here",
        samples=0,
        synthetic=False,
    )


def bounds_of(ranges):
    return {name: (found.minimum, found.maximum) for name, found in ranges.tensors.items()}


@given(st.dictionaries(st.text("ab:/ _\x0b\u2028", min_size=1), st.floats(0, 2.0**100, width=32)))
def test_a_tensorrt_cache_gives_back_what_was_written(tmp_path_factory, largest):
    path = tmp_path_factory.mktemp("caches") / "model.cache"
    write_ranges(ranges_of(**{name: (-value, value / 2) for name, value in largest.items()}), path)
    if not largest:
        with pytest.raises(DataError, match="names no tensor"):
            read_ranges(path)
        return
    read = read_ranges(path)
    assert list(read.tensors) == list(largest)
    for name, value in largest.items():
        expected = value if np.float32(value / 127) else 1
        assert read.tensors[name].maximum == pytest.approx(expected, rel=1e-6, abs=1e-43)
        assert read.tensors[name].minimum == -read.tensors[name].maximum


def test_a_line_of_a_tensorrt_cache_is_a_name_and_a_big_endian_float(tmp_path):
    path = tmp_path / "model.cache"
    write_ranges(ranges_of(**{"conv:0": (-127.0, 12.0)}), path)
    assert path.read_text() == "TRT-8501-EntropyCalibration2\nconv:0: 3f800000\n"
    text = "TRT-10300-MinMaxCalibration\r\n(Unnamed Layer* 3) [Convolution]_output: 3c010a14\r\n\r\nx : 3f800000\n"
    read = read_tensorrt_cache(text, "a.cache")
    assert bounds_of(read)["(Unnamed Layer* 3) [Convolution]_output"][1] == pytest.approx(
        127 * struct.unpack(">f", bytes.fromhex("3c010a14"))[0]
    )
    assert bounds_of(read)["x "] == (-127, 127)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x 3f800000", "line 2: is no `name: scale`"),
        ("x: 3f80000g", "line 2: is no `name: scale`"),
        ("x: 3f8000001", "line 2: is no `name: scale`"),
        ("x: 3f80", "line 2: is no `name: scale`"),
        (": 3f800000", "line 2: is no `name: scale`"),
        ("x: 7fc00000", "line 2: the scale of x is nan"),
        ("x: 7f800000", "line 2: the scale of x is inf"),
        ("x: bf800000", "line 2: the scale of x is -1.0"),
        ("x: 00000000", "line 2: the scale of x is 0.0"),
        ("x: 0", "line 2: the scale of x is 0.0"),
        ("x: 3f800000\nx: 3f800000", "line 3: x is there twice"),
        ("", "names no tensor"),
    ],
)
def test_a_damaged_cache_is_an_error_with_its_line(tmp_path, line, message):
    path = tmp_path / "model.cache"
    path.write_text(f"TRT-8501-EntropyCalibration2\n{line}\n")
    with pytest.raises(DataError, match=message):
        read_ranges(path)


@pytest.mark.parametrize("version", ["8501", "8XXX", "100300"])
def test_the_header_may_be_of_any_version(version):
    assert bounds_of(read_tensorrt_cache(f"TRT-{version}-LegacyCalibration\nx: 3f800000\n", "a")) == {"x": (-127, 127)}


@pytest.mark.parametrize("header", ["TRT-8501-MagicCalibration", "TRT-8501", "TRT-", "x: 3f800000"])
def test_a_cache_with_another_header_is_refused(tmp_path, header):
    path = tmp_path / "model.cache"
    path.write_text(f"{header}\nx: 3f800000\n")
    with pytest.raises(DataError, match=r"line 1: is no header of a TensorRT calibration cache, .*MinMaxCalibration"):
        read_ranges(path)


def test_a_tensor_that_is_too_large_for_a_cache_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"the range of x reaches 1e\+60"):
        write_ranges(ranges_of(x=(0, 1e60)), tmp_path / "model.cache")


def test_a_name_of_two_lines_has_no_place_in_a_cache(tmp_path):
    with pytest.raises(DataError, match="has a line break"):
        write_ranges(ranges_of(**{"a\nb": (0, 1)}), tmp_path / "model.cache")


class Reader:
    """The first samples in the form that onnxruntime asks for."""

    def __init__(self):
        self.feeds = iter([{"input": np.load(DATA)["input"][index : index + 1]} for index in range(8)])

    def get_next(self):
        return next(self.feeds, None)


@pytest.fixture(params=[CalibrationMethod.MinMax, CalibrationMethod.Entropy, CalibrationMethod.Percentile])
def tensors_data(request, tmp_path):
    calibrator = create_calibrator(MODEL, [], str(tmp_path / "augmented.onnx"), request.param)
    calibrator.collect_data(Reader())
    return calibrator.compute_data()


def as_expected(ranges, tensors_data):
    expected = {
        name: tuple(float(np.ravel(value)[0]) for value in data.range_value) for name, data in tensors_data.items()
    }
    assert bounds_of(ranges) == expected
    assert {found.method for found in ranges.tensors.values()} == {"onnxruntime-table"}


def test_what_onnxruntime_writes_is_read(tensors_data, tmp_path):
    assert onnxruntime.__version__
    write_calibration_table(tensors_data.data, str(tmp_path))
    as_expected(read_ranges(tmp_path / "calibration.json"), tensors_data)


def test_the_file_of_save_tensors_data_is_read(tensors_data, tmp_path):
    quantization = pytest.importorskip("onnxruntime.quantization")
    if not hasattr(quantization, "save_tensors_data"):
        pytest.skip("this onnxruntime has no save_tensors_data")
    quantization.save_tensors_data(tensors_data, str(tmp_path / "data.json"))
    as_expected(read_ranges(tmp_path / "data.json"), tensors_data)


def test_pairs_of_older_versions_are_read(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"a": [-1, 2.5], "b": [[0.5], [1]]}))
    assert bounds_of(read_ranges(path)) == {"a": (-1, 2.5), "b": (0.5, 1)}


@pytest.mark.parametrize(
    "entry", [[1], 3, None, {"lowest": 1}, [2, 1], ["a", "b"], [0, {"data": [1, 2]}], [0, 10**400]]
)
def test_an_entry_without_bounds_is_named(tmp_path, entry):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"good": [0, 1], "bad": entry}))
    with pytest.raises(DataError, match="read as onnxruntime's calibration table, but bad has no lowest and highest"):
        read_ranges(path)


@pytest.mark.parametrize("content", [{"CLS": "TensorsData", "data": {}}, {"CLS": "TensorsData"}])
def test_a_table_that_names_no_tensor_is_refused(tmp_path, content):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match='"data" of onnxruntime\'s calibration'):
        read_ranges(path)


def test_a_table_by_channel_is_refused_with_the_reason(tmp_path):
    path = tmp_path / "table.json"
    array = {"CLS": "numpy.array", "data": [[[[-1.0]], [[-2.0]]]], "dtype": "float32"}
    path.write_text(json.dumps({"conv": {"CLS": "TensorData", "lowest": array, "highest": array}}))
    with pytest.raises(DataError, match="conv has no lowest and highest value: it has 2, one for each channel"):
        read_ranges(path)


def test_our_own_files_and_broken_ones_are_told_as_before(tmp_path):
    path = tmp_path / "ranges.json"
    found, _ = calibrate(MODEL, DATA, samples=4)
    write_ranges(found, path)
    assert read_ranges(path) == Ranges.load(path)
    for content in (b"{", b"[]", b"{}", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="ranges file"):
            read_ranges(path)
    with pytest.raises(DataError, match="cannot read ranges"):
        read_ranges(tmp_path / "gone.json")


def test_a_cache_quantizes_a_model_and_its_other_names_are_listed(tmp_path):
    cache = tmp_path / "model.cache"
    result = graphopt.optimize(
        MODEL, "fold,calibrate:method=minmax,qdq", data=DATA, samples=40, target="tensorrt", ranges=cache, verify=False
    )
    cache.write_text(cache.read_text() + "no_such_tensor: 3f800000\n")
    again = graphopt.optimize(MODEL, "fold,qdq", target="tensorrt", ranges=cache, verify=False)
    (warning,) = [each for each in again.report.warnings if "ranges are of tensors" in each]
    assert warning.startswith("1 of ") and warning.endswith("and are not used: no_such_tensor")
    assert again.report.passes[-1].parts == result.report.passes[-1].parts
    scales = [
        {each.name: onnx_array(each) for each in one.model.graph.initializer if each.name.endswith("_scale")}
        for one in (result, again)
    ]
    assert scales[0].keys() == scales[1].keys()
    for name, scale in scales[0].items():
        assert scales[1][name] == pytest.approx(scale, rel=1e-6)


def onnx_array(tensor):
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor)


def test_a_cache_of_another_model_is_refused(tmp_path):
    cache = tmp_path / "other.cache"
    write_ranges(ranges_of(elsewhere=(0, 1)), cache)
    with pytest.raises(PipelineError, match="the ranges are of another model"):
        graphopt.optimize(MODEL, "fold,qdq", target="tensorrt", ranges=cache, verify=False)


def test_merge_ranges_writes_a_cache_where_the_name_says_so(tmp_path):
    ranges, cache = tmp_path / "ranges.json", tmp_path / "model.cache"
    calibrate(MODEL, DATA, samples=4)[0].save(ranges)
    assert main(["merge-ranges", str(ranges), "-o", str(cache)]) == 0
    assert cache.read_text().startswith("TRT-8501-EntropyCalibration2\n")
    assert set(read_ranges(cache).tensors) == set(Ranges.load(ranges).tensors)
