"""Whether inputs look like those that a model was trained on, judged by the first BatchNormalization behind them.

It remembers the mean and the variance that each of its channels had in training. So the operators before it run on
some samples, and for each channel the divergence of what they give from what is remembered is computed, both taken
for normal distributions:

    KL(N(m, v) || N(mean, var)) = (v / var + (m - mean)**2 / var - 1 - log(v / var)) / 2

The median over the channels is below 2 for the right inputs of seven real nets and below 0.4 for most of them; it is
5 where the pixels of 0..1 should be 0..255 and thousands where it is the other way round. Mistakes that people make
are then tried on the same samples: the one that repairs the divergence is the one to name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graphopt.errors import GraphoptError
from graphopt.feeds import Array, Feed, Samples
from graphopt.graph import constant_of
from graphopt.model_io import Model
from graphopt.operators import MOVING
from graphopt.runtime import Session, open_session

_SAMPLES = 6
FITS = 2.0  # the divergence of inputs that may be right
_FAR = 4.0  # one that by itself says that they are not
_SUSPICIOUS, _BETTER = 0.4, 5.0  # one that another reading of the inputs makes so many times smaller
_SWAPPED, _LESS = 2.0, 0.05  # for the order of the channels, which changes less: times and difference
_CARRIES = MOVING | {"Cast", "Pad"}
_LINEAR = ("Conv", "Gemm", "MatMul")
_LEAST_VARIANCE = 1e-6  # of the largest channel's: a channel that was dead in training tells nothing
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Change = Callable[[Array], Array]


@dataclass(frozen=True)
class Remembered:
    """What one BatchNormalization remembers, and the tensor that it reads."""

    tensor: str
    mean: NDArray[np.float64]  # [C]
    variance: NDArray[np.float64]  # [C]


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


def first_remembered(tensor: gs.Tensor) -> Remembered | None:
    """What the BatchNormalization remembers that normalizes the first linear operator behind an input."""
    reached = [tensor]
    for each in reached:
        for node in each.outputs:
            if node.op in _CARRIES and node.inputs[0] is each:
                reached.append(node.outputs[0])
            elif node.op in _LINEAR and node.inputs[0] is each:
                for after in node.outputs[0].outputs:
                    if after.op == "BatchNormalization" and not after.attrs.get("training_mode", 0):
                        return _remembered(after)
    return None


def _remembered(node: gs.Node) -> Remembered | None:
    mean, variance = constant_of(node.inputs[3]), constant_of(node.inputs[4])
    if mean is None or variance is None:
        return None
    return Remembered(node.inputs[0].name, mean.astype(np.float64), variance.astype(np.float64))


def up_to(model: Model, name: str) -> Model:
    """The part of a model that computes one tensor."""
    copy = model.copy()
    copy.graph.outputs = [tensor for node in copy.graph.nodes for tensor in node.outputs if tensor.name == name]
    copy.graph.cleanup(remove_unused_graph_inputs=True)
    return copy


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
    values = [session.run(feed)[statistics.tensor] for feed in feeds]
    rows = np.concatenate([rows_by_channel(each) for each in values], axis=1)
    return float(median_divergence(rows.mean(axis=1), rows.var(axis=1), statistics))


def rows_by_channel(values: Array) -> NDArray[np.float64]:
    """[N, C, ...] -> [C, values of a channel]."""
    return np.moveaxis(values, 1, 0).reshape(values.shape[1], -1).astype(np.float64)


def median_divergence(
    mean: NDArray[np.float64], variance: NDArray[np.float64], remembered: Remembered
) -> NDArray[np.float64]:
    """Means and variances [..., C] -> the median over the channels of their divergence from those remembered, [...]."""
    alive = remembered.variance > _LEAST_VARIANCE * remembered.variance.max()
    expected = remembered.variance[alive]
    ratio = np.maximum(variance[..., alive] / expected, np.finfo(np.float64).tiny)
    offset = (mean - remembered.mean)[..., alive] ** 2 / expected
    return np.asarray(np.median(0.5 * (ratio + offset - 1 - np.log(ratio)), axis=-1))


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
