"""`rcllm pool build`: makes the semantic history pool. Knows nothing of how prototypes are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, TaskID

from rcllm.cli.inputs import Inputs, load_inputs, make_config, make_engine
from rcllm.cli.options import EngineOptions, ItemOptions, spread
from rcllm.cli.screen import busy, console, progress, say
from rcllm.cli.tables import facts_table
from rcllm.config import from_mapping
from rcllm.core.ranking import UserId
from rcllm.data import Catalogue
from rcllm.errors import ConfigError
from rcllm.prototypes.build import BuildProgress, BuildReport, PrototypeBuilder, PrototypeConfig, check_config
from rcllm.prototypes.texts import History, dataset_histories, file_histories, read_users_file, token_runs

_FROM, _HOW = "From what", "Which prototypes"
_DEFAULT = PrototypeConfig()

pool = typer.Typer(no_args_is_help=True, help="The semantic history pool: token prototypes shared by all users.")


@dataclass(frozen=True, slots=True)
class TextOptions:
    """Where the texts come from."""

    texts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Texts instead of --dataset: a .txt with one a line, or rows (.jsonl, .csv, .parquet) with text and, "
            "optionally, user_id.",
            rich_help_panel=_FROM,
        ),
    ] = None
    reviews: Annotated[
        bool, typer.Option("--reviews", help="Users' own words instead of items' titles.", rich_help_panel=_FROM)
    ] = False
    history: Annotated[
        int, typer.Option(min=1, help="Events of a user: the last so many, as in requests.", rich_help_panel=_FROM)
    ] = 10
    limit: Annotated[int | None, typer.Option(min=1, help="Users, at most.", rich_help_panel=_FROM)] = None
    exclude_users: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="User ids, one a line, whose texts are left out.", rich_help_panel=_FROM),
    ] = None


@dataclass(frozen=True, slots=True)
class PrototypeOptions:
    """How prototypes are chosen."""

    prototypes: Annotated[int, typer.Option(min=1, help="At most so many.", rich_help_panel=_HOW)] = _DEFAULT.prototypes
    tables: Annotated[int, typer.Option(min=1, help="Hash tables.", rich_help_panel=_HOW)] = _DEFAULT.tables
    bits: Annotated[int, typer.Option(min=1, help="Hyperplanes of a table.", rich_help_panel=_HOW)] = _DEFAULT.bits
    bucket_width: Annotated[
        int, typer.Option(min=1, help="Positions that count as one place.", rich_help_panel=_HOW)
    ] = _DEFAULT.bucket_width
    threshold: Annotated[
        float, typer.Option(help="Least cosine at which a prototype stands for a token.", rich_help_panel=_HOW)
    ] = _DEFAULT.threshold
    member_context: Annotated[
        str | None,
        typer.Option(
            metavar="history|instruction",
            help="What stood before a prototype's text when its KV was computed; default history, or instruction for a "
            "model tuned under the mask blocks.",
            rich_help_panel=_HOW,
        ),
    ] = None
    members: Annotated[
        int, typer.Option(min=1, help="Occurrences whose mean is a prototype's KV.", rich_help_panel=_HOW)
    ] = _DEFAULT.members
    fresh_pattern: Annotated[
        str, typer.Option(metavar="REGEX", help="Tokens that are never taken from the pool.", rich_help_panel=_HOW)
    ] = _DEFAULT.fresh_pattern
    seed: Annotated[int, typer.Option(min=0, rich_help_panel=_HOW)] = _DEFAULT.seed


@pool.command("build")
@spread
def build_command(
    engine_options: EngineOptions,
    item_options: ItemOptions,
    texts: TextOptions,
    prototypes: PrototypeOptions,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the pool goes; OUT.work beside it while it grows.")],
) -> None:
    """Build the semantic history pool: RcLLM's token prototypes, with K and V of every layer, shared by all users.

    Run it again with the same options to go on after an interruption. Numbers, ids, timestamps, delimiters and field
    names never get into it. Prototypes are made of users' texts: to erase a user, build it again with --exclude-users.
    Of a data set, training users alone are used.

    Example: `rcllm pool build --dataset amazon --out history.pool`, or
    `rcllm pool build --texts reviews.jsonl --prototypes 20000 --out history.pool`
    """
    config = make_config(engine_options)
    inputs, source, histories = _histories(item_options, texts)
    chosen = _pool_config(prototypes)
    engine = make_engine(config, inputs)
    if prototypes.member_context is None and engine.config.model.mask == "blocks":
        chosen = _pool_config(prototypes, member_context="instruction")
    builder = PrototypeBuilder(
        engine.decoder,
        engine.prompter,
        chosen,
        out,
        model_id=engine.model_id,
        kv_dtype=engine.pool.dtype,
        layout=engine.config.rank.layout,
        pass_tokens=engine.config.cache.pass_tokens,
    )
    with busy("writing histories as prompts do"):
        runs = token_runs(engine.prompter, histories, chosen.member_context)
    with progress() as bar:
        task = bar.add_task("computing shards of texts", total=None)
        report = builder.run(runs, source, lambda now: _show(bar, task, now))
    console().print(facts_table("Semantic history pool", _facts(report, out)))


def _histories(items: ItemOptions, options: TextOptions) -> tuple[Inputs, str, list[History]]:
    """What to read items from, what the texts are, in words, and the texts."""
    excluded = read_users_file(options.exclude_users) if options.exclude_users else frozenset[UserId]()
    if options.texts is not None:
        inputs = load_inputs(items) if items.items or items.dataset else Inputs(Catalogue(()))
        histories, report = file_histories(options.texts, options.history, excluded)
        if report is not None and report.rows_skipped:
            say(f"warning: {report}")
        source = f"texts of {options.texts.name}"
    else:
        inputs = load_inputs(items)
        if inputs.dataset is None:
            raise ConfigError("there are no texts: give --dataset FOLDER (users' histories) or --texts FILE")
        histories = dataset_histories(inputs.dataset, options.history, excluded, reviews=options.reviews)
        source = f"{'reviews' if options.reviews else 'items'} of training users of {inputs.dataset.name}"
    return inputs, source, histories[: options.limit]


def _pool_config(options: PrototypeOptions, **values: str) -> PrototypeConfig:
    """Raises ConfigError."""
    if options.member_context is not None:
        values["member_context"] = options.member_context
    names = ("prototypes", "tables", "bits", "bucket_width", "threshold", "members", "fresh_pattern", "seed")
    config = from_mapping(PrototypeConfig, {name: getattr(options, name) for name in names} | values, "option")
    check_config(config)
    return config


def _show(bar: Progress, task: TaskID, now: BuildProgress) -> None:
    bar.update(task, completed=now.done_shards, total=now.num_shards)


def _facts(report: BuildReport, out: Path) -> dict[str, str]:
    header, found = report.header, report.held_out
    told = "too few texts to hold any out"
    if found is not None:
        told = (
            f"{found.reused_share:.1%} of {found.num_tokens:,} tokens of {found.num_texts:,} texts have a prototype "
            f"({found.language_share:.1%} of those that are not always fresh; mean cosine {found.mean_cosine:.3f})"
        )
    return {
        "file": str(out),
        "made from": f"{header.source}: {header.num_texts:,} texts, {header.num_tokens:,} tokens",
        "prototypes": f"{header.prototypes:,}; they stand for {report.covered_share:.1%} of the tokens they may",
        "bytes": f"{report.file_bytes / 1e6:,.1f} MB; K and V {report.bytes_per_layer / 1e6:,.2f} MB a layer, "
        f"{header.layers} layers, {header.dtype}",
        "held out": told,
        "model": header.model,
    }
