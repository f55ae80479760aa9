"""Inputs for a model that came without data: made up, and tried on the model itself."""

from __future__ import annotations

from graphopt.errors import DataError, GraphoptError
from graphopt.feeds import Feed, Samples
from graphopt.runtime import Session
from graphopt.synthetic import synthetic_samples

SAMPLES = 32


def made_up_samples(session: Session, *, count: int = SAMPLES, seed: int = 0) -> Samples:
    """Seeded feeds for a session, of the first choice of open sizes that it runs on; see `synthetic_samples`.

    Raises:
        DataError: it runs on none of them.
    """
    reasons: list[str] = []

    def runs(feed: Feed) -> bool:
        try:
            session.run(feed)
        except GraphoptError as error:
            reasons.append(str(error))
            return False
        return True

    try:
        return synthetic_samples(session.inputs, count=count, seed=seed, runnable=runs)
    except DataError as error:
        raise DataError(f"{error}; {reasons[0]}" if reasons else str(error)) from error
