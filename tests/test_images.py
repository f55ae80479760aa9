"""Folders of images as data: how files are decoded, fitted to the model's input, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tracemalloc
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from texts import model_of

import graphopt
from graphopt.cli import OK, WRONG, main
from graphopt.data import load_samples
from graphopt.errors import DataError
from graphopt.feeds import Array, InputSpec
from graphopt.preprocess import Preprocess

FLOAT32 = np.dtype(np.float32)
AS_IT_IS = "scale=1"
ORIENTATION = 0x0112  # the EXIF tag


def image_input(*shape: int | str | None, dtype: str = "float32") -> tuple[InputSpec]:
    return (InputSpec("image", np.dtype(dtype), shape),)


OPEN_NCHW = image_input("N", 3, "H", "W")
OPEN_NHWC = image_input("N", None, None, 3)
OPEN_GRAY = image_input("N", 1, "H", "W")


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path: Path, pixels: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def only_feed(folder: Path, inputs: tuple[InputSpec, ...], preprocess: str | None = AS_IT_IS) -> Array:
    (feed,) = load_samples(folder, inputs, preprocess=preprocess)
    return feed["image"]


def refused(*parts: str) -> AbstractContextManager[object]:
    """A DataError of one line whose message holds these parts in this order."""
    return pytest.raises(DataError, match="^" + ".*".join(["", *map(re.escape, parts), ""]) + "$")


class TestPixels:
    def test_the_usual_request_gives_what_torchvision_gives(self, tmp_path):
        pixels = save(tmp_path / "1.png", noise(300, 401))
        found = only_feed(
            tmp_path,
            OPEN_NCHW,
            "resize=256:crop=224:mean=0.485+0.456+0.406:std=0.229+0.224+0.225",
        )
        resized = Image.fromarray(pixels).resize((int(256 * 401 / 300), 256), Image.Resampling.BILINEAR)
        left, top = int(round((resized.width - 224) / 2.0)), int(round((256 - 224) / 2.0))  # noqa: RUF046 - as it is there
        middle = np.asarray(resized)[top : top + 224, left : left + 224].astype(np.float64)
        expected = (middle / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected.transpose(2, 0, 1)[None], atol=1e-6)

    def test_the_shorter_side_of_an_upright_image_is_its_width(self, tmp_path):
        save(tmp_path / "1.png", noise(50, 30))
        assert only_feed(tmp_path, OPEN_NCHW, "resize=15").shape == (1, 3, 25, 15)

    def test_an_exact_size_is_height_by_width(self, tmp_path):
        save(tmp_path / "1.png", noise(50, 30))
        assert only_feed(tmp_path, OPEN_NCHW, "resize=20x40").shape == (1, 3, 20, 40)
        assert only_feed(tmp_path, OPEN_NCHW, "crop=20x10").shape == (1, 3, 20, 10)

    @pytest.mark.parametrize("name", ["bilinear", "bicubic", "nearest", "lanczos", "box"])
    def test_interpolates_as_asked(self, tmp_path, name):
        pixels = save(tmp_path / "1.png", noise(50, 30))
        found = only_feed(tmp_path, OPEN_NHWC, f"resize=17x13:interpolation={name}:scale=1")
        expected = np.asarray(Image.fromarray(pixels).resize((13, 17), Image.Resampling[name.upper()]))
        np.testing.assert_array_equal(found[0], expected)

    def test_layouts_and_orders(self, tmp_path):
        pixels = save(tmp_path / "1.png", noise(6, 5))
        np.testing.assert_array_equal(only_feed(tmp_path, OPEN_NHWC), pixels[None])
        np.testing.assert_array_equal(only_feed(tmp_path, OPEN_NCHW), pixels.transpose(2, 0, 1)[None])
        swapped = pixels[..., ::-1].astype(np.float32)
        np.testing.assert_array_equal(only_feed(tmp_path, OPEN_NHWC, "order=bgr:scale=1"), swapped[None])
        found = only_feed(tmp_path, OPEN_NHWC, "order=bgr:scale=1:mean=1+2+3:std=2+4+8")  # of blue, green, red
        np.testing.assert_array_equal(found[0], (swapped - [1, 2, 3]) / [2, 4, 8])

    def test_one_channel_is_gray_and_every_feed_is_contiguous(self, tmp_path):
        pixels = save(tmp_path / "1.png", noise(6, 5))
        found = only_feed(tmp_path, OPEN_GRAY)
        red, green, blue = np.moveaxis(pixels.astype(np.float64), -1, 0)
        np.testing.assert_allclose(found[0, 0], 0.299 * red + 0.587 * green + 0.114 * blue, atol=0.51)
        assert found.flags.c_contiguous
        assert only_feed(tmp_path, OPEN_NCHW, "order=bgr").flags.c_contiguous

    def test_a_rank_of_3_has_no_batch(self, tmp_path):
        pixels = save(tmp_path / "1.png", noise(6, 5))
        np.testing.assert_array_equal(only_feed(tmp_path, image_input("H", "W", 3)), pixels)
        np.testing.assert_array_equal(only_feed(tmp_path, image_input(3, 6, 5)), pixels.transpose(2, 0, 1))


class TestFiles:
    @pytest.mark.parametrize("turned", range(1, 9))
    @pytest.mark.parametrize("name", ["1.png", "1.tif"])
    def test_turns_images_upright(self, tmp_path, name, turned):
        exif = Image.Exif()
        exif[ORIENTATION] = turned
        pixels = noise(6, 5)
        Image.fromarray(pixels).save(tmp_path / name, exif=exif)
        mirrored = pixels[:, ::-1]
        ways = [pixels, mirrored, pixels[::-1, ::-1], pixels[::-1]]
        ways += [each.swapaxes(0, 1) for each in (pixels, pixels[::-1], pixels[::-1, ::-1], mirrored)]
        np.testing.assert_array_equal(only_feed(tmp_path, OPEN_NHWC)[0], ways[turned - 1])

    def test_lays_what_is_transparent_over_white(self, tmp_path):
        pixels = noise(1, 3, 4)
        pixels[0, :, 3] = [255, 0, 128]
        save(tmp_path / "1.png", pixels)
        found = only_feed(tmp_path, OPEN_NHWC)[0, 0]
        np.testing.assert_array_equal(found[0], pixels[0, 0, :3])
        np.testing.assert_array_equal(found[1], [255, 255, 255])
        np.testing.assert_allclose(found[2], (pixels[0, 2, :3] * 128.0 + 255 * 127.0) / 255, atol=1)

    def test_reads_palettes_with_and_without_a_transparent_entry(self, tmp_path):
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.putdata([0, 1])
        image.save(tmp_path / "1.png")
        image.save(tmp_path / "2.png", transparency=b"\x00\xff")
        first, second = (feed["image"][0, 0] for feed in load_samples(tmp_path, OPEN_NHWC, preprocess=AS_IT_IS))
        np.testing.assert_array_equal(first, [[10, 20, 30], [200, 100, 50]])
        np.testing.assert_array_equal(second, [[255, 255, 255], [200, 100, 50]])

    def test_spreads_gray_over_three_channels(self, tmp_path):
        pixels = save(tmp_path / "1.png", noise(4, 5, channels=1))
        np.testing.assert_array_equal(only_feed(tmp_path, OPEN_NHWC)[0], np.stack([pixels] * 3, axis=-1))

    @pytest.mark.parametrize("name", ["1.png", "1.tif", "1.ppm"])
    def test_rounds_16_bits_to_8(self, tmp_path, name):
        levels = np.array([[0, 128, 129, 257, 32768, 65406, 65535]], np.uint16)
        if name.endswith("ppm"):
            (tmp_path / name).write_bytes(b"P5 7 1 65535\n" + levels.astype(">u2").tobytes())
        else:
            save(tmp_path / name, levels)
        np.testing.assert_array_equal(only_feed(tmp_path, OPEN_GRAY)[0, 0], [[0, 0, 1, 1, 128, 254, 255]])

    def test_reads_black_and_white_and_cmyk(self, tmp_path):
        Image.fromarray(np.array([[True, False]])).save(tmp_path / "1.png")
        Image.new("CMYK", (2, 1)).save(tmp_path / "2.tif")
        first, second = (feed["image"][0, 0] for feed in load_samples(tmp_path, OPEN_NHWC, preprocess=AS_IT_IS))
        np.testing.assert_array_equal(first, [[255] * 3, [0] * 3])
        np.testing.assert_array_equal(second, [[255] * 3] * 2)

    def test_takes_the_first_frame_of_an_animation(self, tmp_path):
        frames = [Image.new("RGB", (3, 2), color) for color in ("white", "black")]
        frames[0].save(tmp_path / "1.gif", save_all=True, append_images=frames[1:])
        with Image.open(tmp_path / "1.gif") as saved:
            assert saved.n_frames == 2
        assert (only_feed(tmp_path, OPEN_NHWC) == 255).all()

    def test_finds_files_below_in_sorted_order_whatever_the_case(self, tmp_path):
        names = ["b/2.PNG", "a.jpeg", "b/1.webp", "c.TIFF", "d.bmp"]
        for level, name in enumerate(sorted(names)):
            save(tmp_path / name, np.full((2, 2), level * 40, np.uint8))
        for name in ("b/.hidden.png", "b/readme.txt"):
            (tmp_path / name).write_text("no image")
        (tmp_path / "e.png").mkdir()
        feeds = list(load_samples(tmp_path, OPEN_GRAY, preprocess=AS_IT_IS))
        np.testing.assert_allclose([feed["image"].mean() for feed in feeds], [0, 40, 80, 120, 160], atol=2)

    @pytest.mark.parametrize("kept", [0, 20, 0.5])
    @pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tif", "webp", "bmp"])
    def test_a_damaged_file_is_named(self, tmp_path, suffix, kept):
        save(tmp_path / "1.png", noise(60, 60))
        damaged = tmp_path / f"2.{suffix}"
        save(damaged, noise(60, 60))
        content = damaged.read_bytes()
        damaged.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
        samples = load_samples(tmp_path, OPEN_NCHW, preprocess=AS_IT_IS)
        with refused(f"{damaged}: cannot be read as an image: "):
            list(samples)

    def test_floats_and_wider_integers_are_refused(self, tmp_path):
        Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "1.tif")
        with refused("1.tif: cannot be read as an image: its pixels are floats of an unknown range"):
            only_feed(tmp_path, OPEN_GRAY)
        Image.fromarray(np.full((2, 2), 70000, np.int32)).save(tmp_path / "1.tif")
        with refused("1.tif: cannot be read as an image: its pixels have more than 16 bits"):
            only_feed(tmp_path, OPEN_GRAY)

    def test_without_pillow_says_what_to_install(self, tmp_path, monkeypatch):
        save(tmp_path / "1.png", noise(2, 2))
        for name in [each for each in sys.modules if each == "PIL" or each.startswith("PIL.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "PIL", None)
        with refused("reading images needs Pillow: pip install 'graphopt[images]'"):
            load_samples(tmp_path, OPEN_NCHW)

    def test_memory_does_not_grow_with_their_number(self, tmp_path):
        save(tmp_path / "0.bmp", noise(256, 256))
        for index in range(1, 30):
            shutil.copy(tmp_path / "0.bmp", tmp_path / f"{index}.bmp")
        samples = load_samples(tmp_path, OPEN_NCHW, preprocess=AS_IT_IS)
        peaks = []
        for count in (3, 30):
            tracemalloc.start()
            assert sum(1 for _ in islice(samples, count)) == count
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert peaks[1] < 1.2 * peaks[0]


class TestModel:
    def test_the_size_that_a_model_fixes_is_the_default(self, tmp_path):
        pixels = save(tmp_path / "1.png", noise(50, 30))
        samples = load_samples(tmp_path, image_input("N", 3, 20, 10))
        expected = np.asarray(Image.fromarray(pixels).resize((10, 20), Image.Resampling.BILINEAR)) / 255
        np.testing.assert_allclose(next(iter(samples))["image"][0], expected.transpose(2, 0, 1), atol=1e-6)
        assert samples.description == f"{tmp_path} with resize=20x10:scale=255:layout=nchw:order=rgb"
        assert samples.count == 1
        (note,) = samples.notes
        text = "resize=20x10:scale=255:layout=nchw:order=rgb"
        assert note.startswith(
            f"{tmp_path}: no --preprocess: images were read as --preprocess {text}, so pixels became"
        )

    def test_a_request_is_no_assumption_and_a_crop_is_of_the_image_as_it_is(self, tmp_path):
        pixels = save(tmp_path / "1.png", noise(50, 30))
        samples = load_samples(tmp_path, image_input("N", 20, 10, 3), preprocess=Preprocess(crop=(20, 10), scale=1))
        np.testing.assert_array_equal(next(iter(samples))["image"][0], pixels[15:35, 10:20])
        assert samples.notes == ()

    def test_open_sizes_give_feeds_of_varying_shape(self, tmp_path):
        save(tmp_path / "1.png", noise(5, 6))
        save(tmp_path / "2.png", noise(7, 8))
        shapes = [feed["image"].shape for feed in load_samples(tmp_path, OPEN_NCHW)]
        assert shapes == [(1, 3, 5, 6), (1, 3, 7, 8)]

    def test_a_fixed_batch_takes_as_many_images(self, tmp_path):
        images = [save(tmp_path / f"{index}.png", noise(6, 5, seed=index)) for index in range(5)]
        samples = load_samples(tmp_path, image_input(2, 6, 5, 3), preprocess=AS_IT_IS)
        feeds = [feed["image"] for feed in samples]
        assert samples.count == 2
        np.testing.assert_array_equal(np.concatenate(feeds), np.stack(images[:4]))
        assert samples.notes == (f"{tmp_path}: the model takes 2 images at a time: the last 1 of 5 were left out",)
        with refused(f"{tmp_path}: the model takes 6 images at a time, and these are only 5"):
            load_samples(tmp_path, image_input(6, 6, 5, 3))

    def test_images_of_one_batch_have_one_size(self, tmp_path):
        save(tmp_path / "1.png", noise(5, 6))
        save(tmp_path / "2.png", noise(7, 8))
        with refused("1.png to ", "2.png: the model takes these images at once, and they differ in size: write resize"):
            load_samples(tmp_path, image_input(2, 3, "H", "W"))

    @pytest.mark.parametrize(
        ("dtype", "preprocess", "offset"),
        [
            ("uint8", "scale=1", 0),
            ("int8", "scale=1:mean=128", 128),
            ("int32", "scale=0.5", None),
            ("float16", "scale=1", 0),
            ("float64", "scale=1:mean=128", 128),
        ],
    )
    def test_the_dtype_is_the_models(self, tmp_path, dtype, preprocess, offset):
        pixels = save(tmp_path / "1.png", noise(16, 16)).astype(int)
        found = only_feed(tmp_path, image_input("N", "H", "W", 3, dtype=dtype), preprocess)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found[0], pixels * 2 if offset is None else pixels - offset)

    @pytest.mark.parametrize(
        ("dtype", "preprocess", "advice"),
        [
            ("uint8", None, "write scale=1 without mean and std for 0..255"),
            ("uint8", "scale=1:mean=1", "an integer of 0..255 for every pixel: write scale=1"),
            ("int8", "scale=1", "an integer of -128..127 for every pixel: write scale=1:mean=128 for -128..127"),
            ("int32", "scale=1:mean=0.5", "write scale=1 without mean and std"),
        ],
    )
    def test_fractions_and_overflows_of_integers_are_refused(self, tmp_path, dtype, preprocess, advice):
        save(tmp_path / "1.png", noise(2, 2))
        with refused(f"{tmp_path}: the model's input takes {dtype}, but", advice):
            load_samples(tmp_path, image_input("N", 3, "H", "W", dtype=dtype), preprocess=preprocess)

    @pytest.mark.parametrize("shape", [("N", None, "H", "W"), (1, 3, 8, 3), ("N", 8, 8, 8), (28, 28, 28)])
    def test_asks_for_the_layout_where_it_is_not_clear(self, tmp_path, shape):
        save(tmp_path / "1.png", noise(8, 8))
        with refused("'image' float32", "are first or last is not clear: write layout=nchw or layout=nhwc in"):
            load_samples(tmp_path, image_input(*shape))

    def test_takes_the_layout_that_is_given(self, tmp_path):
        save(tmp_path / "1.png", noise(8, 3))
        assert only_feed(tmp_path, image_input(1, 3, 8, 3), "layout=nchw").shape == (1, 3, 8, 3)
        assert only_feed(tmp_path, image_input("N", None, "H", "W"), "layout=nhwc").shape == (1, 8, 3, 3)

    @pytest.mark.parametrize(
        ("shape", "preprocess", "advice"),
        [
            (
                (1, 3, 8, 8),
                "order=gray",
                "yields 1 channel, but the model's input 'image' takes float32 [1, 3, 8, 8]: w",
            ),
            ((1, 3, 8, 8), "order=gray", "write layout=nchw:order=rgb or layout=nchw:order=bgr"),
            ((1, 8, 8, 1), "order=bgr", "layout=nhwc:order=bgr yields 3 channels, but"),
            ((1, 8, 8, 1), "order=bgr", "write layout=nhwc:order=gray"),
            ((1, 3, 8, 8), "layout=nhwc", "write layout=nchw:order=rgb"),
            ((1, 4, 8, 8), "scale=1", "takes float32 [1, 4, 8, 8]: give an .npz or file.py:function"),
            ((1, 1, 8, 8), "mean=1+2+3", "'mean' has 3 numbers, but order=gray yields 1 channel: write one number"),
        ],
    )
    def test_channels_that_the_model_does_not_take_are_refused(self, tmp_path, shape, preprocess, advice):
        save(tmp_path / "1.png", noise(8, 8))
        with refused(f"{tmp_path}: ", advice):
            load_samples(tmp_path, image_input(*shape), preprocess=preprocess)

    @pytest.mark.parametrize(
        ("shape", "preprocess", "message"),
        [
            (
                ("N", 3, 9, 9),
                "resize=8",
                ["resize=8:scale=255:layout=nchw:order=rgb yields 8x12 (height x width), but"],
            ),
            (("N", 3, 9, 9), "resize=8", ["takes float32 [N, 3, 9, 9]: write resize=9x9 or crop=9x9"]),
            (("N", 3, 48, "W"), "scale=1", ["yields 20x30 (height x width), but", "write resize=48xW or crop=48xW"]),
        ],
    )
    def test_a_size_that_the_model_does_not_take_is_refused(self, tmp_path, shape, preprocess, message):
        save(tmp_path / "1.png", noise(20, 30))
        with refused(f"{tmp_path / '1.png'}: ", *message):
            load_samples(tmp_path, image_input(*shape), preprocess=preprocess)

    @pytest.mark.parametrize(("preprocess", "size"), [("resize=20:crop=25", "resized image is 20x30"),
                                                      ("crop=25", "image is 20x30")])  # fmt: skip
    def test_an_image_that_is_smaller_than_the_crop_is_refused(self, tmp_path, preprocess, size):
        save(tmp_path / "1.png", noise(20, 30))
        with refused("1.png: the ", f"{size} (height x width), smaller than the crop 25x25: write a larger resize"):
            load_samples(tmp_path, OPEN_NCHW, preprocess=preprocess)

    def test_a_model_that_takes_no_single_image_is_refused(self, tmp_path):
        save(tmp_path / "1.png", noise(2, 2))
        with refused("images are for a model with one input", "'image' float32 [N, 3, H, W], 'ids'", "give an .npz or"):
            load_samples(tmp_path, (*OPEN_NCHW, InputSpec("ids", np.dtype(np.int64), ("N",))))
        for spec in (
            InputSpec("x", FLOAT32, ("N", 3)),
            InputSpec("x", FLOAT32, ()),
            InputSpec("x", np.dtype(object), (1, 3, 4, 4)),
        ):
            with refused("images are for an input of 3 or 4 dimensions and of numbers, and 'x' takes"):
                load_samples(tmp_path, (spec,))


def test_arrays_come_before_images_and_are_not_preprocessed(tmp_path):
    save(tmp_path / "1.png", noise(2, 2))
    array = np.ones((1, 3, 2, 2), np.float32)
    np.savez(tmp_path / "2.npz", image=array)
    np.testing.assert_array_equal(next(iter(load_samples(tmp_path, OPEN_NCHW)))["image"], array)
    for data in (tmp_path, tmp_path / "2.npz", {"image": array}, [{"image": array}]):
        with refused("read as arrays, and preprocess is for a folder of images: leave it out"):
            load_samples(data, OPEN_NCHW, preprocess=AS_IT_IS)
    with refused("nowhere: no such file or folder"):
        load_samples(tmp_path / "nowhere", OPEN_NCHW, preprocess=AS_IT_IS)


NET = """
<ir_version: 8, opset_import: ["" : 17]>
agraph (float[N, 3, 8, 8] image) => (float[N, 4, 6, 6] y)
<float[4, 3, 3, 3] w> { y = Conv(image, w) }
"""
REQUEST = "resize=9:crop=8:mean=0.5:std=0.25"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a net, four photos and the request as TOML."""
    onnx.save(model_of(NET), tmp_path / "net.onnx")
    for index in range(4):
        save(tmp_path / "photos" / f"{index}.jpg", noise(12, 16, seed=index))
    (tmp_path / "photos.toml").write_text("resize = 9\ncrop = 8\nmean = 0.5\nstd = 0.25\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestCommands:
    def test_optimize_calibrates_on_images_and_reports_the_request(self, folder, capsys):
        command = [
            "optimize",
            "net.onnx",
            "--passes",
            "fold,calibrate,qdq:small_islands=true",
            "--data",
            "photos",
            "--json",
        ]
        assert main([*command, "--preprocess", REQUEST, "-o", "a.onnx"]) == OK
        shown = capsys.readouterr()
        report = json.loads(shown.out)
        assert report["data"] == f"photos with {REQUEST}:scale=255:layout=nchw:order=rgb"
        assert report["check"]["comparison"]["samples"] == 4
        assert "--preprocess" not in shown.err
        assert main([*command, "--preprocess", "photos.toml", "-o", "b.onnx"]) == OK
        assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()

    def test_both_commands_warn_of_what_they_assume(self, folder, capsys):
        optimizing = ["optimize", "net.onnx", "--passes", "calibrate,qdq:small_islands=true", "-o", "out.onnx"]
        for command in (optimizing, ["check", "net.onnx", "net.onnx"]):
            assert main([*command, "--data", "photos"]) == OK
            shown = capsys.readouterr()
            assert (
                "warning: photos: no --preprocess: images were read as --preprocess resize=8x8:scale=255" in shown.err
            )
            assert (
                main([*command, "--data", "photos", "--preprocess", REQUEST, *["--overwrite"] * ("-o" in command)])
                == OK
            )
            assert "no --preprocess" not in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--preprocess", "resize=8"], "preprocess is for a folder of images, and there are no data"),
            (["--data", "photos", "--preprocess", "size=8"], "preprocess has no key 'size' (did you mean 'resize'?)"),
            (["--data", "photos", "--preprocess", "no.toml"], "no.toml: cannot be read: No such file or directory"),
            (["--data", "photos", "--preprocess", "resize=7"], "yields 7x9 (height x width), but the model's input"),
            (["--data", "arrays.npz", "--preprocess", "resize=8"], "arrays.npz: read as arrays, and preprocess is for"),
        ],
    )
    def test_mistakes_are_one_line(self, folder, capsys, arguments, message):
        np.savez("arrays.npz", image=np.ones((1, 3, 8, 8), np.float32))
        for command in (["optimize", "net.onnx", "--passes", "calibrate"], ["check", "net.onnx", "net.onnx"]):
            assert main([*command, *arguments]) == WRONG
            shown = capsys.readouterr()
            assert shown.err.startswith("error: ")
            assert message in shown.err
            assert shown.err.count("\n") == 1

    def test_the_toml_file_is_no_place_for_an_output(self, folder, capsys):
        command = ["optimize", "net.onnx", "--passes", "calibrate", "--data", "photos", "--preprocess", "photos.toml"]
        assert main([*command, "--ranges", "photos.toml", "--overwrite"]) == WRONG
        assert "photos.toml: it is an input" in capsys.readouterr().err

    def test_python_takes_the_same(self, folder):
        result = graphopt.optimize("net.onnx", "calibrate,qdq:small_islands=true", data="photos", preprocess=REQUEST)
        assert result.report.warnings == ["the ranges come from 4 samples; from 32 on they are steadier"]
        found = graphopt.check("net.onnx", result.model, data="photos", preprocess=Path("photos.toml"))
        assert found.comparison == result.report.check.comparison
        assert found.notes == ()
