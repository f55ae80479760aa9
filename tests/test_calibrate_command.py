import json
from pathlib import Path

import numpy as np
import pytest

from graphopt.cli import main
from graphopt.ranges import Ranges

MODELS = Path(__file__).parents[1] / "models"
MODEL = str(MODELS / "fmnist_resnet.onnx")
DATA = str(MODELS / "fashion_mnist_calibration.npz")
ARGUMENTS = [MODEL, "--data", DATA, "--samples", "40"]


@pytest.mark.parametrize(
    ("asked", "calibrating"), [(["--method", "search"], "calibrate"), ([], "calibrate:method=mse")]
)
def test_calibrate_writes_what_optimize_reads(asked, calibrating, tmp_path, capsys):
    ranges, result = tmp_path / "ranges.json", tmp_path / "result.onnx"
    assert main(["calibrate", *ARGUMENTS, *asked, "-o", str(ranges)]) == 0
    out, err = capsys.readouterr()
    assert "ranges of 18 tensors for ort-cpu, 40 samples" in out
    assert f"wrote {ranges}" in out.replace("\n", "")
    assert err == ""
    one = ["optimize", MODEL, "--data", DATA, "--samples", "40", "--no-verify", "--json"]
    assert main([*one, "--passes", "fold,qdq", "--ranges", str(ranges), "-o", str(result)]) == 0
    again = tmp_path / "again.onnx"
    assert main([*one, "--passes", f"fold,{calibrating},qdq", "-o", str(again)]) == 0
    assert result.read_bytes() == again.read_bytes()


def test_json_is_the_file(tmp_path, capsys):
    path = tmp_path / "ranges.json"
    assert main(["calibrate", *ARGUMENTS, "--method", "minmax", "--json", "-o", str(path)]) == 0
    assert capsys.readouterr().out == path.read_text()


