"""The command line: what a user types, and what they get when it is wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from graphopt.cli import FAILED, OK, WRONG, main

MODELS = Path(__file__).resolve().parent.parent / "models"
DATA = MODELS / "fashion_mnist_calibration.npz"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder with a copy of the residual net in it."""
    shutil.copy(MODELS / "fmnist_resnet.onnx", tmp_path / "net.onnx")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_main_job_needs_no_other_flag(folder, capsys):
    assert main(["optimize", "net.onnx", "--passes", "fold,calibrate,qdq"]) == OK
    shown = capsys.readouterr()
    assert files(folder) == ["net.onnx", "net.opt.onnx"]
    onnx.checker.check_model(onnx.load("net.opt.onnx"), full_check=True)
    assert "made-up inputs" in shown.err
    assert "SQNR" in shown.out
    assert max(len(line) for line in shown.out.splitlines()) <= 100


def test_with_data_the_result_agrees_with_the_float_model(folder, capsys):
    command = [
        "optimize",
        "net.onnx",
        "--passes",
        "fold,calibrate,qdq",
        "--data",
        str(DATA),
        "--samples",
        "64",
        "--json",
    ]
    assert main(command) == OK
    report = json.loads(capsys.readouterr().out)
    (output,) = report["check"]["comparison"]["outputs"]
    assert output["sqnr_db"] > 20
    assert output["agreement"] > 0.9
    assert not report["synthetic"]
    assert [record["text"] for record in report["passes"]] == ["fold", "calibrate", "qdq"]
    assert report["check"]["other_nbytes"] < report["check"]["reference_nbytes"] / 2


@pytest.mark.parametrize("target", ["ort-cpu", "ort-arm", "tensorrt"])
def test_every_target_gives_a_model_that_runs(folder, target):
    command = ["optimize", "net.onnx", "--passes", "fold,calibrate,qdq", "--target", target, "-o", "out.onnx"]
    assert main([*command, "--data", str(DATA), "--samples", "16"]) == OK
    assert main(["check", "net.onnx", "out.onnx", "--data", str(DATA), "--samples", "16", "--min-sqnr", "20"]) == OK


def test_ranges_are_written_by_calibrate_and_read_without_it(folder):
    assert main(["optimize", "net.onnx", "--passes", "fold,calibrate", "--ranges", "r.json", "-o", "a.onnx"]) == OK
    assert main(["optimize", "a.onnx", "--passes", "qdq", "--ranges", "r.json", "-o", "b.onnx"]) == OK
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load("b.onnx").graph.node)


def test_a_report_is_written(folder):
    assert main(["optimize", "net.onnx", "--passes", "fold", "--report", "r.json"]) == OK
    assert json.loads(Path("r.json").read_text(encoding="utf-8"))["passes"][0]["rewrites"] > 0


def test_check_exits_with_1_under_a_limit(folder, capsys):
    assert main(["check", "net.onnx", "net.onnx", "--min-sqnr", "20", "--min-agreement", "1"]) == OK
    main(["optimize", "net.onnx", "--passes", "fold,calibrate,qdq", "-o", "q.onnx"])
    assert main(["check", "net.onnx", "q.onnx", "--min-sqnr", "200"]) == FAILED
    assert "below 200 dB" in capsys.readouterr().err


def test_check_shows_layers(folder, capsys):
    main(["optimize", "net.onnx", "--passes", "fold,calibrate,qdq", "-o", "q.onnx"])
    capsys.readouterr()
    assert main(["check", "net.onnx", "q.onnx", "--layers", "--samples", "4", "--json"]) == OK
    layers = json.loads(capsys.readouterr().out)["layers"]["outputs"]
    assert len(layers) > 5


def test_inspect_prints_one_json_document(folder, capsys):
    assert main(["inspect", "net.onnx", "--json"]) == OK
    shown = json.loads(capsys.readouterr().out)
    assert 150_000 < shown["parameters"] < 160_000


def test_passes_lists_options_with_defaults(capsys):
    assert main(["passes"]) == OK
    shown = capsys.readouterr().out
    for word in ("fold", "calibrate", "qdq", "method", "reduce_range"):
        assert word in shown


