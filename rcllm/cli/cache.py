"""`rcllm pull` and `rcllm warm`. Knows nothing of how blocks are computed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from rcllm.cli.inputs import load_inputs, make_config, make_engine
from rcllm.cli.options import EngineOptions, ItemOptions
from rcllm.cli.screen import busy, console, warm_with_progress
from rcllm.cli.tables import facts_table
from rcllm.core.ranking import Item
from rcllm.data.catalogue import field_shares
from rcllm.engine.engine import Engine
from rcllm.model.pull import pull


def pull_command(
    name: str,
) -> None:
    """Prints the folder of the model."""
    with busy(f"pulling {name}"):
        folder = pull(name)
    console().print(str(folder), soft_wrap=True)


def warm_command(
    engine_options: EngineOptions,
    item_options: ItemOptions,
    limit: int | None,
) -> None:
    """Prints what a catalogue needs."""
    inputs = load_inputs(item_options)
    engine = make_engine(make_config(engine_options), inputs)
    items = list(inputs.catalogue.values())
    chosen = items[:limit]
    with busy("reading item texts"):
        whole, part = _size(engine, items), _size(engine, chosen)
    start = time.perf_counter()
    done = warm_with_progress(engine, [item.item_id for item in chosen])
    seconds = time.perf_counter() - start
    console().print(
        facts_table(
            "Warming (dry run: the cache ends with this process)",
            _facts(engine, len(items), whole)
            | {
                "texts": engine.prompter.text_counts(inputs.catalogue).told(engine.prompter.template) or "all whole",
                "fields": _fields(engine),
                "computed now": f"{done.done_blocks:,} of {done.total_blocks:,} blocks of {len(chosen):,} items in "
                f"{seconds:.1f} s, {done.computed_tokens / max(seconds, 1e-9):,.0f} tokens/s, "
                f"{done.pool_bytes / 1e6:,.1f} MB" + (" (full)" if done.full else ""),
                "time for all": _estimate(seconds, part.tokens * done.done_blocks / done.total_blocks, whole.tokens),
            },
        )
    )


@dataclass(frozen=True, slots=True)
class _Size:
    num_blocks: int  # distinct: items that read the same share a block
    tokens: int


def _size(engine: Engine, items: Sequence[Item]) -> _Size:
    """What `Engine.warm` would compute for `items`."""
    prompter, layout = engine.prompter, engine.config.rank.layout
    blocks = [prompter.item_block(item, layout) for item in items]
    if engine.config.rank.history == "shared":
        blocks += [prompter.event_block(item, layout) for item in items]
    distinct = {block.key: len(block) for block in blocks}
    return _Size(len(distinct), sum(distinct.values()))


def _facts(engine: Engine, num_items: int, whole: _Size) -> dict[str, str]:
    dtype, budget = engine.config.cache.kv_dtype, engine.stats().budget_bytes
    num_bytes = whole.tokens * engine.decoder.spec.kv_bytes_per_token(engine.pool.dtype.itemsize)
    fits = (
        "yes"
        if num_bytes <= budget
        else (
            f"no, about {budget / num_bytes:.0%} of it: what does not fit is computed when it is asked for. Raise "
            "--memory-mb, or warm the most requested items first"
        )
    )
    return {
        "catalogue": f"{num_items:,} items, {whole.num_blocks:,} distinct blocks (as candidates and as events)",
        "tokens": f"{whole.tokens:,}",
        "bytes": f"{num_bytes / 1e6:,.1f} MB of KV in {dtype}",
        "budget": f"{budget / 1e6:,.1f} MB for cached KV",
        "fits": fits,
    }


def _fields(engine: Engine) -> str:
    """How many items have each field that the template shows."""
    shares = field_shares(engine.prompter.catalogue, engine.prompter.template.shown)
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())


def _estimate(seconds: float, tokens_done: float, tokens: int) -> str:
    if not tokens_done:
        return "unknown: not one block fitted"
    return f"about {timedelta(seconds=round(seconds * tokens / tokens_done))} (h:mm:ss) at this rate"
