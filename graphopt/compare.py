"""How far one model's outputs are from another's, over many samples, in memory that does not grow with them.

For a reference tensor x and the other model's y, with sums over all elements of all samples, in float64:

    SQNR     10 log10( sum x^2 / sum (x - y)^2 )  in dB; the signal-to-quantization-noise ratio of Lin,
             Talathi and Annapureddy, "Fixed Point Quantization of Deep Convolutional Networks",
             arXiv:1511.06393. inf where x = y, -inf where x = 0 and y is not.
    cosine   sum x y / sqrt( sum x^2  sum y^2 ); 1 where both are 0, 0 where one of them is
    error    max |x - y|

Elements where x is NaN or infinite are left out of all three and counted. Where only y is, the noise is
infinite. Arrays of other sizes in y, as of a detector that finds one box more, are left out of everything and counted.

Agreement is a share from 0 to 1. For floats it is that of equal top-1 classes, and exists only where the
output looks like class scores: shape [N, C] with C >= 2, once trailing dimensions of 1 are dropped; each row
is one decision, and ties go to the first class. Embeddings and box coordinates have that shape too: read the
figure with the model in mind. For integers, bool and strings it is the share of equal elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from graphopt.errors import DataError, ModelError
from graphopt.feeds import Array, Feed, Samples, fitting_feed
from graphopt.progress import Progress, silent, track
from graphopt.runtime import Session, arrays_in

_CHUNK = 1 << 20  # elements that are in float64 at a time


@dataclass(frozen=True)
class OutputComparison:
    """One tensor of both models; the module docstring has the formulas."""

    name: str
    dtype: str  # the reference's
    sqnr_db: float  # NaN where nothing can be compared: strings or all sizes differ, no finite value in the reference
    cosine: float
    max_error: float
    agreement: float | None  # None where the output does not look like class scores
    nonfinite_reference: int = 0  # elements that are NaN or infinite in the reference, and so left out
    nonfinite_new: int = 0  # elements that are NaN or infinite in the other model only
    arrays: int = 1  # that both models returned
    resized: int = 0  # of these, how many have other sizes in the other model, and so were left out
    first_resized: str = ""  # the shapes of the first of them

    @property
    def is_float(self) -> bool:
        """Whether SQNR judges this tensor; integers, bool and strings are judged by agreement."""
        return "float" in self.dtype


@dataclass(frozen=True)
class Comparison:
    """Two models over the same samples."""

    outputs: tuple[OutputComparison, ...]
    samples: int  # feeds that both models ran

    def worst_first(self) -> list[OutputComparison]:
        """Sort by SQNR, the lowest first; what cannot be compared comes before."""
        return sorted(self.outputs, key=lambda each: -math.inf if math.isnan(each.sqnr_db) else each.sqnr_db)

    def ok(self, min_sqnr: float | None = None, min_agreement: float | None = None) -> bool:
        """Whether there are no `shortfalls`."""
        return not self.shortfalls(min_sqnr, min_agreement)

    def shortfalls(self, min_sqnr: float | None = None, min_agreement: float | None = None) -> list[str]:
        """Say, a sentence for each, which outputs miss `min_sqnr` in dB or `min_agreement` from 0 to 1.

        SQNR is asked of every float output, agreement of every output that has one. New NaN or infinite
        values and other sizes fall short without any limit, and so does a limit that no output can be held to.
        """
        return [
            *self.resized(),
            *_new_nonfinite(self.outputs),
            *([] if min_sqnr is None else _below_sqnr(self.outputs, min_sqnr)),
            *([] if min_agreement is None else _below_agreement(self.outputs, min_agreement)),
        ]

    def resized(self) -> list[str]:
        """Say, a sentence for each, which outputs have other sizes."""
        return [
            f"output '{each.name}' has other sizes than in the reference in {each.resized} of {each.arrays} arrays, "
            f"{each.first_resized}; these are left out of its figures"
            for each in self.outputs
            if each.resized
        ]


def _new_nonfinite(outputs: Sequence[OutputComparison]) -> list[str]:
    return [
        f"output '{each.name}' has {each.nonfinite_new} NaN or infinite values where the reference has none"
        for each in outputs
        if each.nonfinite_new
    ]


def _below_sqnr(outputs: Sequence[OutputComparison], limit: float) -> list[str]:
    judged = [each for each in outputs if each.is_float]
    if not judged:
        return ["no output is float, so there is no SQNR to hold to a limit"]
    return [
        f"output '{each.name}' has an SQNR of {each.sqnr_db:.2f} dB, below {limit:g} dB"
        for each in judged
        if not each.sqnr_db >= limit  # NaN falls short
    ]


def _below_agreement(outputs: Sequence[OutputComparison], limit: float) -> list[str]:
    judged = [(each.name, each.agreement) for each in outputs if each.agreement is not None]
    if not judged:
        return ["no output looks like class scores [N, C], so there is no agreement to hold to a limit"]
    return [
        f"output '{name}' agrees in {agreement:.2%}, below {limit:.2%}"
        for name, agreement in judged
        if agreement < limit
    ]


class Runs(Protocol):
    """What a comparison asks of a session."""

    @property
    def outputs(self) -> Sequence[str]:
        """Names of the outputs."""

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Outputs by name."""


