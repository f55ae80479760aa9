"""Keep only the int8 islands that pay on this machine: measured in onnxruntime, one island at a time.

The graph with all islands is the first candidate. Each island in turn is left out, the smallest first, and stays out
when the graph is faster without it by more than the noise. What is left must beat the float graph, else all is float.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graphopt.feeds import Feed
from graphopt.islands import Island
from graphopt.model_io import Model
from graphopt.progress import Progress, silent, track
from graphopt.runtime import measure_latency, open_session

NOISE = 0.02
"""Two medians that are this close are taken for equal."""
_SECONDS = 0.4  # for one comparison


@dataclass(frozen=True)
class Tuned:
    """What was measured.

    Attributes:
        islands: how many there are.
        reasons: by the position of an island, why it stays float.
        float_seconds: median latency of the float graph.
        int8_seconds: that of the graph with all islands.
        seconds: that of the graph with the islands that pay.
    """

    islands: int
    reasons: dict[int, str]
    float_seconds: float
    int8_seconds: float
    seconds: float

    def __str__(self) -> str:
        """What the report says."""
        left, kind = len(self.reasons), "island" if self.islands == 1 else "islands"
        before = f"{_milliseconds(self.float_seconds)} in float, {_milliseconds(self.int8_seconds)} in int8"
        after = f"{_milliseconds(self.seconds)} with {left} of {self.islands} {kind} left in float"
        return f"measured on this machine: {before}, {after}"


def tune(
    islands: Sequence[Island],
    build: Callable[[Sequence[int]], Model],
    feed: Feed,
    *,
    progress: Progress = silent,
) -> Tuned:
    """Find the islands that make the graph faster.

    Args:
        islands: all that there are.
        build: the model with the islands at some positions left in float.
        feed: the inputs to measure with.
        progress: told after every island, and after the comparison with the float graph.

    Raises:
        ModelError: onnxruntime refuses a model.
    """
    everything = range(len(islands))
    plain = open_session(build(list(everything)))
    best = full = open_session(build([]))
    out: list[int] = []
    reasons: dict[int, str] = {}
    smallest_first = sorted(everything, key=lambda position: len(islands[position].nodes))
    tried = smallest_first if len(islands) > 1 else []
    what, steps = "measure int8 islands", len(tried) + 1
    for position in track(tried, progress, what, steps):
        without = open_session(build([*out, position]))
        with_it, without_it = measure_latency([best, without], feed, seconds=_SECONDS)
        if without_it < with_it * (1 - NOISE):
            best, out = without, [*out, position]
            reasons[position] = f"measured: {_milliseconds(without_it)} without it, {_milliseconds(with_it)} with it"
    finally_timed = [plain, best, *([full] if out else [])]
    float_seconds, seconds, *before = measure_latency(finally_timed, feed, seconds=len(finally_timed) * _SECONDS)
    (int8_seconds,) = before or [seconds]
    progress(what, steps, steps)
    if seconds > float_seconds:
        said = f"measured: {_milliseconds(float_seconds)} in float, {_milliseconds(seconds)} in int8"
        reasons = {position: reasons.get(position, said) for position in everything}
        seconds = float_seconds
    return Tuned(len(islands), reasons, float_seconds, int8_seconds, seconds)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
