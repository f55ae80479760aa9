"""TensorRT's calibration cache: a header line, then `name: scale` a line, the scale as the hex digits of a float32.

    TRT-8501-EntropyCalibration2
    input: 3c010a14

The digits are big-endian; the scale is T / 127 for a range [-T, T]. A name may hold colons: the last one separates.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np

from graphopt.errors import DataError
from graphopt.files import write_text_atomically
from graphopt.ranges import Ranges, TensorRange

HEADER = "TRT-8501-EntropyCalibration2"
METHOD = "tensorrt-cache"

_LARGEST = 127


def is_tensorrt_cache(text: str) -> bool:
    """Whether a file's text begins like a cache."""
    return re.match(r"TRT-\d+-\w+[\r\n]", text) is not None


def read_tensorrt_cache(text: str, source: str) -> Ranges:
    """The ranges in a cache: [-127 scale, 127 scale] of every tensor that it names.

    Raises:
        DataError: a line is no name and scale; begins with `source` and the number of the line.
    """
    tensors: dict[str, TensorRange] = {}
    for number, line in enumerate(text.splitlines()[1:], 2):
        if not line.strip():
            continue
        name, colon, digits = line.rpartition(":")
        name = name.strip()
        if not colon or not name or re.fullmatch(r"[0-9a-fA-F]{8}|0", digits.strip()) is None:
            raise DataError(f"{source}, line {number}: is no `name: scale` with the scale as 8 hex digits: {line:.60}")
        (scale,) = struct.unpack(">f", bytes.fromhex(digits.strip().zfill(8)))
        if not 0 <= scale < np.inf:
            raise DataError(f"{source}, line {number}: the scale of {name} is {scale}, and must be finite and positive")
        if name in tensors:
            raise DataError(f"{source}, line {number}: {name} is there twice")
        tensors[name] = imported_range(-_LARGEST * scale, _LARGEST * scale, METHOD)
    if not tensors:
        raise DataError(f"{source}: names no tensor")
    return Ranges(tensors=tensors, source=source, samples=0, synthetic=False)


def write_tensorrt_cache(ranges: Ranges, path: str | Path) -> None:
    """Write the largest magnitude of each range as a scale, in the order of the ranges; whole or not at all.

    Raises:
        OutputError: it cannot be written there.
        DataError: a tensor's name does not fit on a line.
    """
    lines = [HEADER]
    for name, found in ranges.tensors.items():
        if "\n" in name or "\r" in name:
            raise DataError(f"the tensor name {name!r} has a line break, which a TensorRT cache has no form for")
        scale = np.float32(max(-found.minimum, found.maximum, 0.0) / _LARGEST)
        lines.append(f"{name}: {struct.pack('>f', scale).hex()}")
    write_text_atomically(path, "\n".join(lines) + "\n")


def imported_range(minimum: float, maximum: float, method: str) -> TensorRange:
    """A range that another tool found: nothing else is known of its tensor."""
    return TensorRange(
        minimum=minimum,
        maximum=maximum,
        method=method,
        observed_minimum=minimum,
        observed_maximum=maximum,
        mean=None,
        zeros=None,
        count=0,
    )
