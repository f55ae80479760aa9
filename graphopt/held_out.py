"""Samples that a pass does not learn from, and how close a model's outputs are to another's on these.

A pass that sets numbers from data can set them to the noise of its samples. Every fourth sample is therefore held out,
and what the pass did is kept where the error of the model's outputs on the held-out ones falls.
"""

from __future__ import annotations

import math
from functools import partial

from graphopt.compare import OutputComparison, Runs, compare_sessions
from graphopt.errors import DataError
from graphopt.feeds import Samples
from graphopt.runtime import Session

HELD_OUT = 4  # one sample in so many


def is_held_out(index: int) -> bool:
    """Whether sample number `index` is not learnt from, but judged by."""
    return index % HELD_OUT == HELD_OUT - 1


def count_of(samples: Samples, who: str) -> int:
    """How many samples there are.

    Args:
        samples: read through where they do not tell.
        who: the pass, for the error.

    Raises:
        DataError: there are too few to hold one out.
    """
    count = sum(1 for _ in samples) if samples.count is None else samples.count
    if count < HELD_OUT:
        raise DataError(
            f"{samples.description}: {who} needs {HELD_OUT} samples at least, to fit to some and to judge by "
            f"others; there {'is' if count == 1 else 'are'} {count}"
        )
    return count


class Judge:
    """Compares models with a reference on the held-out samples."""

    def __init__(self, reference: Session, samples: Samples) -> None:
        self._reference = reference
        self._held_out = Samples(
            lambda: (feed for index, feed in enumerate(samples) if is_held_out(index)), samples.description
        )

    def error(self, session: Session) -> float:
        """`noise_to_signal` of a model; with its errors."""
        return noise_to_signal(self._reference, session, self._held_out)

    def prefers(self, new: Session, old: Session) -> bool:
        """Whether the error of `new` is the lower one on more samples than that of `old`.

        Over all samples together, one with large errors may decide alone.

        Raises:
            DataError, ModelError: as `error`.
        """
        votes = 0
        for feed in self._held_out:
            alone = Samples(partial(iter, [feed]), self._held_out.description)
            ours, theirs = (noise_to_signal(self._reference, each, alone) for each in (new, old))
            votes += int(ours < theirs) - int(ours > theirs)
        return votes > 0


def noise_to_signal(reference: Runs, session: Session, samples: Samples) -> float:
    """The noise over the signal, as in SQNR, averaged over the outputs.

    Where no output is a float, the share of elements that differ; NaN where nothing can be compared.

    Raises:
        DataError: a sample does not fit.
        ModelError: the models have other outputs, or fail on a sample.
    """
    errors = noise_by_output(reference, session, samples)
    return sum(errors) / len(errors) if errors else math.nan


def noise_by_output(reference: Runs, session: Session, samples: Samples) -> list[float]:
    """What `noise_to_signal` averages: one value for each output that can be compared.

    Raises:
        DataError, ModelError: as `noise_to_signal`.
    """
    outputs = compare_sessions(reference, session, samples).outputs
    errors = [_error(each) for each in outputs if each.is_float]
    return errors or [1 - each.agreement for each in outputs if each.agreement is not None]


def _error(output: OutputComparison) -> float:
    """Noise over signal; an array of another size is all noise."""
    resized = output.resized / output.arrays
    return resized + (1 - resized) * 10 ** (-output.sqnr_db / 10) if resized < 1 else 1.0


def percent(error: float) -> str:
    """An error of `noise_to_signal` as reports show it."""
    return f"{error:.2%} of the outputs' power ({decibels(error)})"


def decibels(error: float) -> str:
    """An error of `noise_to_signal` as SQNR."""
    return f"{-10 * math.log10(error) if error > 0 else math.inf:.1f} dB"
