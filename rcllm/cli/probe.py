"""`rcllm probe`: looks for what a model should not do. Knows nothing of how engines or probes work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.table import Table

from rcllm.cli.inputs import Shape, make_config, warm_engine
from rcllm.cli.options import EngineOptions, ItemOptions, RankingOptions
from rcllm.cli.outputs import check_file
from rcllm.cli.screen import console, progress
from rcllm.cli.tables import facts_table, number
from rcllm.fidelity.position import PositionBias, SlotMean, position_bias
from rcllm.wire.lines import STDIO, write_figures

_SHOWN_SLOTS = 20
_BAR_WIDTH = 20  # characters for the largest mean


def position_command(
    engine_options: EngineOptions,
    item_options: ItemOptions,
    ranking: RankingOptions,
    requests: str | None,
    count: int,
    candidates: int | None,
    history: int | None,
    permutations: int,
    seed: int,
    out: str | None,
) -> None:
    """Measures what the order of the candidates does."""
    config = make_config(engine_options, ranking)
    check_file(out, requests, config, engine_options, item_options)
    engine, asked = warm_engine(config, item_options, requests, count, Shape(candidates, history, (20, 10)), seed)
    with progress() as bar:
        task = bar.add_task("ranking under other orders", total=len(asked))
        found = position_bias(
            engine, asked, permutations, seed, config.rank, on_request=lambda done: bar.update(task, completed=done)
        )
    console().print(_summary(found))
    console().print(_slots_table(found.slots))
    write_figures(out or STDIO, {"name": "position", "seed": seed, **asdict(found)})


def _summary(found: PositionBias) -> Table:
    title = (
        f"{found.num_requests} requests in {found.num_orders} orders, level {found.level}, read-out {found.readout}, "
        f"layout {found.layout}"
    )
    facts = {
        "variance of an item's score over orders": f"{found.within_variance:.4g}",
        "variance between items": f"{found.between_variance:.4g}",
        "share of order": "–" if math.isnan(found.order_share) else f"{found.order_share:.1%}",
        "Kendall τ between two orders": number(found.tau),
        "two orders agree on the best item": f"{found.top1:.0%}",
        "computed": f"{found.fresh_tokens:,} tokens, {found.fresh_tokens / found.full_tokens:.1%} of full recompute",
    }
    return facts_table(title, facts)


def _slots_table(slots: Sequence[SlotMean]) -> Table:
    """Every slot, or as many as can be taken in, evenly spread; bars to the right are gains."""
    step = max(1, math.ceil(len(slots) / _SHOWN_SLOTS))
    largest = max(abs(slot.mean) for slot in slots) or 1.0
    table = Table(title="What a slot adds to a score", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("slot", justify="right")
    table.add_column("mean", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("loses", justify="right")
    table.add_column("gains")
    for slot in slots[::step]:
        bar = "█" * round(_BAR_WIDTH * abs(slot.mean) / largest)
        interval = "–" if math.isnan(slot.low) else f"{slot.low:+.3f} to {slot.high:+.3f}"
        sides = (bar, "") if slot.mean < 0 else ("", bar)
        table.add_row(str(slot.slot + 1), f"{slot.mean:+.3f}", interval, *sides)
    return table
