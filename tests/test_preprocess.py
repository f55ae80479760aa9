"""How an image becomes an array: what the keys take, in text, in TOML and in Python, and the arithmetic."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import DataError
from graphopt.preprocess import (
    Interpolation,
    Layout,
    Order,
    Preprocess,
    describe_keys,
    parse_preprocess,
    preprocess_file,
    preprocess_of,
)

IMAGENET = "resize=256:crop=224:mean=0.485+0.456+0.406:std=0.229+0.224+0.225:scale=255:layout=nchw:order=rgb"
EXPECTED = Preprocess(
    resize=256,
    crop=224,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    layout=Layout.NCHW,
    order=Order.RGB,
)


def refused(*parts: str) -> AbstractContextManager[object]:
    """A DataError of one line whose message holds these parts in this order."""
    return pytest.raises(DataError, match="^" + ".*".join(["", *map(re.escape, parts), ""]) + "$")


def test_reads_and_prints_the_usual_text():
    assert parse_preprocess(IMAGENET) == EXPECTED
    assert str(EXPECTED) == IMAGENET


def test_says_by_what_pixels_are_divided_even_where_that_is_the_default():
    assert str(Preprocess()) == "scale=255"


def test_tells_height_from_width():
    assert parse_preprocess("resize=240x320:crop=200").resize == (240, 320)


sides = st.integers(1, 9999)
sizes = sides | st.tuples(sides, sides)
finite = st.floats(allow_nan=False, allow_infinity=False)


def one_or_three(numbers):
    return st.tuples(numbers) | st.tuples(numbers, numbers, numbers)


requests = st.builds(
    Preprocess,
    resize=st.none() | sizes,
    crop=st.none() | sizes,
    interpolation=st.sampled_from(Interpolation),
    mean=one_or_three(finite),
    std=one_or_three(finite.filter(bool)),
    scale=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    layout=st.none() | st.sampled_from(Layout),
    order=st.none() | st.sampled_from(Order),
)


@given(requests)
def test_what_is_printed_reads_as_the_same_request(request_):
    assert parse_preprocess(str(request_)) == request_


@given(st.text("resizcopmantdlyu=:+x0123456789.", max_size=30))
def test_any_other_text_is_refused_in_one_line(text):
    try:
        found = parse_preprocess(text)
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert parse_preprocess(str(found)) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "preprocess is empty; its keys are: resize, crop, interpolation, mean, std, scale, layout, order"),
        ("sise=256", "preprocess has no key 'sise' (did you mean 'resize'?); its keys are: resize, crop, interp"),
        ("resize=256,crop=224", "preprocess: 'resize' takes N or HxW, not '256,crop=224'"),
        ("resize=256:", "preprocess has no key ''; its keys are: resize"),
        ("resize", "preprocess: 'resize' takes N or HxW: write resize=VALUE"),
        ("resize=large", "preprocess: 'resize' takes N or HxW, not 'large'"),
        ("resize=-1", "preprocess: 'resize' takes N or HxW, not '-1'"),
        ("resize=0", "preprocess: 'resize' must be at least 1 pixel: resize=0"),
        ("crop=224x0", "preprocess: 'crop' must be at least 1 pixel: crop=224x0"),
        ("crop=224x224x3", "preprocess: 'crop' takes N or HxW, not '224x224x3'"),
        ("mean=0.485,0.456,0.406", "'mean' takes one number, or three joined with +, not '0.485,0.456,0.406'"),
        ("mean=", "'mean' takes one number, or three joined with +, not ''"),
        ("mean=1+2", "'mean' takes one finite number, or one for each of 3 channels: mean=1+2"),
        ("std=nan", "'std' takes one finite number"),
        ("std=0.2+0+0.2", "'std' is a divisor and must not be 0: std=0.2+0+0.2"),
        ("scale=0", "'scale' must be a positive number: scale=0"),
        ("scale=inf", "'scale' must be a positive number: scale=inf"),
        ("scale=1/255", "'scale' takes a number, not '1/255'"),
        ("layout=chw", "'layout' takes nchw|nhwc, not 'chw'"),
        ("order=RGB", "'order' takes rgb|bgr|gray, not 'RGB'"),
        ("interpolation=cubic", "'interpolation' takes bilinear|bicubic|nearest|lanczos|box, not 'cubic'"),
        ("crop=224:resize=256:crop=200", "preprocess: 'crop' is given twice"),
    ],
)
def test_a_mistake_is_answered_with_what_is_right(text, message):
    with refused(message):
        parse_preprocess(text)


class TestToml:
    def write(self, folder: Path, text: str) -> str:
        (folder / "photos.toml").write_text(text, encoding="utf-8")
        return str(folder / "photos.toml")

    def test_numbers_and_lists_mean_what_their_text_means(self, tmp_path):
        path = self.write(
            tmp_path,
            "resize = 256\ncrop = [224, 224]\nmean = [0.485, 0.456, 0.406]\nstd = '0.229+0.224+0.225'\n"
            "scale = 255\nlayout = 'nchw'\norder = 'rgb'\n",
        )
        assert preprocess_of(path) == Preprocess(**{**vars(EXPECTED), "crop": (224, 224)})
        assert preprocess_of(Path(path)) == preprocess_of(path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("sise = 256", "photos.toml: preprocess has no key 'sise' (did you mean 'resize'?)"),
            ("resize = true", "photos.toml: preprocess: 'resize' takes N or HxW, not 'True'"),
            ("resize = 256.5", "photos.toml: preprocess: 'resize' takes N or HxW, not '256.5'"),
            ("[preprocess]\nresize = 256", "photos.toml: preprocess has no key 'preprocess'; its keys are: resize"),
            ("mean = [1, 'x', 3]", "photos.toml: preprocess: 'mean' takes one number, or three joined with +, not"),
            ("resize = 1\nresize = 2", "photos.toml: cannot be read as TOML: "),
            ("resize=256:crop=224", "photos.toml: cannot be read as TOML: "),
        ],
    )
    def test_a_mistake_names_the_file(self, tmp_path, text, message):
        with refused(message):
            preprocess_of(self.write(tmp_path, text))

    def test_a_file_that_is_missing_or_no_text_is_refused(self, tmp_path):
        with refused("other.toml: cannot be read: No such file or directory"):
            preprocess_of(tmp_path / "other.toml")
        (tmp_path / "photos.toml").write_bytes(b"\xff\xfe\x00")
        with refused("photos.toml: cannot be read as TOML: "):
            preprocess_of(tmp_path / "photos.toml")

    def test_a_text_that_ends_in_toml_is_a_file(self):
        assert preprocess_file("a/Photos.TOML") == Path("a/Photos.TOML")
        assert preprocess_file(IMAGENET) is None


def test_python_takes_any_form_and_keeps_one():
    loose = Preprocess(resize="256", crop=[224, 224], mean=0, std=[1, 2, 3], scale=1, order="bgr")
    assert loose == Preprocess(resize=256, crop=(224, 224), std=(1.0, 2.0, 3.0), scale=1.0, order=Order.BGR)
    assert str(loose) == "resize=256:crop=224x224:std=1+2+3:scale=1:order=bgr"
    assert preprocess_of(loose) is loose


def test_python_is_refused_what_text_is():
    with refused("'mean' takes one number"):
        Preprocess(mean="light")
    with refused("'resize' must be at least 1 pixel"):
        Preprocess(resize=(0, 5))


@given(
    request_=st.builds(
        Preprocess,
        mean=one_or_three(st.floats(-300, 300)),
        std=one_or_three(st.floats(0.01, 300)),
        scale=st.sampled_from([1, 127.5, 255]),
    ),
    seed=st.integers(0, 99),
)
def test_values_are_those_of_the_formula(request_, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    values = request_.values(pixels)
    assert values.dtype == np.float32
    expected = (pixels / request_.scale - np.array(request_.mean)) / np.array(request_.std)  # float64
    rounding = 1e-6 * (255 / request_.scale + np.abs(request_.mean).max()) / np.min(request_.std)
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=rounding)


def test_help_names_every_key_with_what_it_takes():
    shown = describe_keys()
    for part in ("resize=N or HxW", "interpolation=bilinear|bicubic", "scale=a number", "order=rgb|bgr|gray"):
        assert part in shown
