"""Inputs for a model that came without data: made up, and tried on the model itself."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.errors import DataError, GraphoptError
from graphopt.feeds import Array, Feed, Samples, shapes_of
from graphopt.required_sizes import with_required_sizes
from graphopt.runtime import Session, arrays_in
from graphopt.synthetic import synthetic_samples

SAMPLES = 32


def made_up_samples(session: Session, graph: gs.Graph, *, count: int = SAMPLES, seed: int = 0) -> Samples:
    """Seeded feeds for a session, of the first choice of open sizes that it runs on; see `synthetic_samples`.

    Second come those that the weights in its `graph` ask for (`graphopt.required_sizes`). A choice whose outputs have
    elements, and finite ones, goes before one that leaves nothing of them, as pooling leaves of few pixels, or NaN, as
    attention gives over sequences without a length.

    Raises:
        DataError: it runs on none of them.
    """
    make_up = partial(
        synthetic_samples, session.inputs, count=count, seed=seed, required=with_required_sizes(session.inputs, graph)
    )
    reasons: list[str] = []
    poor: list[dict[str, tuple[int, ...]]] = []

    def fills(feed: Feed) -> bool:
        try:
            outputs = session.run(feed)
        except GraphoptError as error:
            reasons.append(str(error))
            return False
        if all(map(_is_telling, (array for value in outputs.values() for array in arrays_in(value)))):
            return True
        poor.append(shapes_of(feed))
        return False

    try:
        return make_up(runnable=fills)
    except DataError as error:
        if poor:
            return make_up(runnable=lambda feed: shapes_of(feed) == poor[0])
        raise DataError(f"{error}; {reasons[0]}" if reasons else str(error)) from error


def _is_telling(array: Array) -> bool:
    """Whether an output has elements, and no NaN or infinity among them."""
    return array.size > 0 and (array.dtype.kind != "f" or bool(np.isfinite(array).all()))
