"""From the pixels of an image to what a model's input takes: `--preprocess`.

    resize=256:crop=224:mean=0.485+0.456+0.406:std=0.229+0.224+0.225:layout=nchw:order=rgb:scale=255

In this order: the image is turned as its EXIF data say and converted to RGB or gray (an alpha channel is laid over
white); resized; cut to its middle; value = (pixel / scale - mean) / std in float32, for each channel; laid out. The
same as a TOML file: `resize = 256`, `crop = [224, 224]`, `mean = [0.485, 0.456, 0.406]` ...
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from graphopt.errors import DataError
from graphopt.feeds import Array, InputSpec, fixed_size

if TYPE_CHECKING:
    from PIL.Image import Image

Order = Literal["rgb", "bgr", "gray"]
Layout = Literal["nchw", "nhwc"]
Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos", "box"]

_CHANNELS = (1, 3, 4)  # a size that means channels where the layout is not stated


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How images become arrays; what is None follows from the model's input.

    Attributes:
        resize: one size: the shorter side, the longer in proportion (rounded down); two: height and width. None: the
            input's height and width where it fixes them, unless `crop` is given; else as the image is.
        crop: height and width of the middle to keep, one number for both.
        interpolation: for `resize`, Pillow's.
        scale: by which pixels, 0 to 255, are divided first.
        mean: subtracted then, one number for each channel or one for all.
        std: by which that is divided, the same.
        order: of the channels; None: gray where the input has one channel, else rgb.
        layout: None: where the input has 1, 3 or 4 channels at axis 1 or at the end, and not in both places.

    Raises:
        DataError: a value that cannot be.
    """

    resize: tuple[int, ...] | None = field(default=None, metadata={"kind": "size"})
    crop: tuple[int, ...] | None = field(default=None, metadata={"kind": "size"})
    interpolation: Interpolation = field(default="bilinear", metadata={"kind": Interpolation})
    scale: float = field(default=255.0, metadata={"kind": "number"})
    mean: tuple[float, ...] = field(default=(0.0,), metadata={"kind": "numbers"})
    std: tuple[float, ...] = field(default=(1.0,), metadata={"kind": "numbers"})
    order: Order | None = field(default=None, metadata={"kind": Order})
    layout: Layout | None = field(default=None, metadata={"kind": Layout})

    def __post_init__(self) -> None:
        for name in ("resize", "crop"):
            size = getattr(self, name)
            if size is not None and (len(size) not in (1, 2) or min(size) < 1):
                raise DataError(f"preprocess: {name} takes a number of pixels or HEIGHTxWIDTH, not {size}")
        if not self.scale or 0 in self.std:
            raise DataError("preprocess: scale and std divide pixels, so they cannot be 0")
        if not all(np.isfinite([self.scale, *self.mean, *self.std])):
            raise DataError("preprocess: scale, mean and std must be finite numbers")

    @classmethod
    def parse(cls, text: str) -> Preprocess:
        """Read the text form, or the TOML file that `text` names.

        Raises:
            DataError: a key or a value that is not known, or a file that cannot be read.
        """
        if text.endswith(".toml"):
            return cls._from_items(_toml(Path(text)))
        items: dict[str, Any] = {}
        for part in filter(None, text.split(":")):
            key, equals, value = part.partition("=")
            if not equals:
                raise DataError(f"preprocess: '{part}' needs a value: {key}=VALUE")
            if key in items:
                raise DataError(f"preprocess: {key} is given twice")
            items[key] = value
        return cls._from_items(items)

    @classmethod
    def _from_items(cls, items: Mapping[str, Any]) -> Preprocess:
        kinds = {each.name: each.metadata["kind"] for each in fields(cls)}
        for key in items:
            if key not in kinds:
                close = get_close_matches(key, list(kinds), n=1)
                hint = f" (did you mean {close[0]}?)" if close else ""
                raise DataError(f"preprocess: there is no '{key}'{hint}; there are {', '.join(kinds)}")
        return cls(**{key: _value(key, value, kinds[key]) for key, value in items.items()})

    def __str__(self) -> str:
        """The text form, with what differs from the defaults."""
        return ":".join(
            f"{each.name}={_text(getattr(self, each.name), each.metadata['kind'])}"
            for each in fields(self)
            if getattr(self, each.name) != each.default
        )

    def array(self, image: Image, spec: InputSpec) -> Array:
        """The array of one image, without a batch axis where the input has four.

        Raises:
            DataError: it does not fit the input, or its layout does not show.
        """
        layout = self.layout or _layout(spec)
        sizes = [fixed_size(size) for size in spec.shape[-3:]]
        channels, height, width = sizes if layout == "nchw" else (sizes[2], sizes[0], sizes[1])
        order = self.order or ("gray" if channels == 1 else "rgb")
        pixels = self._pixels(image, "L" if order == "gray" else "RGB", (height, width))
        if order == "bgr":
            pixels = pixels[..., ::-1]
        values = self._normalized(pixels, spec)
        return np.ascontiguousarray(values.transpose(2, 0, 1) if layout == "nchw" else values)

    def _pixels(self, image: Image, mode: str, fixed: tuple[int | None, int | None]) -> Array:
        """uint8 [height, width, channels]."""
        import PIL.Image
        import PIL.ImageOps

        image = _in_mode(PIL.ImageOps.exif_transpose(image), mode)
        width, height = image.size
        target = None
        if self.resize is not None and len(self.resize) == 2:
            target = self.resize
        elif self.resize is not None:
            (short,) = self.resize
            target = (short, width * short // height) if height <= width else (height * short // width, short)
        elif self.crop is None and None not in fixed:
            target = (fixed[0] or height, fixed[1] or width)
        if target is not None and target != (height, width):
            resampling = PIL.Image.Resampling[self.interpolation.upper()]
            image = image.resize((max(1, target[1]), max(1, target[0])), resampling)
        if self.crop is not None:
            image = _middle(image, self.crop[0], self.crop[-1])
        array = np.asarray(image)
        return array[:, :, None] if array.ndim == 2 else array

    def _normalized(self, pixels: Array, spec: InputSpec) -> Array:
        channels = pixels.shape[-1]
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) not in (1, channels):
                raise DataError(f"preprocess: {name} has {len(numbers)} numbers, but the image has {channels} channels")
        if spec.dtype.kind in "iu":
            if (self.scale, self.mean, self.std) != (1, (0.0,), (1.0,)):
                raise DataError(
                    f"the model's input '{spec.name}' takes {spec}: give whole pixels, with --preprocess scale=1"
                )
            if spec.dtype == np.int8:
                raise DataError(f"the model's input '{spec.name}' takes int8, which pixels from 0 to 255 do not fit")
            return pixels.astype(spec.dtype)
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        values = (pixels.astype(np.float32) / np.float32(self.scale) - mean) / std
        return np.asarray(values.astype(spec.dtype))


