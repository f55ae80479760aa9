"""Image files: which of a folder are some, and the pixels of one, upright, resized and cropped.

Pillow decodes and resizes them. It is the extra `images` and imported when the first image is read.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from graphopt.errors import DataError
from graphopt.preprocess import Order, Preprocess, height_and_width

if TYPE_CHECKING:
    from PIL import Image

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def image_paths(folder: Path) -> list[Path]:
    """The images in a folder and in those below it, sorted; files whose names begin with a dot are none."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and not path.name.startswith("."))
    return sorted(path for path in found if path.is_file())


def refuse_missing_pillow() -> None:
    """Refuse to read images without Pillow.

    Raises:
        DataError: it is not installed.
    """
    try:
        import PIL.Image  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise DataError("reading images needs Pillow: pip install 'graphopt[images]'") from error


def read_pixels(path: Path, preprocess: Preprocess, order: Order) -> NDArray[np.uint8]:
    """Decode, resize and crop one image: [height, width, channels], the channels in `order`.

    Raises:
        DataError: the file is damaged, or smaller than the crop.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as opened:  # odd metadata, many pixels
            image = _resized(_upright(opened, "L" if order is Order.GRAY else "RGB"), preprocess)
            pixels = np.atleast_3d(np.asarray(_cropped(image, preprocess, path)))
    except DataError:
        raise
    except Exception as error:  # Pillow's readers raise what comes: OSError, SyntaxError, struct.error, KeyError ...
        unknown = isinstance(error, UnidentifiedImageError)  # its text is the path once more
        why = "it is damaged or another kind of file" if unknown else str(error) or type(error).__name__
        raise DataError(f"{path}: cannot be read as an image: {why}") from error
    return pixels[..., ::-1] if order is Order.BGR else pixels


def _upright(opened: Image.Image, mode: str) -> Image.Image:
    """The first frame in `mode`, copied no more often than it must be: photos of 12 megapixels are 36 MB."""
    from PIL import Image, ImageOps

    ImageOps.exif_transpose(opened, in_place=True)
    image = _eight_bit(opened)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == mode else image.convert(mode)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Bring the wider kinds of gray to 0..255; Pillow itself would clip them, and reads all colours as 8 bits."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are floats of an unknown range: save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError("its pixels have more than 16 bits: save it with 8 or 16")
    return Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))


def _resized(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    from PIL import Image

    wanted = preprocess.resize
    if wanted is None:
        return image
    if isinstance(wanted, int):
        shorter = min(image.size)
        size = (int(wanted * image.width / shorter), int(wanted * image.height / shorter))
    else:
        size = (wanted[1], wanted[0])
    return image.resize(size, Image.Resampling[preprocess.interpolation.name])


def _cropped(image: Image.Image, preprocess: Preprocess, path: Path) -> Image.Image:
    if preprocess.crop is None:
        return image
    height, width = height_and_width(preprocess.crop)
    if image.height < height or image.width < width:
        resized = "" if preprocess.resize is None else "resized "
        raise DataError(
            f"{path}: the {resized}image is {image.height}x{image.width} (height x width), smaller than the crop "
            f"{height}x{width}: write a larger resize (resize={max(height, width)} suits every image) or a smaller crop"
        )
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))
