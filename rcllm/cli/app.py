"""The command line: `rcllm`. Registers the commands, and turns the product's errors into one line and an exit code.

Knows nothing of what commands do. Invariant: an error that a user can do something about shows no traceback unless
`--debug` asks for it; exit codes are 0, 1 (something failed), 2 (an option or the configuration is wrong) and
130 (interrupted).
"""

from __future__ import annotations

import errno
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rcllm.cli.bench import bench
from rcllm.cli.cache import pull_command, warm_command
from rcllm.cli.calibrate import calibrate_command
from rcllm.cli.demo import demo_command
from rcllm.cli.describe import describe_command
from rcllm.cli.doctor import doctor_command
from rcllm.cli.pool import pool
from rcllm.cli.probe import probe
from rcllm.cli.rank import explain_command, rank_command
from rcllm.cli.recommend import recommend_command
from rcllm.cli.screen import INTERRUPTED, console, say
from rcllm.cli.sid import sid
from rcllm.cli.tune import tune_command
from rcllm.errors import ConfigError, RcllmError


class _Group(TyperGroup):
    """Shows the product's errors as one line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RcllmError as error:
            if ctx.params.get("debug"):
                raise
            say(f"error: {error}", "bold red")
            raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from error
        except OSError as error:  # a place that cannot be read or written, and that no command has a better word for
            if ctx.params.get("debug") or error.errno == errno.EPIPE:
                raise
            say(f"error: {error}", "bold red")
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            say("interrupted", "bold red")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    add_completion=False,
)
app.command("demo", rich_help_panel="Start here")(demo_command)
app.command("doctor", rich_help_panel="Start here")(doctor_command)
app.command("pull", rich_help_panel="Work")(pull_command)
app.command("warm", rich_help_panel="Work")(warm_command)
app.command("rank", rich_help_panel="Work")(rank_command)
app.command("explain", rich_help_panel="Work")(explain_command)
app.command("recommend", rich_help_panel="Work")(recommend_command)
app.command("calibrate", rich_help_panel="Work")(calibrate_command)
app.command("tune", rich_help_panel="Work")(tune_command)
app.command("describe", rich_help_panel="Work")(describe_command)
app.add_typer(bench, name="bench", rich_help_panel="Work")
app.add_typer(pool, name="pool", rich_help_panel="Work")
app.add_typer(probe, name="probe", rich_help_panel="Work")
app.add_typer(sid, name="sid", rich_help_panel="Work")


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            number = version("rcllm")
        except PackageNotFoundError:  # run from a checkout that was not installed
            number = "(not installed)"
        console().print(f"rcllm {number}")
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
