"""Feeds from files of arrays: an .npz, a folder of .npz, ONNX test data.

A source yields what it finds, unchecked; `graphopt.data` compares it with the model's inputs. Folders are
read anew on every iteration, one file at a time; the arrays of a single .npz are read once and handed out as
views.
"""

from __future__ import annotations

import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from graphopt.errors import DataError
from graphopt.feeds import Array, InputSpec, fixed_size, required, sizes_fit, unfitting


class RawFeed(NamedTuple):
    """Arrays as they were found, not yet compared with the model."""

    where: str  # how an error names this feed
    arrays: Mapping[str, Any]
    unread: tuple[str, ...] = ()  # names of further arrays that no input asks for


@dataclass(frozen=True)
class Source:
    """Feeds that can be iterated again and again."""

    start: Callable[[], Iterator[RawFeed]]
    description: str
    count: int | None = None
    notes: tuple[str, ...] = ()


def arrays_along_axis_0(arrays: Mapping[str, Any], inputs: Sequence[InputSpec], where: str) -> Source:
    """One array per input, samples along axis 0; a feed is one sample.

    What axis 0 means follows from the array's rank:
      - the input's rank: axis 0 is the batch. A feed has one sample, shape [1, ...], or as many as the
        input's first dimension fixes.
      - one more than the input's rank: axis 0 counts feeds. This is how inputs without a batch axis are
        given, such as a scalar (array of shape [feeds]) or a recurrent state of shape [2, 1, 128].
    An array that holds a single feed, a scalar included, is repeated for all feeds.

    Raises:
        DataError: an array is missing, has the wrong shape, or holds another number of feeds than the others.

    """
    columns = {
        spec.name: _column(np.asarray(arrays[spec.name]), spec, where) for spec in required(inputs, arrays, where)
    }
    count = max((column.count for column in columns.values()), default=0)
    if any(column.count == 0 for column in columns.values()):
        raise DataError(f"{where}: no samples: axis 0 of its arrays has length 0")
    repeated = [name for name, column in columns.items() if column.count == 1 and count > 1]
    odd = [f"'{name}' {column.count}" for name, column in columns.items() if column.count not in (1, count)]
    if odd:
        raise DataError(f"{where}: the arrays hold different numbers of samples: {', '.join(odd)}, others {count}")

    def start() -> Iterator[RawFeed]:
        for index in range(count):
            feed = {name: column.feed(index) for name, column in columns.items()}
            yield RawFeed(f"{where}, sample {index}", feed, others)

    others = tuple(name for name in arrays if name not in columns)
    notes = tuple(f"{where}: '{name}' holds one sample, which is used for every feed" for name in repeated)
    return Source(start, where, count, notes)


@dataclass(frozen=True)
class _Column:
    """The feeds that one array holds."""

    array: Array
    count: int
    rows: int | None  # axis 0 of each feed; None where a feed is one entry of axis 0, or the whole scalar

    def feed(self, index: int) -> Array:
        if self.array.ndim == 0:
            return self.array
        index = index if self.count > 1 else 0
        if self.rows is None:
            return np.asarray(self.array[index])
        return self.array[index * self.rows : (index + 1) * self.rows]


def _column(array: Array, spec: InputSpec, where: str) -> _Column:
    if not spec.shape:  # a scalar, or an input whose shape is not declared
        return _Column(array, 1 if array.ndim == 0 else len(array), None if array.ndim < 2 else 1)
    if array.ndim == len(spec.shape) + 1 and sizes_fit(array.shape[1:], spec.shape):
        return _Column(array, len(array), None)
    if array.ndim != len(spec.shape) or not sizes_fit(array.shape[1:], spec.shape[1:]):
        raise unfitting(array, spec, where)
    rows = fixed_size(spec.shape[0]) or 1
    if len(array) % rows:
        raise DataError(
            f"{where}: array '{spec.name}' has {len(array)} samples, but the model takes {rows} at a time: "
            f"give a multiple of {rows}"
        )
    return _Column(array, len(array) // rows, rows)


def npz_file(path: Path, inputs: Sequence[InputSpec]) -> Source:
    """Read an .npz whose arrays are named after the inputs, samples along axis 0."""
    feed = _read_npz(path, inputs)
    source = arrays_along_axis_0(feed.arrays, inputs, str(path))
    return Source(
        lambda: (each._replace(unread=feed.unread) for each in source.start()),
        source.description,
        source.count,
        source.notes,
    )


def npz_folder(folder: Path, inputs: Sequence[InputSpec]) -> Source:
    """Read a folder of .npz in the order of their names, one feed each; they may differ in shape."""
    paths = sorted(folder.glob("*.npz"))
    return Source(lambda: (_read_npz(path, inputs) for path in paths), str(folder), len(paths))


_UNREADABLE = (  # what NumPy and zipfile raise on damaged files
    *(OSError, EOFError, MemoryError, OverflowError, RuntimeError, ValueError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error),
)


def _read_npz(path: Path, inputs: Sequence[InputSpec]) -> RawFeed:
    try:
        with path.open("rb") as opened:  # NumPy leaves a damaged file open that it opened itself
            file = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise DataError(f"{path}: a single array, not an .npz: write it with np.savez, named after the input")
            with file:
                wanted = required(inputs, file, str(path))
                arrays = {spec.name: _read_array(file, spec.name, path) for spec in wanted}
                return RawFeed(str(path), arrays, tuple(name for name in file if name not in arrays))
    except _UNREADABLE as error:
        why = "it is damaged or another kind of file" if "pickle" in str(error) else error
        raise DataError(f"{path}: cannot be read as .npz: {why}") from error


def _read_array(file: Any, name: str, path: Path) -> Array:
    try:
        array: Array = file[name]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise DataError(
            f"{path}: array '{name}' is pickled, which is refused because reading it could run code: "
            "save it with a numeric dtype"
        ) from error
    return array


def onnx_test_data(folder: Path, inputs: Sequence[InputSpec]) -> Source:
    """ONNX test data: one feed for each folder `test_data_set_*`, or the one feed of such a folder.

    `input_3.pb` is a TensorProto for the input that it names, or else, as in ONNX's own tests, the input
    number 3.
    """
    sets = sorted(folder.glob("test_data_set_*"), key=_number) or [folder]
    return Source(lambda: (_read_test_set(each, inputs) for each in sets), str(folder), len(sets))


def _read_test_set(folder: Path, inputs: Sequence[InputSpec]) -> RawFeed:
    names = [spec.name for spec in inputs]
    arrays: dict[str, Array] = {}
    for path in sorted(folder.glob("input_*.pb"), key=_number):
        try:
            tensor = onnx.TensorProto.FromString(path.read_bytes())
            array = onnx.numpy_helper.to_array(tensor)
        except (OSError, DecodeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: cannot be read as an ONNX TensorProto: {error}") from error
        by_order = names[_number(path)] if _number(path) < len(names) else tensor.name
        arrays[tensor.name if tensor.name in names else by_order] = array
    return RawFeed(str(folder), arrays)


def _number(path: Path) -> int:
    digits = re.findall(r"\d+", path.name)
    return int(digits[-1]) if digits else 0
