"""Units: merged where axes meet, refined where an axis is looked at as a product, and sound in any order of the two."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.units import NONE, Axis, Units


def columns(units: Units, axis: Axis) -> list[list[int]]:
    return [column.tolist() for column in units.resolved(axis).columns]


def sets(units: Units, axis: Axis) -> list[frozenset[int]]:
    """The units of each position."""
    found = units.resolved(axis).columns
    return [frozenset(int(column[place]) for column in found if column[place] != NONE) for place in range(axis.size)]


def test_axes_that_meet_hold_the_same_units():
    units = Units()
    first, second, third = (units.fresh(4) for _ in range(3))
    units.align([first, second])
    units.align([second, third])
    assert columns(units, first) == columns(units, third) == [[0, 1, 2, 3]]


def test_an_axis_of_one_position_has_nothing_to_remove():
    assert Units().fresh(1).columns == ()


def test_a_split_makes_two_factors_of_an_axis_everywhere():
    units = Units()
    whole, other = units.fresh(6), units.fresh(6)
    units.align([whole, other])
    rows, places = units.split(whole, [2, 3], "no reason")
    assert len(columns(units, other)) == 2
    assert sets(units, other) == sets(units, units.join([rows, places]))


def test_two_splits_that_nest_refine_each_other():
    units = Units()
    first, second = units.fresh(8), units.fresh(8)
    coarse = units.split(first, [2, 4], "")
    fine = units.split(second, [2, 2, 2], "")
    units.align([first, second])
    assert sets(units, first) == sets(units, second)
    assert sets(units, coarse[1]) == sets(units, units.join(fine[1:]))
    assert len(set().union(*sets(units, first))) == 6


def test_two_splits_that_do_not_nest_leave_one_unit_of_what_meets():
    units = Units()
    first, second = units.fresh(6), units.fresh(6)
    units.split(first, [2, 3], "")
    units.split(second, [3, 2], "")
    units.align([first, second])
    assert sets(units, first) == sets(units, second)


def test_what_meets_an_axis_that_stays_is_frozen_with_its_reason():
    units = Units()
    axis = units.fresh(3)
    units.align([axis, Axis(3, fixed="it is the input")])
    assert units.frozen() == dict.fromkeys(range(3), "it is the input")


def test_freezing_reaches_the_parts_of_what_was_frozen_before_it_was_refined():
    units = Units()
    axis = units.fresh(4)
    units.freeze(axis, "it is an output")
    parts = units.split(axis, [2, 2], "")
    held = set(units.frozen())
    assert held == set().union(*(each for part in parts for each in sets(units, part)))


def test_positions_without_a_unit_cannot_be_split():
    units = Units()
    axis = units.concatenate([units.fresh(3), Axis(3, fixed="it is the input")])
    parts = units.split(axis, [3, 2], "mixed")
    assert units.frozen() == dict.fromkeys(range(3), "mixed")
    assert parts[0].fixed == "it is the input"


@pytest.mark.parametrize("size", [3, 5])
def test_taken_and_concatenated_positions_keep_their_units(size):
    units = Units()
    axis = units.fresh(size)
    turned = units.take(axis, np.arange(size)[::-1])
    assert columns(units, units.concatenate([axis, turned])) == [[*range(size), *range(size)[::-1]]]


@given(
    st.lists(st.tuples(st.sampled_from(["align", "2x6", "3x4", "4x3", "6x2"]), st.integers(0, 3), st.integers(0, 3)))
)
def test_axes_stay_aligned_whatever_happens_later(steps):
    units = Units()
    axes = [units.fresh(12) for _ in range(4)]
    met: list[tuple[int, int]] = []
    for step, one, other in steps:
        if step == "align":
            units.align([axes[one], axes[other]])
            met.append((one, other))
        else:
            sizes = [int(each) for each in step.split("x")]
            parts = units.split(axes[one], sizes, "")
            held = set(units.frozen())
            for whole, part in zip(sets(units, axes[one]), sets(units, units.join(parts)), strict=True):
                assert whole - held == part - held
    for one, other in met:
        assert sets(units, axes[one]) == sets(units, axes[other])
