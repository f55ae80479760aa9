"""What a person sees while work goes on: bars with an estimate, the speed and the memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBars
from rich.text import Text

from graphopt.progress import Progress


@contextmanager
def progress_bars(errors: Console) -> Iterator[Progress]:
    """Bars on `errors`, one for each kind of work; nothing where that is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Speed(),
        TimeRemainingColumn(elapsed_when_finished=True),
        _Memory(),
    )
    with ProgressBars(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


class _Speed(ProgressColumn):
    """Samples a second."""

    def render(self, task: Task) -> Text:
        """Nothing before the first is done."""
        speed = task.finished_speed or task.speed
        return Text("" if not speed else f"{speed:.1f}/s")


class _Memory(ProgressColumn):
    """The most memory that this process has taken, in MiB."""

    def render(self, task: Task) -> Text:
        """Nothing where the system does not tell."""
        try:
            import resource
        except ImportError:  # Windows
            return Text("")
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return Text(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.0f} MiB")