def _broken(name):
    content = {
        "text.onnx": b"hello, this is a text file\n" * 10,
        "empty.onnx": b"",
        "short.onnx": (MODELS / "fmnist_resnet.onnx").read_bytes()[:300_000],
    }
    Path(name).write_bytes(content[name])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["net.onnx", "--passes", "fold,qqd"], ["'qqd'", "did you mean 'qdq'"]),
        (["net.onnx", "--passes", "calibrate:methd=entropy"], ["'methd'", "method"]),
        (["net.onnx", "--passes", "calibrate:method=best"], ["minmax|", "'best'"]),
        (["net.onnx", "--passes", "qdq"], ["needs ranges", "calibrate"]),
        (["net.onnx", "--passes", "qdq", "--ranges", "none.json"], ["none.json"]),
        (["net.onnx", "--passes", "fold", "--target", "gpu"], ["'gpu'", "ort-cpu"]),
        (["none.onnx", "--passes", "fold"], ["none.onnx", "no such file"]),
        ([".", "--passes", "fold", "-o", "out.onnx"], ["folder"]),
        (["text.onnx", "--passes", "fold"], ["text.onnx", "text file"]),
        (["empty.onnx", "--passes", "fold"], ["empty.onnx", "empty"]),
        (["short.onnx", "--passes", "fold"], ["short.onnx", "its end is missing"]),
        (["net.onnx", "--passes", "fold", "-o", "net.onnx"], ["it is an input"]),
        (["net.onnx", "--passes", "fold", "-o", "net.onnx", "--overwrite"], ["it is an input"]),
        (["net.onnx", "--passes", "fold", "-o", "there.onnx"], ["there.onnx", "--overwrite"]),
        (["net.onnx", "--passes", "fold", "-o", "no/such/out.onnx"], ["no/such", "create it first"]),
        (["net.onnx", "--passes", "fold", "--report", "r.txt"], [".json", "r.txt"]),
        (["net.onnx", "--passes", "fold", "--data", "none.npz"], ["none.npz", "no such file"]),
        (["net.onnx", "--passes", "fold", "--data", "names.npz"], ["'input'", "'image'"]),
        (["net.onnx", "--passes", "fold", "--data", "shapes.npz"], ["(4, 3, 28, 28)", "[N, 1, 28, 28]"]),
        (["net.onnx", "--passes", "fold", "--data", "types.npz"], ["uint8", "scale it yourself"]),
        (["net.onnx", "--passes", "fold", "--samples", "0", "--data", "types.npz"], ["at least 1"]),
    ],
)
def test_a_mistake_is_one_clear_line_and_leaves_no_file(folder, capsys, arguments, words):
    if arguments[0] in ("text.onnx", "empty.onnx", "short.onnx"):
        _broken(arguments[0])
    Path("there.onnx").write_bytes(b"mine")
    np.savez("names.npz", image=np.zeros((4, 1, 28, 28), np.float32))
    np.savez("shapes.npz", input=np.zeros((4, 3, 28, 28), np.float32))
    np.savez("types.npz", input=np.zeros((4, 1, 28, 28), np.uint8))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["optimize", *arguments]) == WRONG
    shown = capsys.readouterr()
    assert shown.out == ""
    message = shown.err.strip()
    assert message.startswith("error:")
    assert "\n" not in message
    for word in words:
        assert word in message
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_one_clear_line(folder, capsys, monkeypatch):
    def refuse(path, *rest):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("graphopt.files.os.open", refuse)  # root, who may run the tests, may write everywhere
    assert main(["optimize", "net.onnx", "--passes", "fold", "-o", "out.onnx"]) == WRONG
    message = capsys.readouterr().err.strip()
    assert message == "error: cannot write out.onnx: Permission denied"
    assert files(folder) == ["net.onnx"]


def test_a_file_where_a_folder_should_be_is_one_clear_line(folder, capsys):
    Path("sealed").write_bytes(b"")
    assert main(["optimize", "net.onnx", "--passes", "fold", "-o", "sealed/out.onnx"]) == WRONG
    message = capsys.readouterr().err.strip()
    assert "sealed" in message
    assert "\n" not in message


def test_a_full_disk_leaves_nothing_behind(folder, capsys, monkeypatch):
    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["optimize", "net.onnx", "--passes", "fold"]) == WRONG
    assert "No space left on device" in capsys.readouterr().err
    assert files(folder) == ["net.onnx"]


def test_the_installed_command_runs_in_a_shell(folder):
    done = subprocess.run(
        [sys.executable, "-m", "graphopt.cli", "optimize", "none.onnx", "--passes", "fold"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (WRONG, "")
    assert done.stderr.strip() == "error: none.onnx: no such file"
