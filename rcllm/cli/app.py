"""The command line: `rcllm`. Registers the commands, and turns the product's errors into one line and an exit code.

Knows nothing of what commands do. Invariant: an error that a user can do something about shows no traceback unless
`--debug` asks for it; exit codes are 0, 1 (something failed), 2 (an option or the configuration is wrong) and 130
(interrupted).
"""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rcllm.cli.listed import Group, Listed, fill
from rcllm.errors import RcllmError
from rcllm.late import Late
from rcllm.version import __version__

if TYPE_CHECKING:
    from rcllm.cli import ending, screen
else:
    ending, screen = Late("rcllm.cli.ending"), Late("rcllm.cli.screen")

_START = "Start here"
# A new command is a line here, and a declaration in `commands/`; a new group of commands is a line below as well.
COMMANDS = (
    Listed("demo", "start:demo", "Try it: about four minutes on 2 cores, after downloads of about 100 MB.", _START),
    Listed("doctor", "start:doctor", "Check machine, model, kernels and store, and say what to change.", _START),
    Listed("pull", "start:pull", "Fetch a model and put it where every command finds it. Pulling again is free."),
    Listed("warm", "cache:warm", "Compute a catalogue ahead of requests, and keep it on disk."),
    Listed("rank", "rank:rank", "Rank the candidates of every request in a file."),
    Listed("explain", "rank:explain", "Rank one request and show where every token came from, and why."),
    Listed("recommend", "recommend:recommend", "Recommend from the whole catalogue: a model generates semantic IDs."),
    Listed("serve", "serve:serve", "Serve a model over HTTP: rank, recommend, rerank, score, complete and chat."),
    Listed("calibrate", "calibrate:calibrate", "Measure how far KV reuse may go before answers change."),
    Listed("tune", "tune:tune", "Teach a language model to rank: LoRA with a listwise loss on interactions."),
    Listed("enrich", "enrich:enrich", "Put into each item's text what interactions and a language model know of it."),
    Listed("describe", "describe:describe", "Describe every user or item in text: knowledge for a click model."),
    Listed("sim", "sim:sim", "Simulate a cluster: times, hits and use of nodes, before there is one."),
    Listed("plan", "sim:plan", "Plan a cluster: nodes, memory, times to the first token, and what it costs."),
    Listed("cache stats", "cache:stats", "Show what is kept: blocks, bytes and rates, and which model they belong to."),
    Listed("cache verify", "cache:verify", "Read every block against its checksum."),
    Listed("cache compact", "cache:compact", "Give disk space back that removed blocks took."),
    Listed("cache erase", "cache:erase", "Remove users or items from every tier."),
    Listed("cache prune", "cache:prune", "Remove blocks that the model, adapter, template and dtype do not read."),
    Listed("cache export", "cache:export", "Copy the store into a folder to take to another machine."),
    Listed("cache import", "cache:import_", "Take the blocks of an export into the store, each checked."),
    Listed("bench ttft", "rank:ttft", "Time to first token of every reuse level, and how far off its answers are."),
    Listed("place build", "place:build", "Decide which node holds which items, from the requests of the past."),
    Listed("place eval", "place:evaluate", "Tell what a placement is worth: a request's items on its best node."),
    Listed("place diff", "place:diff", "Show what changes from one placement to another, and plan bounded moves."),
    Listed("place explain", "place:explain", "Explain where an item is, or which node would answer a request."),
    Listed("pool build", "pool:build", "Build the semantic history pool: token prototypes shared by all users."),
    Listed("probe position", "rank:position", "How much of a score is the candidate, and how much its place."),
    Listed("sid build", "sid:build", "Give every item its semantic ID, by its text and by who touched it."),
    Listed("sid train", "sid:train", "Train a small decoder that continues a history with the ID of the next item."),
)
GROUPS = {
    "cache": "What is kept on disk between runs, and its care.",
    "bench": "Measure your own model, catalogue and requests.",
    "place": "Many machines: which node holds which items, and which answers a request.",
    "pool": "The semantic history pool: token prototypes shared by all users.",
    "probe": "Look for what a ranking should not depend on.",
    "sid": "Semantic IDs: codes of items, and a decoder that generates them.",
}


class _Rcllm(Group):
    """Shows what a user can do something about as one line; `--debug` shows where it came from as well."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        fill(self, COMMANDS, GROUPS)

    def invoke(self, ctx: Any) -> Any:
        gc.enable()
        try:
            return super().invoke(ctx)
        except (RcllmError, OSError, MemoryError, KeyboardInterrupt) as error:
            if ctx.params.get("debug"):
                raise
            end = ending.ended_by(error)
            if end.words:
                screen.say(end.words, "bold red")
            raise typer.Exit(end.code) from error


app = typer.Typer(
    cls=_Rcllm,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    add_completion=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rcllm {__version__}")
        raise typer.Exit


@app.callback()
def main(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Language models that recommend, with KV reuse beyond the prefix.

    **pull** a model → **warm**: compute a catalogue, and keep it → **rank** requests → **explain** one answer, block by
    block. **calibrate** finds how far reuse may go before answers change, and rank goes that far; **tune** teaches a
    model to rank, also so that reuse changes nothing. **bench ttft** says what reuse saves on your data; **probe
    position**, what the order of the candidates does; **pool build** makes token prototypes for histories.
    **recommend** finds items of the whole catalogue, with a decoder that **sid train** made; **serve** answers over
    HTTP. Example:

    - `rcllm pull`
    - `rcllm warm --items items.jsonl --limit 500`
    - `rcllm rank --items items.jsonl --in requests.jsonl --out answers.jsonl`
    - `rcllm explain --items items.jsonl --request requests.jsonl:1`
    """


def run() -> None:
    """What the script `rcllm` calls."""
    gc.disable()  # until a command is invoked: nothing that a help page makes is garbage before it is shown
    try:
        app()
    finally:
        if "torch" not in sys.modules:  # whose parts say that they leak where garbage is left
            gc.freeze()  # the process ends: looking for garbage once more would take a tenth of the time of a help page


if __name__ == "__main__":
    run()
