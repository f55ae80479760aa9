"""One feed: the arrays of one inference call, and whether they are what the model's inputs take.

Arrays are cast where that cannot change what the user meant: float64 to float32, int32 to int64, bool to an
integer. An integer array for a float input is refused, because only the user knows the scaling: a uint8 image
may stand for 0..255, 0..1 or something normalized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.errors import DataError

Array = NDArray[Any]
Feed = dict[str, Array]
"""Input name -> array, everything that one inference call needs."""


class SourcedFeed(dict[str, Array]):
    """A feed that knows where it was found: a file, or a file and a sample in it."""

    def __init__(self, arrays: Mapping[str, Array], where: str) -> None:
        super().__init__(arrays)
        self.where = where


def place_of(feed: Feed, number: int) -> str:
    """Return how an error names a feed: where it was found, or else its number."""
    return feed.where if isinstance(feed, SourcedFeed) else f"sample {number} (counted from 0)"


Dimension = int | str | None
"""A declared size: a number, a symbolic name, or None where the model says nothing."""


@dataclass(frozen=True)
class InputSpec:
    """What one input of a model takes.

    `shape` is `()` for a scalar, and also for an input that declares no shape, because onnxruntime reports
    both alike. Strings are numpy objects.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[Dimension, ...]

    def __str__(self) -> str:
        """Dtype and shape, such as `float32 [N, 1, 28, 28]`."""
        dtype = "string" if self.dtype.kind == "O" else str(self.dtype)
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{dtype} [{sizes}]" if self.shape else f"{dtype} scalar"


@dataclass(frozen=True)
class Samples:
    """Feeds for one model, each one inference call. Every iteration starts again from the first feed.

    Only one iteration at a time is safe: a source such as a CalibrationDataReader has a single position.
    """

    start: Callable[[], Iterator[Feed]]  # begins a new iteration
    description: str  # where the feeds come from, for reports
    count: int | None = None  # how many there are; None where that shows only on reading them
    synthetic: bool = False  # made up from the inputs' declarations, so no evidence of real ranges
    notes: tuple[str, ...] = ()  # what a user should know: ignored arrays, repeated arrays

    def __iter__(self) -> Iterator[Feed]:
        return self.start()

    def first(self, limit: int) -> Samples:
        """Return the same without the feeds after the first `limit`."""
        count = self.count if self.count is None else min(self.count, limit)
        return replace(self, start=lambda: islice(self.start(), limit), count=count)

    def first_shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Return the shapes of the first feed by input name; None where there is no feed."""
        feed = next(iter(self), None)
        return None if feed is None else shapes_of(feed)


def shapes_of(feed: Feed) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array by input name."""
    return {name: np.shape(value) for name, value in feed.items()}


def fixed_size(dimension: Dimension) -> int | None:
    """Return the number that a declared dimension fixes; None where any size fits.

    Exporters also write 0, -1, "-1" and "?" for sizes that they do not know.
    """
    return dimension if isinstance(dimension, int) and dimension > 0 else None


def is_named(dimension: Dimension) -> bool:
    """Return whether a dimension has a name that says something; "?" and "-1" stand for unknown sizes."""
    return isinstance(dimension, str) and any(character.isalpha() for character in dimension)


def fitting_feed(arrays: Mapping[str, Any], inputs: Sequence[InputSpec], where: str) -> Feed:
    """Check `arrays` against the model's inputs and cast them; arrays that are no input are left out.

    Raises:
        DataError: an input has no array, or its array does not fit; the message begins with `where`.

    """
    fitting = {spec.name: _fitting_array(arrays[spec.name], spec, where) for spec in required(inputs, arrays, where)}
    return SourcedFeed(fitting, where)


def required(inputs: Sequence[InputSpec], names: Mapping[str, Any], where: str) -> Sequence[InputSpec]:
    """Return the inputs themselves, once it is sure that `names` has each of them.

    Raises:
        DataError: names the missing inputs, and all that the model takes.

    """
    missing = [spec.name for spec in inputs if spec.name not in names]
    if missing:
        takes = ", ".join(f"'{spec.name}' {spec}" for spec in inputs)
        found = ", ".join(f"'{name}'" for name in names) or "none"
        absent = ", ".join(f"'{name}'" for name in missing)
        raise DataError(f"{where}: no array for input {absent}; the model takes {takes}; arrays found: {found}")
    return inputs


def unfitting(array: Array, spec: InputSpec, where: str) -> DataError:
    """Return the error for an array whose shape is not the one that an input declares."""
    return DataError(
        f"{where}: array '{spec.name}' has shape {array.shape}, but the model's input '{spec.name}' takes {spec}"
    )


def sizes_fit(sizes: Sequence[int], dimensions: Sequence[Dimension]) -> bool:
    """Whether `sizes` agree in number and in every fixed dimension with `dimensions`."""
    return len(sizes) == len(dimensions) and all(
        fixed_size(dimension) in (None, size) for size, dimension in zip(sizes, dimensions, strict=True)
    )


def _fitting_array(value: Any, spec: InputSpec, where: str) -> Array:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: the value of '{spec.name}' is not an array: {error}") from error
    if spec.shape and not sizes_fit(array.shape, spec.shape):
        raise unfitting(array, spec, where)
    if array.dtype == spec.dtype:
        return array
    why_not = _why_no_cast(array, spec.dtype)
    if why_not:
        raise DataError(
            f"{where}: array '{spec.name}' is {array.dtype}, "
            f"but the model's input '{spec.name}' takes {spec}; {why_not}"
        )
    return array.astype(spec.dtype)


def _why_no_cast(array: Array, dtype: np.dtype[Any]) -> str | None:
    """Why casting would change what the user meant; None where it would not."""
    kind, wanted = _kind(array.dtype), _kind(dtype)
    if (kind, wanted) == ("integer", "float"):
        return "scale it yourself, because only you know how (such as array.astype('float32') / 255)"
    if kind != wanted:
        return f"convert it to {dtype} yourself"
    if kind == "float":
        with np.errstate(over="ignore"):
            overflows = np.isinf(array.astype(dtype)) & np.isfinite(array)
        return f"some of its values are too large for {dtype}" if overflows.any() else None
    if kind == "integer" and array.size and not _in_range(array, dtype):
        return f"some of its values do not fit into {dtype}"
    return None


def _in_range(array: Array, dtype: np.dtype[Any]) -> bool:
    lowest, highest = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    return lowest <= int(array.min()) and int(array.max()) <= highest


def _kind(dtype: np.dtype[Any]) -> str:
    return {"b": "integer", "i": "integer", "u": "integer", "f": "float", "O": "string", "U": "string"}.get(
        dtype.kind, dtype.name
    )
