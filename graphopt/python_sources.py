"""Feeds from Python: a function in a file, and objects that a caller of the library hands over.

What can be started again is started again for every iteration, so memory stays flat. An iterator that has
only one go is kept in memory instead, up to `BUFFER_LIMIT`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import DataError
from graphopt.feed_sources import RawFeed, Source, arrays_along_axis_0
from graphopt.feeds import InputSpec

BUFFER_LIMIT = 2 << 30
"""Bytes that the feeds of an iterator which cannot be restarted may fill."""


def function_in_file(path: Path, name: str) -> Source:
    """Call a function in a Python file, which takes nothing and yields feeds, for every iteration.

    The file runs under a private module name, with its own folder on the import path while it is imported.

    Raises:
        DataError: the file or the function is missing, or raises; the message names the file and the line.

    """
    module = _import_privately(path)
    function = getattr(module, name, None)
    if not callable(function):
        raise DataError(f"{path}: has no function '{name}'")
    where = f"{path}:{name}"

    def feeds() -> Iterator[Any]:
        with _blaming(path):
            iterator = iter(function())
        while True:
            with _blaming(path):
                feed = next(iterator, _END)
            if feed is _END:
                return
            yield feed

    return Source(lambda: _numbered(feeds(), where), where)


_END = object()


def _import_privately(path: Path) -> Any:
    name = f"_graphopt_data_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise DataError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    sys.path.insert(0, folder)
    try:
        with _blaming(path):
            spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Turn whatever the user's file raises into a DataError that names the file and the line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        line = _line_in(str(path.absolute()), error)
        place = f"{path}, line {line}" if line is not None else str(path)
        raise DataError(f"{place}: {type(error).__name__}: {error}") from error


def _line_in(file: str, error: BaseException) -> int | None:
    """Return the line of `file` that the error comes from or came through."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return lines[-1] if lines else None


def python_object(data: Any, inputs: Sequence[InputSpec], limit: int | None) -> Source:
    """Take feeds from Python: a dict of arrays, a CalibrationDataReader, a function, or an iterable of feeds.

    A list, a Dataset and the like are iterated again each time; a function is called again; a reader is
    rewound. An iterator or a reader without `rewind` has only one go: its feeds are kept in memory, up to
    BUFFER_LIMIT bytes, so a function that returns the iterator is better.

    Raises:
        DataError: `data` is none of these, or fills the buffer.

    """
    kind = type(data).__name__
    if isinstance(data, Mapping):
        return arrays_along_axis_0(data, inputs, "data")
    if hasattr(data, "get_next"):
        if hasattr(data, "rewind"):
            return Source(lambda: _numbered(_rewound(data), kind), kind)
        return _kept_in_memory(iter(data.get_next, None), kind, limit)
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        if not callable(data):
            raise DataError(f"data is a {kind}: give a path, a dict of arrays, or an iterable of such dicts")
        name = getattr(data, "__name__", kind)
        return Source(lambda: _numbered(data(), name), f"function {name}")
    if iter(data) is data:
        return _kept_in_memory(data, kind, limit)
    return Source(lambda: _numbered(data, kind), kind, len(data) if isinstance(data, Sized) else None)


def _rewound(reader: Any) -> Iterator[Any]:
    reader.rewind()
    return iter(reader.get_next, None)


def _kept_in_memory(feeds: Iterator[Any], where: str, limit: int | None) -> Source:
    kept: list[RawFeed] = []
    size = 0
    for feed in _numbered(islice(feeds, limit), where):
        size += sum(np.asarray(value).nbytes for value in feed.arrays.values())
        if size > BUFFER_LIMIT:
            raise DataError(
                f"{where}: an iterator can be read only once, and its feeds need more than "
                f"{BUFFER_LIMIT >> 30} GiB of memory: give a function that returns the "
                "iterator, or limit the number of samples"
            )
        kept.append(feed)
    return Source(lambda: iter(kept), where, len(kept), (f"{where}: read once and kept in memory, {size} bytes",))


def _numbered(feeds: Iterable[Any], where: str) -> Iterator[RawFeed]:
    """Name each feed by its number.

    Raises:
        DataError: one of them is no dict of arrays.

    """
    for index, feed in enumerate(feeds):
        if not isinstance(feed, Mapping):
            kind = type(feed).__name__
            raise DataError(f"{where}: feed {index} is a {kind}: yield a dict of input name -> array")
        yield RawFeed(f"{where}, feed {index}", feed)
