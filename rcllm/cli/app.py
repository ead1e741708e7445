"""The command line: `rcllm`. Registers the commands, and turns the product's errors into one line and an exit code.

Knows nothing of what commands do. Invariant: an error that a user can do something about shows no traceback unless
`--debug` asks for it; exit codes are 0, 1 (something failed), 2 (an option or the configuration is wrong) and 130
(interrupted).
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rcllm.cli.commands import describe, learn, rank, recommend, sid, sim, start
from rcllm.cli.ending import ended_by
from rcllm.cli.screen import console, say
from rcllm.cli.spread import Declared
from rcllm.errors import RcllmError
from rcllm.version import __version__


class _Group(TyperGroup):
    """Shows what a user can do something about as one line; `--debug` shows where it came from as well."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (RcllmError, OSError, MemoryError, KeyboardInterrupt) as error:
            if ctx.params.get("debug"):
                raise
            ending = ended_by(error)
            if ending.words:
                say(ending.words, "bold red")
            raise typer.Exit(ending.code) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    add_completion=False,
)
for name, command in {"demo": start.demo, "doctor": start.doctor}.items():
    app.command(name, rich_help_panel="Start here")(command)
for name, command in {
    "pull": start.pull,
    "warm": start.warm,
    "rank": rank.rank,
    "explain": rank.explain,
    "recommend": recommend.recommend,
    "calibrate": learn.calibrate,
    "tune": learn.tune,
    "describe": describe.describe,
    "sim": sim.sim,
    "plan": sim.plan,
}.items():
    app.command(name, rich_help_panel="Work")(command)


def _add(name: str, about: str, commands: dict[str, Declared]) -> None:
    """A command that has commands of its own."""
    group = typer.Typer(no_args_is_help=True, help=about)
    for inner, command in commands.items():
        group.command(inner)(command)
    group.callback()(lambda: None)  # so that a single command keeps its name
    app.add_typer(group, name=name, rich_help_panel="Work")


_add("bench", "Measure your own model, catalogue and requests.", {"ttft": rank.ttft})
_add("pool", "The semantic history pool: token prototypes shared by all users.", {"build": learn.pool_build})
_add("probe", "Look for what a ranking should not depend on.", {"position": rank.position})
_add(
    "sid",
    "Semantic IDs: codes of items, and a decoder that generates them.",
    {"build": sid.build, "train": sid.train},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        console().print(f"rcllm {__version__}")
        raise typer.Exit


@app.callback()
def main(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Language models that recommend, with KV reuse beyond the prefix.

    **pull** a model → **warm**: see what a catalogue needs → **rank** requests → **explain** one answer, block by
    block. **calibrate** finds how far reuse may go before answers change, and rank goes that far; **tune** teaches a
    model to rank, also so that reuse changes nothing. **bench ttft** says what reuse saves on your data; **probe
    position**, what the order of the candidates does; **pool build** makes token prototypes for histories.
    **recommend** finds items of the whole catalogue, with a decoder that **sid train** made. Example:

    - `rcllm pull`
    - `rcllm warm --items items.jsonl --limit 500`
    - `rcllm rank --items items.jsonl --in requests.jsonl --out answers.jsonl`
    - `rcllm explain --items items.jsonl --request requests.jsonl:1`
    """


if __name__ == "__main__":
    app()
