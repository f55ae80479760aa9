"""Pipeline text: what it takes, what it prints, and what it says about mistakes."""

from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import PipelineError
from graphopt.pass_base import Effect, Pass, PassResult
from graphopt.passes import Calibrate, registry
from graphopt.pipeline import format_pass, format_pipeline, options_of, parse_pipeline


class Mode(Enum):
    FAST = "fast"
    SLOW = "slow"


@dataclass(frozen=True, kw_only=True)
class Example(Pass):
    """An example."""

    name: ClassVar[str] = "example"
    effect: ClassVar[Effect] = Effect.EXACT

    count: int = field(default=1, metadata={"help": "how many"})
    ratio: float = 0.5
    deep: bool = False
    mode: Mode = Mode.FAST
    label: str = ""
    names: tuple[str, ...] = ()
    limit: int | None = None

    def __post_init__(self):
        if self.count < 0:
            raise ValueError("count must not be negative")

    def apply(self, graph, context):
        return PassResult()


@dataclass(frozen=True, kw_only=True)
class Plain(Pass):
    """Has no options."""

    name: ClassVar[str] = "plain"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, graph, context):
        return PassResult()


TABLE = {"example": Example, "plain": Plain}


def test_parses_passes_and_typed_options():
    first, second = parse_pipeline("example:count=3:ratio=0.25:deep=true:mode=slow:names=a+b:limit=7, plain", TABLE)
    assert first == Example(count=3, ratio=0.25, deep=True, mode=Mode.SLOW, names=("a", "b"), limit=7)
    assert second == Plain()


@given(
    st.builds(
        Example,
        count=st.integers(0, 10**6),
        ratio=st.floats(allow_nan=False, allow_infinity=False),
        deep=st.booleans(),
        mode=st.sampled_from(Mode),
        label=st.text("abc/._-*", max_size=5),
        names=st.lists(st.text("ab./", min_size=1, max_size=3)).map(tuple),
        limit=st.none() | st.integers(),
    )
)
def test_what_is_printed_parses_to_the_same_passes(item):
    assert parse_pipeline(format_pipeline([item, Plain()]), TABLE) == [item, Plain()]


def test_prints_only_what_differs_from_the_defaults():
    assert format_pass(Example(count=2)) == "example:count=2"
    assert format_pass(Example()) == "example"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("exampel", ["'exampel'", "did you mean 'example'", "plain"]),
        ("", ["missing", "example, plain"]),
        ("example,,plain", ["missing"]),
        ("example:cuont=1", ["'cuont'", "did you mean 'count'", "ratio"]),
        ("plain:count=1", ["'count'", "it has none"]),
        ("example:count", ["needs a value", "example:count=VALUE"]),
        ("example:count=many", ["takes int", "'many'"]),
        ("example:ratio=x", ["takes float"]),
        ("example:deep=perhaps", ["takes true|false"]),
        ("example:mode=medium", ["takes fast|slow"]),
        ("example:count=1:count=2", ["given twice"]),
        ("example:count=-1", ["must not be negative"]),
    ],
)
def test_a_mistake_is_one_line_that_lists_what_is_right(text, words):
    with pytest.raises(PipelineError) as caught:
        parse_pipeline(text, TABLE)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_options_show_types_defaults_and_help():
    count, _, deep, mode, _, names, limit = options_of(Example)
    assert (count.name, count.type_name, count.default, count.help) == ("count", "int", "1", "how many")
    assert (deep.type_name, mode.type_name, names.type_name) == ("true|false", "fast|slow", "text+...")
    assert (limit.type_name, limit.default) == ("int", "")


@pytest.mark.parametrize("name", list(registry()))
def test_every_pass_can_be_written_and_shown(name):
    (item,) = parse_pipeline(name, registry())
    assert item.name == name
    assert (type(item).__doc__ or "").strip()
    assert all(option.help for option in options_of(type(item)))


@pytest.mark.parametrize(
    ("name", "loaded", "words"),
    [
        ("mine", "none", "is no graphopt.Pass"),
        ("mine", Calibrate, "must have that name"),
        ("calibrate", Calibrate, "takes a name that is taken"),
    ],
)
def test_a_pass_of_another_package_that_cannot_be_used_is_one_line(monkeypatch, name, loaded, words):
    entry = SimpleNamespace(name=name, value="package:Class", load=lambda: loaded)
    monkeypatch.setattr("graphopt.passes.entry_points", lambda group: [entry])
    with pytest.raises(PipelineError, match=words):
        registry.__wrapped__()
