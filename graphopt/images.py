"""Feeds from a folder of images, decoded one at a time as they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from graphopt.errors import DataError
from graphopt.feed_sources import RawFeed, Source
from graphopt.feeds import Array, InputSpec, fixed_size
from graphopt.preprocess import Preprocess

ENDINGS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder and of those in it, in the order of their paths."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())


def image_folder(folder: Path, inputs: Sequence[InputSpec], preprocess: Preprocess | None) -> Source:
    """The images of a folder for a model with one image input; as many at a time as its first dimension fixes.

    Raises:
        DataError: Pillow is missing, or the model takes something else.
    """
    _need_pillow()
    spec = _image_input(inputs, folder)
    paths = images_in(folder)
    rows = (fixed_size(spec.shape[0]) or 1) if len(spec.shape) == 4 else 1
    groups = [paths[start : start + rows] for start in range(0, len(paths) - rows + 1, rows)]
    chosen = preprocess or Preprocess()

    def start() -> Iterator[RawFeed]:
        for group in groups:
            arrays = [_array(path, spec, chosen) for path in group]
            if len({array.shape for array in arrays}) > 1:
                raise DataError(
                    f"{group[0]} and those after it differ in size, but the model takes {rows} at a time: "
                    "add resize=HEIGHTxWIDTH to --preprocess"
                )
            yield RawFeed(str(group[0]), {spec.name: np.stack(arrays) if len(spec.shape) == 4 else arrays[0]})

    return Source(start, str(folder), len(groups), tuple(_notes(folder, len(paths), rows, preprocess)))


def _notes(folder: Path, count: int, rows: int, preprocess: Preprocess | None) -> Iterator[str]:
    if preprocess is None:
        yield (
            f"{folder}: nobody said how the model wants its images: pixels / 255 is assumed, without mean and standard "
            "deviation; say it with --preprocess, such as mean=0.485+0.456+0.406:std=0.229+0.224+0.225"
        )
    if left := count % rows:
        yield f"{folder}: the last {left} images are left out: the model takes {rows} at a time"


def _need_pillow() -> None:
    try:
        import PIL.Image  # noqa: F401 - only whether it is there
    except ImportError:
        raise DataError("a folder of images needs Pillow: pip install 'graphopt[images]'") from None


def _image_input(inputs: Sequence[InputSpec], folder: Path) -> InputSpec:
    if len(inputs) != 1 or len(inputs[0].shape) not in (3, 4) or inputs[0].dtype.kind not in "fiu":
        takes = ", ".join(f"'{spec.name}' {spec}" for spec in inputs) or "nothing"
        raise DataError(
            f"{folder}: images are for a model with one input of rank 4 or 3, and this one takes {takes}: "
            "give an .npz or file.py:function"
        )
    return inputs[0]


def _array(path: Path, spec: InputSpec, preprocess: Preprocess) -> Array:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return preprocess.array(image, spec)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image: {error}") from error
