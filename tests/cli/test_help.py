"""`--help` of every command: quick, because it imports nothing that computes; and what is declared is what is done."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, get_type_hints

import pytest
import typer

from rcllm.annotated import bare
from rcllm.cli.app import app
from rcllm.late import look_up

HEAVY = ("rcllm.checking", "torch", "numpy", "scipy", "transformers", "tokenizers", "pyarrow", "psutil", "blake3")
SHOW_HELP = """
import sys
from rcllm.cli.app import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    assert end.code == 0, end.code
print("IMPORTED", *sorted(sys.modules))
"""


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group of commands by the words that name it."""
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))
WORKING = {path: command for path, command in COMMANDS.items() if not hasattr(command, "commands")}


def test_all_commands_are_there() -> None:
    names = "demo doctor pull warm rank explain recommend calibrate tune describe sim plan"
    groups = {("bench", "ttft"), ("pool", "build"), ("probe", "position"), ("sid", "build"), ("sid", "train")}
    assert set(WORKING) == {*((name,) for name in names.split()), *groups}


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "rcllm")
def test_help_imports_nothing_that_computes(path: tuple[str, ...]) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SHOW_HELP, *path, "--help"], capture_output=True, text=True, check=False, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    shown, _, imported = ran.stdout.partition("IMPORTED")
    assert "Usage:" in shown
    assert set(HEAVY) & set(imported.split()) == set()


@pytest.mark.parametrize("path", WORKING, ids=" ".join)
def test_what_is_declared_is_what_the_work_takes(path: tuple[str, ...]) -> None:
    command = WORKING[path].callback
    work = look_up(command.work)
    assert list(inspect.signature(work).parameters) == list(inspect.signature(command.declared).parameters)
    declared, taken = get_type_hints(command.declared, include_extras=True), get_type_hints(work)
    for name, hint in declared.items():
        assert str(taken[name]).replace("collections.abc.Sequence[pathlib.Path]", "tuple[pathlib.Path, ...]") == str(
            bare(hint)
        ), name


@pytest.mark.parametrize("path", WORKING, ids=" ".join)
def test_every_option_is_explained_or_plain(path: tuple[str, ...]) -> None:
    plain = {"seed", "readouts", "layouts", "label_places", "num_layers"}
    silent = {option.name for option in WORKING[path].params if not getattr(option, "help", "")} - plain
    assert silent == set()