def _in_mode(image: Image, mode: str) -> Image:
    import PIL.Image

    if image.mode.startswith("I"):  # 16 bits: Pillow would clip, not scale
        image = PIL.Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert(mode)


def _middle(image: Image, height: int, width: int) -> Image:
    if image.width < width or image.height < height:
        raise DataError(
            f"an image of {image.width} x {image.height} pixels is smaller than the crop of {width} x {height}: "
            "resize it first (resize=N)"
        )
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _layout(spec: InputSpec) -> Layout:
    first, last = fixed_size(spec.shape[-3]) in _CHANNELS, fixed_size(spec.shape[-1]) in _CHANNELS
    if first == last:
        raise DataError(f"whether input '{spec.name}' {spec} has channels first or last does not show: add layout=nchw")
    return "nchw" if first else "nhwc"


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no TOML file: {error}") from error


def _value(key: str, value: Any, kind: Any) -> Any:
    """The value of one key, from text or from TOML."""
    try:
        if kind == "size":
            parts = value.split("x") if isinstance(value, str) else value if isinstance(value, list) else [value]
            return tuple(map(_whole, parts))
        if kind == "numbers":
            parts = value.split("+") if isinstance(value, str) else value if isinstance(value, list) else [value]
            return tuple(map(float, parts))
        if kind == "number":
            return float(value)
    except (TypeError, ValueError):
        example = {"size": "224 or 224x320", "numbers": "0.5 or 0.485+0.456+0.406", "number": "255"}[kind]
        raise DataError(f"preprocess: {key} cannot be '{value}': give it as {example}") from None
    if value not in get_args(kind):
        raise DataError(f"preprocess: {key} cannot be '{value}': it is one of {', '.join(get_args(kind))}")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError
    return int(value)


def _text(value: Any, kind: Any) -> str:
    if isinstance(value, tuple):
        return ("x" if kind == "size" else "+").join(f"{each:g}" if kind == "numbers" else str(each) for each in value)
    return f"{value:g}" if kind == "number" else str(value)
