"""Inputs for a model that came without data: made up, and tried on the model itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.errors import DataError, GraphoptError
from graphopt.feeds import Array, Feed, Samples
from graphopt.required_sizes import with_required_sizes
from graphopt.runtime import Session, arrays_in
from graphopt.synthetic import synthetic_samples

SAMPLES = 32


def made_up_samples(session: Session, graph: gs.Graph, *, count: int = SAMPLES, seed: int = 0) -> Samples:
    """Seeded feeds for a session, of the first choice of open sizes that it runs on; see `synthetic_samples`.

    Second come those that the weights in its `graph` ask for (`graphopt.required_sizes`). A choice whose outputs have
    elements, and finite ones, goes before one that leaves nothing of them, as pooling leaves of few pixels, or NaN, as
    attention gives over sequences without a length; and before both goes one whose outputs follow from every input of
    floats, not from padding in the place of one.

    Raises:
        DataError: it runs on none of them.
    """
    make_up = partial(
        synthetic_samples, session.inputs, count=count, seed=seed, required=with_required_sizes(session.inputs, graph)
    )
    reasons: list[str] = []
    without: list[tuple[float, Feed]] = []  # choices that are not accepted, and how many inputs go without effect

    def fills(feed: Feed) -> bool:
        try:
            outputs = _arrays(session.run(feed))
            idle = _idle_inputs(session, feed, outputs) if all(map(_is_telling, outputs)) else math.inf
        except GraphoptError as error:
            reasons.append(str(error))
            return False
        without.append((idle, feed))
        return idle == 0

    try:
        return make_up(runnable=fills)
    except DataError as error:
        if without:
            _, best = min(without, key=lambda each: each[0])
            return make_up(runnable=lambda feed: all(np.array_equal(feed[name], best[name]) for name in best))
        raise DataError(f"{error}; {reasons[0]}" if reasons else str(error)) from error


def _arrays(outputs: Mapping[str, Any]) -> list[Array]:
    return [array for value in outputs.values() for array in arrays_in(value)]


def _is_telling(array: Array) -> bool:
    """Whether an output has elements, and no NaN or infinity among them."""
    return array.size > 0 and (array.dtype.kind != "f" or bool(np.isfinite(array).all()))


def _idle_inputs(session: Session, feed: Feed, outputs: Sequence[Array]) -> int:
    """How many inputs of floats can be halved and all outputs stay the same."""

    def is_idle(name: str) -> bool:
        halved = np.asarray(feed[name] * feed[name].dtype.type(0.5))  # a product of scalars is no array
        return all(map(np.array_equal, outputs, _arrays(session.run({**feed, name: halved}))))

    return sum(is_idle(name) for name, array in feed.items() if array.dtype.kind == "f")
