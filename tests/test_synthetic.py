"""Feeds made up from declarations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import DataError
from graphopt.feeds import Dimension, Feed, InputSpec, sizes_fit
from graphopt.synthetic import candidate_shapes, synthetic_samples

FLOAT32 = np.dtype("float32")


def shape_of(*declared: Dimension) -> tuple[int, ...]:
    (feed,) = synthetic_samples([InputSpec("x", FLOAT32, declared)], count=1, seed=0)
    return feed["x"].shape


@pytest.mark.parametrize(
    ("declared", "shape"),
    [
        ((), ()),
        ((2, 3), (2, 3)),
        (("N", 3, 32, 32), (1, 3, 32, 32)),
        (("N", 3, "H", "W"), (1, 3, 224, 224)),
        ((None, None, None, None), (1, 3, 224, 224)),
        ((-1, 3, "?", "?"), (1, 3, 224, 224)),
        (("N", 3, 48, "W"), (1, 3, 48, 224)),
        (("N", "H", "W", 3), (1, 224, 224, 3)),
        (("N", "N", 8, 8), (1, 1, 8, 8)),
        (("batch", "sequence"), (1, 16)),
        (("batch", 80, "time"), (1, 80, 16)),
        ((2, None, 128), (2, 1, 128)),
        ((1, "time", 80), (1, 16, 80)),
    ],
)
def test_sets_open_sizes_by_rank_and_place(declared: tuple[Dimension, ...], shape: tuple[int, ...]) -> None:
    assert shape_of(*declared) == shape


@settings(deadline=None)  # other work may hold the machine
@given(st.lists(st.sampled_from([1, 2, 7, 0, -1, None, "N", "T", "?", "-1"]), max_size=6))
def test_gives_shapes_that_fit_the_declaration(declared: list[Dimension]) -> None:
    for (shape,) in candidate_shapes([InputSpec("x", FLOAT32, tuple(declared))]):
        assert sizes_fit(shape, declared)


def test_gives_equal_names_equal_sizes_across_inputs() -> None:
    inputs = [InputSpec("image", FLOAT32, ("N", 3, "S", "S")), InputSpec("mask", FLOAT32, ("S", "N"))]
    (feed,) = synthetic_samples(inputs, count=1, seed=0)
    assert feed["image"].shape == (1, 3, 1, 1)
    assert feed["mask"].shape == (1, 1)


def test_does_not_take_question_marks_for_equal_names() -> None:
    inputs = [InputSpec("a", FLOAT32, ("?", 8)), InputSpec("b", FLOAT32, (4, "?"))]
    (feed,) = synthetic_samples(inputs, count=1, seed=0)
    assert feed["b"].shape == (4, 16)


def test_draws_floats_from_the_standard_normal_distribution() -> None:
    (feed,) = synthetic_samples([InputSpec("x", FLOAT32, (200, 500))], count=1, seed=0)
    assert feed["x"].dtype == FLOAT32
    assert abs(feed["x"].mean()) < 0.02
    assert abs(feed["x"].std() - 1) < 0.02


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "bool"])
def test_draws_integers_and_bool_from_zero_and_one(dtype: str) -> None:
    (feed,) = synthetic_samples([InputSpec("ids", np.dtype(dtype), ("N", 100))], count=1, seed=0)
    assert feed["ids"].dtype == dtype
    assert np.unique(feed["ids"]).tolist() == [0, 1]


def test_gives_strings_and_scalars_as_arrays() -> None:
    inputs = [InputSpec("text", np.dtype(object), ("N",)), InputSpec("rate", np.dtype("int64"), ())]
    (feed,) = synthetic_samples(inputs, count=1, seed=0)
    assert feed["text"].tolist() == ["a"]
    assert isinstance(feed["rate"], np.ndarray)


def test_depends_on_seed_and_index_and_on_nothing_else() -> None:
    inputs = [InputSpec("x", FLOAT32, (4,))]
    samples = synthetic_samples(inputs, count=3, seed=1)
    first, again = list(samples), list(samples)
    assert samples.count == len(first) == 3
    assert samples.synthetic
    assert samples.description == "synthetic, floats N(0, 1), seed 1"
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one["x"], other["x"])
    assert not np.array_equal(first[0]["x"], first[1]["x"])
    assert not np.array_equal(first[0]["x"], next(iter(synthetic_samples(inputs, count=1, seed=2)))["x"])


def test_tries_other_sizes_until_one_runs() -> None:
    def takes_multiples_of_32(feed: Feed) -> bool:
        return feed["x"].shape[1] % 32 == 0

    inputs = [InputSpec("x", FLOAT32, ("N", "T"))]
    samples = synthetic_samples(inputs, count=2, seed=0, runnable=takes_multiples_of_32)
    assert [feed["x"].shape for feed in samples] == [(1, 128), (1, 128)]


def test_tries_more_than_one_frame_last_but_no_batch_of_images() -> None:
    frames, image = InputSpec("x", FLOAT32, ("T", 40)), InputSpec("i", FLOAT32, ("N", 3, "H", "W"))
    assert candidate_shapes([frames]) == [[(1, 40)], [(64, 40)]]
    open_frames = InputSpec("x", FLOAT32, ("T", "F"))
    assert candidate_shapes([open_frames], [frames])[:2] == [[(1, 16)], [(64, 40)]]
    assert all(shape[0] == 1 for shapes in candidate_shapes([image, frames]) for shape in shapes)


def test_tries_fixed_shapes_only_once_and_says_what_it_tried() -> None:
    tried = []
    with pytest.raises(DataError, match=r"runs with none of the made-up inputs \('x' \[2, 3\]\): give real ones"):
        synthetic_samples(
            [InputSpec("x", FLOAT32, (2, 3))], count=1, seed=0, runnable=lambda feed: bool(tried.append(feed))
        )
    assert len(tried) == 1


def test_refuses_a_count_below_one() -> None:
    with pytest.raises(DataError, match="the number of samples must be at least 1, not 0"):
        synthetic_samples([], count=0, seed=0)
