"""How an image becomes an array: the request, as a value, as text and as TOML.

`resize=256:crop=224:mean=0.485+0.456+0.406:std=0.229+0.224+0.225`: keys are separated by colons, the numbers of one key
by `+`. The text is what the command line takes and what reports print: `parse_preprocess(str(value))` gives the same
value again. A TOML file has the same keys; there, numbers may be written as numbers and lists of them.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.errors import DataError

Size = int | tuple[int, int]
"""Pixels: one number, or height and width."""


class Interpolation(Enum):
    """How an image is resized; all but `nearest` look at every pixel when they make it smaller, as Pillow does."""

    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    NEAREST = "nearest"
    LANCZOS = "lanczos"
    BOX = "box"


class Layout(Enum):
    """Where the channels are: before height and width, or after them."""

    NCHW = "nchw"
    NHWC = "nhwc"


class Order(Enum):
    """The channels of a pixel."""

    RGB = "rgb"
    BGR = "bgr"
    GRAY = "gray"

    @property
    def channels(self) -> int:
        """How many there are."""
        return 1 if self is Order.GRAY else 3


def _read_size(text: str) -> Size:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise ValueError
    return int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))


def _read_numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split("+"))


def _key(read: Callable[[str], Any], takes: str, purpose: str, separator: str = "") -> Mapping[str, Any]:
    """What a field's text form needs: `read` raises ValueError for text that is not what the key `takes`."""
    return {"read": read, "takes": takes, "help": purpose, "separator": separator}


def _size(purpose: str) -> Mapping[str, Any]:
    return _key(_read_size, "N or HxW", purpose, "x")


def _numbers(purpose: str) -> Mapping[str, Any]:
    return _key(_read_numbers, "one number, or three joined with +", purpose, "+")


def _choice(kind: type[Enum], purpose: str) -> Mapping[str, Any]:
    return _key(kind, "|".join(each.value for each in kind), purpose)


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How the images of a folder become the arrays that a model takes.

    An image is decoded to 8 bits a channel, resized, cropped, and computed with in float32:
    value = (pixel / scale - mean) / std.

    Decoding: the first frame, turned upright by its EXIF orientation; palettes and gray images become RGB, or all
    become gray (ITU-R 601 luma) with `order=gray`; what is transparent is laid over white, as a viewer shows it; 16
    bits become 8, rounded.

    Attributes:
        resize: N: the shorter side becomes N pixels and the longer one int(N * longer / shorter), as torchvision does;
            HxW: exactly height H and width W. None: where the model fixes height and width and there is no `crop`,
            that size; otherwise images stay as they are.
        crop: the middle N x N or H x W of the resized image; an image that is smaller is an error.
        interpolation: how to resize.
        mean: subtracted after the division by `scale`: one number, or one for each channel in the order in which the
            model gets them (with `order=bgr` blue first).
        std: the divisor after that, likewise.
        scale: the divisor of pixels 0..255; 255 gives 0..1, 1 keeps 0..255.
        layout: None: guessed from the input's shape, where a fixed 1, 3 or 4 is its first size after the batch, or its
            last one; an error where that is so for both or neither.
        order: None: rgb, or gray where the model's input has 1 channel.

    A field may be given in any form: `Preprocess(resize="256", mean=[0.5, 0.5, 0.5], order="bgr")`.

    The dtype is that of the model's input. An integer input needs a scale, mean and std that give integers of its range
    for every pixel: scale=1 for uint8, scale=1:mean=128 for int8.

    Raises:
        DataError: a field has a value that it does not take.
    """

    resize: Size | None = field(
        default=None, metadata=_size("the shorter side, or height and width; default: the model's size")
    )
    crop: Size | None = field(default=None, metadata=_size("the middle of the resized image; default: all of it"))
    interpolation: Interpolation = field(
        default=Interpolation.BILINEAR, metadata=_choice(Interpolation, "how to resize; default: bilinear")
    )
    mean: tuple[float, ...] = field(
        default=(0.0,), metadata=_numbers("subtracted after the division by scale; default: 0")
    )
    std: tuple[float, ...] = field(default=(1.0,), metadata=_numbers("the divisor after that; default: 1"))
    scale: float = field(default=255.0, metadata=_key(float, "a number", "the divisor of pixels 0..255; default: 255"))
    layout: Layout | None = field(default=None, metadata=_choice(Layout, "default: what the input's shape says"))
    order: Order | None = field(
        default=None, metadata=_choice(Order, "the channels; default: rgb, or gray if the model takes one")
    )

    def __post_init__(self) -> None:
        """Bring every field into its own type by way of its text, so that one place says what it takes."""
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None:
                object.__setattr__(self, each.name, _read(each, _text(each, value)))
        for name, size in (("resize", self.resize), ("crop", self.crop)):
            if size is not None and min(height_and_width(size)) < 1:
                raise DataError(f"preprocess: '{name}' must be at least 1 pixel: {self}")
        if not 0 < self.scale < math.inf:
            raise DataError(f"preprocess: 'scale' must be a positive number: {self}")
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)):
                raise DataError(f"preprocess: '{name}' takes one finite number, or one for each of 3 channels: {self}")
        if 0 in self.std:
            raise DataError(f"preprocess: 'std' is a divisor and must not be 0: {self}")

    def __str__(self) -> str:
        """The text form: `scale`, and what differs from its default."""
        shown = [each for each in fields(self) if each.name == "scale" or getattr(self, each.name) != each.default]
        return ":".join(f"{each.name}={_text(each, getattr(self, each.name))}" for each in shown)

    def values(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Compute (pixel / scale - mean) / std in float32; the last axis of `pixels` is the channels."""
        mean, std = (np.asarray(numbers, np.float32) for numbers in (self.mean, self.std))
        values = pixels.astype(np.float32)
        values /= np.float32(self.scale)
        values -= mean
        values /= std
        return values


