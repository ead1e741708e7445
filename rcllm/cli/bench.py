"""`rcllm bench`: measures a user's own model, catalogue and requests. Knows nothing of how engines work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from rcllm.cli.inputs import load_inputs, load_requests, make_config, make_engine
from rcllm.cli.options import EngineOptions, ItemOptions, RankingOptions, spread
from rcllm.cli.outputs import check_file
from rcllm.cli.screen import console, progress, say, warm_with_progress
from rcllm.cli.tables import levels_table
from rcllm.core.ranking import Level, RankOptions, RankRequest
from rcllm.data import named_items
from rcllm.engine.engine import Engine
from rcllm.fidelity.compare import LevelRow, compare_levels
from rcllm.model.ceilings import describe_hardware
from rcllm.wire.lines import write_figures

LEVELS = ("full", "exact", "linked(4)", "tail(0.1)", "blocks")

_SCATTERED = 1.8  # P90 over P50; requests of one shape stay within 1.1 on a quiet machine

bench = typer.Typer(no_args_is_help=True, help="Measure your own model, catalogue and requests.")


@bench.command("ttft")
@spread
def ttft_command(
    engine_options: EngineOptions,
    item_options: ItemOptions,
    ranking: RankingOptions,
    requests: Annotated[
        str | None, typer.Option("--in", metavar="FILE", help="Requests as JSON lines; else made from --dataset.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many requests.")] = 20,
    candidates: Annotated[int, typer.Option(min=1, help="Candidates per request made from --dataset.")] = 50,
    history: Annotated[int, typer.Option(min=0, help="Events per request made from --dataset.")] = 20,
    levels: Annotated[
        str, typer.Option(metavar="LEVELS", help="Reuse levels, between spaces; full and exact are always measured.")
    ] = " ".join(LEVELS),
    seed: Annotated[int, typer.Option(min=0, help="Draws users and candidates.")] = 0,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Also write the figures here, as JSON.")] = None,
) -> None:
    """Time to first token (here: to the scores) of every reuse level, and how far its answer is from full recompute.

    One request at a time on a warm cache, all levels of a request before the next one. 20 requests tell times, not
    quality: for that, give hundreds. --level is ignored; --readout, --layout and --label-place hold for all levels.

    Example: `rcllm bench ttft --items items.jsonl --in requests.jsonl --levels "blocks tail(0.2)"`
    """
    chosen = [Level.parse(level) for level in levels.split()]
    config = make_config(engine_options, ranking)
    check_file(out, requests, config, engine_options, item_options)
    inputs = load_inputs(item_options)
    asked = load_requests(requests, inputs, count, candidates, history, seed)
    engine = make_engine(config, inputs, asked)
    warm_with_progress(engine, named_items(asked))
    rows = measure(engine, asked, chosen, config.rank)
    num_candidates = min(len(request.candidates) for request in asked)
    console().print(levels_table(f"{len(asked)} requests, one at a time, warm cache", rows, num_candidates))
    if out is not None:
        figures = {"hardware": asdict(describe_hardware()), "seed": seed, "rows": [asdict(row) for row in rows]}
        write_figures(out, figures)


def measure(
    engine: Engine, requests: Sequence[RankRequest], levels: Sequence[Level], options: RankOptions
) -> list[LevelRow]:
    """`compare_levels` under a progress bar; tells where the cache was too small to keep misses out of the times."""
    with progress() as bar:
        task = bar.add_task(f"ranking, {options.readout} read-out", total=len(requests))
        rows = compare_levels(
            engine, requests, levels, options, on_request=lambda done: bar.update(task, completed=done)
        )
    if computed := sum(row.tokens_computed for row in rows):
        say(f"{computed:,} tokens of missing blocks were computed within the times: give the cache more --memory-mb")
    if any(row.ttft_p90_ms > _SCATTERED * row.ttft_p50_ms for row in rows):
        say(
            f"times of the {options.readout} read-out scatter: other processes seem to use the processor. "
            "Measure again when it is quiet (rcllm doctor tells)"
        )
    return rows
