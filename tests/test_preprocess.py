import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from graphopt.errors import DataError
from graphopt.feeds import InputSpec
from graphopt.preprocess import Preprocess

FLOAT = np.dtype(np.float32)
NCHW = InputSpec("x", FLOAT, ("N", 3, "H", "W"))
NHWC = InputSpec("x", FLOAT, ("N", "H", "W", 3))
GRAY = InputSpec("x", FLOAT, ("N", 1, 28, 28))


def picture(width=40, height=30, mode="RGB", seed=0):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8)
    return Image.fromarray(pixels)


def pixels_of(image):
    return np.asarray(image).astype(np.float64)


def test_a_value_is_the_pixel_over_scale_less_mean_over_std():
    image = picture()
    text = "mean=0.485+0.456+0.406:std=0.229+0.224+0.225"
    expected = (pixels_of(image) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    array = Preprocess.parse(text).array(image, NCHW)
    assert array.dtype == np.float32
    assert array == pytest.approx(expected.transpose(2, 0, 1), abs=1e-5)
    assert Preprocess.parse(text).array(image, NHWC) == pytest.approx(expected, abs=1e-5)


def test_one_mean_serves_all_channels():
    array = Preprocess.parse("scale=1:mean=127:std=128").array(picture(), NHWC)
    assert array == pytest.approx((pixels_of(picture()) - 127) / 128, abs=1e-6)


def test_bgr_turns_the_channels_round_and_mean_follows_the_order_that_the_model_gets():
    array = Preprocess.parse("order=bgr:scale=1:mean=1+2+3").array(picture(), NHWC)
    assert array == pytest.approx(pixels_of(picture())[..., ::-1] - [1, 2, 3], abs=1e-4)


@pytest.mark.parametrize(("width", "height"), [(400, 300), (300, 400), (301, 257), (256, 256)])
def test_resize_and_crop_are_those_of_torchvision(width, height):
    image = picture(width, height)
    short, long = min(width, height), max(width, height)
    longer = 256 * long // short  # torchvision: int(size * long / short)
    resized = image.resize((longer, 256) if width > height else (256, longer), Image.Resampling.BILINEAR)
    left, top = (resized.width - 224) // 2, (resized.height - 224) // 2
    expected = pixels_of(resized.crop((left, top, left + 224, top + 224)))
    array = Preprocess.parse("resize=256:crop=224:scale=1").array(image, NHWC)
    assert np.array_equal(array, expected)


def test_two_sizes_are_height_and_width():
    assert Preprocess.parse("resize=20x10").array(picture(), NCHW).shape == (3, 20, 10)
    assert Preprocess.parse("crop=20x10").array(picture(), NCHW).shape == (3, 20, 10)


def test_without_resize_the_input_says_the_size_or_the_image_keeps_its_own():
    assert Preprocess().array(picture(), GRAY).shape == (1, 28, 28)
    assert Preprocess().array(picture(), NCHW).shape == (3, 30, 40)
    fixed = InputSpec("x", FLOAT, (1, 128, 96, 3))
    assert Preprocess().array(picture(), fixed).shape == (128, 96, 3)


def test_gray_is_the_luma_of_the_colours():
    array = Preprocess.parse("order=gray:scale=1:layout=nchw").array(picture(28, 28), GRAY)
    assert np.array_equal(array[0], np.asarray(picture(28, 28).convert("L")))


def test_interpolation_is_pillows():
    image = picture()
    for name in ("bilinear", "bicubic", "nearest", "lanczos", "box"):
        expected = image.resize((10, 20), Image.Resampling[name.upper()])
        array = Preprocess.parse(f"resize=20x10:scale=1:interpolation={name}").array(image, NHWC)
        assert np.array_equal(array, np.asarray(expected))


def test_transparency_lies_over_white():
    image = picture(mode="RGBA")
    alpha = pixels_of(image)[..., 3:] / 255
    expected = pixels_of(image)[..., :3] * alpha + 255 * (1 - alpha)
    assert Preprocess.parse("scale=1").array(image, NHWC) == pytest.approx(expected, abs=1.01)


def test_palettes_and_16_bits_become_what_they_show():
    image = picture().quantize(16)
    assert np.array_equal(Preprocess.parse("scale=1").array(image, NHWC), np.asarray(image.convert("RGB")))
    deep = Image.fromarray(np.array([[0, 257, 65535]], np.uint16))
    assert Preprocess.parse("scale=1:order=gray").array(deep, NHWC)[..., 0].tolist() == [[0, 1, 255]]


def test_a_photo_is_turned_upright():
    image = picture()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    image.getexif()[0x0112] = 6
    assert Preprocess().array(image, NCHW).shape == (3, 40, 30)


def test_whole_pixels_for_an_input_of_integers():
    spec = InputSpec("x", np.dtype(np.uint8), (1, "H", "W", 3))
    array = Preprocess.parse("scale=1").array(picture(), spec)
    assert (array.dtype, array.tolist()) == (np.uint8, np.asarray(picture()).tolist())
    with pytest.raises(DataError, match="give whole pixels, with --preprocess scale=1"):
        Preprocess().array(picture(), spec)
    with pytest.raises(DataError, match="which pixels from 0 to 255 do not fit"):
        Preprocess.parse("scale=1").array(picture(), InputSpec("x", np.dtype(np.int8), (1, "H", "W", 3)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crop=224", "40 x 30 pixels is smaller than the crop of 224 x 224: resize it first"),
        ("mean=1+2", "mean has 2 numbers, but the image has 3 channels"),
    ],
)
def test_an_image_that_does_not_fit_says_why(text, message):
    with pytest.raises(DataError, match=message):
        Preprocess.parse(text).array(picture(), NCHW)


@pytest.mark.parametrize("shape", [("N", 3, 64, 3), ("N", "C", "H", "W")])
def test_a_layout_that_does_not_show_must_be_said(shape):
    spec = InputSpec("x", FLOAT, shape)
    with pytest.raises(DataError, match="channels first or last does not show: add layout=nchw"):
        Preprocess().array(picture(), spec)
    assert Preprocess.parse("layout=nchw:resize=8").array(picture(), spec).shape == (3, 8, 10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resiz=3", r"there is no 'resiz' \(did you mean resize\?\); there are resize, crop"),
        ("resize", "'resize' needs a value: resize=VALUE"),
        ("resize=3:resize=4", "resize is given twice"),
        ("resize=big", "resize cannot be 'big': give it as 224 or 224x320"),
        ("resize=1.5", "resize cannot be '1.5'"),
        ("resize=1x2x3", "resize takes a number of pixels or HEIGHTxWIDTH"),
        ("crop=0", "crop takes a number of pixels"),
        ("mean=a+b", r"mean cannot be 'a\+b': give it as 0.5 or"),
        ("std=0", "scale and std divide pixels, so they cannot be 0"),
        ("scale=nan", "must be finite numbers"),
        ("order=rbg", "order cannot be 'rbg': it is one of rgb, bgr, gray"),
        ("layout=chw", "layout cannot be 'chw': it is one of nchw, nhwc"),
    ],
)
def test_a_wrong_text_is_an_error_that_says_what_is_right(text, message):
    with pytest.raises(DataError, match=message):
        Preprocess.parse(text)