def compare_sessions(
    reference: Runs,
    other: Session,
    samples: Samples,
    *,
    outputs: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Run both models on every feed and compare the outputs of the same name.

    Args:
        reference: the model to be close to.
        other: may take its inputs in another dtype (cast as `data` does) and may have further outputs.
        samples: feeds that fit the reference.
        outputs: the tensors to compare, in this order; None: all outputs of the reference. Tensors inside the
            models are outputs of sessions opened with `extra_outputs`. For one feed at a time, all are in memory
            twice.
        progress: told after each feed.

    Raises:
        ModelError: a tensor is missing in one of the models, or they differ in its rank or kind.
        DataError: there are no samples, or they do not fit the other model's inputs.

    """
    names = list(reference.outputs if outputs is None else outputs)
    _refuse_missing(names, reference, "the reference")
    _refuse_missing(names, other, "the other model")
    sums = {name: _Sums(name) for name in names}
    count = 0
    for feed in track(samples, progress, "comparing", samples.count):
        expected, actual = reference.run(feed, names), other.run(_feed_for(other, feed), names)
        for name in names:
            sums[name].add_all(arrays_in(expected[name]), arrays_in(actual[name]))
        count += 1
    if count == 0:
        raise DataError(f"{samples.description}: no samples to compare the models on")
    return Comparison(tuple(each.result() for each in sums.values()), count)


def _refuse_missing(names: Sequence[str], session: Runs, which: str) -> None:
    missing = [name for name in names if name not in session.outputs]
    if missing:
        has = ", ".join(f"'{name}'" for name in session.outputs)
        raise ModelError(f"cannot compare '{missing[0]}': {which} has no such output, it has {has}")


def _feed_for(session: Session, feed: Feed) -> Feed:
    return fitting_feed(feed, session.inputs, "the reference's feed, given to the other model")


class _Sums:
    """Running sums for one tensor."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dtype = ""
        self.finite = 0  # elements compared
        self.arrays = self.resized = 0
        self.first_resized = ""
        self.signal = self.noise = self.product = self.other_signal = self.max_error = 0.0
        self.nonfinite_reference = self.nonfinite_new = 0
        self.agreeing = self.decisions = 0

    def add_all(self, expected: Sequence[Array], actual: Sequence[Array]) -> None:
        """Take in one feed's arrays: one of a tensor, one for each element of a sequence.

        Raises:
            ModelError: they differ in number, rank, or kind.

        """
        if len(expected) != len(actual):
            raise ModelError(
                f"'{self.name}' holds {len(expected)} arrays in the reference and {len(actual)} in the other model"
            )
        for one, other in zip(expected, actual, strict=True):
            self.add(one, other)

    def add(self, expected: Array, actual: Array) -> None:
        """Take in a pair of arrays.

        Raises:
            ModelError: they differ in rank, or one holds strings and the other numbers.

        """
        shapes = f"shape {expected.shape} in the reference and {actual.shape} in the other model"
        if expected.ndim != actual.ndim:
            raise ModelError(f"'{self.name}' has {shapes}")
        if _is_text(expected) != _is_text(actual):
            raise ModelError(
                f"'{self.name}' is {expected.dtype} in the reference and {actual.dtype} in the other model"
            )
        self.dtype = "string" if _is_text(expected) else str(expected.dtype)
        self.arrays += 1
        if expected.shape != actual.shape:
            self.resized += 1
            self.first_resized = self.first_resized or shapes
            return
        if not _is_float(expected):
            self.agreeing += int(np.count_nonzero(expected == actual))
            self.decisions += expected.size
        else:
            self._add_classes(expected, actual)
        if not _is_text(expected):
            expected, actual = expected.ravel(), actual.ravel()
            for start in range(0, expected.size, _CHUNK):
                part = slice(start, start + _CHUNK)
                self._add_numbers(expected[part].astype(np.float64), actual[part].astype(np.float64))

    def _add_classes(self, expected: Array, actual: Array) -> None:
        rows, columns = expected.shape[:2] if expected.ndim >= 2 else (0, 0)
        if columns < 2 or rows * columns != expected.size:
            return
        expected, actual = expected.reshape(rows, columns), actual.reshape(rows, columns)
        known = np.isfinite(expected).all(axis=1)
        same = (expected.argmax(axis=1) == actual.argmax(axis=1)) & np.isfinite(actual).all(axis=1)
        self.agreeing += int(np.count_nonzero(same & known))
        self.decisions += int(np.count_nonzero(known))

    def _add_numbers(self, expected: NDArray[np.float64], actual: NDArray[np.float64]) -> None:
        known = np.isfinite(expected)
        if not known.all():
            self.nonfinite_reference += int(np.count_nonzero(~known))
            expected, actual = expected[known], actual[known]
        self.nonfinite_new += int(np.count_nonzero(~np.isfinite(actual)))
        self.finite += expected.size
        error = np.abs(expected - actual)
        self.signal += _dot(expected, expected)
        self.other_signal += _dot(actual, actual)
        self.product += _dot(expected, actual)
        self.noise += _dot(error, error)
        self.max_error = max(self.max_error, float(error.max(initial=0.0)))

    def result(self) -> OutputComparison:
        """Return what the sums say so far."""
        return OutputComparison(
            self.name,
            self.dtype,
            self._sqnr_db(),
            self._cosine(),
            math.inf if self.nonfinite_new else self.max_error,
            self.agreeing / self.decisions if self.decisions else None,
            self.nonfinite_reference,
            self.nonfinite_new,
            self.arrays,
            self.resized,
            self.first_resized,
        )

    @property
    def _has_none(self) -> bool:
        """Whether all arrays have other sizes, so that nothing was compared."""
        return 0 < self.arrays == self.resized

    def _sqnr_db(self) -> float:
        if self.nonfinite_new:
            return -math.inf
        if self._has_none:
            return math.nan
        if self.dtype == "string":
            return math.inf if self.agreeing == self.decisions else math.nan
        if self.nonfinite_reference and not self.finite:
            return math.nan
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    def _cosine(self) -> float:
        if self.dtype == "string" or self.nonfinite_new or self._has_none:
            return math.nan
        if self.signal == 0 or self.other_signal == 0:
            return 1.0 if self.signal == self.other_signal else 0.0
        return self.product / math.sqrt(self.signal) / math.sqrt(self.other_signal)


def _dot(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """In this thread: BLAS would wait for those of onnxruntime, which stay awake a while after a run."""
    return float(np.einsum("i,i->", one, other))


def _is_text(array: Array) -> bool:
    return array.dtype.kind in "OUS"


def _is_float(array: Array) -> bool:
    return "float" in array.dtype.name
