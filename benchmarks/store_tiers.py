"""How long the first answer takes by the tier that its blocks come from: the part `ttft` of `benchmarks.store`.

Regime and ceilings stand there. Every answer of a tier is paired with those of the others to the same request.
"""

from __future__ import annotations

import dataclasses
import os
import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.harness import Metrics, percentile, show, timed, turns
from benchmarks.store_setup import Bench, forget_pages, over_disk, read_bytes, sources, without_store
from rcllm.cache.rates import Rates
from rcllm.core.ranking import RankRequest, RankResponse
from rcllm.engine.engine import Engine
from rcllm.engine.prefill import keys_of
from rcllm.model.ceilings import measure_bandwidth
from rcllm.reuse.missing import recompute_flops

TIERS = ("memory", "disk warm", "disk cold", "computed")
_POOL_MB = 4_000
_TYPICAL_TOKENS = 90  # of an item


@dataclasses.dataclass(frozen=True)
class Timed:
    """One answer from one tier."""

    seconds: float
    answer: RankResponse
    rates: Rates  # as they were learned from this answer alone
    from_disk: int = 0  # bytes that the system read meanwhile


def measure(bench: Bench) -> Metrics:
    """The same requests from every tier, in turns; what they read and how fast."""
    in_memory = _in_memory(bench)
    ask: dict[str, Callable[[RankRequest], Timed]] = {
        "memory": lambda request: _timed(in_memory, request),
        "disk warm": partial(_from_disk, bench, is_cold=False),
        "disk cold": partial(_from_disk, bench, is_cold=True),
        "computed": lambda request: _timed(without_store(bench, _POOL_MB), request),
    }
    took: dict[str, list[Timed]] = defaultdict(list)
    asked = (bench.requests[0], *bench.requests)  # the first one does not count
    for request, turn in zip(asked, turns(TIERS), strict=False):
        for name in turn:
            took[name].append(ask[name](request))
    took = {name: some[1:] for name, some in took.items()}
    _check_sources(took)
    return {**_times(took, bench), **_rates(took, bench)}


def _in_memory(bench: Bench) -> Engine:
    """An engine whose pool has what the requests read."""
    engine = without_store(bench, _POOL_MB)
    with over_disk(bench, _POOL_MB) as disk, disk.pool.hold() as held, engine.pool.hold() as kept:
        for request in bench.requests:
            keys = list(keys_of(bench.engine.prompter.build(request)))
            held.fetch(keys)
            for key in keys:
                if key in held.blocks:
                    kept.publish(key, held.blocks[key], 1.0, None)
    return engine


def _from_disk(bench: Bench, request: RankRequest, *, is_cold: bool) -> Timed:
    """The store is opened for this answer: nothing of it is mapped, and what is not cold is in the page cache."""
    if is_cold:
        forget_pages(bench.folder)
    else:
        with over_disk(bench, _POOL_MB) as before:
            before.rank(request)
    with over_disk(bench, _POOL_MB) as engine:
        return _timed(engine, request)


def _timed(engine: Engine, request: RankRequest) -> Timed:
    before = read_bytes()
    seconds, answer = timed(engine.rank, request)
    return Timed(seconds, answer, engine.pool.rates, read_bytes() - before)


def _check_sources(took: Mapping[str, Sequence[Timed]]) -> None:
    meant = {"memory": "device", "disk warm": "disk", "disk cold": "disk", "computed": "computed"}
    for name, some in took.items():
        found = sum((sources(each.answer) for each in some), Counter[str]())
        assert set(found) == {meant[name]}, f"{name}: blocks came from {dict(found)}"


