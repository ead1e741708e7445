"""What `benchmarks.store` is run on: real items on disk, engines over them, requests, and the system's page cache.

Knows nothing of what is measured. Invariants: what a request reads was computed by the model from the items' own texts;
items that only make the store large have their own keys and sizes, and rows of others, for times depend on no value. A
store is made once, and kept in the cache folder of rcllm.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.harness import console, dataset
from benchmarks.ttft import paper_shaped
from rcllm.cache.pool import Pool
from rcllm.config import MIB, CacheConfig, Config, StoreConfig
from rcllm.core.ranking import ItemId, Level, RankOptions, RankRequest, RankResponse
from rcllm.data import Dataset, named_items
from rcllm.engine.engine import Engine
from rcllm.engine.prefill import keys_of
from rcllm.engine.space import about, space_of
from rcllm.engine.tiers import open_tiers
from rcllm.engine.warming import blocks_to_warm
from rcllm.fetch import cache_dir
from rcllm.reuse.missing import Missing
from rcllm.store.codec import encode
from rcllm.store.contract import Stored
from rcllm.store.disk import DiskStore

DISK_MB = 40_000
SET = "amazon_scientific"


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all parts share."""

    data: Dataset
    engine: Engine  # has the model and an empty pool, and no store
    requests: Sequence[RankRequest]  # read real KV
    items: Sequence[ItemId]  # on disk, those of the requests first
    folder: Path

    @property
    def blocks(self) -> list[Missing]:
        return blocks_to_warm(self.engine.prompter, self.engine.config.rank, self.items)

    @property
    def block_bytes(self) -> int:
        return sum(len(block.token_ids) for block in self.blocks) * self.engine.kv_bytes_per_token


def prepare(num_items: int, num_requests: int, seed: int) -> Bench:
    """Makes the store where it is not there: minutes for what the requests read, seconds for the rest."""
    data = dataset(SET)
    engine = Engine.build(data.catalogue, Config(cache=CacheConfig(pool_mb=256)))
    requests = [at_blocks(request) for request in paper_shaped(engine, data, num_requests, seed)]
    needed = named_items(requests)
    items = list(dict.fromkeys([*needed, *data.catalogue]))[: max(num_items, len(needed))]
    bench = Bench(data, engine, requests, items, cache_dir() / "benchmarks" / f"store-{num_items}")
    with over_disk(bench, 256) as warming, console.status(f"computing {len(needed)} items"):
        warming.warm(needed)
    with DiskStore.open(bench.folder, DISK_MB * MIB) as disk, console.status(f"writing {len(items)} items"):
        _fill(bench, disk)
    return bench


def at_blocks(request: RankRequest) -> RankRequest:
    """At the level that reads the most of the cache; without a user, so that no request finds another one's chain."""
    return dataclasses.replace(request, user_id=None, options=RankOptions(level=Level("blocks")))


def _fill(bench: Bench, disk: DiskStore) -> None:
    """The blocks that the store lacks, with the rows of the first prompt's in their place."""
    blocks, space = bench.blocks, space_of(bench.engine.prompter.namespace)
    there = disk.lookup_many(block.key for block in blocks)
    absent = [block for block in blocks if block.key not in there]
    with bench.engine.pool.hold() as held:
        bench.engine.rank(bench.requests[0])
        held.fetch(keys_of(bench.engine.prompter.build(bench.requests[0])))
        rows = torch.cat(list(held.blocks.values()), dim=3)  # [layers, 2, kv_heads, tokens, head_dim]
        for first in range(0, len(absent), 32):
            disk.put_many(
                {
                    block.key: Stored(encode(rows[:, :, :, : len(block.token_ids)]), 1e9, block.owner, space)
                    for block in absent[first : first + 32]
                }
            )
    bench.engine.pool.clear()


@contextmanager
def over_disk(bench: Bench, pool_mb: int) -> Iterator[Engine]:
    """An engine with an empty pool over the store, as a new process has it, on the model that is loaded."""
    base = bench.engine
    space = space_of(base.prompter.namespace)
    config = StoreConfig(enabled=True, folder=str(bench.folder), disk_mb=DISK_MB, queue_mb=512)
    tiers = open_tiers(config, space, about(base.config, base.model_id))
    pool = Pool(pool_mb * MIB, base.pool.dtype, base.pool.device, tiers.store, space=space)
    with Engine(base.config, base.decoder, base.prompter, pool, base.model_id, tiers=tiers) as engine:
        yield engine


def without_store(bench: Bench, pool_mb: int) -> Engine:
    """An engine with an empty pool, and nothing below it."""
    base = bench.engine
    pool = Pool(pool_mb * MIB, base.pool.dtype, base.pool.device)
    return Engine(base.config, base.decoder, base.prompter, pool, base.model_id)


def sources(answer: RankResponse) -> Counter[str]:
    """How many of an answer's reused blocks came from where."""
    return Counter(block.source for block in answer.receipt.blocks if block.num_reused)


def forget_pages(folder: Path) -> None:
    """Lets the system forget the file of a store that nobody has open: it keeps pages that a process has mapped."""
    ctypes.CDLL(None).sync()
    handle = os.open(folder / "data.mdb", os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def read_bytes() -> int:
    """What this process, and the system on its advice, read from disks so far."""
    told = Path("/proc/self/io").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in told.splitlines() if line.startswith("read_bytes"))


# ---- in a process of its own ----


def start_again(folder: str, num_requests: int, seed: int, started_at: float) -> None:
    """A new process over the store: when it is ready, and what its first requests find. Prints JSON."""
    imported_s = time.time() - started_at
    data = dataset(SET)
    read_s = time.time() - started_at
    store = StoreConfig(enabled=bool(folder), folder=folder, disk_mb=DISK_MB)
    with Engine.build(data.catalogue, Config(cache=CacheConfig(pool_mb=3000), store=store)) as engine:
        ready_s = time.time() - started_at
        requests = [at_blocks(request) for request in paper_shaped(engine, data, num_requests, seed)]
        answers = []
        for request in requests:
            start = time.perf_counter()
            answer = engine.rank(request)
            answers.append(
                {
                    "ttft_s": time.perf_counter() - start,
                    "computed_tokens": answer.receipt.num_computed,
                    "sources": sources(answer),
                    "scores": answer.scores,
                }
            )
        tiers = [dataclasses.asdict(tier) for tier in engine.stats().tiers]
        told = {"imported_s": imported_s, "read_s": read_s, "ready_s": ready_s, "answers": answers, "tiers": tiers}
        print(json.dumps(told))
