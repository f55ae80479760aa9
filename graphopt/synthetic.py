"""Feeds made up from what the inputs declare, for when there are no data.

The model runs on them, but the ranges that it then shows mean nothing.

Values, from a seeded generator:
  - floats: the standard normal distribution N(0, 1)
  - integers and bool: 0 or 1. These are the only numbers that are in range wherever a model looks something
    up: a table of token types has two rows, a mask is 0 or 1.
  - strings: "a"

Sizes that a declaration leaves open:
  - a first dimension is 1, the batch
  - an input of rank 4 is an image, [N, C, H, W], or [N, H, W, C] where its last size is fixed to 1, 3 or 4: H
    and W are 224, an open C is 3
  - an input [L, ?, H] with fixed L > 1 and H is a recurrent state, [layers, N, hidden]: N is 1
  - any other size, such as the length of a sequence, is 16
  - equal names have equal sizes, and a name that is a first dimension anywhere is 1
A model may want other sizes (a multiple of 256, a second of sound, more than one frame along the first dimension); with
`runnable`, a list of them is tried in turn. Integers that come one for each sample, or one for all, are also tried as
the lengths of sequences: the largest open size behind the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from graphopt.errors import DataError
from graphopt.feeds import Array, Dimension, Feed, InputSpec, Samples, fixed_size, is_named


class _Sizes(NamedTuple):
    """What open dimensions are set to."""

    image: int
    other: int
    first: int = 1


class _Choice(NamedTuple):
    """What all feeds have in common."""

    shapes: Sequence[tuple[int, ...]]
    length: int | None = None  # what integers that may be lengths are; None: 0 or 1


_IMAGE_RANK = 4
_FRAMES = _Sizes(224, 128, first=64)  # in place of a batch
_CANDIDATES = (
    _Sizes(224, 16),
    _Sizes(256, 1),
    _Sizes(32, 128),
    _Sizes(48, 256),
    _Sizes(512, 512),
    _Sizes(640, 1024),
    _Sizes(128, 4000),
    _Sizes(64, 16000),
    _FRAMES,
)


def synthetic_samples(
    inputs: Sequence[InputSpec],
    *,
    count: int,
    seed: int,
    runnable: Callable[[Feed], bool] | None = None,
    required: Sequence[InputSpec] = (),
) -> Samples:
    """`count` made-up feeds; feed number i depends on nothing but `inputs`, `seed`, i and the sizes chosen.

    Without `runnable` the sizes are those of the module docstring; with it, the first of a short list of
    sizes whose feed it accepts, of `candidate_shapes`, each with integers of 0 and 1 before those that are lengths.

    Raises:
        DataError: `count` is less than 1, or `runnable` accepts none of the sizes.

    """
    if count < 1:
        raise DataError(f"the number of samples must be at least 1, not {count}")
    candidates = candidate_shapes(inputs, required)
    choice = _runnable_choice(inputs, candidates, seed, runnable) if runnable else _Choice(candidates[0])

    def start() -> Iterator[Feed]:
        return (_feed(inputs, choice, seed, index) for index in range(count))

    return Samples(start, f"synthetic, floats N(0, 1), seed {seed}", count, synthetic=True)


def candidate_shapes(inputs: Sequence[InputSpec], required: Sequence[InputSpec] = ()) -> list[list[tuple[int, ...]]]:
    """Return the shapes of all inputs: by the rules above, then with each further choice of sizes.

    A choice that makes no difference is left out, so there is one entry where no size is open. `required` are the same
    inputs with more sizes stated; they come second, with many frames: onnx and onnxruntime abort on some nets where
    features match and there are fewer frames than a kernel has places.
    """
    distinct: list[list[tuple[int, ...]]] = []
    first, *others = ((inputs, sizes) for sizes in _CANDIDATES)
    second = [(required, _FRAMES)] if required and list(required) != list(inputs) else []
    for specs, sizes in (first, *second, *others):
        shapes = _shapes(specs, sizes)
        if shapes not in distinct:
            distinct.append(shapes)
    return distinct


def _runnable_choice(
    inputs: Sequence[InputSpec],
    candidates: Sequence[list[tuple[int, ...]]],
    seed: int,
    runnable: Callable[[Feed], bool],
) -> _Choice:
    has_lengths = any(map(_may_be_length, inputs))
    for shapes in candidates:
        for length in (None, _longest(inputs, shapes)) if has_lengths else (None,):
            if runnable(_feed(inputs, choice := _Choice(shapes, length), seed, 0)):
                return choice
    texts = "; ".join(
        ", ".join(f"'{spec.name}' {list(shape)}" for spec, shape in zip(inputs, shapes, strict=True))
        for shapes in candidates
    )
    raise DataError(f"the model runs with none of the made-up inputs ({texts}): give real ones with --data")


def _shapes(inputs: Sequence[InputSpec], sizes: _Sizes) -> list[tuple[int, ...]]:
    """Return the shape of each input; `named` keeps equal names equal."""
    first = 1 if any(len(spec.shape) == _IMAGE_RANK for spec in inputs) else sizes.first
    named: dict[str, int] = {}
    for spec in inputs:
        if spec.shape and is_named(spec.shape[0]):
            named[str(spec.shape[0])] = first
    return [_shape(spec.shape, sizes._replace(first=first), named) for spec in inputs]


def _shape(declared: tuple[Dimension, ...], sizes: _Sizes, named: dict[str, int]) -> tuple[int, ...]:
    open_sizes = [sizes.first, *(sizes.other for _ in declared[1:])]
    if len(declared) == _IMAGE_RANK:
        picture = [sizes.image, sizes.image, 3] if declared[3] in (1, 3, 4) else [3, sizes.image, sizes.image]
        open_sizes = [sizes.first, *picture]
    if _is_recurrent_state(declared):
        open_sizes[1] = 1
    return tuple(
        fixed_size(dimension) or (named.setdefault(str(dimension), size) if is_named(dimension) else size)
        for dimension, size in zip(declared, open_sizes, strict=False)
    )


def _is_recurrent_state(declared: tuple[Dimension, ...]) -> bool:
    fixed = [fixed_size(dimension) for dimension in declared]
    return len(fixed) == 3 and (fixed[0] or 0) > 1 and fixed[1] is None and fixed[2] is not None


def _may_be_length(spec: InputSpec) -> bool:
    return spec.dtype.kind in "iu" and len(spec.shape) < 2


def _feed(inputs: Sequence[InputSpec], choice: _Choice, seed: int, index: int) -> Feed:
    generator = np.random.default_rng((seed, index))
    made_up = {
        spec.name: _values(spec.dtype, shape, generator) for spec, shape in zip(inputs, choice.shapes, strict=True)
    }
    if choice.length is not None:
        lengths = [spec.name for spec in inputs if _may_be_length(spec)]
        made_up |= {name: np.full_like(made_up[name], choice.length) for name in lengths}
    return made_up


def _longest(inputs: Sequence[InputSpec], shapes: Sequence[tuple[int, ...]]) -> int:
    """The largest size behind a first axis that the declarations leave open; 1 where none is."""
    pairs = [
        pair for spec, shape in zip(inputs, shapes, strict=True) for pair in zip(spec.shape[1:], shape[1:], strict=True)
    ]
    return max((size for declared, size in pairs if fixed_size(declared) is None), default=1)


def _values(dtype: np.dtype[Any], shape: tuple[int, ...], generator: np.random.Generator) -> Array:
    if dtype.kind == "O":
        return np.full(shape, "a", dtype)
    if dtype.kind in "biu":
        return np.asarray(generator.integers(0, 2, shape)).astype(dtype)
    return np.asarray(generator.standard_normal(shape)).astype(dtype)
