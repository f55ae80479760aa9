"""Ranges of the shards of some data, merged into those of all of it.

Histograms, extremes, counts and digests of the data merge exactly, so the result is what one calibration on all the
data finds, to the byte of its file. Only means and variances by channel, where they were asked for, agree to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from graphopt.channel_statistics import ChannelStatistics
from graphopt.errors import DataError
from graphopt.ranges import Ranges, added_digests, range_of, seen_of
from graphopt.targets import target_named

_SHARED = ("model", "model_sha256", "source", "synthetic", "target", "method", "percent")


def merged(parts: Sequence[Ranges]) -> Ranges:
    """The ranges of all the data from those of its shards, chosen anew from the merged histograms.

    Raises:
        DataError: the parts are of different calibrations, lack histograms, or are not just the shards 1/N to N/N.
    """
    first = parts[0]
    for part in parts[1:]:
        for what in _SHARED:
            if (one := getattr(first, what)) != (other := getattr(part, what)):
                raise DataError(
                    f"the files are not of one calibration: {what} is {one!r} in one and {other!r} in another"
                )
    _refuse_other_shards(parts)
    method = first.method
    if method is None:
        raise DataError("these ranges cannot be merged: the files do not say by which method they were chosen")
    if (reason := method.why_not_from_histograms) is not None:
        raise DataError(f"these ranges cannot be merged: {reason}")
    quant_type = target_named(first.target).activation
    tensors = {}
    for name in dict.fromkeys(name for part in parts for name in part.tensors):
        found = [part.tensors[name] for part in parts if name in part.tensors]
        seen, *others = [seen_of(each, method, f"tensor {name}") for each in found]
        for other in others:
            seen.merge(other)
        chosen = range_of(
            seen, method, percent=first.percent, quant_type=quant_type, keep=True, response=found[0].response
        )
        tensors[name] = replace(chosen, channels=_merged_channels([each.channels for each in found]))
    return replace(
        first,
        tensors=tensors,
        samples=sum(part.samples for part in parts),
        data_digest=added_digests(part.data_digest for part in parts),
        shard="",
    )


def _merged_channels(parts: Sequence[ChannelStatistics | None]) -> ChannelStatistics | None:
    """The statistics of all parts; None where one has none, or the number of channels differs."""
    channels = ChannelStatistics()
    for part in parts:
        if part is None:
            return None
        channels.merge(part)
    return None if channels.varies else channels


def _refuse_other_shards(parts: Sequence[Ranges]) -> None:
    """Refuse parts that are not each shard of the data once.

    Raises:
        DataError: says which is missing, or there twice.
    """
    found = [part.shard for part in parts]
    if not all(found):
        raise DataError("a file is no shard: `graphopt calibrate --shard I/N` makes shards")
    if repeated := sorted({shard for shard in found if found.count(shard) > 1}):
        raise DataError(f"shard {repeated[0]} is there twice: its samples would count twice")
    totals = {int(shard.partition("/")[2]) for shard in found}
    if len(totals) > 1:
        raise DataError(f"the shards are of different divisions of the data, into {' and '.join(map(str, totals))}")
    (total,) = totals
    if missing := [f"{number}/{total}" for number in range(1, total + 1) if f"{number}/{total}" not in found]:
        raise DataError(f"shard {', '.join(missing)} is missing: calibrate it too")
