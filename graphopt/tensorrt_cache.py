"""TensorRT's calibration cache: a header line, then `name: scale` a line, the scale as the hex digits of a float32.

    TRT-8501-EntropyCalibration2
    input: 3c010a14

The digits are big-endian; the scale is T / 127 for a range [-T, T], and always positive. A name may hold colons, and
spaces at its ends: the last colon separates.
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
CALIBRATORS = ("EntropyCalibration2", "EntropyCalibration", "MinMaxCalibration", "LegacyCalibration")
METHOD = "tensorrt-cache"

_LARGEST = 127
_LINE = re.compile(r"(.+): ?([0-9a-fA-F]{8}|0)\s*")


def is_tensorrt_cache(text: str) -> bool:
    """Whether a file's text is meant as a cache: it begins like one, or like one without its header."""
    return text.startswith("TRT-") or _LINE.fullmatch(text.partition("\n")[0]) is not None


def read_tensorrt_cache(text: str, source: str) -> Ranges:
    """The ranges in a cache: [-127 scale, 127 scale] of every tensor that it names.

    Raises:
        DataError: the header is none, or a line is no name and scale; begins with `source` and the number of the line.
    """
    header, *lines = text.split("\n")  # not splitlines: a name may hold what that takes for the end of a line
    calibrator = re.fullmatch(r"TRT-\w+-(\w+)\s*", header)
    if calibrator is None or calibrator[1] not in CALIBRATORS:
        raise DataError(
            f"{source}, line 1: is no header of a TensorRT calibration cache, TRT-<version>-<calibrator> with one of "
            f"{', '.join(CALIBRATORS)}: {header:.60}"
        )
    tensors: dict[str, TensorRange] = {}
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            raise DataError(f"{source}, line {number}: is no `name: scale` with the scale as 8 hex digits: {line:.60}")
        name, digits = found.groups()
        (scale,) = struct.unpack(">f", bytes.fromhex(digits.zfill(8)))
        if not 0 < scale < np.inf:
            raise DataError(f"{source}, line {number}: the scale of {name} is {scale}, and must be finite and positive")
        if name in tensors:
            raise DataError(f"{source}, line {number}: {name} is there twice")
        tensors[name] = imported_range(-_LARGEST * scale, _LARGEST * scale, METHOD)
    if not tensors:
        raise DataError(f"{source}: names no tensor")
    return Ranges(tensors=tensors, source=source, samples=0, synthetic=False)


def write_tensorrt_cache(ranges: Ranges, path: str | Path) -> None:
    """Write the largest magnitude of each range as a scale, in the order of the ranges; whole or not at all.

    A tensor that was 0 throughout gets the scale of [-1, 1]: TensorRT asks for a positive one, and any has a 0.

    Raises:
        OutputError: it cannot be written there.
        DataError: a tensor's name does not fit on a line, or its scale into a float32.
    """
    lines = [HEADER]
    for name, found in ranges.tensors.items():
        if "\n" in name or "\r" in name:
            raise DataError(f"the tensor name {name!r} has a line break, which a TensorRT cache has no form for")
        largest = max(-found.minimum, found.maximum, 0.0)
        if largest / _LARGEST > float(np.finfo(np.float32).max):
            raise DataError(f"the range of {name} reaches {largest:g}, for which a TensorRT cache has no scale")
        scale = np.float32(largest / _LARGEST) or np.float32(1 / _LARGEST)
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
