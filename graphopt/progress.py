"""Progress of long work, told to whoever shows it: the command line draws a bar, a library call stays silent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Progress = Callable[[str, int, int | None], None]
"""Called as progress(what, done, total); `total` is None where the length is not known."""


def silent(what: str, done: int, total: int | None) -> None:
    """Show nothing."""


def track(items: Iterable[Item], progress: Progress, what: str, total: int | None) -> Iterator[Item]:
    """Yield `items`, telling `progress` after each."""
    progress(what, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        progress(what, done, total)
