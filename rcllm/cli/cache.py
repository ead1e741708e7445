"""`rcllm pull` and `rcllm warm`. Knows nothing of how blocks are computed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from rcllm.cli.clustered import ServeRecipe, check_extra, cluster_of, configured_by
from rcllm.cli.inputs import Inputs, load_inputs, make_config, make_engine
from rcllm.cli.options import EngineOptions, FidelityOptions, ItemOptions, StoreOptions
from rcllm.cli.screen import GOES_ON, busy, console, interruptible, progress, warm_with_progress
from rcllm.cli.tables import facts_table
from rcllm.core.ranking import ContentKey, Item
from rcllm.data.catalogue import field_shares
from rcllm.engine.engine import Engine
from rcllm.engine.space import space_of
from rcllm.engine.tiers import folder_of
from rcllm.engine.warmed import remove_stale
from rcllm.engine.warming import WarmProgress, blocks_to_warm
from rcllm.errors import ConfigError
from rcllm.late import Late
from rcllm.model.pull import pull

if TYPE_CHECKING:
    from rcllm.on_ray import jobs
else:
    jobs = Late("rcllm.on_ray.jobs")


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
    store: StoreOptions,
    limit: int | None,
    dry_run: bool,
    cluster: str | None,
) -> None:
    """Prints what was computed, and what the catalogue needs."""
    if cluster is not None:
        _warm_cluster(cluster, engine_options, item_options, store, only_one={"--limit": limit, "--dry-run": dry_run})
        return
    inputs = load_inputs(item_options)
    config = make_config(engine_options, store=None if dry_run else store)
    if not dry_run and not config.store.enabled:
        raise ConfigError("there is no store to warm (--no-store, or store.enabled = false): give --dry-run to measure")
    with make_engine(config, inputs) as engine:
        items = _by_popularity(inputs)
        chosen = items[:limit]
        with busy("reading item texts"):
            whole = _size(engine, items)
            part = whole if limit is None else _size(engine, chosen)
        removed = _remove_stale(engine, item_options, whole)
        start = time.perf_counter()
        done = warm_with_progress(engine, [item.item_id for item in chosen])
        seconds = time.perf_counter() - start
        facts = _facts(engine, len(items), whole) | _computed(engine, done, len(chosen), seconds, part, whole)
        facts |= {"removed": removed} if removed else {}
    title = "Warming (dry run: nothing is kept)" if dry_run else f"Warmed, and kept in {folder_of(config.store)}"
    console().print(facts_table(title, facts))


def _warm_cluster(
    cluster: str,
    engine_options: EngineOptions,
    items: ItemOptions,
    store: StoreOptions,
    only_one: Mapping[str, object],
) -> None:
    """The shard of each replica, into the store that this replica will open."""
    check_extra()
    if given := [name for name, value in only_one.items() if value]:
        raise ConfigError(f"{given[0]} is for one process: leave it out with --cluster, which warms whole shards")
    config = make_config(configured_by(engine_options, cluster), store=store)
    if not config.store.enabled:
        raise ConfigError("there is no store to warm (--no-store, or store.enabled = false)")
    section = cluster_of(cluster, config)
    made = ServeRecipe(config, section, items, FidelityOptions())
    shards = jobs.shards(made, section)
    with interruptible(GOES_ON), jobs.processes(partial(jobs.warms, made), section) as warms, progress() as bar:
        task = bar.add_task("warming shards, items", total=sum(map(len, shards)))
        facts: dict[str, str] = {}
        for warmed in warms(enumerate(shards)):
            bar.advance(task, warmed.num_items)
            done = warmed.done
            blocks = f"{done.done_blocks:,} of {done.total_blocks:,} blocks of {warmed.num_items:,} items"
            new = f"{done.computed_tokens:,} tokens, {done.computed_bytes / 1e6:,.1f} MB in {done.elapsed_s:,.1f} s"
            facts[f"replica {warmed.node}"] = f"{blocks}{' (full)' if done.full else ''}; computed now: {new}"
    console().print(facts_table(f"Warmed, and kept in {folder_of(config.store)}", facts))


def _by_popularity(inputs: Inputs) -> list[Item]:
    """Those that most interactions name first, then in the order of the file."""
    counts = Counter(row.item_id for row in inputs.catalogue.interactions)
    return sorted(inputs.catalogue.values(), key=lambda item: -counts[item.item_id])


def _computed(
    engine: Engine, done: WarmProgress, num_chosen: int, seconds: float, part: _Size, whole: _Size
) -> dict[str, str]:
    new = (
        f"{done.computed_tokens:,} tokens in {seconds:.1f} s, {done.computed_tokens / max(seconds, 1e-9):,.0f} tokens/s"
    )
    facts = {
        "texts": engine.prompter.text_counts(engine.catalogue).told(engine.prompter.template) or "all whole",
        "fields": _fields(engine),
        "there now": f"{done.done_blocks:,} of {done.total_blocks:,} blocks of {num_chosen:,} items"
        + (" (full)" if done.full else ""),
        "computed now": f"{new}, {done.computed_bytes / 1e6:,.1f} MB",
    }
    if num_chosen < len(engine.catalogue) or done.full:
        facts["time for all"] = _estimate(seconds, part.tokens * done.done_blocks / done.total_blocks, whole.tokens)
    return facts


@dataclass(frozen=True, slots=True)
class _Size:
    keys: Collection[ContentKey]  # distinct: items that read the same share a block
    tokens: int

    @property
    def num_blocks(self) -> int:
        return len(self.keys)


def _size(engine: Engine, items: Sequence[Item]) -> _Size:
    """What `Engine.warm` would compute for `items`."""
    blocks = blocks_to_warm(engine.prompter, engine.config.rank, [item.item_id for item in items])
    return _Size([block.key for block in blocks], sum(len(block.token_ids) for block in blocks))


def _remove_stale(engine: Engine, options: ItemOptions, whole: _Size) -> str:
    """Of texts that changed, and of items that are gone, since this catalogue was last warmed; what is said of it."""
    if engine.tiers.disk is None:
        return ""
    files = [str(path.absolute()) for path in (options.items, options.dataset) if path is not None]
    rank = engine.config.rank
    read = [space_of(engine.prompter.namespace), engine.config.prompt.context, rank.layout, rank.history, rank.readout]
    removed = remove_stale(engine.tiers.disk, "\n".join([*files, *read]), whole.keys)
    if not removed.num_blocks:
        return ""
    return (
        f"{removed.num_blocks:,} blocks, {removed.num_bytes / 1e6:,.1f} MB, of texts that changed or items that are "
        "gone since the last time"
    )


def _facts(engine: Engine, num_items: int, whole: _Size) -> dict[str, str]:
    dtype, stats = engine.config.cache.kv_dtype, engine.stats()
    num_bytes = whole.tokens * engine.kv_bytes_per_token
    budgets = {"memory": stats.budget_bytes} | {tier.tier: tier.budget_bytes for tier in stats.tiers}
    return {
        "catalogue": f"{num_items:,} items, {whole.num_blocks:,} distinct blocks (as candidates and as events)",
        "tokens": f"{whole.tokens:,}",
        "bytes": f"{num_bytes / 1e6:,.1f} MB of KV in {dtype}",
        "room": ", ".join(f"{budget / 1e6:,.1f} MB in {tier}" for tier, budget in budgets.items()),
        "fits": _fits(num_bytes, budgets),
    }


def _fits(num_bytes: int, budgets: Mapping[str, int]) -> str:
    """Into which tier the whole catalogue fits."""
    if (first := next((tier for tier, budget in budgets.items() if num_bytes <= budget), None)) is not None:
        return f"yes, in {first}" + ("" if first == "memory" else "; what memory has no room for is read where it lies")
    return (
        f"no, about {max(budgets.values()) / num_bytes:.0%} of it: what does not fit is computed when it is asked for. "
        "Raise --disk-mb or --memory-mb, store fewer bits (--kv-dtype), or give --dataset, so that the most popular "
        "items come first"
    )


def _fields(engine: Engine) -> str:
    """How many items have each field that the template shows."""
    shares = field_shares(engine.prompter.catalogue, engine.prompter.template.shown)
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())


def _estimate(seconds: float, tokens_done: float, tokens: int) -> str:
    if not tokens_done:
        return "unknown: not one block fitted"
    return f"about {timedelta(seconds=round(seconds * tokens / tokens_done))} (h:mm:ss) at this rate"
