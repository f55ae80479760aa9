"""The ranges that calibration found, and the file that keeps them.

The file is JSON for people too: a head that says where the ranges come from, then one tensor a line.

    {
      "schema": 2,
      "graphopt": "0.1.0",
      "model": "net.onnx",
      "model_sha256": "9f86...",
      "data": "calib.npz",
      "data_digest": "60a1...",
      "synthetic": false,
      "samples": 77,
      "target": "ort-cpu",
      "method": "entropy",
      "percent": 99.99,
      "shard": "",
      "covering_weights": false,
      "tensors": {
        "conv_1": {"minimum": 0.0, "maximum": 5.5, "method": "entropy", "observed_minimum": 0.0, ...},
        ...
      }
    }

`minimum` and `maximum` are what quantization uses, and may be edited; the rest is the evidence for them. A tensor may
also have "channels", lists of "minimum", "maximum", "mean", "variance" and "count" by index of its axis 1, and
"histogram", with a "response" where operators behind it see a function of it (`graphopt.responses`). With
these, another method can choose other ranges later (`rechosen`), and the files of shards of the data
merge into that of all of it, exactly (`merged`): histograms, extremes and the data's digest are sums and extremes of
those of the shards, whatever their order.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any

from graphopt.channel_statistics import ChannelStatistics
from graphopt.errors import DataError
from graphopt.exact_histogram import ExactHistogram
from graphopt.files import write_text_atomically
from graphopt.histogram import Extremes, Histogram
from graphopt.quantization import QuantType
from graphopt.responses import Response
from graphopt.targets import Target
from graphopt.thresholds import Method, choose_range
from graphopt.version import VERSION

SCHEMA = 2
DIGEST_BITS = 128


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
    mean: float | None  # None where only the extremes were observed
    second_moment: float | None = None  # the mean of the squares
    zeros: int | None  # how many of the values; None where nobody counted
    count: int  # of values over all samples
    histogram: Histogram | None = None  # None where it was not kept
    channels: ChannelStatistics | None = None  # None where nobody asked
    response: Response | None = None  # with the histogram; None where others see the values themselves

    def __post_init__(self) -> None:
        for low, high in (
            (self.minimum, self.maximum),
            (self.observed_minimum, self.observed_maximum),
        ):
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise ValueError(f"[{low}, {high}] is no range")


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """The ranges of a model's tensors by name, and what they were found with."""

    tensors: Mapping[str, TensorRange]
    source: str  # the data, for reports
    samples: int
    synthetic: bool  # made-up data, so no evidence of real ranges
    model: str = ""  # the file's name
    model_sha256: str = ""  # of that file; empty where the model is no file
    data_digest: str = ""  # the samples' digests added up, so whatever their order; empty where nobody knows
    target: str = ""
    method: Method | None = None  # None: several, or another tool's
    percent: float = 99.99  # for the method percentile
    shard: str = ""  # "2/3" for the second of three parts of the data; empty for all of it
    covering_weights: bool = False  # scales that cover the weights came closer than those of `graphopt.weight_scales`

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all; an existing one is replaced.

        Raises:
            OutputError: it cannot be written there.
        """
        write_text_atomically(path, self.to_text())

    def to_text(self) -> str:
        """What `save` writes."""
        lines = [f"  {_json(key)}: {_json(value)},\n" for key, value in self._head().items()]
        tensors = ",\n".join(f"    {_json(name)}: {_json(_record(found))}" for name, found in self.tensors.items())
        return "{\n" + "".join(lines) + '  "tensors": {\n' + tensors + "\n  }\n}\n"

    def _head(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "graphopt": VERSION,
            "model": self.model,
            "model_sha256": self.model_sha256,
            "data": self.source,
            "data_digest": self.data_digest,
            "synthetic": self.synthetic,
            "samples": self.samples,
            "target": self.target,
            "method": None if self.method is None else self.method.value,
            "percent": self.percent,
            "shard": self.shard,
            "covering_weights": self.covering_weights,
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ranges:
        """Read a file that `save` wrote.

        Raises:
            DataError: it cannot be read, is no JSON, has another schema, or lacks something; the message says
                where.
        """
        return cls.from_content(json_of(text_of(path), path), path)

    @classmethod
    def from_content(cls, content: Any, path: str | os.PathLike[str]) -> Ranges:
        """The ranges in the JSON value that a file at `path` holds.

        Raises:
            DataError: it has another schema or lacks something.
        """
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
        method = _value(content, "method", (str, NoneType), where)
        return cls(
            tensors={name: _tensor_range(record, f"tensor '{name}'") for name, record in tensors.items()},
            source=_value(content, "data", str, where),
            samples=_value(content, "samples", int, where),
            synthetic=_value(content, "synthetic", bool, where),
            model=_value(content, "model", str, where),
            model_sha256=_value(content, "model_sha256", str, where),
            data_digest=_value(content, "data_digest", str, where),
            target=_value(content, "target", str, where),
            method=None if method is None else Method(method),
            percent=float(_value(content, "percent", _NUMBER, where)),
            shard=_value(content, "shard", str, where),
            covering_weights="covering_weights" in content and _value(content, "covering_weights", bool, where),
        )

    def rechosen(self, method: Method, *, percent: float, target: Target) -> Ranges:
        """The ranges that another method finds in the histograms, for the activations of a target.

        Raises:
            DataError: a tensor has no histogram, which only minmax can do without, or the method does not follow from
                histograms.
        """
        if (reason := method.why_not_from_histograms) is not None:
            raise DataError(f"{reason}: calibrate again with it")
        tensors = {
            name: replace(
                range_of(
                    seen_of(found, method, f"tensor {name}"),
                    method,
                    percent=percent,
                    quant_type=target.activation,
                    keep=found.histogram is not None,
                    response=found.response,
                ),
                channels=found.channels,
            )
            for name, found in self.tensors.items()
        }
        return replace(self, tensors=tensors, method=method, percent=percent, target=target.name)

    def without_histograms(self) -> Ranges:
        """The same, as another method cannot use them."""
        tensors = {name: replace(found, histogram=None, response=None) for name, found in self.tensors.items()}
        return replace(self, tensors=tensors)


def range_of(
    seen: Extremes,
    method: Method,
    *,
    percent: float,
    quant_type: QuantType,
    keep: bool,
    response: Response | None = None,
) -> TensorRange:
    """The range that a method chooses for what was seen of a tensor, with the evidence.

    Args:
        seen: at least one value.
        method: how to choose; its `statistics` are what `seen` must be.
        percent: for the method percentile.
        quant_type: of the quantized tensor.
        keep: whether the histogram and the response go along.
        response: what the rest of the graph sees of the tensor, where that is not its values.
    """
    minimum, maximum, chosen = choose_range(seen, method, quant_type, percent=percent, response=response)
    histogram = seen if isinstance(seen, Histogram) else None
    return TensorRange(
        minimum=minimum,
        maximum=maximum,
        method=chosen.value,
        observed_minimum=seen.minimum,
        observed_maximum=seen.maximum,
        mean=None if histogram is None else histogram.mean,
        second_moment=None if histogram is None else histogram.second_moment,
        zeros=seen.zeros,
        count=seen.count,
        histogram=histogram if keep else None,
        response=response if keep else None,
    )


def added_digests(digests: Iterable[str]) -> str:
    """The digest of samples from those of its parts; empty where one of them is unknown."""
    known = list(digests)
    if not all(known):
        return ""
    return f"{sum(int(digest, 16) for digest in known) % 2**DIGEST_BITS:0{DIGEST_BITS // 4}x}"


def seen_of(found: TensorRange, method: Method, where: str) -> Extremes:
    """What was seen of a tensor, as far as `method` needs it; a histogram is a copy.

    Raises:
        DataError: there is no histogram.
    """
    if found.histogram is not None:
        copy = type(found.histogram)()
        copy.merge(found.histogram)
        return copy
    if method.statistics().needs_values:
        raise DataError(f"{where} has no histogram: calibrate with histograms=true to keep it")
    seen = Extremes()
    seen.add_extremes(found.observed_minimum, found.observed_maximum, found.count)
    seen.zeros = found.zeros
    return seen


def text_of(path: str | os.PathLike[str]) -> str:
    """What a file of ranges holds.

    Raises:
        DataError: it cannot be read, or is no text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read ranges from {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise _no_ranges_file(path, error) from error


def json_of(text: str, path: str | os.PathLike[str]) -> Any:
    """The JSON value that the text of the file at `path` is.

    Raises:
        DataError: it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _no_ranges_file(path, error) from error


def _no_ranges_file(path: str | os.PathLike[str], error: Exception) -> DataError:
    return DataError(f"{path} is no ranges file, or only a part of one: {error}; calibrate again to write it")


_NUMBER = (int, float)


def _record(found: TensorRange) -> dict[str, Any]:
    record = {each.name: getattr(found, each.name) for each in fields(found)}
    del record["histogram"], record["channels"], record["response"]
    if found.histogram is not None:
        record["histogram"] = found.histogram.to_json()
    if found.channels is not None:
        record["channels"] = found.channels.to_json()
    if found.response is not None:
        record["response"] = found.response.to_text()
    return record


def _tensor_range(record: Any, where: str) -> TensorRange:
    values = {
        "minimum": float(_value(record, "minimum", _NUMBER, where)),
        "maximum": float(_value(record, "maximum", _NUMBER, where)),
        "method": _value(record, "method", str, where),
        "observed_minimum": float(_value(record, "observed_minimum", _NUMBER, where)),
        "observed_maximum": float(_value(record, "observed_maximum", _NUMBER, where)),
        "mean": _value(record, "mean", (*_NUMBER, NoneType), where),
        "second_moment": _value(record, "second_moment", (*_NUMBER, NoneType), where),
        "zeros": _value(record, "zeros", (int, NoneType), where),
        "count": _value(record, "count", int, where),
    }
    try:
        found = TensorRange(**values)
        if "channels" in record:
            found = replace(found, channels=ChannelStatistics.from_json(_value(record, "channels", dict, where)))
        if "response" in record:
            found = replace(found, response=Response.from_text(_value(record, "response", str, where)))
        if "histogram" not in record:
            return found
        extremes = seen_of(found, Method.MINMAX, where)
        stored = _value(record, "histogram", dict, where)
        kind = ExactHistogram if "total" in stored else Histogram
        return replace(found, histogram=kind.from_json(stored, extremes))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _value(record: Any, key: str, kinds: type | tuple[type, ...], where: str) -> Any:
    """`record[key]`, if it is there and of one of `kinds`."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} is not an object with names and values")
    if key not in record:
        raise ValueError(f'{where} has no "{key}"')
    value = record[key]
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise ValueError(f'"{key}" of {where} cannot be {_json(value)}')
    return value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
