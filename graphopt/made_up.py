"""Inputs for a model that came without data: made up, and tried on the model itself."""

from __future__ import annotations

from graphopt.data import Feed, Samples, synthetic_samples
from graphopt.errors import GraphoptError
from graphopt.runtime import Session

SAMPLES = 32


def made_up_samples(session: Session, *, count: int = SAMPLES, seed: int = 0) -> Samples:
    """Seeded feeds for a session, of the first choice of open sizes that it runs on; see `synthetic_samples`."""

    def runs(feed: Feed) -> bool:
        try:
            session.run(feed)
        except GraphoptError:
            return False
        return True

    return synthetic_samples(session.inputs, count=count, seed=seed, runnable=runs)
