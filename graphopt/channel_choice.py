"""Which units of channel groups to remove: a share of them, or as many as a budget asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from graphopt.channel_groups import ChannelGroups, Group
from graphopt.units import NONE

Gone = NDArray[np.bool_]


class Scope(Enum):
    """Among which units the least important ones are looked for."""

    LOCAL = "local"  # the same share of each group
    GLOBAL = "global"  # of all groups together


@dataclass(frozen=True)
class Limits:
    """What may be removed.

    Attributes:
        round_to: the number of kept positions of a group is a multiple of it, or all stay.
        adapts: groups that hold it less than twice take half of it, and so on: else they could not be cut.
        max_ratio: the largest share of a group that goes.
    """

    round_to: int = 1
    max_ratio: float = 0.9
    adapts: bool = False

    def step(self, group: Group) -> int:
        """How many units of a group make up a multiple."""
        multiple = self.round_to
        while self.adapts and multiple % 2 == 0 and group.size < 2 * (multiple // math.gcd(multiple, group.width)):
            multiple //= 2
        return multiple // math.gcd(multiple, group.width)


def factors_cut_elsewhere(groups: ChannelGroups, left_out: Mapping[str, str]) -> dict[str, str]:
    """Groups that share an axis with a larger one as another factor of it (heads with places in a head): name and why.

    Cutting both would remove more than was asked for; the larger one can be cut more finely.
    """
    of_unit: NDArray[np.int64] = np.full(groups.count, NONE)
    for number, group in enumerate(groups.groups):
        of_unit[group.units] = number
    meets: dict[int, set[int]] = {}
    for labels in (each for axes in (*groups.axes.values(), *groups.uses.values()) for each in axes):
        if labels is None or len(labels) < 2:
            continue
        at = np.where(labels == NONE, NONE, of_unit[labels])
        for column in np.unique(at, axis=1).T:
            found = set(column.tolist()) - {NONE}
            for number in found:
                meets.setdefault(number, set()).update(found - {number})
    chosen: set[int] = set()
    left: dict[str, str] = {}
    for number in sorted(meets, key=lambda each: -groups.groups[each].size):
        group = groups.groups[number]
        if group.name in left_out:
            continue
        other = next(iter(sorted(meets[number] & chosen)), None)
        if other is None:
            chosen.add(number)
        else:
            left[group.name] = f"the same axes are cut through {groups.groups[other].name}, which has more units"
    return left


def least_important(
    groups: ChannelGroups,
    eligible: list[Group],
    scores: NDArray[np.float64],
    ratio: float,
    scope: Scope,
    limits: Limits,
) -> Gone:
    """The units that go when the share `ratio` of all eligible ones goes, bool [groups.count]."""
    gone: Gone = np.zeros(groups.count, bool)
    threshold = _threshold(eligible, scores, ratio) if scope is Scope.GLOBAL else None
    for group in eligible:
        own = scores[group.units]
        wanted = group.size * (1 - ratio) if threshold is None else float((own >= threshold).sum())
        keep = kept_count(group, wanted, limits)
        gone[group.units[np.argsort(-own, kind="stable")[keep:]]] = True
    return gone


def _threshold(eligible: list[Group], scores: NDArray[np.float64], ratio: float) -> float:
    every = np.sort(np.concatenate([scores[group.units] for group in eligible]))
    place = round(ratio * len(every))
    return math.inf if place >= len(every) else float(every[place])


def kept_count(group: Group, wanted: float, limits: Limits) -> int:
    """The number of units nearest to `wanted` that may be kept, at least one."""
    step = limits.step(group)
    least = max(1, math.ceil(group.size * (1 - limits.max_ratio) - 1e-9))
    keep = max(step, math.floor(wanted / step + 0.5) * step)
    while keep < least:
        keep += step
    return min(keep, group.size)


def within_budget(
    choose: Callable[[float], Gone], cost: Callable[[Gone], float], most: float, tries: int = 30
) -> Gone | None:
    """What goes at the smallest ratio, to 2^-tries, of which the cost is at most `most`; None: not even with all."""
    least, largest = 0.0, 1.0
    best = choose(largest)
    if cost(best) > most:
        return None
    for _ in range(tries):
        middle = (least + largest) / 2
        found = choose(middle)
        if cost(found) <= most:
            largest, best = middle, found
        else:
            least = middle
    return best


def given_back(
    eligible: list[Group],
    scores: NDArray[np.float64],
    gone: Gone,
    limits: Limits,
    cost: Callable[[Gone], float],
    most: float,
    tries: int = 64,
) -> Gone:
    """What goes when as many units come back as the budget has room for: multiples make ratios coarse.

    The most important ones first, in blocks that keep each group a multiple; at most `tries` blocks are tried.
    """
    kept = {group.name: int((~gone[group.units]).sum()) for group in eligible}

    def block(group: Group) -> NDArray[np.int64]:
        ordered = group.units[np.argsort(-scores[group.units], kind="stable")]
        more = kept_count(group, kept[group.name] + limits.step(group), limits)
        return ordered[kept[group.name] : more]

    waiting = [(group, units) for group in eligible if len(units := block(group))]
    for _ in range(tries):
        if not waiting:
            break
        waiting.sort(key=lambda each: -scores[each[1]].mean())
        group, units = waiting.pop(0)
        tried = gone.copy()
        tried[units] = False
        if cost(tried) <= most:
            gone = tried
            kept[group.name] += len(units)
            if len(more := block(group)):
                waiting.append((group, more))
    return gone


def eligible_groups(groups: ChannelGroups, left_out: Mapping[str, str]) -> list[Group]:
    """The groups of which units may go."""
    return [group for group in groups.groups if group.frozen is None and group.name not in left_out]