def test_a_toml_file_says_the_same(tmp_path):
    path = tmp_path / "photos.toml"
    path.write_text('resize = 256\ncrop = [224, 192]\nmean = [0.5, 0.25, 0.125]\nstd = 2\norder = "bgr"\n')
    assert Preprocess.parse(str(path)) == Preprocess.parse(
        "resize=256:crop=224x192:mean=0.5+0.25+0.125:std=2:order=bgr"
    )
    path.write_text("resize = {")
    with pytest.raises(DataError, match="is no TOML file"):
        Preprocess.parse(str(path))
    with pytest.raises(DataError, match="cannot be read: No such file"):
        Preprocess.parse(str(tmp_path / "gone.toml"))


SIZES = st.one_of(st.none(), st.lists(st.integers(1, 999), min_size=1, max_size=2).map(tuple))
NUMBERS = st.lists(st.sampled_from([0.25, 0.5, 3.0, 127.5]), min_size=1, max_size=3).map(tuple)


@given(
    st.builds(
        Preprocess,
        resize=SIZES,
        crop=SIZES,
        scale=st.sampled_from([1.0, 255.0]),
        mean=NUMBERS,
        std=NUMBERS,
        order=st.sampled_from([None, "rgb", "bgr", "gray"]),
        layout=st.sampled_from([None, "nchw", "nhwc"]),
    )
)
def test_the_text_says_all(preprocess):
    assert Preprocess.parse(str(preprocess)) == preprocess
