"""In which dtype should cached KV be kept beside fp32 compute?

Regime: paper-shaped prompts at level `blocks`, everything warm, SmolLM2-135M, fp32 compute; the same requests for
every dtype in one run. Shift is the largest change of a candidate's log-probability against KV kept in fp32. A 16-bit
block is widened tile by tile as attention reads it, so the ceiling is the time of fp32.
"""

from __future__ import annotations

import dataclasses
import statistics

from benchmarks.harness import dataset, options, report, show, timed
from benchmarks.ttft import paper_shaped
from rcllm.config import CacheConfig, Config
from rcllm.core.ranking import Level, RankOptions
from rcllm.data import named_items
from rcllm.engine.engine import Engine
from rcllm.fidelity.measures import agreement

QUESTION = "Score shift and TTFT of KV kept in fp32, fp16 and bf16"
DTYPES = ("fp32", "fp16", "bf16")


def main() -> None:
    chosen = options("kv_dtype", QUESTION)
    data = dataset("amazon_scientific")
    engines = {
        name: Engine.build(data.catalogue, Config(cache=CacheConfig(kv_dtype=name, pool_mb=4000)))  # type: ignore[arg-type]
        for name in DTYPES
    }
    requests = paper_shaped(engines["fp32"], data, 6 if chosen.quick else 24, chosen.seed)
    asked = [dataclasses.replace(r, options=RankOptions(level=Level("blocks"))) for r in requests]
    needed = named_items(requests)
    for engine in engines.values():
        engine.warm(needed)
    times: dict[str, list[float]] = {name: [] for name in DTYPES}
    shifts: dict[str, list[float]] = {name: [] for name in DTYPES}
    taus: dict[str, list[float]] = {name: [] for name in DTYPES}
    for request in asked * 3:
        reference = engines["fp32"].rank(request).scores
        for name, engine in engines.items():
            took, answer = timed(engine.rank, request)
            times[name].append(took)
            close = agreement(reference, answer.scores)
            shifts[name].append(close.max_shift)
            taus[name].append(close.tau)
    p50 = {name: statistics.median(values) for name, values in times.items()}
    rows = [
        [
            name,
            f"{engines[name].stats().num_bytes / 1e6:.0f}",
            f"{p50[name] * 1e3:.0f}",
            f"{p50[name] / p50['fp32']:.2f}",
            f"{max(shifts[name]):.1e}",
            f"{statistics.mean(taus[name]):.3f}",
        ]
        for name in DTYPES
    ]
    show(f"KV dtype, {len(requests)} requests", ["dtype", "pool MB", "P50 ms", "vs fp32", "max shift", "τ"], rows)
    metrics: dict[str, float] = {}
    for name in DTYPES:
        metrics |= {f"ttft_ratio_{name}": p50[name] / p50["fp32"], f"max_shift_{name}": max(shifts[name])}
        metrics |= {f"tau_{name}": statistics.mean(taus[name])}
    report("kv_dtype", QUESTION, chosen, metrics)


if __name__ == "__main__":
    main()
