"""`rcllm pool build`: makes the semantic history pool. Knows nothing of how prototypes are chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.progress import Progress, TaskID

from rcllm.cli.commands.pool import MemberOptions, TextOptions
from rcllm.cli.inputs import Inputs, load_inputs, load_inputs_given, make_config, make_engine, tell_read
from rcllm.cli.options import EngineOptions, ItemOptions
from rcllm.cli.outputs import check_file
from rcllm.cli.screen import GOES_ON, busy, console, interruptible, progress, say
from rcllm.cli.tables import facts_table
from rcllm.core.ranking import UserId
from rcllm.data import Catalogue
from rcllm.errors import ConfigError
from rcllm.prototypes.build import BuildProgress, BuildReport, PrototypeBuilder, check_out
from rcllm.prototypes.config import MemberContext, PrototypeConfig
from rcllm.prototypes.texts import (
    History,
    dataset_histories,
    file_histories,
    read_users_file,
    tell_absent,
    token_runs,
)


def build_command(
    engine_options: EngineOptions,
    item_options: ItemOptions,
    texts: TextOptions,
    prototypes: PrototypeConfig,
    member: MemberOptions,
    out: Path,
) -> None:
    """Builds the pool and says what it holds."""
    config = make_config(engine_options)
    check_file(out, config, engine_options, item_options, texts)
    check_out(out)
    inputs, source, histories = _histories(item_options, texts)
    engine = make_engine(config, inputs)
    suits: MemberContext = "instruction" if engine.config.model.mask == "blocks" else "history"
    chosen = replace(prototypes, member_context=member.member_context or suits)
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
    with interruptible(GOES_ON), progress() as bar:
        task = bar.add_task("computing shards of texts", total=None)
        report = builder.run(runs, source, lambda now: _show(bar, task, now))
    console().print(facts_table("Semantic history pool", _facts(report, out)))


def _histories(items: ItemOptions, options: TextOptions) -> tuple[Inputs, str, list[History]]:
    """What to read items from, what the texts are, in words, and the texts."""
    excluded = read_users_file(options.exclude_users) if options.exclude_users else frozenset[UserId]()
    if options.texts is not None:
        if options.reviews:
            raise ConfigError("--reviews are of a --dataset; leave it out with --texts, which are taken as they are")
        inputs = load_inputs_given(items) or Inputs(Catalogue(()))
        histories, report = file_histories(options.texts, options.history, excluded)
        if report is not None:
            tell_read([report])
        source = f"texts of {options.texts.name}"
    else:
        inputs = load_inputs(items)
        if inputs.dataset is None:
            raise ConfigError("there are no texts: give --dataset FOLDER (users' histories) or --texts FILE")
        if absent := tell_absent(excluded, {row.user_id for row in inputs.dataset.interactions}):
            say(f"warning: {absent}")
        histories = dataset_histories(inputs.dataset, options.history, excluded, reviews=options.reviews)
        source = f"{'reviews' if options.reviews else 'items'} of training users of {inputs.dataset.name}"
    return inputs, source, histories[: options.limit]


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