def _times(took: Mapping[str, Sequence[Timed]], bench: Bench) -> Metrics:
    seconds = {name: [each.seconds for each in some] for name, some in took.items()}
    p50 = {name: statistics.median(some) for name, some in seconds.items()}
    kv_bytes = statistics.median(each.answer.receipt.kv_bytes_read for each in took["memory"])
    forget_pages(bench.folder)
    plain_bytes_per_s = _plain_reads(bench.folder / "data.mdb", int(kv_bytes))
    floors = {
        "disk warm": p50["memory"] + kv_bytes / measure_bandwidth(),
        "disk cold": p50["memory"] + kv_bytes / plain_bytes_per_s,
    }
    reference = [each.answer.scores for each in took["memory"]]
    shift = {
        name: max(
            abs(a - b)
            for each, scores in zip(some, reference, strict=True)
            for a, b in zip(each.answer.scores, scores, strict=True)
        )
        for name, some in took.items()
    }
    show(
        f"TTFT by tier, {len(bench.requests)} requests of {len(bench.requests[0].candidates)} candidates, level "
        f"blocks, {kv_bytes / 1e6:.0f} MB of KV each",
        ["blocks from", "P50 ms", "P90 ms", "floor ms", "of memory", "of computed", "read from disk MB", "score shift"],
        [
            [
                name,
                f"{p50[name] * 1e3:.0f}",
                f"{percentile(seconds[name], 0.9) * 1e3:.0f}",
                f"{floors[name] * 1e3:.0f}" if name in floors else "",
                f"{p50[name] / p50['memory']:.3f}",
                f"{p50[name] / p50['computed']:.3f}",
                f"{statistics.median(each.from_disk for each in some) / 1e6:.0f}",
                f"{shift[name]:.1e}",
            ]
            for name, some in took.items()
        ],
    )
    return {
        "num_requests": len(bench.requests),
        "ttft_ratio_disk_warm_vs_memory": p50["disk warm"] / p50["memory"],
        "ttft_ratio_disk_cold_vs_compute": p50["disk cold"] / p50["computed"],
        "ttft_ratio_disk_cold_vs_memory": p50["disk cold"] / p50["memory"],
        "ttft_kv_mb": kv_bytes / 1e6,
        "ttft_disk_cold_read_mb": statistics.median(each.from_disk for each in took["disk cold"]) / 1e6,
        **{f"ttft_ms_{_flat(name)}": value * 1e3 for name, value in p50.items()},
        **{f"ttft_floor_ms_{_flat(name)}": value * 1e3 for name, value in floors.items()},
        **{f"max_score_shift_{_flat(name)}": value for name, value in shift.items()},
    }


def _rates(took: Mapping[str, Sequence[Timed]], bench: Bench) -> Metrics:
    """What engines learned of the tiers, and the disk below which they would compute a typical item instead."""
    of = {name: [each.rates for each in some] for name, some in took.items()}
    warm, cold = (statistics.median(r.bytes_of["disk"].per_s for r in of[f"disk {how}"]) for how in ("warm", "cold"))
    flops = statistics.median(rates.flops.per_s for rates in of["computed"])
    num_bytes = _TYPICAL_TOKENS * bench.engine.kv_bytes_per_token
    instruction = bench.blocks[0].context.variants
    compute_s = recompute_flops(bench.engine.decoder.spec, _TYPICAL_TOKENS, [len(v) for v in instruction]) / flops
    even = num_bytes / compute_s
    show(
        f"Fetch or compute an item of {_TYPICAL_TOKENS} tokens, {num_bytes / 1e6:.1f} MB, by the learned rates",
        ["how", "rate", "ms"],
        [
            ["disk warm", f"{warm / 1e9:.2f} GB/s", f"{num_bytes / warm * 1e3:.2f}"],
            ["disk cold", f"{cold / 1e9:.2f} GB/s", f"{num_bytes / cold * 1e3:.2f}"],
            ["computed", f"{flops / 1e9:.0f} GFLOP/s", f"{compute_s * 1e3:.2f}"],
            ["break-even", f"{even / 1e6:.0f} MB/s", f"{compute_s * 1e3:.2f}"],
        ],
    )
    return {
        "rate_gb_s_disk_warm": warm / 1e9,
        "rate_gb_s_disk_cold": cold / 1e9,
        "rate_gflops_computing": flops / 1e9,
        "break_even_mb_s": even / 1e6,
    }


def _plain_reads(file: Path, num_bytes: int) -> float:
    """Bytes per second of reading so much of a file that the system has forgotten, at places as far apart as items."""
    piece = 2 << 20
    size, rng = file.stat().st_size, random.Random(0)
    handle = os.open(file, os.O_RDONLY)
    try:
        start = time.perf_counter()
        for _ in range(max(1, num_bytes // piece)):
            os.pread(handle, piece, rng.randrange(max(1, size - piece)))
        return max(1, num_bytes // piece) * piece / (time.perf_counter() - start)
    finally:
        os.close(handle)


def _flat(name: str) -> str:
    return name.replace(" ", "_")
