"""The ranges that calibration found, and the file that keeps them.

The file is JSON for people too: a head that says where the ranges come from, then one tensor a line.

    {
      "schema": 1,
      "graphopt": "0.1.0",
      "data": "calib.npz",
      "synthetic": false,
      "samples": 77,
      "tensors": {
        "conv_1": {"minimum": 0.0, "maximum": 5.5, "method": "entropy", "observed_minimum": 0.0, ...},
        ...
      }
    }

`minimum` and `maximum` are what quantization uses, and may be edited; the rest is the evidence for them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from graphopt.errors import DataError
from graphopt.files import write_text_atomically
from graphopt.version import VERSION

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class TensorRange:
    """What one tensor's quantizer should cover, and what calibration saw of it; in the tensor's unit.

    Raises:
        ValueError: a bound is not finite, or the minimum is above the maximum.
    """

    minimum: float
    maximum: float
    method: str  # that chose the range
    observed_minimum: float
    observed_maximum: float
    mean: float | None  # of all values, to one part in 2048 of the largest; None where the method keeps no histogram
    zero_fraction: float | None  # of the values, 0 to 1; None where nobody counted
    count: int  # of values over all samples

    def __post_init__(self) -> None:
        for low, high in (
            (self.minimum, self.maximum),
            (self.observed_minimum, self.observed_maximum),
        ):
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise ValueError(f"[{low}, {high}] is no range")


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """The ranges of a model's tensors by name, and what data they were found with."""

    tensors: Mapping[str, TensorRange]
    source: str  # the data, for reports
    samples: int
    synthetic: bool  # made-up data, so no evidence of real ranges

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all; an existing one is replaced.

        Raises:
            OutputError: it cannot be written there.
        """
        head = {
            "schema": SCHEMA,
            "graphopt": VERSION,
            "data": self.source,
            "synthetic": self.synthetic,
            "samples": self.samples,
        }
        lines = [f"  {_json(key)}: {_json(value)},\n" for key, value in head.items()]
        tensors = ",\n".join(f"    {_json(name)}: {_json(asdict(found))}" for name, found in self.tensors.items())
        write_text_atomically(path, "{\n" + "".join(lines) + '  "tensors": {\n' + tensors + "\n  }\n}\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ranges:
        """Read a file that `save` wrote.

        Raises:
            DataError: it cannot be read, is no JSON, has another schema, or lacks something; the message says
                where.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"cannot read ranges from {path}: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:  # no JSON or no UTF-8
            raise DataError(
                f"{path} is no ranges file, or only a part of one: {error}; calibrate again to write it"
            ) from error
        try:
            return cls._from_json(content)
        except (ValueError, OverflowError) as error:
            raise DataError(
                f"{path} is not a ranges file that can be used: {error}; calibrate again to write it"
            ) from error

    @classmethod
    def _from_json(cls, content: Any) -> Ranges:
        where = "the file"
        schema = _value(content, "schema", int, where)
        if schema != SCHEMA:
            raise ValueError(f"its schema is {schema}, and this version of graphopt reads {SCHEMA}")
        tensors = _value(content, "tensors", dict, where)
        return cls(
            tensors={name: _tensor_range(fields, f"tensor '{name}'") for name, fields in tensors.items()},
            source=_value(content, "data", str, where),
            samples=_value(content, "samples", int, where),
            synthetic=_value(content, "synthetic", bool, where),
        )


_NUMBER = (int, float)


def _tensor_range(fields: Any, where: str) -> TensorRange:
    values = {
        "minimum": float(_value(fields, "minimum", _NUMBER, where)),
        "maximum": float(_value(fields, "maximum", _NUMBER, where)),
        "method": _value(fields, "method", str, where),
        "observed_minimum": float(_value(fields, "observed_minimum", _NUMBER, where)),
        "observed_maximum": float(_value(fields, "observed_maximum", _NUMBER, where)),
        "mean": _value(fields, "mean", (*_NUMBER, NoneType), where),
        "zero_fraction": _value(fields, "zero_fraction", (*_NUMBER, NoneType), where),
        "count": _value(fields, "count", int, where),
    }
    try:
        return TensorRange(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _value(fields: Any, key: str, kinds: type | tuple[type, ...], where: str) -> Any:
    """`fields[key]`, if it is there and of one of `kinds`."""
    if not isinstance(fields, dict):
        raise ValueError(f"{where} is not an object with names and values")
    if key not in fields:
        raise ValueError(f'{where} has no "{key}"')
    value = fields[key]
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise ValueError(f'"{key}" of {where} cannot be {_json(value)}')
    return value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
