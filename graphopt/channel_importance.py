"""How much the units of channel groups matter: one number each, from weights or from what tensors hold.

With W the weight of a linear operator, W[p] its slice at a position p of a channel axis, and x[p] the channel that it
reads there, the score of a unit adds up over the positions that go with it:

    l1, l2       |W[p]| in that norm, of every weight that has the unit on its output or its input axis, each divided by
                 its mean over the group: a small layer counts as much as a large one  (DepGraph, arXiv 2301.12900)
    bn-scale     |scale| of BatchNormalization  (Network Slimming, arXiv 1708.06519); l2 for groups without
    activation   ||W[p]||^2 * Var(x[p]) over the readers: the output error once the mean is absorbed  (FLAP, arXiv
                 2312.11983)
    wanda        ||W[p]|| * ||x[p]||, root mean square, over the readers  (arXiv 2306.11695, by channels)
    fpgm         sum of distances to the other filters: what is near the others can be spared  (arXiv 1811.00250)
    taylor       how much the outputs move, to first order (`graphopt.channel_sensitivity`)
    random       the baseline that any other must beat

Scores of a group are divided by their mean, so that groups can be compared with each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graphopt.channel_flow import Linear
from graphopt.channel_groups import ChannelGroups
from graphopt.channel_statistics import ChannelStatistics
from graphopt.graph import constant_of, constants_in
from graphopt.units import NONE

Scores = NDArray[np.float64]
Array = NDArray[np.float64]


class Importance(Enum):
    """How the importance of a unit is measured."""

    L1 = "l1"
    L2 = "l2"
    BN_SCALE = "bn-scale"
    ACTIVATION = "activation"
    WANDA = "wanda"
    FPGM = "fpgm"
    TAYLOR = "taylor"
    RANDOM = "random"

    @property
    def needs_data(self) -> bool:
        """Whether it depends on what tensors hold."""
        return self in (Importance.ACTIVATION, Importance.WANDA, Importance.TAYLOR)


class Reduce(Enum):
    """How the scores that the members of a group give a unit become one."""

    MEAN = "mean"
    SUM = "sum"
    MAX = "max"


def score_units(
    graph: gs.Graph,
    groups: ChannelGroups,
    importance: Importance,
    reduce: Reduce,
    statistics: Mapping[str, ChannelStatistics],
    seed: int = 0,
) -> Scores:
    """The score of every unit, float64 [groups.count], at least 0; the mean over each group is 1, or all are 0.

    Args:
        graph: what `groups` were found in.
        groups: of the graph.
        importance: what to measure.
        reduce: how members are combined.
        statistics: of the tensors that linear operators read, by name, for what needs data.
        seed: for random scores.
    """
    if importance is Importance.RANDOM:
        return np.random.default_rng(seed).random(groups.count)
    weights = {constant.name: constant for constant in constants_in(graph)}
    found: list[Share] = []
    for linear in groups.linears:
        value = constant_of(weights[linear.weight]) if linear.weight in weights else None
        if value is not None and value.dtype.kind == "f":
            found += _of_linear(value.astype(np.float64), linear, groups, importance, statistics)
    if not importance.needs_data:
        of_unit = _group_of_unit(groups)
        found = [_relative(each, of_unit) for each in found]
    scores = _reduced(found, groups.count, reduce)
    if importance is Importance.BN_SCALE:
        scales = _reduced(_scales(graph, groups), groups.count, reduce)
        scores = np.where(np.isnan(scales), scores, scales)
    return within_groups(scores, groups)


def within_groups(scores: Scores, groups: ChannelGroups) -> Scores:
    """Scores of units, float64 [groups.count], divided by their mean over each group."""
    return _relative(Share(np.arange(groups.count), np.nan_to_num(scores)), _group_of_unit(groups)).values


class Share(NamedTuple):
    """What one member says of the units that it carries."""

    units: NDArray[np.int64]
    values: Scores


def _of_linear(
    weight: Array,
    linear: Linear,
    groups: ChannelGroups,
    importance: Importance,
    statistics: Mapping[str, ChannelStatistics],
) -> list[Share]:
    axes = groups.axes.get(linear.weight, (None,) * weight.ndim)
    output, reading = axes[linear.output_axis], axes[linear.input_axis]
    if importance.needs_data:
        seen = statistics.get(linear.data)
        data = groups.axes.get(linear.data)
        labels = None if data is None else data[linear.data_axis]
        if seen is None or labels is None:
            return []
        energy = input_energy(weight, linear)
        moved = seen.variance if importance is Importance.ACTIVATION else seen.variance + seen.mean**2
        value = energy * moved
        return [_by_unit(labels, value if importance is Importance.ACTIVATION else np.sqrt(value))]
    if importance is Importance.FPGM:
        return [] if output is None else [_by_unit(output, _distances(weight, linear.output_axis))]
    power = 1 if importance is Importance.L1 else 2
    result = []
    for axis, labels in ((linear.output_axis, output), (linear.input_axis, reading)):
        if labels is not None:
            size = (np.abs(weight) ** power).sum(axis=tuple(place for place in range(weight.ndim) if place != axis))
            units, sums = _by_unit(labels, size)
            result.append(Share(units, sums ** (1 / power)))
    return result


def input_energy(weight: Array, linear: Linear) -> Array:
    """The sum of squares of what each position of the input is multiplied by, float64 [C]."""
    rows = np.moveaxis(weight, (linear.output_axis, linear.input_axis), (0, 1)) ** 2
    if linear.op != "Conv" or linear.groups == 1:
        return np.asarray(rows.sum(axis=tuple(place for place in range(rows.ndim) if place != 1)))
    rows = rows.reshape(linear.groups, -1, rows.shape[1], int(np.prod(rows.shape[2:])))
    return np.asarray(rows.sum(axis=(1, 3)).reshape(-1))


def _distances(weight: Array, axis: int) -> Array:
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    squares = np.einsum("ij,ij->i", rows, rows)
    apart = squares[:, None] + squares[None] - 2 * rows @ rows.T
    return np.asarray(np.sqrt(np.maximum(apart, 0)).sum(axis=1))


def _scales(graph: gs.Graph, groups: ChannelGroups) -> list[Share]:
    places = {use: groups.uses[use] for use in groups.scales if use in groups.uses}
    found = []
    for node in graph.nodes:
        name = next((tensor.name for tensor in node.outputs if tensor.name), "")
        axes = places.get((name, 1))
        value = constant_of(node.inputs[1]) if axes is not None else None
        if axes is not None and value is not None and axes[0] is not None:
            found.append(_by_unit(axes[0], np.abs(value.astype(np.float64))))
    return found


def _by_unit(labels: NDArray[np.int64], values: Array) -> Share:
    """The sum over the positions of each unit that an axis carries."""
    positions = np.broadcast_to(np.arange(labels.shape[1]), labels.shape)[labels != NONE]
    units, group = np.unique(labels[labels != NONE], return_inverse=True)
    sums = np.bincount(group.reshape(-1), weights=values[positions], minlength=len(units))
    return Share(units, sums.astype(np.float64))


def _group_of_unit(groups: ChannelGroups) -> NDArray[np.int64]:
    """The number of each unit's group; units without one have one of their own together."""
    of_unit: NDArray[np.int64] = np.full(groups.count, len(groups.groups))
    for number, group in enumerate(groups.groups):
        of_unit[group.units] = number
    return of_unit


def _relative(share: Share, of_unit: NDArray[np.int64]) -> Share:
    """Divided by the mean over each group, of which a member carries all units or none."""
    _, group, sizes = np.unique(of_unit[share.units], return_inverse=True, return_counts=True)
    means = np.bincount(group.reshape(-1), weights=share.values) / sizes
    return Share(share.units, share.values / np.where(means > 0, means, 1)[group.reshape(-1)])


def _reduced(found: list[Share], count: int, reduce: Reduce) -> Scores:
    """NaN where no member gives a unit a score."""
    times = np.zeros(count)
    result = np.zeros(count)
    for units, values in found:
        times[units] += 1
        result[units] = np.maximum(result[units], values) if reduce is Reduce.MAX else result[units] + values
    if reduce is Reduce.MEAN:
        result /= np.maximum(times, 1)
    return np.where(times > 0, result, np.nan)
