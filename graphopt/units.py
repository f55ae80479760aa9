"""Units, the smallest things that can be removed from a graph, and the axes that carry them.

An axis of a tensor has *columns*: integer vectors with one unit id for each position, -1 where a column says nothing.
A position goes when one of its units goes, so removing units leaves every tensor rectangular. Two columns are two
factors of an axis: 32 channels that a Reshape takes as 4 heads of 8 have a column of 4 heads, each 8 times in a row,
and one of 8 places, 4 times over.

`Units` is a union-find over ids with one more move: an id can be *refined* into several, everywhere at once. That is
how heads, conv groups and channel shuffles are found without a word from the user: 32 independent ids become 4 + 8 as
soon as an operator looks at the axis in that way. Everything here is sound under later refinement: two axes that were
aligned stay so, because they then hold the same ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

NONE = -1
"""In a column: no unit. Such positions stay unless another column has a unit there."""

_MEETS_FIXED = "it meets an axis of which nothing can go"


@dataclass(frozen=True)
class Axis:
    """An axis of a tensor.

    Attributes:
        size: how many positions it has.
        columns: unit ids, int64 [size] each; none: the axis stays as it is.
        fixed: why positions without a unit stay, as a clause: "it is the graph input x".
    """

    size: int
    columns: tuple[Ids, ...] = ()
    fixed: str = ""


class Units:
    """All ids of one graph: which of them are the same, which are made of others, and which must stay."""

    def __init__(self) -> None:
        self._parent: Ids = np.zeros(0, np.int64)
        self._is_refined: NDArray[np.bool_] = np.zeros(0, bool)
        self._parts: dict[int, tuple[int, ...]] = {}
        self._count = 0
        self._frozen: list[tuple[Ids, str]] = []

    @property
    def count(self) -> int:
        """How many ids there are; a root that is not refined is a unit."""
        return self._count

    def fresh(self, size: int) -> Axis:
        """An axis with a new unit in each position; an axis of one position has nothing to remove."""
        return Axis(size, (self._new(size),)) if size > 1 else Axis(size)

    def fresh_positions(self, size: int) -> Axis:
        """As `fresh`, also for one position: a part of an axis, which may go as a whole."""
        return Axis(size, (self._new(size),))

    def freeze(self, axis: Axis, reason: str) -> Axis:
        """Keep every unit of an axis for `reason`, a sentence; return the axis as one that stays as it is."""
        for column in axis.columns:
            self._frozen.append((column[column != NONE], reason))
        return Axis(axis.size, fixed=reason)

    def frozen(self) -> dict[int, str]:
        """The units that must stay, with the first reason for each."""
        reasons: dict[int, str] = {}
        for ids, reason in self._frozen:
            for column in self._resolved_column(np.unique(self._find(ids))):
                for unit in np.unique(column[column != NONE]).tolist():
                    reasons.setdefault(unit, reason)
        return reasons

    def resolved(self, axis: Axis) -> Axis:
        """The axis in terms of units: ids that were merged or refined since are replaced."""
        if not axis.columns:
            return axis
        columns = [each for column in axis.columns for each in self._resolved_column(column)]
        return Axis(axis.size, tuple(columns), axis.fixed)

    def align(self, axes: Iterable[Axis]) -> Axis:
        """Let axes of one size lose the same positions, and return one that stands for all."""
        first, *others = axes
        for other in others:
            first = self._align(first, other)
        return first

    def split(self, axis: Axis, sizes: Sequence[int], reason: str) -> list[Axis]:
        """The axes of `sizes` that an axis of their product becomes when it is reshaped; refines units as needed.

        Args:
            axis: what is split.
            sizes: of the new axes.
            reason: why units stay that no new axis can carry.
        """
        columns: list[list[Ids]] = [[] for _ in sizes]
        for column in self.resolved(axis).columns:
            grid = column.reshape(sizes)
            varying = [place for place in range(len(sizes)) if _varies(grid, place)]
            if not varying or (len(varying) > 1 and NONE in column):
                self._frozen.append((column[column != NONE], reason))
            elif len(varying) == 1:
                columns[varying[0]].append(_along(grid, varying[0]))
            else:
                factors = self._refine_by_places(grid, varying)
                for place, factor in zip(varying, factors, strict=True):
                    columns[place].append(factor)
        return [Axis(size, tuple(found), axis.fixed or reason) for size, found in zip(sizes, columns, strict=True)]

    def join(self, axes: Sequence[Axis]) -> Axis:
        """The axis that several become when they are reshaped into one."""
        sizes = [axis.size for axis in axes]
        columns = []
        for place, axis in enumerate(axes):
            shape = [1] * len(sizes)
            shape[place] = axis.size
            columns += [np.broadcast_to(column.reshape(shape), sizes).reshape(-1) for column in axis.columns]
        return Axis(math.prod(sizes), tuple(columns), _first_reason(axes))

    def take(self, axis: Axis, positions: Ids) -> Axis:
        """The axis at `positions`, negative ones counted from its end."""
        return Axis(len(positions), tuple(column[positions] for column in axis.columns), axis.fixed)

    def concatenate(self, axes: Sequence[Axis]) -> Axis:
        """One axis after the other."""
        resolved = [self.resolved(axis) for axis in axes]
        count = max((len(axis.columns) for axis in resolved), default=0)
        columns = [
            np.concatenate([a.columns[k] if k < len(a.columns) else np.full(a.size, NONE) for a in resolved])
            for k in range(count)
        ]
        return Axis(sum(axis.size for axis in axes), tuple(columns), _first_reason(resolved))

    def _new(self, count: int) -> Ids:
        ids = np.arange(self._count, self._count + count)
        self._count += count
        if self._count > len(self._parent):
            room = max(self._count, 2 * len(self._parent))
            self._parent = np.concatenate([self._parent, np.arange(len(self._parent), room)])
            self._is_refined = np.concatenate([self._is_refined, np.zeros(room - len(self._is_refined), bool)])
        return ids

    def _find(self, ids: Ids) -> Ids:
        """The root of each id, and NONE for NONE."""
        roots: Ids = ids
        while True:
            above = np.where(roots == NONE, NONE, self._parent[roots])
            if np.array_equal(above, roots):
                break
            roots = above
        real = ids != NONE
        self._parent[ids[real]] = roots[real]
        return roots

    def _union(self, left: Ids, right: Ids) -> None:
        """Merge ids pairwise; none of them is refined."""
        while True:
            one, other = self._find(left), self._find(right)
            differ = one != other
            if not differ.any():
                return
            self._parent[np.maximum(one, other)[differ]] = np.minimum(one, other)[differ]

    def _resolved_column(self, column: Ids) -> list[Ids]:
        roots = self._find(column)
        refined = (roots != NONE) & self._is_refined[roots]
        if not refined.any():
            return [roots]
        distinct, inverse = np.unique(roots[refined], return_inverse=True)
        parts = [self._parts[root] for root in distinct.tolist()]
        width = max(map(len, parts))
        table = np.array([(*each, *[NONE] * (width - len(each))) for each in parts])
        columns = []
        for place in range(width):
            plain = roots.copy() if place == 0 else np.full_like(roots, NONE)
            plain[refined] = table[inverse.reshape(-1), place]
            columns += self._resolved_column(plain)
        return [each for each in columns if (each != NONE).any()]

    def _align(self, left: Axis, right: Axis) -> Axis:
        if left is right:
            return left
        left, right = self.resolved(left), self.resolved(right)
        in_left, in_right = _covered(left), _covered(right)
        if not in_left.any() and not in_right.any():
            return left if left.fixed else right
        self._freeze_where(left, ~in_right, right.fixed)
        self._freeze_where(right, ~in_left, left.fixed)
        both = np.flatnonzero(in_left & in_right)
        if len(both):
            self._match([each[both] for each in left.columns], [each[both] for each in right.columns])
        return right if in_right.all() else left

    def _freeze_where(self, axis: Axis, where: NDArray[np.bool_], reason: str) -> None:
        if where.any():
            for column in axis.columns:
                at = column[where]
                self._frozen.append((at[at != NONE], reason or _MEETS_FIXED))

    def _match(self, left: list[Ids], right: list[Ids]) -> None:
        """Make the set of units of each position the same on both sides."""
        left, right = _not_empty(left), _not_empty(right)
        every = [*left, *right]
        if len(left) > 1 and len(right) > 1:
            for column in list(left):
                same = next((each for each in right if np.array_equal(_pattern(each), _pattern(column))), None)
                if same is not None:
                    self._union(*_where_both(column, same))
                    left = [each for each in left if each is not column]
                    right = [each for each in right if each is not same]
            left, right = self._again(left), self._again(right)
        if not left and not right:
            return
        if len(left) == 1 and right:
            self._refine(left[0], right)
        elif len(right) == 1 and left:
            self._refine(right[0], left)
        else:
            self._merge_all(every)

    def _again(self, columns: list[Ids]) -> list[Ids]:
        return [each for column in columns for each in self._resolved_column(column)]

    def _refine(self, column: Ids, by: list[Ids]) -> None:
        """Make each id of `column` stand for the units that `by` has in its places."""
        first, group = _groups(column)
        if len(by) == 1 or NONE in column or np.isin(np.unique(column), np.concatenate(by)).any():
            self._merge_all([column, *by])
            return
        for each in by:  # places with one id must agree on what it is made of
            self._union(*_where_both(each, each[first][group]))
        parts = [self._find(each[first]) for each in by]
        for place, root in enumerate(column[first].tolist()):
            ids = dict.fromkeys(int(each[place]) for each in parts if each[place] != NONE)
            self._set_parts(root, tuple(ids))

    def _refine_by_places(self, grid: Ids, varying: list[int]) -> list[Ids]:
        """Make each id of `grid` stand for one new id on each of the axes along which the ids vary."""
        flat = grid.reshape(-1)
        first, group = _groups(flat)
        factors = []
        for place in varying:
            ids = self._new(grid.shape[place])
            shape = [1] * grid.ndim
            shape[place] = -1
            spread = np.broadcast_to(ids.reshape(shape), grid.shape).reshape(-1)
            self._union(spread, spread[first][group])
            factors.append((ids, spread))
        parts = [self._find(spread[first]) for _, spread in factors]
        for position, root in enumerate(flat[first].tolist()):
            self._set_parts(root, tuple(int(each[position]) for each in parts))
        return [self._find(ids) for ids, _ in factors]

    def _set_parts(self, root: int, parts: tuple[int, ...]) -> None:
        if len(parts) == 1:
            self._parent[root] = parts[0]
            return
        self._parts[root] = parts
        self._is_refined[root] = True

    def _merge_all(self, columns: list[Ids]) -> None:
        """Let all units of a position be one: what always holds, where nothing finer is found."""
        first = np.maximum.reduce(columns)
        for column in columns:
            self._union(*_where_both(column, first))


def _first_reason(axes: Iterable[Axis]) -> str:
    return next((axis.fixed for axis in axes if axis.fixed), "")


def _covered(axis: Axis) -> NDArray[np.bool_]:
    if not axis.columns:
        return np.zeros(axis.size, bool)
    return np.asarray(np.maximum.reduce(axis.columns) != NONE)


def _not_empty(columns: list[Ids]) -> list[Ids]:
    return [column for column in columns if (column != NONE).any()]


def _where_both(left: Ids, right: Ids) -> tuple[Ids, Ids]:
    both = (left != NONE) & (right != NONE)
    return left[both], right[both]


def _groups(column: Ids) -> tuple[Ids, Ids]:
    """The first place of each distinct id, and for each place which of them it has."""
    _, first, group = np.unique(column, return_index=True, return_inverse=True)
    return first, group.reshape(-1)


def _pattern(column: Ids) -> Ids:
    """Which places hold the same id, by the first place that holds it."""
    first, group = _groups(column)
    return np.where(column == NONE, NONE, first[group])


def _varies(grid: Ids, place: int) -> bool:
    return grid.shape[place] > 1 and bool((grid != grid.take([0], axis=place)).any())


def _along(grid: Ids, place: int) -> Ids:
    index: list[int | slice] = [0] * grid.ndim
    index[place] = slice(None)
    return np.asarray(grid[tuple(index)])
