"""What results look like on a terminal.

Knows nothing of how they came about. Invariant: functions return something to print and print nothing; text that comes
from data is never read as markup.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from rcllm.core.ranking import Item, ItemId, RankRequest, RankResponse
from rcllm.core.receipts import BlockReceipt, RankReceipt
from rcllm.fidelity.compare import TOP, LevelRow
from rcllm.fidelity.measures import chance_ndcg
from rcllm.store.disk import Space

NOTHING = "–"
_ENOUGH = 10  # requests from which on a standard error means something


def item_title(catalogue: Mapping[ItemId, Item], item_id: str | None) -> str:
    """A title for people: the field of that name, else the first one, else the id."""
    item = catalogue.get(ItemId(item_id)) if item_id is not None and ItemId(item_id) in catalogue else None
    if item is None:
        return item_id or ""
    return item.fields.get("title") or item.fields.get("name") or next(iter(item.fields.values()), item.item_id)


def facts_table(title: str, facts: Mapping[str, str]) -> Table:
    """Names and values."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(value))
    return table


def spaces_table(spaces: Mapping[str, Space], current: str, now: float) -> Table:
    """What a store has, by what it was made by; the space of this configuration is marked."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("space", "model", "adapter", "template", "KV"):
        table.add_column(name, overflow="fold")
    for name in ("blocks", "MB", "last used"):
        table.add_column(name, justify="right")
    for name, space in sorted(spaces.items(), key=lambda each: -each[1].used):
        told = [space.about.get(key) or NOTHING for key in ("model", "adapter", "template", "kv_dtype")]
        used = f"{timedelta(seconds=round(max(0.0, now - space.used)))} ago"
        marked = name + (" (current)" if name == current else "")
        table.add_row(*map(Text, (marked, *told)), f"{space.num_blocks:,}", f"{space.num_bytes / 1e6:,.1f}", used)
    return table


def levels_table(title: str, rows: Sequence[LevelRow], num_candidates: int) -> Table:
    """What each level costs and keeps, beside full recompute and chance; fits 90 columns."""
    chance = chance_ndcg(num_candidates, TOP)
    table = Table(
        title=title,
        title_justify="left",
        caption="full recomputes all; exact is prefix caching, here of the instruction",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("read-out,\nprompt")
    table.add_column("\nlevel", no_wrap=True)
    speedups = ("speed-up\nover full", "over\nexact")
    for name in ("fresh\ntokens", "TTFT ms\nP50", "\nP90", *speedups, "Kendall\nτ", "same\ntop-1"):
        table.add_column(name, justify="right")
    table.add_column(f"NDCG@{TOP}\nchance {chance:.2f}", justify="right")
    for readout in dict.fromkeys(row.readout for row in rows):
        some = [row for row in rows if row.readout == readout]
        names = [readout, f"{some[0].prompt_tokens:,.0f} tokens"]
        for index, row in enumerate(some):
            table.add_row(names[index] if index < len(names) else "", *_level_cells(row))
        table.add_section()
    return table


def _level_cells(row: LevelRow) -> tuple[str, ...]:
    return (
        row.level,
        f"{row.fresh_tokens:,.0f}",
        f"{row.ttft_p50_ms:,.0f}",
        f"{row.ttft_p90_ms:,.0f}",
        f"{row.speedup_full:.1f}×",
        f"{row.speedup_exact:.1f}×",
        number(row.tau),
        f"{row.top1:.0%}",
        number(row.ndcg) + (f" ± {row.ndcg_error:.2f}" if row.num_requests >= _ENOUGH else ""),
    )


def blocks_table(response: RankResponse, catalogue: Mapping[ItemId, Item]) -> Table:
    """Every block of a prompt: where its KV came from, and why."""
    table = Table(title="Blocks, in prompt order", title_justify="left")
    table.add_column("#", justify="right")
    table.add_column("kind")
    table.add_column("owner", max_width=12, no_wrap=True, overflow="ellipsis")
    table.add_column("title", max_width=40, no_wrap=True, overflow="ellipsis")
    table.add_column("source")
    table.add_column("reused", justify="right")
    table.add_column("fresh", justify="right")
    table.add_column("key", no_wrap=True)
    table.add_column("why")
    for index, block in enumerate(response.receipt.blocks):
        counts = (str(block.num_reused or NOTHING), str(block.num_fresh or NOTHING))
        title = _block_title(block, catalogue)
        owner = block.owner or ""
        table.add_row(
            str(index), block.kind, Text(owner), Text(title), block.source, *counts, block.key or NOTHING, block.why
        )
    return table


def _block_title(block: BlockReceipt, catalogue: Mapping[ItemId, Item]) -> str:
    if block.kind == "label":
        return "" if block.slot is None else f"of candidate {block.slot + 1}"
    return item_title(catalogue, block.owner) if block.owner is not None else ""


def receipt_table(receipt: RankReceipt) -> Table:
    """Totals of one answer."""
    stages = ", ".join(f"{name} {ms:,.1f}" for name, ms in receipt.stage_ms.items())
    facts = {
        "tokens": f"{receipt.num_tokens:,} = {receipt.num_reused:,} reused + {receipt.num_fresh:,} fresh",
        "computed first": f"{receipt.num_computed:,} tokens of blocks that were missing",
        "answered by": f"level {receipt.level}, read-out {receipt.readout}, layout {receipt.layout}, label "
        f"{receipt.label_place}, bias {receipt.bias}",
        "reused KV": f"context {receipt.context}, history {receipt.history}",
        "cached KV": f"{receipt.kv_bytes_read / 1e6:,.1f} MB read, {receipt.kv_bytes_copied / 1e6:,.1f} MB copied",
        "attention": receipt.backend,
        "model, node": f"{receipt.model}, {receipt.node}",
        "stages, ms": stages,
    }
    return facts_table("Receipt", facts | ({"notes": "\n".join(receipt.notes)} if receipt.notes else {}))


def scores_table(response: RankResponse, request: RankRequest, catalogue: Mapping[ItemId, Item], top: int) -> Table:
    """The best candidates by title; what the user did choose is marked."""
    table = Table(title=f"Scores, best {min(top, len(response.order))} of {len(response.order)}", title_justify="left")
    table.add_column("rank", justify="right")
    table.add_column("score", justify="right")
    table.add_column("item", no_wrap=True, max_width=12, overflow="ellipsis")
    table.add_column("title")
    table.add_column("")
    for rank, index in enumerate(response.order, 1):
        item_id = response.candidates[index]
        chosen = item_id == request.positive
        if rank <= top or chosen:
            mark = "what the user chose next" if chosen else ""
            title = item_title(catalogue, item_id)
            table.add_row(str(rank), f"{response.scores[index]:.4f}", Text(item_id), Text(title), mark)
    return table


def number(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.2f}"
