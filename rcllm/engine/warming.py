"""What is computed ahead of requests, and how far that is. Computes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rcllm.core.ranking import ItemId, RankOptions
from rcllm.prompt.blocks import Prompter
from rcllm.reuse.missing import Missing, canonical


@dataclass(frozen=True, slots=True)
class WarmProgress:
    """How far `warm` is."""

    done_blocks: int
    total_blocks: int
    computed_tokens: int
    pool_bytes: int
    full: bool  # the pool has no room for the rest
    elapsed_s: float
    eta_s: float  # until the rest is done, at the speed so far; 0 when it is


def blocks_to_warm(prompter: Prompter, options: RankOptions, item_ids: Iterable[ItemId] | None) -> list[Missing]:
    """Items as candidates and, where histories share events, as events; each block once. None: the whole catalogue."""
    layout = options.layout
    items = [prompter.item(item_id) for item_id in (prompter.catalogue if item_ids is None else item_ids)]
    reads_items = options.readout != "likelihood"  # which computes its candidates afresh
    blocks = [prompter.item_block(item, layout) for item in items if reads_items]
    if options.history == "shared":
        blocks += [prompter.event_block(item, layout) for item in items]
    return [canonical(prompter, block, layout) for block in {block.key: block for block in blocks}.values()]
