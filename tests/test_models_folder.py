"""What models/README.md promises of the committed files, and how fetch.py fails; no test here needs a network."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "models"
FILES = re.findall(r"^\| `(\S+)` \|.*\| `([0-9a-f]{64})` \|$", (FOLDER / "README.md").read_text("utf-8"), re.MULTILINE)


@pytest.fixture
def fetch(monkeypatch):
    """The module models/fetch.py."""
    monkeypatch.syspath_prepend(str(FOLDER))  # it imports catalogue as a sibling
    spec = importlib.util.spec_from_file_location("fetch_of_models_folder", FOLDER / "fetch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=FOLDER, capture_output=True, text=True, check=False)


def test_the_readme_lists_every_committed_model_and_sample():
    names = {path.name for suffix in ("onnx", "npz", "csv") for path in FOLDER.glob(f"*.{suffix}")}
    assert {name for name, _ in FILES} == names


@pytest.mark.parametrize(("name", "sha256"), FILES)
def test_a_committed_file_has_the_digest_of_the_readme(name, sha256):
    assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == sha256


@pytest.mark.parametrize(
    ("name", "arrays"),
    [
        ("calibration", {"input": (256, 1, 28, 28)}),
        ("evaluation", {"input": (512, 1, 28, 28), "label": (512,)}),
        ("small_calibration", {"input": (256, 1, 14, 14)}),
        ("small_evaluation", {"input": (512, 1, 14, 14), "target": (512, 1, 28, 28)}),
    ],
)
def test_samples_have_the_promised_arrays(name, arrays):
    with np.load(FOLDER / f"fashion_mnist_{name}.npz") as stored:
        assert {key: stored[key].shape for key in stored} == arrays
        for key in stored:
            values = stored[key]
            assert values.dtype == (np.int64 if key == "label" else np.float32)
            assert values.min() == 0
            assert values.max() <= (9 if key == "label" else 1)


@pytest.mark.parametrize("name", ["fmnist_resnet", "fmnist_mbv2", "fmnist_srunet"])
def test_nets_are_what_the_readme_says(name):
    model = onnx.load(FOLDER / f"{name}.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 17)]
    assert model.ir_version == 8
    (value,), (result,) = model.graph.input, model.graph.output
    assert (value.name, result.name) == ("input", "output")
    assert {each.type.tensor_type.elem_type for each in (value, result)} == {onnx.TensorProto.FLOAT}
    sizes = [size.dim_value or size.dim_param for size in value.type.tensor_type.shape.dim]
    assert sizes == (["N", 1, 14, 14] if name == "fmnist_srunet" else ["N", 1, 28, 28])
    assert any(node.op_type == "BatchNormalization" for node in model.graph.node)


def test_fetch_lists_every_model_and_data_set(fetch):
    done = run_script("fetch.py", "--list")
    assert (done.returncode, done.stderr) == (0, "")
    known = fetch.load_catalogue()
    assert len(done.stdout.splitlines()) == len(known.models) + len(known.data)
    for name in (*known.models, *known.data):
        assert name in done.stdout


@pytest.mark.parametrize("script", ["fetch.py", "feeds.py"])
def test_a_wrong_name_exits_with_2_and_a_line_that_lists_the_right_ones(script):
    if script == "feeds.py":
        for needed in ("PIL", "tokenizers"):
            pytest.importorskip(needed, reason="making feeds needs the extra zoo")
    done = run_script(script, "resnet_of_nobody")
    assert (done.returncode, done.stdout) == (2, "")
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "resnet_of_nobody" in errors[0]
    assert "ppocrv4_det" in errors[0]
    assert "Traceback" not in done.stderr


def one_model(fetch, monkeypatch, content: bytes, served: bytes):
    """A model whose recorded digest is that of `content`, in a package that holds `served`."""
    model = fetch.Model(
        name="net",
        sha256=hashlib.sha256(content).hexdigest(),
        licence="MIT",
        may_be_redistributed=True,
        data=[],
        package="pypi:nets==1",
        path="nets/net.onnx",
    )

    def download(_, scratch: Path) -> Path:
        archive = scratch / "nets-1.whl"
        with zipfile.ZipFile(archive, "w") as packed:
            packed.writestr("nets/net.onnx", served)
        return archive

    monkeypatch.setattr(fetch, "download", download)
    return model


def test_a_model_is_written_whole_then_present(fetch, monkeypatch, tmp_path):
    model = one_model(fetch, monkeypatch, b"weights", b"weights")
    scratch, zoo = tmp_path / "scratch", tmp_path / "zoo"
    scratch.mkdir()
    assert fetch.fetch_model(model, zoo, scratch) == "fetched"
    monkeypatch.setattr(fetch, "download", None)  # must not be asked again
    assert fetch.fetch_model(model, zoo, scratch) == "present"
    assert [path.name for path in (zoo / "models").iterdir()] == ["net.onnx"]


def test_half_a_download_leaves_no_file_and_says_so(fetch, monkeypatch, tmp_path, capsys):
    model = one_model(fetch, monkeypatch, b"weights", b"weig")
    scratch, zoo = tmp_path / "scratch", tmp_path / "zoo"
    scratch.mkdir()
    assert fetch.fetch_item(model, zoo, scratch) is False
    assert re.fullmatch(r"models/net\.onnx +MISSING: differs: .*sha256 .*\n", capsys.readouterr().out)
    assert not zoo.exists()


def test_a_full_disk_leaves_no_file(fetch, monkeypatch, tmp_path):
    model = one_model(fetch, monkeypatch, b"weights", b"weights")
    write = Path.write_bytes

    def fill_up(path: Path, content: bytes) -> None:
        write(path, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    with pytest.raises(fetch.FetchError, match="No space left"):
        fetch.fetch_model(model, tmp_path / "zoo", tmp_path)
    assert list((tmp_path / "zoo" / "models").iterdir()) == []


def test_a_missing_tool_is_named(fetch, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(fetch.FetchError, match="npm is not installed"):
        fetch.download(fetch.Package.parse("npm:nets==1"), tmp_path)
