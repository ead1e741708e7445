"""Options made from dataclasses: what a person can type, what is refused, and what the work is given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner, Result

from rcllm.annotated import Ge, Gt, Interval, MinLen, MultipleOf, Of, Opt
from rcllm.cli.listed import Group, Listed, fill
from rcllm.cli.spread import Command, Without, spread
from rcllm.core.requests import Level
from rcllm.errors import ConfigError

EXACT = Level("exact")


@dataclass(frozen=True, slots=True)
class Oven:
    """Has a field that is no option, a limit on both sides, and a default that cannot be typed."""

    heat: Annotated[int, Interval(ge=50, le=250), Opt("How hot.", panel="Oven")] = 180
    minutes: Annotated[float, Gt(0), Opt("How long.")] = math.inf
    fan: Annotated[bool, Opt("Move the air.")] = True
    trays: Annotated[tuple[Annotated[str, MinLen(1)], ...], Opt("May repeat.", metavar="NAME")] = ()
    level: Annotated[Level, Opt("A word that is read.", metavar="LEVEL")] = EXACT
    serial: int = 7


@dataclass(frozen=True, slots=True)
class Narrow:
    """Means a field of another dataclass, may be left out, and is stricter."""

    heat: Annotated[int | None, Of(Oven, "heat"), Ge(100)] = None


GIVEN: dict[str, Any] = {}


def work(**given: Any) -> None:
    GIVEN.clear()
    GIVEN.update(given)


HERE = f"{__name__}:work"


@spread(HERE)
def bake(
    dough: Annotated[Path, Opt("What is [baked].", name="DOUGH")],
    oven: Annotated[Oven, Without(("fan",))],
    guests: Annotated[int, Ge(1), MultipleOf(2), Opt("How many.", name="--for")] = 4,
    glaze: Annotated[Literal["none", "egg"], Opt("What shines.")] = "none",
    cool: Annotated[bool, Opt("Wait.")] = True,
) -> None:
    """Bake a cake."""


@spread(HERE)
def warm(narrow: Narrow) -> None:
    """Keep it warm."""


def run(command: Command, *words: object) -> Result:
    app = typer.Typer(add_completion=False)
    app.command()(command.spread())
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "160"})


def test_what_is_not_given_is_the_dataclass_itself() -> None:
    assert run(bake, "dough.txt").exit_code == 0
    assert {"dough": Path("dough.txt"), "oven": Oven(), "guests": 4, "glaze": "none", "cool": True} == GIVEN
    assert GIVEN["oven"].minutes == math.inf


def test_every_kind_of_value() -> None:
    words = "dough.txt --heat 200 --minutes 1.5 --trays low --trays high --level linked(4) --for 6 --no-cool"
    assert run(bake, *words.split(), "--glaze", "egg").exit_code == 0
    assert GIVEN["oven"] == Oven(200, 1.5, trays=("low", "high"), level=Level("linked", 4))
    assert (GIVEN["guests"], GIVEN["glaze"], GIVEN["cool"]) == (6, "egg", False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--heat 20", "--heat must be at least 50, got 20"),
        ("--heat 300", "--heat must be at most 250, got 300"),
        ("--minutes 0", "--minutes must be above 0, got 0"),
        ("--minutes nan", "--minutes must be a finite number"),
        ("--for 3", "--for must be a multiple of 2, got 3"),
        ("--for 0", "--for must be at least 1"),
        ("--glaze eg", "--glaze must be one of none, egg, got 'eg'; did you mean 'egg'?"),
        ("--level medium", "--level: unknown reuse level 'medium'"),
    ],
)
def test_a_value_that_cannot_be_is_named_as_it_is_typed(words: str, message: str) -> None:
    shown = run(bake, "dough.txt", *words.split())
    assert isinstance(shown.exception, ConfigError)
    assert message in str(shown.exception)


@pytest.mark.parametrize("words", [["--fan", "dough.txt"], ["--serial", "1", "dough.txt"]])
def test_what_is_no_option_cannot_be_typed(words: list[str]) -> None:
    shown = run(bake, *words)
    assert shown.exit_code == 2
    assert "No such option" in shown.output


def test_what_must_be_given() -> None:
    shown = run(bake)
    assert shown.exit_code == 2
    assert "Missing argument 'DOUGH'" in shown.output


def test_a_field_that_means_another_takes_its_words_and_the_stricter_limit() -> None:
    assert run(warm).exit_code == 0
    assert GIVEN["narrow"].heat is None, "not given, so that somebody else decides"
    with pytest.raises(ConfigError, match="--heat must be at least 100, got 60"):
        raise run(warm, "--heat", 60).exception or AssertionError
    page = run(warm, "--help").output
    assert "How hot." in page
    assert "N ≥ 100 ≤ 250" in page


def test_a_page_shows_limits_words_and_defaults_that_can_be_typed() -> None:
    page = run(bake, "--help").output
    assert "N ≥ 50 ≤ 250" in page
    assert "X > 0" in page
    assert "none|egg" in page
    assert "What is [baked]." in page
    assert "--no-cool" in page
    assert "default: exact" in page
    assert "inf" not in page, "no limit is no default that a person could type"
    assert "Oven" in page


def test_a_command_of_a_group_runs_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [Listed("cake bake", "bake", "Bake a cake."), Listed("cake warm", "warm", "Keep it warm.")]
    monkeypatch.setattr(Listed, "load", lambda self: _loaded({"bake": bake, "warm": warm}[self.where]))
    group = Group(name="kitchen", no_args_is_help=True)
    fill(group, listed, {"cake": "What cakes need."})
    assert list(group.commands) == ["cake"]
    group.main(["cake", "warm", "--heat", "150"], standalone_mode=False)
    assert GIVEN["narrow"].heat == 150


def test_a_group_without_words_for_it_is_our_mistake() -> None:
    with pytest.raises(KeyError, match="cake"):
        fill(Group(name="kitchen"), [Listed("cake bake", "bake", "Bake a cake.")], {})


def _loaded(command: Command) -> Any:
    alone = typer.Typer(add_completion=False)
    alone.command()(command.spread())
    return typer.main.get_command(alone)
