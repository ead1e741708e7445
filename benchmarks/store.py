"""What is a store on disk worth: after a restart, and to the first answer, by the tier that its blocks come from?

Regime: real items (Amazon Scientific), paper-shaped prompts (2.2–3.0K tokens, 20 candidates), level `blocks`,
SmolLM2-135M in fp32, KV in fp16, one request at a time; all tiers interleaved over the same requests in one run. For
every answer from disk the store is opened anew, so that its pages are not mapped yet, as in a process that has just
begun; for cold ones the system has forgotten the file besides. Recompute: a pool without a store, all blocks missing.

Ceilings: for a warm disk the answer from memory and the bytes of its blocks over the bandwidth of memory; for a cold
one, over the rate at which plain reads of the same file come from this disk. For a start: the same start without a
store.

Items that no timed request reads have the rows of others under their own keys, see `benchmarks.store_setup`.
"""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import store_tiers
from benchmarks.harness import Metrics, Options, options, percentile, run_parts, show, timed
from benchmarks.store_disk import measure_beside_files, place
from benchmarks.store_setup import Bench, at_blocks, forget_pages, over_disk, prepare
from rcllm.cache.pool import Pool
from rcllm.config import MIB
from rcllm.core.ranking import Event, RankRequest, RankResponse
from rcllm.data import build_requests
from rcllm.engine.engine import Engine
from rcllm.store.disk import DiskStore

QUESTION = "Restart, TTFT by tier, the break-even between fetching and computing, and bytes, of KV on disk"


@dataclasses.dataclass(frozen=True)
class Sizes:
    items: int  # on disk
    requests: int  # that are timed by tier
    mixed: int  # over a catalogue that is larger than the memory


FULL, QUICK = Sizes(3_000, 24, 200), Sizes(200, 4, 20)


def main() -> None:
    chosen = options("store", QUESTION, tuple(PARTS))
    sizes = QUICK if chosen.quick else FULL
    bench = prepare(sizes.items, sizes.requests, chosen.seed)
    run_parts("store", QUESTION, chosen, {name: partial(part, bench, sizes, chosen) for name, part in PARTS.items()})


# ---- after a restart ----


def restart(bench: Bench, sizes: Sizes, chosen: Options) -> Metrics:
    """A new process over the store, its file in the page cache; forgotten by it; and one without a store."""
    count = len(bench.requests)
    without = _start("", 1, chosen.seed)
    warm = _start(str(bench.folder), count, chosen.seed)
    forget_pages(bench.folder)
    cold = _start(str(bench.folder), 1, chosen.seed)
    runs = {"without a store": without, "disk warm": warm, "disk cold": cold}
    rows = []
    for name, run in runs.items():
        first = run["answers"][0]
        came = ", ".join(f"{number} {source}" for source, number in first["sources"].items())
        rows.append([name, f"{run['imported_s']:.2f}", f"{run['ready_s']:.2f}", f"{first['ttft_s'] * 1e3:.0f}", came])
    title = f"A new process over {len(bench.items):,} items on disk, {bench.block_bytes / 1e9:.1f} GB"
    show(title, ["start", "imported s", "ready s", "first TTFT ms", "blocks of the first request"], rows)
    [tier] = warm["tiers"]
    return {
        "restart_items_on_disk": len(bench.items),
        "restart_blocks_on_disk": tier["num_blocks"],
        "restart_items_recomputed": warm["answers"][0]["sources"].get("computed", 0),
        "restart_items_recomputed_cold": cold["answers"][0]["sources"].get("computed", 0),
        f"restart_items_recomputed_in_{count}": sum(a["sources"].get("computed", 0) for a in warm["answers"]),
        "restart_tokens_computed": sum(answer["computed_tokens"] for answer in warm["answers"]),
        "restart_ready_s": warm["ready_s"],
        "restart_ready_s_cold": cold["ready_s"],
        "restart_ready_s_without_store": without["ready_s"],
        "restart_first_ttft_ms": warm["answers"][0]["ttft_s"] * 1e3,
        "restart_first_ttft_ms_cold": cold["answers"][0]["ttft_s"] * 1e3,
        "restart_first_ttft_ms_without_store": without["answers"][0]["ttft_s"] * 1e3,
    }


