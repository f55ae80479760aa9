import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from PIL import Image

from graphopt.cli import main
from graphopt.data import load_samples
from graphopt.errors import DataError
from graphopt.feeds import InputSpec

MODELS = Path(__file__).parents[1] / "models"
FLOAT = np.dtype(np.float32)
GRAY = [InputSpec("input", FLOAT, ("N", 1, 28, 28))]


def folder_of(path, names, size=(28, 28)):
    for seed, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(path / name)
    return path


def test_images_are_found_in_folders_in_order_and_decoded_when_they_are_asked_for(tmp_path):
    folder = folder_of(tmp_path, ["b/2.png", "a.JPEG", "b/1.bmp"])
    (folder / "notes.txt").write_text("no image")
    samples = load_samples(folder, GRAY)
    assert samples.count == 3
    assert [Path(feed.where).name for feed in samples] == ["a.JPEG", "1.bmp", "2.png"]
    assert all(feed["input"].shape == (1, 1, 28, 28) and feed["input"].max() <= 1 for feed in samples)
    (folder / "b" / "2.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"2\.png: cannot be read as an image"):
        list(samples)


def test_without_preprocess_a_note_says_what_is_assumed(tmp_path):
    folder = folder_of(tmp_path, ["1.png"])
    assert "pixels / 255 is assumed" in load_samples(folder, GRAY).notes[0]
    assert load_samples(folder, GRAY, preprocess="scale=255").notes == ()


def test_a_fixed_batch_takes_as_many_images_and_leaves_out_the_rest(tmp_path):
    folder = folder_of(tmp_path, [f"{number}.png" for number in range(5)])
    samples = load_samples(folder, [InputSpec("x", FLOAT, (2, 3, "H", "W"))], preprocess="scale=1")
    assert [feed["x"].shape for feed in samples] == [(2, 3, 28, 28)] * 2
    assert samples.notes == (f"{folder}: the last 1 images are left out: the model takes 2 at a time",)


def test_a_batch_of_images_of_other_sizes_is_refused(tmp_path):
    folder_of(tmp_path, ["1.png"])
    folder_of(tmp_path, ["2.png"], size=(30, 28))
    spec = [InputSpec("x", FLOAT, (2, 3, "H", "W"))]
    with pytest.raises(DataError, match="differ in size, but the model takes 2 at a time: add resize=HEIGHTxWIDTH"):
        load_samples(tmp_path, spec, preprocess="scale=1")


def test_an_input_without_a_batch_axis_gets_one_image(tmp_path):
    (feed,) = load_samples(folder_of(tmp_path, ["1.png"]), [InputSpec("x", FLOAT, ("H", "W", 3))])
    assert feed["x"].shape == (28, 28, 3)


def test_an_image_that_does_not_fit_names_its_file(tmp_path):
    folder = folder_of(tmp_path, ["1.png"])
    with pytest.raises(DataError, match=r"1\.png: .*smaller than the crop"):
        load_samples(folder, GRAY, preprocess="crop=64")
    with pytest.raises(DataError, match=r"1\.png.*has shape \(1, 1, 20, 20\)"):
        load_samples(folder, GRAY, preprocess="crop=20")


@pytest.mark.parametrize(
    "inputs",
    [
        [],
        [*GRAY, InputSpec("mask", FLOAT, (1,))],
        [InputSpec("x", FLOAT, (1, 8))],
        [InputSpec("x", np.dtype("O"), (1, 1, 2, 2))],
    ],
)
def test_a_model_of_another_kind_is_refused(tmp_path, inputs):
    with pytest.raises(DataError, match="images are for a model with one input of rank 4 or 3"):
        load_samples(folder_of(tmp_path, ["1.png"]), inputs)


def test_preprocess_without_images_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", input=np.zeros((1, 1, 28, 28), np.float32))
    with pytest.raises(DataError, match="preprocess is for a folder of images"):
        load_samples(tmp_path / "x.npz", GRAY, preprocess="scale=1")


def test_without_pillow_the_error_names_the_extra(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, ["1.png"])
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"pip install 'graphopt\[images\]'"):
        load_samples(folder, GRAY)


def test_the_command_line_takes_a_folder_of_images(tmp_path, capsys):
    folder = folder_of(tmp_path / "photos", [f"{number}.png" for number in range(3)])
    out = tmp_path / "out.onnx"
    arguments = [str(MODELS / "fmnist_resnet.onnx"), "--data", str(folder), "--preprocess", "order=gray:scale=255"]
    assert main(["optimize", *arguments, "--passes", "fold,calibrate,qdq", "-o", str(out)]) == 0
    assert "assumed" not in capsys.readouterr().err
    assert main(["check", str(MODELS / "fmnist_resnet.onnx"), str(out), *arguments[1:]]) == 0
    assert main(["check", str(MODELS / "fmnist_resnet.onnx"), str(out), "--preprocess", "scale=1"]) == 2
    assert "name their folder with --data" in capsys.readouterr().err


def test_images_of_any_size_go_through_a_model_that_takes_them(tmp_path):
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3, H, W] x) => (float[N, 8, P, Q] y) <float[8, 3, 1, 1] w = {WEIGHTS}> { y = Conv (x, w) }
    """.replace("WEIGHTS", ", ".join(["0.5"] * 24))
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    for number, size in enumerate([(9, 7), (7, 9), (5, 5)]):
        folder_of(tmp_path / "photos", [f"{number}.png"], size)
    arguments = [str(tmp_path / "model.onnx"), "--data", str(tmp_path / "photos"), "--preprocess", "scale=255"]
    assert main(["calibrate", *arguments, "-o", str(tmp_path / "ranges.json")]) == 0
