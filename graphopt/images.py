"""Feeds from a folder of images: what `Preprocess` leaves open is settled by the model's input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import DataError
from graphopt.feed_sources import RawFeed, Source
from graphopt.feeds import Array, InputSpec, fixed_size
from graphopt.image_files import read_pixels, refuse_missing_pillow
from graphopt.preprocess import Layout, Order, Preprocess

_OTHERWISE = "give an .npz or file.py:function"


def image_folder(
    folder: Path, paths: Sequence[Path], inputs: Sequence[InputSpec], preprocess: Preprocess | None
) -> Source:
    """The images `paths`, read one at a time, one feed each, or as many as the input's batch dimension fixes.

    Without a `preprocess` its defaults are taken, and a note says which.

    Raises:
        DataError: the model does not take one image, what it takes is not what `preprocess` yields, or Pillow is
            missing. Iterating raises it for an image that is damaged or of the wrong size.
    """
    refuse_missing_pillow()
    spec = _image_input(inputs, folder)
    settled = _settle(preprocess or Preprocess(), spec, folder)
    batch = (fixed_size(spec.shape[0]) or 1) if len(spec.shape) == 4 else 1
    count, left_out = divmod(len(paths), batch)
    if count == 0:
        raise DataError(f"{folder}: the model takes {batch} images at a time, and these are only {len(paths)}")

    def start() -> Iterator[RawFeed]:
        for index in range(count):
            chosen = paths[index * batch : (index + 1) * batch]
            where = str(chosen[0]) if batch == 1 else f"{chosen[0]} to {chosen[-1]}"
            yield RawFeed(where, {spec.name: settled.feed(chosen, where)})

    notes = []
    if preprocess is None:
        notes.append(
            f"{folder}: no --preprocess: images were read as --preprocess {settled.preprocess}, so pixels became 0..1 "
            "without mean and std: write it as the model was trained"
        )
    if left_out:
        notes.append(
            f"{folder}: the model takes {batch} images at a time: the last {left_out} of {len(paths)} were left out"
        )
    return Source(start, f"{folder} with {settled.preprocess}", count, tuple(notes))


def _image_input(inputs: Sequence[InputSpec], folder: Path) -> InputSpec:
    """The one input of a model that takes images."""
    if len(inputs) != 1:
        takes = ", ".join(f"'{spec.name}' {spec}" for spec in inputs) or "nothing"
        raise DataError(f"{folder}: images are for a model with one input, and this one takes {takes}: {_OTHERWISE}")
    (spec,) = inputs
    if len(spec.shape) not in (3, 4) or spec.dtype.kind not in "fiu":
        raise DataError(
            f"{folder}: images are for an input of 3 or 4 dimensions and of numbers, and '{spec.name}' takes {spec}: "
            f"{_OTHERWISE}"
        )
    return spec


@dataclass(frozen=True)
class _Settled:
    """A `Preprocess` with nothing left open, for one input."""

    preprocess: Preprocess
    spec: InputSpec
    layout: Layout
    order: Order

    def feed(self, paths: Sequence[Path], where: str) -> Array:
        """The array of one inference call."""
        images = [self._image(path) for path in paths]
        if len({image.shape for image in images}) > 1:
            raise DataError(f"{where}: the model takes these images at once, and they differ in size: write resize=HxW")
        return images[0] if len(self.spec.shape) == 3 else np.stack(images)

    def _image(self, path: Path) -> Array:
        """One image as the input takes it, without a batch axis."""
        pixels = read_pixels(path, self.preprocess, self.order)
        wanted = _sides(self.spec, self.layout)
        if any(side not in (None, size) for side, size in zip(wanted, pixels.shape, strict=False)):
            size = "x".join(str(side or letter) for side, letter in zip(wanted, "HW", strict=True))
            raise DataError(
                f"{path}: {self.preprocess} yields {pixels.shape[0]}x{pixels.shape[1]} (height x width), but the "
                f"model's input '{self.spec.name}' takes {self.spec}: write resize={size} or crop={size}"
            )
        values = self.preprocess.values(pixels).astype(self.spec.dtype, copy=False)
        return np.ascontiguousarray(np.moveaxis(values, -1, 0)) if self.layout is Layout.NCHW else values


def _settle(preprocess: Preprocess, spec: InputSpec, folder: Path) -> _Settled:
    layout = preprocess.layout or _layout(spec, folder)
    channels = fixed_size(spec.shape[_channel_axis(spec, layout)])
    order = preprocess.order or (Order.GRAY if channels == 1 else Order.RGB)
    height, width = _sides(spec, layout)
    resize = preprocess.resize
    if resize is None and preprocess.crop is None and height is not None and width is not None:
        resize = (height, width)
    settled = replace(preprocess, layout=layout, order=order, resize=resize)
    why_not = _why_not_channels(settled, spec, layout, order) or _why_not_dtype(settled, spec.dtype, order)
    if why_not:
        raise DataError(f"{folder}: {why_not}")
    return _Settled(settled, spec, layout, order)


def _layout(spec: InputSpec, folder: Path) -> Layout:
    fitting = [each for each in Layout if fixed_size(spec.shape[_channel_axis(spec, each)]) in (1, 3, 4)]
    if len(fitting) != 1:
        raise DataError(
            f"{folder}: whether the channels of the model's input '{spec.name}' {spec} are first or last is not clear: "
            "write layout=nchw or layout=nhwc in --preprocess"
        )
    return fitting[0]


def _channel_axis(spec: InputSpec, layout: Layout) -> int:
    return len(spec.shape) - (3 if layout is Layout.NCHW else 1)


def _sides(spec: InputSpec, layout: Layout) -> tuple[int | None, int | None]:
    """The height and the width that an input fixes."""
    height, width = spec.shape[-2:] if layout is Layout.NCHW else spec.shape[-3:-1]
    return fixed_size(height), fixed_size(width)


def _why_not_channels(preprocess: Preprocess, spec: InputSpec, layout: Layout, order: Order) -> str | None:
    """Why an input does not take these channels, or its numbers are not those of these channels."""
    if fixed_size(spec.shape[_channel_axis(spec, layout)]) not in (None, order.channels):
        others = [
            f"layout={other.value}:order={each.value}"
            for other in Layout
            for each in Order
            if fixed_size(spec.shape[_channel_axis(spec, other)]) in (None, each.channels)
        ]
        advice = f"write {' or '.join(others)}" if others else _OTHERWISE
        channels = f"{order.channels} channel{'s' if order.channels > 1 else ''}"
        return (
            f"layout={layout.value}:order={order.value} yields {channels}, but the model's input '{spec.name}' takes "
            f"{spec}: {advice}"
        )
    for name, numbers in (("mean", preprocess.mean), ("std", preprocess.std)):
        if len(numbers) > order.channels:
            return f"'{name}' has {len(numbers)} numbers, but order={order.value} yields 1 channel: write one number"
    return None


def _why_not_dtype(preprocess: Preprocess, dtype: np.dtype[Any], order: Order) -> str | None:
    """Why a dtype does not hold what the pixels become: integers must be so for all of 0..255."""
    if dtype.kind == "f":
        return None
    levels = preprocess.values(np.repeat(np.arange(256, dtype=np.uint8)[:, None], order.channels, axis=1))
    lowest, highest = np.iinfo(dtype).min, np.iinfo(dtype).max
    if (levels == np.round(levels)).all() and lowest <= levels.min() and levels.max() <= highest:
        return None
    example = "scale=1:mean=128 for -128..127" if highest < 255 else "scale=1 without mean and std for 0..255"
    return (
        f"the model's input takes {dtype}, but (pixel / scale - mean) / std with {preprocess} is not an integer of "
        f"{lowest}..{highest} for every pixel: write {example}"
    )
