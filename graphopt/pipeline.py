"""Pipeline text <-> passes: `fold,calibrate:method=entropy,qdq:exclude=conv1+conv2`.

Passes are separated by commas, options by colons, items of a list option by `+`. The text is what the command line
takes, what `graphopt.optimize(passes=...)` takes and what reports print: `parse(format_pipeline(passes))` gives the
same passes again.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints

from graphopt.errors import PipelineError
from graphopt.pass_base import Pass

_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class Option:
    """One option of a pass, as `graphopt passes` shows it."""

    name: str
    type_name: str  # "int", "minmax|entropy", "text+..."
    default: str
    help: str


def parse_pipeline(text: str, registry: Mapping[str, type[Pass]]) -> list[Pass]:
    """The passes that a pipeline text names, with their options.

    Raises:
        PipelineError: an unknown pass or option, or a value of the wrong type; the message lists the right ones.
    """
    return [_parse_pass(item.strip(), registry) for item in text.split(",")]


def format_pipeline(passes: Iterable[Pass]) -> str:
    """The text of some passes, with the options that differ from their defaults."""
    return ",".join(map(format_pass, passes))


def format_pass(item: Pass) -> str:
    """The text of one pass."""
    fields = [each for each in _fields(type(item)) if getattr(item, each.name) != each.default]
    return ":".join([item.name, *(f"{each.name}={_text(getattr(item, each.name))}" for each in fields)])


def options_of(kind: type[Pass]) -> list[Option]:
    """The options of a pass, in the order of its fields."""
    hints = get_type_hints(kind)
    return [
        Option(each.name, _type_name(hints[each.name]), _text(each.default), str(each.metadata.get("help", "")))
        for each in _fields(kind)
    ]


def _parse_pass(text: str, registry: Mapping[str, type[Pass]]) -> Pass:
    name, *options = text.split(":")
    if not name:
        raise PipelineError(f"a pass name is missing in the pipeline; there are: {', '.join(registry)}")
    kind = registry.get(name)
    if kind is None:
        raise PipelineError(f"no pass is called '{name}'{_hint(name, registry)}; there are: {', '.join(registry)}")
    hints = get_type_hints(kind)
    allowed = [each.name for each in _fields(kind)]
    values: dict[str, object] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if key not in allowed:
            has = f"its options are: {', '.join(allowed)}" if allowed else "it has none"
            raise PipelineError(f"pass '{name}' has no option '{key}'{_hint(key, allowed)}; {has}")
        if not equals:
            raise PipelineError(f"option '{key}' of pass '{name}' needs a value: {name}:{key}=VALUE")
        if key in values:
            raise PipelineError(f"option '{key}' of pass '{name}' is given twice")
        values[key] = _parse_value(value, hints[key], f"option '{key}' of pass '{name}'")
    try:
        return kind(**values)
    except ValueError as error:  # a pass checks the range of its options when it is made
        raise PipelineError(f"pass '{name}': {error}") from None


def _parse_value(text: str, kind: Any, where: str) -> object:
    if get_origin(kind) is tuple:
        return tuple(_parse_value(item, get_args(kind)[0], where) for item in text.split("+") if item)
    if get_origin(kind) is types.UnionType:  # `int | None`: the default says what None means
        return _parse_value(text, get_args(kind)[0], where)
    if kind is str:
        return text
    try:
        if kind is bool:
            return _BOOLEANS[text.lower()]
        return kind(text)
    except (KeyError, ValueError):
        raise PipelineError(f"{where} takes {_type_name(kind)}, not '{text}'") from None


def _type_name(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"{_type_name(get_args(kind)[0])}+..."
    if get_origin(kind) is types.UnionType:
        return _type_name(get_args(kind)[0])
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(str(member.value) for member in kind)
    return {str: "text", bool: "true|false"}.get(kind) or str(kind.__name__)


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return "+".join(map(_text, value))
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def _fields(kind: type[Pass]) -> Sequence[dataclasses.Field[Any]]:
    return dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()


def _hint(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
