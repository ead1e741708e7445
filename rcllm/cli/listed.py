"""Commands that are listed by a line each, and imported when one of them is asked for.

A group's page needs the names of its commands and a line about each, not their options: so `rcllm --help` imports no
module of a command, and the page of a command imports that of no other. Knows nothing of what commands do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from rcllm.cli.markup import to_markup
from rcllm.late import look_up


@dataclass(frozen=True)
class Listed:
    """One line of the list."""

    name: str  # as it is typed: `rank`, or `bench ttft` for a command of a group
    where: str  # its declaration in `commands/`, at `module:function`
    about: str  # the first line of the declaration's docstring
    panel: str = "Work"  # the heading under which --help lists it

    def load(self) -> Any:
        """The command with its options, of Typer's class. Imports its module."""
        command = look_up(f"rcllm.cli.commands.{self.where}")
        alone = typer.Typer(add_completion=False, rich_markup_mode="rich")
        alone.command(self.name.split()[-1], help=to_markup(command.declared.__doc__))(command.spread())
        return typer.main.get_command(alone)


class _StandIn(TyperCommand):
    """Stands in a group for a command that is not imported yet."""

    def __init__(self, listed: Listed) -> None:
        super().__init__(listed.name.split()[-1], help=listed.about, rich_help_panel=listed.panel)
        self.load = listed.load

    def make_context(self, *given: Any, **more: Any) -> Any:
        return self.load().make_context(*given, **more)


class Group(TyperGroup):
    """A command that has commands of its own."""

    def get_help_option(self, ctx: Any) -> Any:
        """`--help`, with False for «not given»: of None Typer asks pydantic what it means, and imports it for that."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False
        return option


def fill(group: Group, commands: Iterable[Listed], about: Mapping[str, str]) -> None:
    """Puts a stand-in for every command into the group, or into a group within it that `about` says a line of."""
    for listed in commands:
        *path, _ = listed.name.split()
        owner = group
        for word in path:
            inner = owner.commands.setdefault(word, _inner(word, about[word], listed.panel))
            assert isinstance(inner, Group)
            owner = inner
        owner.add_command(_StandIn(listed))


def _inner(name: str, about: str, panel: str) -> Group:
    return Group(name=name, help=about, no_args_is_help=True, rich_markup_mode="rich", rich_help_panel=panel)