AnyPreprocess = Preprocess | str | Path
"""What a caller gives: the value, its text, or the path of a TOML file; a text that ends in .toml is such a path."""


def preprocess_of(request: AnyPreprocess) -> Preprocess:
    """The value that a caller means.

    Raises:
        DataError: a wrong key or value, or a file that cannot be read; the message lists the right ones.
    """
    if isinstance(request, Preprocess):
        return request
    file = preprocess_file(request)
    return parse_preprocess(str(request)) if file is None else _read_toml(file)


def preprocess_file(request: str | Path) -> Path | None:
    """The TOML file that a request names; None where it is text."""
    return Path(request) if isinstance(request, Path) or request.lower().endswith(".toml") else None


def parse_preprocess(text: str) -> Preprocess:
    """Read the text form.

    Raises:
        DataError: an unknown or repeated key, or a value that the key does not take; the message lists the right ones.
    """
    if not text:
        raise DataError(f"preprocess is empty; its keys are: {', '.join(_KEYS)}")
    values: dict[str, Any] = {}
    for item in text.split(":"):
        key, equals, value = item.partition("=")
        known = _known(key)
        if not equals:
            raise DataError(f"preprocess: '{key}' takes {known.metadata['takes']}: write {key}=VALUE")
        if key in values:
            raise DataError(f"preprocess: '{key}' is given twice")
        values[key] = value
    return Preprocess(**values)


def describe_keys() -> str:
    """All keys with what they take, for help."""
    return ", ".join(f"{name}={each.metadata['takes']} ({each.metadata['help']})" for name, each in _KEYS.items())


def height_and_width(size: Size) -> tuple[int, int]:
    """Both sides, where one number stands for both."""
    return (size, size) if isinstance(size, int) else size


def _read_toml(path: Path) -> Preprocess:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise DataError(f"{path}: cannot be read as TOML: {error}") from error
    try:
        return Preprocess(**{_known(key).name: value for key, value in table.items()})
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _known(key: str) -> Field[Any]:
    if key not in _KEYS:
        close = get_close_matches(key, _KEYS, n=1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        raise DataError(f"preprocess has no key '{key}'{hint}; its keys are: {', '.join(_KEYS)}")
    return _KEYS[key]


def _read(key: Field[Any], text: str) -> Any:
    try:
        return key.metadata["read"](text)
    except ValueError:
        raise DataError(f"preprocess: '{key.name}' takes {key.metadata['takes']}, not '{text}'") from None


def _text(key: Field[Any], value: object) -> str:
    if isinstance(value, list | tuple):
        return str(key.metadata["separator"]).join(_text(key, each) for each in value)
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, float):
        return str(value).removesuffix(".0").replace("e+", "e")  # a plus separates numbers
    return str(value)


_KEYS = {each.name: each for each in fields(Preprocess)}
