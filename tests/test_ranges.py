import json
import math
from dataclasses import replace

import pytest

from graphopt.errors import DataError, OutputError
from graphopt.ranges import Ranges, TensorRange

RELU = TensorRange(
    minimum=0.0,
    maximum=5.5,
    method="entropy",
    observed_minimum=0.0,
    observed_maximum=6.1,
    mean=0.4,
    second_moment=0.3,
    zeros=250,
    count=1000,
)
ADD = TensorRange(
    minimum=-1.0,
    maximum=0.1 + 0.2,
    method="minmax",
    observed_minimum=-1.0,
    observed_maximum=0.1 + 0.2,
    mean=None,
    zeros=None,
    count=8,
)
RANGES = Ranges(tensors={"/conv/Relu:0": RELU, 'größer "1"': ADD}, source="calib.npz", samples=77, synthetic=False)


def saved_json(path):
    RANGES.save(path)
    return json.loads(path.read_text(encoding="utf-8"))


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    RANGES.save(tmp_path / "ranges.json")
    assert Ranges.load(tmp_path / "ranges.json") == RANGES


def test_ranges_without_tensors_are_a_file_too(tmp_path):
    empty = Ranges(tensors={}, source="none", samples=0, synthetic=True)
    empty.save(tmp_path / "ranges.json")
    assert Ranges.load(tmp_path / "ranges.json") == empty


def test_the_file_has_a_head_and_one_line_for_each_tensor(tmp_path):
    content = saved_json(tmp_path / "ranges.json")
    assert list(content) == [
        *("schema", "graphopt", "model", "model_sha256", "data", "data_digest", "synthetic", "samples"),
        *("target", "method", "percent", "shard", "covering_weights", "tensors"),
    ]
    lines = (tmp_path / "ranges.json").read_text(encoding="utf-8").splitlines()
    assert '  "data": "calib.npz",' in lines
    assert sum('"minimum": ' in line for line in lines) == 2
    assert any(line.startswith('    "größer \\"1\\"": {"minimum": -1.0, ') for line in lines)


def test_saving_replaces_an_existing_file(tmp_path):
    path = tmp_path / "ranges.json"
    path.write_text("old")
    RANGES.save(path)
    assert Ranges.load(path) == RANGES


def test_a_file_says_whether_scales_cover_the_weights_and_an_older_one_need_not(tmp_path):
    path = tmp_path / "ranges.json"
    replace(RANGES, covering_weights=True).save(path)
    assert Ranges.load(path).covering_weights
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["covering_weights"]
    assert not Ranges.from_content(content, path).covering_weights


def test_saving_where_there_is_no_folder_is_refused(tmp_path):
    with pytest.raises(OutputError, match="there is no folder"):
        RANGES.save(tmp_path / "nowhere" / "ranges.json")


def test_a_hand_edited_range_may_hold_whole_numbers_and_comments(tmp_path):
    path = tmp_path / "ranges.json"
    content = saved_json(path)
    content["tensors"]["/conv/Relu:0"].update(maximum=6, comment="by hand")
    path.write_text(json.dumps(content))
    assert Ranges.load(path).tensors["/conv/Relu:0"].maximum == 6.0


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(DataError, match=r"cannot read ranges from .*gone\.json: No such file"):
        Ranges.load(tmp_path / "gone.json")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 100_000, b"\xff\xfe\x00", b'{"schema": 1, "tensors": {"a": {"mini']
)
def test_a_file_that_is_no_json_is_an_error_of_one_line(tmp_path, content):
    path = tmp_path / "ranges.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"is no ranges file, or only a part of one") as caught:
        Ranges.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}", '{"schema": true}'])
def test_json_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "ranges.json"
    path.write_text(content)
    with pytest.raises(DataError, match="is not a ranges file that can be used: "):
        Ranges.load(path)


def test_another_schema_is_refused(tmp_path):
    path = tmp_path / "ranges.json"
    content = saved_json(path)
    path.write_text(json.dumps(content | {"schema": 1}))
    with pytest.raises(DataError, match="its schema is 1, and this version of graphopt reads 2"):
        Ranges.load(path)


@pytest.mark.parametrize("key", ["schema", "data", "synthetic", "samples", "method", "shard", "data_digest", "tensors"])
def test_each_key_of_the_head_is_required(tmp_path, key):
    path = tmp_path / "ranges.json"
    content = saved_json(path)
    del content[key]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f'the file has no "{key}"'):
        Ranges.load(path)


OPTIONAL = ("histogram", "channels", "response")


@pytest.mark.parametrize("key", [key for key in RELU.__dataclass_fields__ if key not in OPTIONAL])
def test_each_key_of_a_tensor_is_required(tmp_path, key):
    path = tmp_path / "ranges.json"
    content = saved_json(path)
    del content["tensors"]["/conv/Relu:0"][key]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"tensor '/conv/Relu:0' has no \"{key}\""):
        Ranges.load(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("minimum", "0"), ("maximum", None), ("maximum", True), ("method", 3), ("count", 1.5), ("mean", "0.4")],
)
def test_a_value_of_another_type_is_named(tmp_path, key, value):
    path = tmp_path / "ranges.json"
    content = saved_json(path)
    content["tensors"]["/conv/Relu:0"][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"\"{key}\" of tensor '/conv/Relu:0' cannot be"):
        Ranges.load(path)


def test_a_number_that_no_float_holds_is_refused(tmp_path):
    path = tmp_path / "ranges.json"
    content = saved_json(path)
    content["tensors"]["/conv/Relu:0"]["maximum"] = 10**400
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="not a ranges file that can be used: int too large"):
        Ranges.load(path)


@pytest.mark.parametrize(("low", "high"), [(1, 0), (0, math.inf), (math.nan, 1), (-math.inf, 0)])
@pytest.mark.parametrize("observed", [False, True])
def test_bounds_that_are_no_range_are_refused(tmp_path, low, high, observed):
    path = tmp_path / "ranges.json"
    content = saved_json(path)
    prefix = "observed_" if observed else ""
    content["tensors"]["/conv/Relu:0"].update({f"{prefix}minimum": low, f"{prefix}maximum": high})
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"tensor '/conv/Relu:0': \[.*\] is no range"):
        Ranges.load(path)
