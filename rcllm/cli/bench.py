"""`rcllm bench`: measures a user's own model, catalogue and requests. Knows nothing of how engines work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rcllm.cli.inputs import Shape, make_config, warm_engine
from rcllm.cli.options import EngineOptions, ItemOptions, RankingOptions
from rcllm.cli.outputs import check_file
from rcllm.cli.screen import console, progress, say
from rcllm.cli.tables import levels_table
from rcllm.core.ranking import Level, RankOptions, RankRequest
from rcllm.engine.engine import Engine
from rcllm.fidelity.compare import LevelRow, compare_levels
from rcllm.model.ceilings import describe_hardware
from rcllm.wire.lines import write_figures

_SCATTERED = 1.8  # P90 over P50; requests of one shape stay within 1.1 on a quiet machine


def ttft_command(
    engine_options: EngineOptions,
    item_options: ItemOptions,
    ranking: RankingOptions,
    requests: str | None,
    count: int,
    candidates: int | None,
    history: int | None,
    levels: str,
    seed: int,
    out: str | None,
) -> None:
    """Measures every level on the requests."""
    chosen = [Level.parse(level) for level in levels.split()]
    config = make_config(engine_options, ranking)
    check_file(out, requests, config, engine_options, item_options)
    engine, asked = warm_engine(config, item_options, requests, count, Shape(candidates, history, (50, 20)), seed)
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
