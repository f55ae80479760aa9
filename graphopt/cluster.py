"""The shards of a calibration on the workers of a dask.distributed cluster.

Each worker reads the model and its part of the samples by itself, from paths that mean the same there; only ranges with
their histograms travel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from graphopt.data import Shard
from graphopt.errors import DataError, GraphoptError, PipelineError
from graphopt.progress import Progress
from graphopt.ranges import Ranges

if TYPE_CHECKING:
    from distributed import Client

_SECONDS_TO_CONNECT = 10


def ranges_of_shards(
    scheduler: str, shards: int | None, work: Callable[[Shard], Ranges], progress: Progress
) -> list[Ranges]:
    """What `work` finds for each shard of the data.

    Args:
        scheduler: the address of the cluster's scheduler, such as tcp://10.0.0.1:8786.
        shards: how many; None: one for each worker that there is.
        work: what a worker does; it must be picklable.
        progress: told after every shard.

    Raises:
        PipelineError: dask.distributed is missing, the scheduler does not answer, or it has no workers.
        DataError: a worker was lost with its shard.
        GraphoptError: what `work` raised.
    """
    if shards is not None and shards < 1:
        raise PipelineError(f"the number of shards must be at least 1, not {shards}")
    with _connected(scheduler) as client:
        total = shards or len(client.scheduler_info()["workers"])
        if not total:
            raise PipelineError(
                f"the scheduler at {scheduler} has no workers: start some with `dask worker {scheduler}`"
            )
        return _gathered(client, [Shard(number, total) for number in range(1, total + 1)], work, progress)


def _connected(scheduler: str) -> Client:
    try:
        from distributed import Client
    except ImportError:
        raise PipelineError("a cluster needs dask.distributed: pip install 'graphopt[dask]'") from None
    try:
        return Client(scheduler, timeout=_SECONDS_TO_CONNECT, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PipelineError(f"no dask scheduler answers at {scheduler}: {reason[:200]}") from error


def _gathered(client: Client, shards: list[Shard], work: Callable[[Shard], Ranges], progress: Progress) -> list[Ranges]:
    from distributed import as_completed

    what = f"calibrate {len(shards)} shards"
    progress(what, 0, len(shards))
    futures = client.map(work, shards, pure=False)
    for done, future in enumerate(as_completed(futures, loop=client.loop), 1):
        error = future.exception()
        if error is not None:
            client.cancel(futures)
            if isinstance(error, GraphoptError):
                raise error
            raise DataError(
                f"a worker failed on its shard: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            )
        progress(what, done, len(shards))
    found: list[Ranges] = client.gather(futures)
    return found
