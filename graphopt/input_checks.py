"""Whether inputs look like those that a model was trained on, judged by the first BatchNormalization behind them.

The operators before it run on some samples, and what they give is compared with what it remembers
(`graphopt.remembered`). The divergence is below 2 for the right inputs of seven real nets and below 0.4 for most; it is
5 where the pixels of 0..1 should be 0..255 and thousands where it is the other way round. Mistakes that people make
are then tried on the same samples: the one that repairs the divergence is the one to name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np

from graphopt.errors import GraphoptError
from graphopt.feeds import Array, Feed, Samples
from graphopt.model_io import Model
from graphopt.remembered import FITS, Remembered, first_remembered, median_divergence, up_to
from graphopt.runtime import Session, open_session

_SAMPLES = 6
_FAR = 4.0  # one that by itself says that they are not
_SUSPICIOUS, _BETTER = 0.4, 5.0  # one that another reading of the inputs makes so many times smaller
_SWAPPED, _LESS = 2.0, 0.05  # for the order of the channels, which changes less: times and difference
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Change = Callable[[Array], Array]


def input_warnings(model: Model, samples: Samples) -> tuple[str, ...]:
    """Sentences about inputs that look scaled, shifted or ordered otherwise than in training; none where nothing tells.

    Args:
        model: as it came in: `fold` takes BatchNormalization away.
        samples: the first few are looked at.
    """
    feeds = list(islice(samples, _SAMPLES))
    found: list[str] = []
    for tensor in model.graph.inputs:
        statistics = first_remembered(tensor)
        if statistics is None or not feeds or feeds[0][tensor.name].dtype.kind != "f":
            continue
        try:
            session = open_session(up_to(model, statistics.tensor))
            warning = _judge(session, tensor.name, feeds, statistics)
        except GraphoptError:  # it has no part that runs by itself: nothing to say
            continue
        found += [] if warning is None else [warning]
    return tuple(found)


def _judge(session: Session, name: str, feeds: Sequence[Feed], statistics: Remembered) -> str | None:
    inputs = [{spec.name: feed[spec.name] for spec in session.inputs} for feed in feeds]

    def divergence(change: Change) -> float:
        return _divergence(session, [{**feed, name: change(feed[name])} for feed in inputs], statistics)

    as_is = divergence(lambda array: array)
    readings = {what: divergence(change) for what, change in _readings(inputs[0][name])} if as_is > _SUSPICIOUS else {}
    best = min(readings, key=readings.__getitem__, default=None)
    if best is not None and readings[best] < min(FITS, as_is / _BETTER):
        return (
            f"input {name} does not look like what the model was trained on, by what its first BatchNormalization "
            f"remembers; it would, {best}: check the preprocessing"
        )
    if as_is > _FAR:
        return (
            f"input {name} does not look like what the model was trained on, by what its first BatchNormalization "
            "remembers: check scale, mean and order of the channels"
        )
    reverse = _reversed(inputs[0][name])
    if reverse is None or as_is < 2 * _LESS:
        return None
    swapped = divergence(reverse)
    if as_is - swapped > _LESS and swapped * _SWAPPED < as_is:
        return f"the channels of input {name} may be in reverse order (RGB and BGR): the other fits the model better"
    return None


def _divergence(session: Session, feeds: Sequence[Feed], statistics: Remembered) -> float:
    """The median over the channels of KL(what the feeds give || what is remembered)."""
    means, variances, sizes = [], [], []
    for feed in feeds:
        values = session.run_without_copies(feed)[statistics.tensor]
        axes = tuple(axis for axis in range(values.ndim) if axis != 1)
        wide = np.promote_types(values.dtype, np.float32)  # sums of float16 overflow
        means.append(values.mean(axis=axes, dtype=wide).astype(np.float64))
        variances.append(values.var(axis=axes, dtype=wide).astype(np.float64))
        sizes.append(values.size)
    mean = np.average(means, axis=0, weights=sizes)
    variance = np.average(variances + (means - mean) ** 2, axis=0, weights=sizes)  # within the feeds and among them
    return float(median_divergence(mean, variance, statistics))


def _readings(array: Array) -> Iterator[tuple[str, Change]]:
    """Other readings of the same pixels: what the inputs should have been made of, and how to get there."""
    yield "divided by 255", lambda pixels: _affine(pixels, 1 / 255)
    yield "times 255", lambda pixels: _affine(pixels, 255)
    yield "as 2 x - 1 (from -1 to 1 instead of from 0 to 1)", lambda pixels: _affine(pixels, 2, -1)
    yield "as (x + 1) / 2 (from 0 to 1 instead of from -1 to 1)", lambda pixels: _affine(pixels, 0.5, 0.5)
    yield "as x / 127.5 - 1 (from -1 to 1 instead of from 0 to 255)", lambda pixels: _affine(pixels, 1 / 127.5, -1)
    yield "as 127.5 (x + 1) (from 0 to 255 instead of from -1 to 1)", lambda pixels: _affine(pixels, 127.5, 127.5)
    axis = _channel_axis(array)
    if axis is not None:
        mean, std = (np.asarray(each).reshape([-1] + [1] * (3 - axis)) for each in (_IMAGENET_MEAN, _IMAGENET_STD))
        yield "less ImageNet's mean, over its deviation", lambda pixels: _affine(pixels, 1 / std, -mean / std)
        yield "without ImageNet's mean and deviation", lambda pixels: _affine(pixels, std, mean)
        yield (
            "divided by 255, less ImageNet's mean, over its deviation",
            lambda pixels: _affine(pixels, 1 / std / 255, -mean / std),
        )


def _affine(array: Array, scale: float | Array, shift: float | Array = 0.0) -> Array:
    return np.asarray(array * scale + shift, array.dtype)


def _reversed(array: Array) -> Change | None:
    axis = _channel_axis(array)
    return None if axis is None else lambda pixels: np.ascontiguousarray(np.flip(pixels, axis))


def _channel_axis(array: Array) -> int | None:
    """Where an image has three channels."""
    if array.ndim != 4 or (array.shape[1] == 3) == (array.shape[3] == 3):
        return None
    return 1 if array.shape[1] == 3 else 3
