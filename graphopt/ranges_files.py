"""Ranges from a file of any tool that we read, told apart by what is in it.

- our own JSON (`graphopt.ranges`)
- TensorRT's calibration cache (`graphopt.tensorrt_cache`)
- onnxruntime's calibration JSON: `write_calibration_table` writes {name: tensor data}, `save_tensors_data` the same
  under "data", and older versions {name: [lowest, highest]}.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import DataError
from graphopt.ranges import Ranges, json_of, text_of
from graphopt.tensorrt_cache import imported_range, is_tensorrt_cache, read_tensorrt_cache, write_tensorrt_cache

ORT_METHOD = "onnxruntime-table"

_SHOWN = 5  # names in a warning


def read_ranges(path: str | Path) -> Ranges:
    """Read a file of ranges.

    Raises:
        DataError: it cannot be read, or is of no kind that is known; the message says where.
    """
    text = text_of(path)
    if is_tensorrt_cache(text):
        return read_tensorrt_cache(text, str(path))
    content = json_of(text, path)
    if not isinstance(content, dict) or not content or "schema" in content:
        return Ranges.from_content(content, path)
    table = content.get("data") if content.get("CLS") == "TensorsData" else content
    return _ort_table(table, str(path))


def write_ranges(ranges: Ranges, path: str | Path) -> None:
    """Write ranges as JSON, or as a TensorRT cache where the name ends in .cache.

    Raises:
        OutputError: they cannot be written there.
    """
    if str(path).endswith(".cache"):
        write_tensorrt_cache(ranges, path)
    else:
        ranges.save(path)


def unmatched_names(ranges: Ranges, names: Collection[str]) -> str | None:
    """A sentence about the tensors of `ranges` that are not among `names`; None where all are."""
    unmatched = [name for name in ranges.tensors if name not in names]
    if not unmatched:
        return None
    shown = ", ".join(unmatched[:_SHOWN]) + (", ..." if len(unmatched) > _SHOWN else "")
    return (
        f"{len(unmatched)} of {len(ranges.tensors)} ranges are of tensors that the model does not have, "
        f"and are not used: {shown}"
    )


def _ort_table(table: Any, source: str) -> Ranges:
    if not isinstance(table, dict):
        raise DataError(f'{source}: "data" of onnxruntime\'s calibration is no object with names and ranges')
    if not table:
        raise DataError(f'{source}: "data" of onnxruntime\'s calibration names no tensor')
    tensors = {}
    for name, entry in table.items():
        try:
            low, high = _bounds(entry)
            tensors[name] = imported_range(low, high, ORT_METHOD)
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise DataError(
                f"{source}: is read as onnxruntime's calibration table, but {name} has no lowest and highest value: "
                f"{error}"
            ) from error
    return Ranges(tensors=tensors, source=source, samples=0, synthetic=False)


def _bounds(entry: Any) -> tuple[float, float]:
    if isinstance(entry, Mapping):
        return _number(entry["lowest"]), _number(entry["highest"])
    low, high = entry
    return _number(low), _number(high)


def _number(value: Any) -> float:
    """A number, or what onnxruntime writes for a numpy value of one.

    Raises:
        ValueError: there are several, which a calibrator with per_channel finds.
    """
    numbers = np.ravel(value["data"] if isinstance(value, Mapping) else value)
    if numbers.size != 1:
        raise ValueError(
            f"it has {numbers.size}, one for each channel, where activations are quantized with one range: calibrate "
            "without per_channel"
        )
    return float(numbers[0])
