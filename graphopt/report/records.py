"""What happened in one run, as plain values: the console prints them, `--json` and `--report` write them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from graphopt.checking import Check
from graphopt.files import write_text_atomically
from graphopt.lint import LintReport
from graphopt.pass_base import Skip

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class PassRecord:
    """One pass of a run.

    `nodes` and `nbytes` are those of the graph after the pass; `failure` says why the pass was rolled back.
    """

    text: str
    effect: str
    rewrites: int
    nodes: int
    nbytes: int
    seconds: float
    parts: Mapping[str, int] = field(default_factory=dict)
    skipped: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()
    failure: str | None = None


@dataclass(kw_only=True)
class Report:
    """One run of a pipeline: the request, each pass, and the final check and lint of a lossy pipeline."""

    model: str
    pipeline: str
    target: str
    version: str
    nodes: int  # of the model as it came in
    nbytes: int
    data: str = ""
    synthetic: bool = False
    passes: list[PassRecord] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    check: Check | None = None
    lint: LintReport | None = None  # of the result, where it was quantized
    output: str | None = None

    @property
    def failed(self) -> bool:
        """Whether a pass had to be rolled back."""
        return any(record.failure for record in self.passes)

    def to_json(self) -> dict[str, Any]:
        """The report as values that the json module writes; not-a-number and infinity become text."""
        values = {"schema": SCHEMA, **asdict(self)}
        plain: dict[str, Any] = plain_values(values)
        return plain

    def save(self, path: Path) -> None:
        """Write the report as JSON.

        Raises:
            OutputError: the file cannot be written.
        """
        write_text_atomically(path, json.dumps(self.to_json(), indent=2) + "\n")


def plain_values(value: Any) -> Any:
    """`value` with what JSON has no form for replaced: infinities by "inf", NaN by null, enums by their values."""
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, Skip):
        return value._asdict()
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value
