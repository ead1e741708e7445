"""`rcllm probe`: looks for what a model should not do. Knows nothing of how engines or probes work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from rcllm.cli.inputs import load_inputs, load_requests, make_config, make_engine
from rcllm.cli.options import EngineOptions, ItemOptions, RankingOptions, spread
from rcllm.cli.outputs import check_file
from rcllm.cli.screen import console, progress, warm_with_progress
from rcllm.cli.tables import facts_table, number
from rcllm.data import named_items
from rcllm.fidelity.position import PositionBias, SlotMean, position_bias
from rcllm.wire.lines import STDIO, write_figures

_SHOWN_SLOTS = 20
_BAR_WIDTH = 20  # characters for the largest mean

probe = typer.Typer(no_args_is_help=True, help="Look for what a ranking should not depend on.")


@probe.command("position")
@spread
def position_command(
    engine_options: EngineOptions,
    item_options: ItemOptions,
    ranking: RankingOptions,
    requests: Annotated[
        str | None, typer.Option("--in", metavar="FILE", help="Requests as JSON lines; else made from --dataset.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many requests.")] = 50,
    candidates: Annotated[int, typer.Option(min=2, help="Candidates per request made from --dataset.")] = 20,
    history: Annotated[int, typer.Option(min=0, help="Events per request made from --dataset.")] = 10,
    permutations: Annotated[int, typer.Option(min=1, help="Other orders of the candidates per request.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Draws orders, users and candidates.")] = 0,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Write the JSON line here, not to stdout.")] = None,
) -> None:
    """How much of a score is the candidate, and how much its place in the list.

    Ranks every request again under other orders of its candidates. Their KV is reused, so that an order costs its fresh
    tokens only. **share of order** is what order does to an item's score, within / (within + between) variance: 0 is a
    ranker that does not care, 1 one that looks at nothing else. Means by slot tell which places gain. Read-outs
    pointwise and likelihood score each candidate apart and come out at 0; for label, letters have a bias of their own.
    --level, --readout, --layout and --label-place hold for all requests, whatever options they name. The last line of
    stdout holds all figures as JSON.

    Example: `rcllm probe position --items items.jsonl --in requests.jsonl --permutations 8`
    """
    config = make_config(engine_options, ranking)
    check_file(out, requests, config, engine_options, item_options)
    inputs = load_inputs(item_options)
    asked = load_requests(requests, inputs, count, candidates, history, seed)
    engine = make_engine(config, inputs, asked)
    warm_with_progress(engine, named_items(asked))
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