def test_shards_merge_on_the_command_line(tmp_path, capsys):
    parts = [str(tmp_path / f"part{number}.json") for number in (1, 2)]
    for number, part in enumerate(parts, 1):
        assert main(["calibrate", *ARGUMENTS, "--shard", f"{number}/2", "-o", part]) == 0
    assert main(["merge-ranges", *parts, "-o", str(tmp_path / "all.json")]) == 0
    assert main(["calibrate", *ARGUMENTS, "--histograms", "-o", str(tmp_path / "whole.json")]) == 0
    assert (tmp_path / "all.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    capsys.readouterr()
    entropy = str(tmp_path / "entropy.json")
    assert main(["merge-ranges", str(tmp_path / "all.json"), "--method", "entropy", "-o", entropy]) == 0
    assert {found.method for found in Ranges.load(entropy).tensors.values()} == {"entropy"}
    assert main(["merge-ranges", parts[0], "-o", str(tmp_path / "half.json")]) == 2
    assert capsys.readouterr().err == "error: shard 2/2 is missing: calibrate it too\n"
    assert not (tmp_path / "half.json").exists()


def test_channels_are_in_the_file_and_merge_to_rounding(tmp_path):
    whole, parts, merged = tmp_path / "whole.json", [tmp_path / f"{n}.json" for n in (1, 2)], tmp_path / "merged.json"
    assert main(["calibrate", *ARGUMENTS, "--channels", "-o", str(whole)]) == 0
    tensors = Ranges.load(whole).tensors
    assert all(found.channels is not None for found in tensors.values())
    for found in tensors.values():
        assert found.channels.minima.min() == found.observed_minimum
        assert found.channels.maxima.max() == found.observed_maximum
        assert found.channels.counts.sum() == found.count
    for number, part in enumerate(parts, 1):
        assert main(["calibrate", *ARGUMENTS, "--channels", "--shard", f"{number}/2", "-o", str(part)]) == 0
    assert main(["merge-ranges", *map(str, parts), "--method", "minmax", "-o", str(merged)]) == 0
    for name, found in Ranges.load(merged).tensors.items():
        assert found.channels.mean == pytest.approx(tensors[name].channels.mean, rel=1e-9, abs=1e-12)
        assert found.channels.variance == pytest.approx(tensors[name].channels.variance, rel=1e-9, abs=1e-12)


def test_channels_without_data_are_refused(tmp_path, capsys):
    for options in (["--channels"], ["--channels", "--method", "data-free"]):
        assert main(["calibrate", MODEL, *options, "-o", str(tmp_path / "r.json")]) == 2
        assert "calibrate:channels needs data" in capsys.readouterr().err


def test_merging_keeps_what_the_file_says_unless_it_is_told_otherwise(tmp_path, capsys):
    kept, other = str(tmp_path / "kept.json"), str(tmp_path / "other.json")
    asked = ["--method", "percentile", "--percent", "99", "--histograms"]
    assert main(["calibrate", *ARGUMENTS, *asked, "-o", kept]) == 0
    assert main(["merge-ranges", kept, "--target", "tensorrt", "-o", other]) == 0
    assert (Ranges.load(other).percent, Ranges.load(other).method.value) == (99, "percentile")
    assert main(["merge-ranges", kept, "--percent", "90", "-o", other, "--overwrite"]) == 0
    assert Ranges.load(other).percent == 90
    name = next(iter(Ranges.load(kept).tensors))
    assert Ranges.load(other).tensors[name].maximum < Ranges.load(kept).tensors[name].maximum
    with pytest.raises(SystemExit):
        main(["merge-ranges", kept, "--percent", "0", "-o", other, "--overwrite"])
    assert "percent above 0 and at most 100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "entropi"], "no method is called 'entropi'; there are: search, auto, minmax"),
        (["--shard", "3"], "'3' is no shard: give I/N"),
        (["--shard", "3/2"], "there is no shard 3/2"),
        (["--passes", "fold,calibrate"], "the passes of calibrate are those that come before it"),
        (["--passes", "fodl"], "no pass is called 'fodl'"),
        (["--target", "gpu"], "gpu"),
        (["--percent", "0"], "percent must be above 0"),
        (["--memory-budget", "0"], "number of MiB from 1 up"),
    ],
)
def test_a_wrong_request_is_one_line_and_leaves_no_file(tmp_path, capsys, options, message):
    try:
        code = main(["calibrate", *ARGUMENTS, *options, "-o", str(tmp_path / "ranges.json")])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_refused_before_the_work(tmp_path, capsys):
    path = tmp_path / "ranges.json"
    path.write_text("mine")
    assert main(["calibrate", *ARGUMENTS, "-o", str(path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert main(["calibrate", *ARGUMENTS, "-o", str(path), "--overwrite"]) == 0


def test_a_sample_that_is_not_finite_names_its_file(tmp_path, capsys):
    for number in range(3):
        array = np.random.default_rng(number).random((1, 1, 28, 28)).astype(np.float32)
        if number == 1:
            array[0, 0, 3, 3] = np.nan
        np.savez(tmp_path / f"{number}.npz", input=array)
    out = tmp_path / "out"
    out.mkdir()
    assert main(["calibrate", MODEL, "--data", str(tmp_path), "-o", str(out / "r.json")]) == 2
    assert capsys.readouterr().err.startswith(f"error: input input has NaN in {tmp_path / '1.npz'}: leave that sample")
    assert list(out.iterdir()) == []


def test_what_is_wrong_with_the_data_is_a_warning_and_in_the_report(tmp_path, capsys):
    data = {"input": np.zeros((5, 1, 28, 28), np.float32)}
    np.savez(tmp_path / "zeros.npz", **data)
    out = tmp_path / "out.onnx"
    arguments = ["optimize", MODEL, "--passes", "fold,calibrate,qdq", "--data", str(tmp_path / "zeros.npz"), "--json"]
    assert main([*arguments, "-o", str(out)]) == 0
    printed, err = capsys.readouterr()
    assert "5 of 5 samples hold one value throughout" in err
    assert "4 of 5 samples repeat another one" in err
    assert any("repeat another" in warning for warning in json.loads(printed)["warnings"])
