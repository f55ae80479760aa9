"""Made-up inputs that look like training data to the first BatchNormalization behind them.

It remembers the mean and the variance that its channels had in training. Between an input and it lies one linear
operator, so for an input m + d u, with u noise of mean 0 and variance 1, all that it sees follows from three runs of
that operator, on u, on ones and on zeros:

    f(m + d u) = f(0) + m (f(1) - f(0)) + d (f(u) - f(0))

and of a grid of m and d the pair is taken whose channels diverge least from those remembered (`graphopt.remembered`).
How a kernel answers depends on how smooth an input is. Pictures, spectrograms and sounds have about the same power in
each octave, so u has, too: 1/f noise over the places of the input, the same in up to four channels but for a tenth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from graphopt.errors import GraphoptError
from graphopt.feeds import Feed, Samples
from graphopt.graph import Array
from graphopt.model_io import Model
from graphopt.remembered import FITS, Remembered, first_remembered, median_divergence, up_to
from graphopt.runtime import open_session

_SEEN = 6  # samples that the fit looks at
_DEVIATIONS = 2.0 ** np.arange(-10, 12, 0.25)
_MEANS = np.arange(-5, 5.25, 0.25)  # in deviations
_COLOURS = 4  # an axis of so many is one of colours
_GREY = 0.9  # of the variance, what all colours share

Values = NDArray[np.float64]


def likely_samples(model: Model, samples: Samples, *, seed: int = 0) -> Samples:
    """`samples` with the floating-point inputs that a BatchNormalization tells something of replaced.

    Args:
        model: as it came in, BatchNormalization and all.
        samples: made-up feeds, which give shapes, and values where nothing else does.
        seed: of the noise.
    """
    first = next(iter(samples), {})
    fits: dict[str, tuple[float, float]] = {}
    for tensor in model.graph.inputs:
        remembered = first_remembered(tensor)
        if remembered is None or tensor.name not in first or first[tensor.name].dtype.kind != "f":
            continue
        noise = [_noise(first[tensor.name].shape, seed, index) for index in range(_SEEN)]
        try:
            fit = _fit(model, tensor.name, first, noise, remembered)
        except GraphoptError:  # the part of the model before it does not run by itself
            continue
        if fit is not None:
            fits[tensor.name] = fit

    def start() -> Iterator[Feed]:
        for index, feed in enumerate(samples):
            drawn = {
                name: (mean + deviation * _noise(feed[name].shape, seed, index)).astype(feed[name].dtype)
                for name, (mean, deviation) in fits.items()
            }
            yield {**feed, **drawn}

    told = "".join(f"; {name} as BatchNormalization tells: {m:.3g} +- {d:.3g}" for name, (m, d) in fits.items())
    return replace(samples, start=start, description=samples.description + told)


def _fit(
    model: Model, name: str, feed: Feed, noise: list[Values], remembered: Remembered
) -> tuple[float, float] | None:
    """Mean and deviation of the input; None where none fits."""
    session = open_session(up_to(model, remembered.tensor))

    def rows(values: Values) -> Values:
        fed = {spec.name: feed[spec.name] for spec in session.inputs} | {name: values.astype(feed[name].dtype)}
        given = session.run(fed)[remembered.tensor]  # [N, C, ...]
        return np.asarray(np.moveaxis(given, 1, 0).reshape(given.shape[1], -1), np.float64)

    still = rows(np.zeros(noise[0].shape))
    constant = np.tile(rows(np.ones(noise[0].shape)) - still, len(noise))
    varying = np.concatenate([rows(each) - still for each in noise], axis=1)
    means = _MEANS[:, None]
    offset = still.mean(axis=1) + _DEVIATIONS[:, None, None] * (
        means * constant.mean(axis=1) + varying.mean(axis=1)
    )  # [deviations, means, channels]
    constant, varying = (each - each.mean(axis=1, keepdims=True) for each in (constant, varying))
    shared = (constant * varying).mean(axis=1)
    variance = means**2 * constant.var(axis=1) + 2 * means * shared + varying.var(axis=1)
    divergence = median_divergence(offset, _DEVIATIONS[:, None, None] ** 2 * variance, remembered)
    deviation, mean = np.unravel_index(np.argmin(divergence), divergence.shape)
    if not divergence[deviation, mean] < FITS:
        return None
    return float(_MEANS[mean] * _DEVIATIONS[deviation]), float(_DEVIATIONS[deviation])


def _noise(shape: tuple[int, ...], seed: int, index: int) -> Values:
    """1/f noise of mean 0 and variance 1 over the places, axis 0 being samples; white where there are no places."""
    generator = np.random.default_rng((seed, index))
    rank = len(shape)
    if rank < 3:
        return generator.standard_normal(shape)
    channels = rank - 1 if shape[-1] <= _COLOURS else 1
    places = tuple(axis for axis in range(1, rank) if axis != channels)
    white = generator.standard_normal(shape)
    if shape[channels] <= _COLOURS:
        grey = generator.standard_normal([1 if axis == channels else size for axis, size in enumerate(shape)])
        white = np.sqrt(_GREY) * grey + np.sqrt(1 - _GREY) * white
    amplitudes = _amplitudes(shape, places)
    coloured = np.fft.ifftn(np.fft.fftn(white, axes=places) * amplitudes, axes=places).real
    return np.asarray(coloured / np.sqrt((amplitudes**2).mean()))


def _amplitudes(shape: tuple[int, ...], places: tuple[int, ...]) -> Array:
    """Equal power in each octave: power falls with the number of axes as exponent."""
    frequencies = np.meshgrid(*(np.fft.fftfreq(shape[axis]) for axis in places), indexing="ij")
    lowest = 1 / max(shape[axis] for axis in places)
    radius = np.maximum(np.sqrt(sum(each**2 for each in frequencies)), lowest)
    grid = [shape[axis] if axis in places else 1 for axis in range(len(shape))]
    return np.asarray(radius ** (-len(places) / 2)).reshape(grid)
