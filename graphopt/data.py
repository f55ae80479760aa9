"""Where calibration and check data come from: `--data`, a Python object, or made up."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from graphopt.errors import DataError
from graphopt.feed_sources import RawFeed, Source, npz_file, npz_folder, onnx_test_data
from graphopt.feeds import Array, Feed, InputSpec, Samples, fitting_feed
from graphopt.image_files import image_paths
from graphopt.images import image_folder
from graphopt.preprocess import AnyPreprocess, Preprocess, preprocess_of
from graphopt.python_sources import function_in_file, python_object


class DataReader(Protocol):
    """onnxruntime's CalibrationDataReader: returns feeds one by one, then None."""

    def get_next(self) -> Mapping[str, Any] | None:
        """Return the next feed, or None after the last."""


DataSource = (
    str
    | Path
    | Samples
    | Mapping[str, Array]
    | DataReader
    | Iterable[Mapping[str, Any]]
    | Callable[[], Iterable[Mapping[str, Any]]]
)


def load_samples(
    source: DataSource,
    inputs: Sequence[InputSpec],
    *,
    limit: int | None = None,
    preprocess: AnyPreprocess | None = None,
) -> Samples:
    """Load feeds that fit `inputs`, at most `limit` of them, read as they are asked for.

    `source` is one of
      - `calib.npz`: arrays named after the inputs, samples along axis 0 (rules:
        `feed_sources.arrays_along_axis_0`); in Python also a dict of such arrays
      - a folder of .npz, one feed each, in the order of their names
      - a folder of ONNX `test_data_set_*/input_*.pb`
      - a folder of images and of folders of them (bmp, gif, jpeg, png, ppm, tiff, webp; sorted), which `preprocess`
        turns into arrays: see `preprocess.Preprocess`
      - `file.py:function`: a function that yields feeds; in Python also the function itself
      - in Python any iterable of `dict[str, array]`, or a CalibrationDataReader (rules:
        `python_sources.python_object`).

    Arrays that are no input of the model are ignored; the result's `notes` say so. The first feed is read and
    checked at once, each later one when its turn comes.

    Raises:
        DataError: nothing is there, there are no samples, or they do not fit the model; `preprocess` is wrong, or
        the data are no images. Iterating raises it too.

    """
    refuse_limit(limit)
    found = _source(source, inputs, limit, None if preprocess is None else preprocess_of(preprocess))
    first = next(found.start(), None)
    if first is None:
        raise DataError(f"{found.description}: no samples")
    fitting_feed(first.arrays, inputs, first.where)

    def start() -> Iterator[Feed]:
        raw = None
        for raw in islice(found.start(), limit):
            yield fitting_feed(raw.arrays, inputs, raw.where)
        if raw is None:
            raise DataError(
                f"{found.description}: gave samples once, but none when started again: "
                "return a new iterator on every call"
            )

    return Samples(
        start,
        found.description,
        count=found.count if found.count is None or limit is None else min(found.count, limit),
        synthetic=isinstance(source, Samples) and source.synthetic,
        notes=(*found.notes, *_ignored(first, inputs, found.description)),
    )


@dataclass(frozen=True)
class Shard:
    """One of `total` parts of some samples: every `total`-th of them, from number `number`, counted from 1.

    Raises:
        DataError: there is no such part.
    """

    number: int
    total: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.total:
            raise DataError(f"there is no shard {self}: give I/N with I from 1 to N, such as 1/4")

    def __str__(self) -> str:
        """As the command line takes it."""
        return f"{self.number}/{self.total}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `I/N`.

        Raises:
            DataError: it is something else.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None:
            raise DataError(f"'{text}' is no shard: give I/N with I from 1 to N, such as 1/4")
        return cls(int(match[1]), int(match[2]))

    def of(self, samples: Samples) -> Samples:
        """The samples that are this part of `samples`.

        Raises:
            DataError: there is none.
        """

        def start() -> Iterator[Feed]:
            return islice(samples, self.number - 1, None, self.total)

        count = None if samples.count is None else len(range(self.number - 1, samples.count, self.total))
        if next(start(), None) is None:
            raise DataError(f"{samples.description} has no samples for shard {self}: divide it into fewer")
        return replace(samples, start=start, count=count)


def refuse_limit(limit: int | None) -> None:
    """Refuse a number of samples that leaves none.

    Raises:
        DataError: it is less than 1.

    """
    if limit is not None and limit < 1:
        raise DataError(f"the number of samples must be at least 1, not {limit}")


def _source(
    source: DataSource, inputs: Sequence[InputSpec], limit: int | None, preprocess: Preprocess | None
) -> Source:
    if isinstance(source, (str, Path)) and (paths := _images(str(source))):
        return image_folder(Path(source), paths, inputs, preprocess)
    found = _arrays(source, inputs, limit)
    if preprocess is not None:
        raise DataError(f"{found.description}: read as arrays, and preprocess is for a folder of images: leave it out")
    return found


def _arrays(source: DataSource, inputs: Sequence[InputSpec], limit: int | None) -> Source:
    if isinstance(source, (str, Path)):
        return _source_at(str(source), inputs)
    if isinstance(source, Samples):
        return Source(
            lambda: (RawFeed(source.description, feed) for feed in source),
            source.description,
            source.count,
            source.notes,
        )
    return python_object(source, inputs, limit)


def _source_at(text: str, inputs: Sequence[InputSpec]) -> Source:
    if not text:
        raise DataError(f"the data's path is empty: give {_KINDS}")
    python = re.fullmatch(r"(.+\.py)(?::(\w+))?", text)
    path = Path(python[1] if python else text)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if python:
        if not python[2]:
            raise DataError(f"{path}: name the function that yields feeds, such as {path}:load_data")
        return function_in_file(path, python[2])
    if path.is_dir():
        return _source_in_folder(path, inputs)
    if path.suffix == ".npz":
        return npz_file(path, inputs)
    raise DataError(f"{path}: not a kind of data that graphopt reads: give {_KINDS}")


def data_file(text: str) -> Path:
    """Return the file or folder that `--data` names, without the function in it."""
    python = re.fullmatch(r"(.+\.py):\w+", text)
    return Path(python[1] if python else text)


def _images(text: str) -> list[Path]:
    """The images of a folder that holds no arrays."""
    folder = Path(text)
    return [] if not text or not folder.is_dir() or _kind_of_arrays(folder) else image_paths(folder)


def _source_in_folder(folder: Path, inputs: Sequence[InputSpec]) -> Source:
    kind = _kind_of_arrays(folder)
    if kind is not None:
        return kind(folder, inputs)
    raise DataError(f"{folder}: holds no data that graphopt reads: give {_KINDS}")


def _kind_of_arrays(folder: Path) -> Callable[[Path, Sequence[InputSpec]], Source] | None:
    if any(folder.glob("*.npz")):
        return npz_folder
    if any(folder.glob("test_data_set_*/input_*.pb")) or any(folder.glob("input_*.pb")):
        return onnx_test_data
    return None


_KINDS = "an .npz, a folder of .npz, of ONNX test_data_set_*/input_*.pb or of images, or file.py:function"


def _ignored(first: RawFeed, inputs: Sequence[InputSpec], where: str) -> tuple[str, ...]:
    taken = {spec.name for spec in inputs}
    others = [f"'{name}'" for name in (*first.arrays, *first.unread) if name not in taken]
    return (f"{where}: ignored {', '.join(others)}: no such input in the model",) if others else ()