def _start(folder: str, num_requests: int, seed: int) -> dict[str, Any]:
    call = f"start_again({folder!r}, {num_requests}, {seed}, {time.time()})"
    command = [sys.executable, "-c", f"from benchmarks.store_setup import start_again; {call}"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    told: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return told


# ---- more items than memory ----


def larger(bench: Bench, sizes: Sizes, chosen: Options) -> Metrics:
    """A pool of a fifth of what the items take; users and candidates as popular as they are; the disk cold at first."""
    pool_mb = bench.block_bytes // 5 // MIB
    asked = _within(bench, sizes.mixed, chosen.seed)
    forget_pages(bench.folder)
    seconds, errors, computed = list[float](), 0, 0
    with over_disk(bench, pool_mb) as engine:
        for request in asked:
            took, [answer] = timed(engine.rank_batch, [request])
            seconds.append(took)
            if isinstance(answer, RankResponse):
                computed += answer.receipt.num_computed
            else:
                errors += 1
        stats = engine.stats()
        engine.pool.check()
    num_blocks = sum(stats.hits.values()) + stats.misses
    half = len(seconds) // 2
    shares = {source: stats.hits.get(source, 0) / num_blocks for source in ("device", "disk")}
    show(
        f"{len(bench.items):,} items, {bench.block_bytes / 1e6:,.0f} MB; pool {pool_mb:,} MB, {len(asked)} requests",
        ["blocks", "pool", "disk", "computed", "TTFT P50 ms", "P90 ms", "second half P50 ms", "errors"],
        [
            [
                f"{num_blocks:,}",
                *(f"{share:.3f}" for share in shares.values()),
                f"{stats.misses / num_blocks:.3f}",
                f"{statistics.median(seconds) * 1e3:.0f}",
                f"{percentile(seconds, 0.9) * 1e3:.0f}",
                f"{statistics.median(seconds[half:]) * 1e3:.0f}",
                str(errors),
            ]
        ],
    )
    return {
        "larger_catalogue_over_pool": bench.block_bytes / (pool_mb * MIB),
        "larger_hit_rate_pool": shares["device"],
        "larger_hit_rate_disk": shares["disk"],
        "larger_miss_rate": stats.misses / num_blocks,
        "larger_tokens_computed": computed,
        "larger_ttft_ms": statistics.median(seconds) * 1e3,
        "larger_ttft_p90_ms": percentile(seconds, 0.9) * 1e3,
        "larger_ttft_second_half_ms": statistics.median(seconds[half:]) * 1e3,
        "larger_errors": errors + stats.store_errors,
        "larger_num_requests": len(asked),
    }


def _within(bench: Bench, count: int, seed: int) -> list[RankRequest]:
    """Held-out users' requests over the items that are on disk; a candidate that is not gives way to a popular one."""
    rng, there = random.Random(seed), set(bench.items)
    chosen = Counter(row.item_id for row in bench.data.interactions if row.item_id in there)
    items, weights = list(chosen), list(chosen.values())
    asked = []
    for request in build_requests(bench.data, count, num_candidates=20, num_history=12, min_history=4, seed=seed):
        wanted = dict.fromkeys(item for item in request.candidates if item in there)
        while len(wanted) < len(request.candidates):
            wanted[rng.choices(items, weights)[0]] = None
        events = [e if e.item_id in there else Event(rng.choices(items, weights)[0]) for e in request.history]
        asked.append(at_blocks(dataclasses.replace(request, candidates=tuple(wanted), history=tuple(events))))
    return asked


# ---- bytes ----


def on_disk(bench: Bench, sizes: Sizes, chosen: Options) -> Metrics:
    """Writing against plain files, and what int8 takes of the room of fp32."""
    with place() as folder:
        beside = measure_beside_files(folder, 300 if chosen.quick else 1_500, 2_000_000, chosen.seed)
    taken = {name: _bytes_on_disk(bench, name) for name in ("fp32", "fp16", "int8")}
    show(
        "Writing to disk, beside plain files; and the blocks of one request in three dtypes",
        ["what", "figure"],
        [
            ["blocks written GB/s", f"{beside['write_gb_s']:.2f}"],
            ["files written GB/s", f"{beside['write_gb_s_files']:.2f}"],
            *([f"{name}, bytes of blocks and of the file", f"{a:,} {b:,}"] for name, (a, b) in taken.items()),
        ],
    )
    return {
        "write_ratio_vs_files": beside["write_ratio_vs_files"],
        "write_gb_s": beside["write_gb_s"],
        "int8_bytes_ratio_vs_fp32": taken["fp32"][0] / taken["int8"][0],
        "int8_file_bytes_ratio_vs_fp32": taken["fp32"][1] / taken["int8"][1],
        "fp16_bytes_ratio_vs_fp32": taken["fp32"][0] / taken["fp16"][0],
    }


def _bytes_on_disk(bench: Bench, name: str) -> tuple[int, int]:
    """Of the blocks of the first request, in a dtype: of the blocks alone, and of a file that holds them alone."""
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}[name]
    with place() as folder, DiskStore.open(folder, 4_000 * MIB) as disk:
        base = bench.engine
        pool = Pool(1_000 * MIB, dtype, base.pool.device, disk)
        with Engine(base.config, base.decoder, base.prompter, pool, base.model_id) as engine:
            engine.rank(bench.requests[0])
        return disk.stats()[0].num_bytes, disk.use().file_bytes


def ttft(bench: Bench, sizes: Sizes, chosen: Options) -> Metrics:
    """The first answer, by tier."""
    return store_tiers.measure(bench)


PARTS: dict[str, Callable[[Bench, Sizes, Options], Metrics]] = {
    "restart": restart,
    "ttft": ttft,
    "larger": larger,
    "on_disk": on_disk,
}


if __name__ == "__main__":
    main()
