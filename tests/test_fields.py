"""One rule for the values of dataclasses, wherever they come from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass
from typing import Annotated, Any, Literal

import pytest

from rcllm.annotated import Ge, Interval, Of, Opt, Rule, option_of
from rcllm.core.decoding import GenerateOptions, Speculation
from rcllm.core.ranking import Level, RankOptions, Selection
from rcllm.errors import ConfigError, DataError
from rcllm.fields import check, given, parse
from rcllm.plain_json import read_object


def _even(value: int) -> None:
    if value % 2:
        raise ConfigError(f"expected an even number, got {value}")


@dataclass(frozen=True, slots=True)
class Part:
    share: Annotated[float, Interval(ge=0, le=1)] = 0.5
    word: Literal["one", "two"] = "one"


@dataclass(frozen=True, slots=True)
class Whole:
    count: Annotated[int, Ge(1), Rule(_even), Opt("How many.")]
    names: tuple[str, ...] = ()
    part: Part = field(default_factory=Part)
    parts: Mapping[str, Part] = field(default_factory=dict)
    level: Level = field(default_factory=lambda: Level("exact"))
    limit: Annotated[int | None, Ge(1)] = None


def test_values_become_the_dataclass() -> None:
    values = {"count": 2, "names": ["a"], "part": {"word": "two"}, "parts": {"x": {"share": 1}}, "level": "tail(0.2)"}
    expected = Whole(2, ("a",), Part(word="two"), {"x": Part(1.0)}, Level("tail", 0.2))
    assert parse(Whole, values) == expected


def test_values_lie_over_a_base_section_by_section() -> None:
    base = Whole(4, part=Part(0.25, "two"), limit=3)
    made = parse(Whole, {"count": 6, "part": {"share": 0.75}}, base=base)
    assert made == Whole(6, part=Part(0.75, "two"), limit=3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "here: missing count"),
        ({"count": "2"}, "here: count must be a whole number, got '2'"),
        ({"count": True}, "here: count must be a whole number, got true"),
        ({"count": 2.5}, "here: count must be a whole number, got 2.5"),
        ({"count": 0}, "here: count must be at least 1, got 0"),
        ({"count": 3}, "here: count: expected an even number, got 3"),
        ({"count": 2, "limit": 0}, "here: limit must be at least 1, got 0"),
        ({"count": 2, "names": "ab"}, "here: names must be a list, got 'ab'"),
        ({"count": 2, "names": ["a", 3]}, r"here: names[1] must be a text, got 3"),
        ({"count": 2, "part": {"share": math.nan}}, "here: part.share must be a finite number, got nan"),
        ({"count": 2, "part": {"share": 1.5}}, "here: part.share must be at most 1, got 1.5"),
        ({"count": 2, "part": {"wrod": 1}}, "here: unknown key 'wrod' in part; did you mean 'word'?"),
        (
            {"count": 2, "part": {"word": "too"}},
            "here: part.word must be one of one, two, got 'too'; did you mean 'two'?",
        ),
        ({"count": 2, "parts": {"x": {"share": None}}}, "here: parts.x.share must be a number, got null"),
        ({"count": 2, "level": "fats"}, "here: level: unknown reuse level 'fats': expected full"),
    ],
)
def test_messages_say_where_what_and_what_came(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(Whole, values, "here", error=DataError)
    assert str(caught.value).startswith(message)


def test_several_faults_are_told_together_but_not_all() -> None:
    with pytest.raises(ConfigError, match=r"^a: .*; b: .*; c: .*; and 2 more$"):
        parse(dict_of("abcde"), dict.fromkeys("abcde", ""))


def dict_of(names: str) -> Any:
    return make_dataclass("Made", [(name, Annotated[str, Rule(_nothing)], "x") for name in names])


def _nothing(value: str) -> None:
    raise ConfigError("never right")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (GenerateOptions(temperature=math.nan), "temperature must be a finite number, got nan"),
        (GenerateOptions(top_p=0.0), "top_p must be above 0, got 0"),
        (GenerateOptions(stop="end"), "stop must be a list, got 'end'"),  # type: ignore[arg-type]
        (GenerateOptions(stop=["end"]), r"stop must be a tuple, got \['end'\]"),  # type: ignore[arg-type]
        (RankOptions(level="blocks"), r"level must be a Level, got 'blocks'; read one with Level\.parse"),  # type: ignore[arg-type]
        (RankOptions(level=Level("tail", 2.0)), r"level: unknown reuse level 'tail\(2\.0\)'"),
        (RankOptions(selection=Selection(window=-1)), r"selection\.window must be at least 0, got -1"),
        (RankOptions(selection=Selection(divergence=math.inf)), r"selection\.divergence must be a finite number"),
    ],
)
def test_objects_made_in_python_are_held_to_the_same_rule(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(value)


def test_a_default_is_not_checked_and_a_given_value_is() -> None:
    assert given(RankOptions()) == {}
    assert given(RankOptions(selection=Selection(window=2))) == {"selection": {"window": 2}}
    assert given(GenerateOptions(speculation=Speculation("none"))) == {"speculation": Speculation("none")}
    check(RankOptions())


def test_an_option_of_another_dataclass_has_its_words_and_limits() -> None:
    narrowed = Annotated[int | None, Of(Whole, "count"), Ge(4)]
    option = option_of(narrowed)
    assert option is not None
    assert option.help == "How many."


@pytest.mark.parametrize(
    ("text", "message"), [("[1]", "got a list of 1"), ("{", "it is not JSON"), ("[" * 100_000, "it is not JSON")]
)
def test_what_is_no_json_object(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_object(text, "x.json", DataError)
