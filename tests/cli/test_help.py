"""`--help` of every command: quick, because it imports nothing that computes; and what is declared is what is done."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, get_type_hints

import pytest
import typer
from rich.markup import render
from typer.testing import CliRunner

from rcllm.annotated import bare
from rcllm.cli.app import COMMANDS, GROUPS, app
from rcllm.cli.markup import to_markup
from rcllm.late import look_up

COMPUTES = {"torch", "numpy", "scipy", "transformers", "tokenizers", "pandas", "polars", "pyarrow", "psutil", "blake3"}
NOT_FOR_A_PAGE = {"pydantic", "annotated_types", "json", "tomllib", "rich.progress", "importlib.metadata"}
SHOW_HELP = """
import sys
from rcllm.cli.app import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    assert end.code == 0, end.code
print("IMPORTED", *sorted(sys.modules))
"""
LISTED = {command.name: command for command in COMMANDS}


def pages(group: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """The words that name every command and group of commands."""
    yield " ".join(path)
    for name, command in getattr(group, "commands", {}).items():
        yield from pages(command, (*path, name))


def show(words: str) -> tuple[str, set[str]]:
    """The page of a command in a process of its own, and the modules that were imported for it."""
    ran = subprocess.run(
        [sys.executable, "-c", SHOW_HELP, *words.split(), "--help"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    page, _, imported = ran.stdout.partition("IMPORTED")
    return page, set(imported.split())


def test_all_commands_are_there() -> None:
    alone = {name for name in LISTED if " " not in name}
    assert set(pages(typer.main.get_command(app))) == {"", *alone, *GROUPS, *LISTED}
    assert {"demo", "doctor", "pull", "warm", "rank", "explain", "recommend", "calibrate", "tune", "describe"} <= alone
    assert {"sim", "plan"} <= alone


@pytest.mark.parametrize("words", ["", *GROUPS, *LISTED], ids=lambda words: words or "rcllm")
def test_help_imports_nothing_that_computes(words: str) -> None:
    page, imported = show(words)
    assert "Usage:" in page
    assert (COMPUTES | NOT_FOR_A_PAGE) & imported == set()


def test_the_page_of_all_commands_imports_none_of_them() -> None:
    page, imported = show("")
    assert [name for name in imported if name.startswith("rcllm.cli.commands")] == []
    assert all(name.split()[0] in page for name in LISTED)


@pytest.mark.parametrize("name", LISTED)
def test_the_list_says_what_the_declaration_says(name: str) -> None:
    declared = look_up(f"rcllm.cli.commands.{LISTED[name].where}").declared
    assert LISTED[name].about == inspect.getdoc(declared).splitlines()[0]  # type: ignore[union-attr]
    assert LISTED[name].load().name == name.split()[-1]


@pytest.mark.parametrize("name", LISTED)
def test_what_is_declared_is_what_the_work_takes(name: str) -> None:
    command = look_up(f"rcllm.cli.commands.{LISTED[name].where}")
    work = look_up(command.work)
    assert list(inspect.signature(work).parameters) == list(inspect.signature(command.declared).parameters)
    declared, taken = get_type_hints(command.declared, include_extras=True), get_type_hints(work)
    for parameter, hint in declared.items():
        given = str(taken[parameter]).replace("collections.abc.Sequence[pathlib.Path]", "tuple[pathlib.Path, ...]")
        assert given == str(bare(hint)), parameter


@pytest.mark.parametrize("name", LISTED)
def test_every_option_is_explained_or_plain(name: str) -> None:
    plain = {"seed", "readouts", "layouts", "label_places", "num_layers"}
    silent = {option.name for option in LISTED[name].load().params if not getattr(option, "help", "")} - plain
    assert silent == set()


@pytest.mark.parametrize("words", ["", *GROUPS])
def test_a_group_alone_shows_its_page(words: str) -> None:
    shown = CliRunner().invoke(app, words.split())
    assert shown.exit_code == 2
    assert "Commands" in shown.output or "Work" in shown.output


def test_a_misspelt_command_is_told_of_the_nearest() -> None:
    assert "Did you mean 'rank'?" in CliRunner().invoke(app, ["rnak"]).output
    assert "Did you mean 'build'?" in CliRunner().invoke(app, ["sid", "biuld"]).output


def test_words_are_shown_as_they_are_written() -> None:
    shown = render(to_markup("A cell: [1], `rcllm\n   pull [x]` and **bold**.\n\n    Next [/b] one."))
    assert shown.plain == "A cell: [1], rcllm pull [x] and bold.\n\nNext [/b] one."
    assert [shown.plain[span.start : span.end] for span in shown.spans] == ["rcllm pull [x]", "bold"]
