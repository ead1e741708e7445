"""How much sooner does the first answer come when items and history are reused beyond the prefix?

Regime: one request at a time, paper-shaped prompts (2.2–3.0K tokens, 20 candidates, RcLLM §V), items warm, every user
new, SmolLM2-135M in fp32 on the CPU; all levels interleaved on the same requests in one run. Both sides are this
engine: level `exact` is automatic prefix caching. So that no speed-up is owed to a slow baseline, cold prefill is
held against its floor and against transformers in the same run.

Ceiling: FLOPs of the fresh tokens (visible pairs only) / the measured GEMM rate at that row count, plus bytes of KV
read / measured bandwidth.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness import (
    Options,
    console,
    dataset,
    median_seconds,
    options,
    percentile,
    report,
    show,
    timed,
    transformers_model,
)
from rcllm.config import CacheConfig, Config, PromptConfig
from rcllm.core.ranking import Level, RankOptions, RankRequest, UserId
from rcllm.data import Dataset, build_requests, named_items
from rcllm.engine.engine import Engine
from rcllm.fidelity.measures import agreement
from rcllm.model.attend.segments import Group
from rcllm.model.ceilings import measure_bandwidth, measure_gemm
from rcllm.model.decoder import Pass
from rcllm.model.pull import pull
from rcllm.model.spec import ModelSpec
from rcllm.reuse.assemble import assemble
from rcllm.reuse.plan import Planned, plan

QUESTION = "TTFT of the reuse levels over prefix caching and over their physical floor, and memory against its budget"
LEVELS = ("full", "exact", "linked(4)", "linked(16)", "tail(0.1)", "tail(0.3)", "blocks")
COLD = (500, 1000, 2000)
PAPER_TOKENS = range(2200, 3001)


def main() -> None:
    chosen = options("ttft", QUESTION)
    data = dataset("amazon_scientific")
    engine = Engine.build(data.catalogue, Config(cache=CacheConfig(pool_mb=6000)))
    requests = paper_shaped(engine, data, 8 if chosen.quick else 24, chosen.seed)
    metrics = {**levels(engine, requests), **floor_of_blocks(engine, requests), **cold(engine, chosen)}
    del engine
    gc.collect()
    metrics |= memory(chosen)
    report("ttft", QUESTION, chosen, metrics)


def paper_shaped(engine: Engine, data: Dataset, count: int, seed: int) -> list[RankRequest]:
    """Held-out users' requests whose prompts have the paper's length; all of them where the data has none such."""
    found = build_requests(data, None, num_candidates=20, num_history=12, min_history=4, seed=seed)
    long = [request for request in found if engine.prompter.build(request).num_tokens in PAPER_TOKENS]
    return (long or found)[:count]


def levels(engine: Engine, requests: list[RankRequest]) -> dict[str, float]:
    needed = named_items(requests)
    with console.status(f"warming {len(needed)} items"):
        engine.warm(needed)
    times, fresh, tau, top1 = (defaultdict[str, list[float]](list) for _ in range(4))
    for request in requests:
        reference: tuple[float, ...] = ()
        for level in LEVELS:
            # a user of its own for each level: no level finds the history that another one published
            asked = dataclasses.replace(
                request, user_id=UserId(f"{request.user_id}/{level}"), options=RankOptions(level=Level.parse(level))
            )
            if request is requests[0]:
                engine.rank(asked)  # the first call of a level does not count
                engine.erase_user(asked.user_id or UserId(""))
            took, answer = timed(engine.rank, asked)
            reference = reference or answer.scores
            close = agreement(reference, answer.scores)
            times[level].append(took)
            fresh[level].append(answer.receipt.num_fresh)
            tau[level].append(close.tau)
            top1[level].append(close.top1)
            assert answer.receipt.kv_bytes_copied == 0 or answer.receipt.backend != "segmented"
            assert answer.receipt.num_computed == 0, "items are warm"
    tokens = statistics.median(engine.prompter.build(r).num_tokens for r in requests)
    p50 = {level: statistics.median(values) for level, values in times.items()}
    show(
        f"TTFT, {len(requests)} requests of {len(requests[0].candidates)} candidates, median {tokens:.0f} tokens, "
        "items warm, users new",
        ["level", "P50 ms", "P90 ms", "fresh tokens", "over prefix cache", "over full", "Kendall τ", "top-1"],
        [
            [
                level,
                f"{p50[level] * 1e3:.0f}",
                f"{percentile(times[level], 0.9) * 1e3:.0f}",
                f"{statistics.median(fresh[level]):.0f}",
                f"{p50['exact'] / p50[level]:.2f}×",
                f"{p50['full'] / p50[level]:.2f}×",
                f"{statistics.mean(tau[level]):.2f}",
                f"{statistics.mean(top1[level]):.2f}",
            ]
            for level in LEVELS
        ],
    )
    return {
        "num_requests": len(requests),
        "prompt_tokens_p50": tokens,
        "p50_speedup_blocks_vs_prefix": p50["exact"] / p50["blocks"],
        "p50_speedup_linked_vs_prefix": p50["exact"] / p50["linked(4)"],
        "p90_speedup_blocks_vs_prefix": percentile(times["exact"], 0.9) / percentile(times["blocks"], 0.9),
        **{f"p50_ms_{_flat(level)}": value * 1e3 for level, value in p50.items()},
        **{f"tau_{_flat(level)}": statistics.mean(values) for level, values in tau.items()},
        **{f"fresh_tokens_{_flat(level)}": statistics.median(values) for level, values in fresh.items()},
    }


def floor_of_blocks(engine: Engine, requests: list[RankRequest]) -> dict[str, float]:
    """The forward pass of `blocks` against its floor, request by request."""
    decoder, spec = engine.decoder, engine.decoder.spec
    bandwidth = measure_bandwidth()
    ratios, copied = [], 0
    rows: list[list[str]] = []
    for request in requests:
        prompt = engine.prompter.build(dataclasses.replace(request, options=RankOptions(level=Level("blocks"))))
        planned = Planned(prompt, plan(prompt, Level("blocks"), ()))
        with engine.pool.hold() as held:
            assert not held.fetch(planned.plan.read)
            work = assemble([planned], held.blocks, decoder.device).work
            took = median_seconds(decoder.forward, work, 5)
            copied += decoder.forward(work).bytes_copied
        floor = floor_seconds(spec, work, gemm_rate(len(work.token_ids), spec), bandwidth)
        ratios.append(took / floor)
        rows.append([request.request_id, str(len(work.token_ids)), str(len(work.groups[0].segments))])
        rows[-1] += [f"{took * 1e3:.0f}", f"{floor * 1e3:.0f}", f"{took / floor:.2f}"]
    show("Forward pass of `blocks`", ["request", "fresh", "segments", "ms", "floor ms", "ratio"], rows)
    console.print(f"published KV copied: {copied} bytes\n")
    return {"floor_ratio_blocks": statistics.median(ratios), "kv_bytes_copied_blocks": copied}


def gemm_rate(rows: int, spec: ModelSpec) -> float:
    """FLOP/s of the model's own matrices at that row count, fp32."""
    return measure_gemm(rows, spec, torch.float32) * 1e9


def floor_seconds(spec: ModelSpec, work: Pass, flops_per_s: float, bytes_per_s: float) -> float:
    pairs = sum(int(group.row_mask().sum()) for group in work.groups)
    kv_bytes = 0
    for group in work.groups:
        lengths = torch.tensor([segment.stop - segment.start for segment in group.segments], dtype=torch.int64)
        pairs += int((torch.from_numpy(group.segment_mask()).long() @ lengths).sum()) if group.segments else 0
        kv_bytes += sum(segment.num_bytes for segment in group.segments)
    flops = len(work.token_ids) * spec.linear_flops_per_token + spec.attention_flops(pairs)
    return flops / flops_per_s + kv_bytes / bytes_per_s


def cold(engine: Engine, chosen: Options) -> dict[str, float]:
    """Cold prefill against its floor, and at 2,000 tokens against transformers on the same weights."""
    decoder, spec, metrics = engine.decoder, engine.decoder.spec, {}
    peer = transformers_model(pull(engine.config.model.path))
    rows = []
    for size in COLD:
        ids = torch.randint(0, spec.vocab_size, (size,), generator=torch.Generator().manual_seed(chosen.seed))
        work = Pass(ids, torch.arange(size), (Group.causal(size),), wanted=torch.tensor([size - 1]))
        repeats = 2 if chosen.quick else 5
        took = median_seconds(decoder.forward, work, repeats)
        floor = floor_seconds(spec, work, gemm_rate(size, spec), measure_bandwidth())
        theirs = median_seconds(partial(_peer_prefill, peer), ids, repeats)
        metrics[f"cold_prefill_floor_ratio_{size}"] = took / floor
        metrics[f"cold_prefill_time_ratio_vs_transformers_{size}"] = took / theirs
        row = [str(size), f"{took * 1e3:.0f}", f"{floor * 1e3:.0f}", f"{took / floor:.2f}"]
        rows.append([*row, f"{theirs * 1e3:.0f}", f"{took / theirs:.2f}"])
    columns = ["tokens", "ms", "floor ms", "ratio", "transformers ms", "ours / theirs"]
    show("Cold prefill, nothing cached", columns, rows)
    return metrics


@torch.inference_mode()
def _peer_prefill(peer: torch.nn.Module, ids: torch.Tensor) -> None:
    peer(ids[None], logits_to_keep=1, use_cache=True)


def memory(chosen: Options) -> dict[str, float]:
    """Peak memory of a process that warms a catalogue, over its budget; and one whose catalogue exceeds its budget."""
    count = 300 if chosen.quick else 3000
    runs = {"": (count, 2500 if chosen.quick else 9500), "_small_budget": (count // 3, 1600)}
    metrics, rows = {}, []
    for name, (items, budget) in runs.items():
        command = [sys.executable, "-c", f"from benchmarks.ttft import warm_alone; warm_alone({items}, {budget})"]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        told = json.loads(ran.stdout.splitlines()[-1])
        metrics[f"peak_rss_ratio_to_budget{name}"] = told["peak_rss_mb"] / budget
        share = f"{told['done']} / {told['total']}"
        rows.append([str(items), str(budget), f"{told['peak_rss_mb']:.0f}", share, f"{told['evictions']}"])
    show(
        "Peak memory while warming",
        ["items", "budget MB", "peak RSS MB", "blocks warmed", "evictions in 3 requests"],
        rows,
    )
    return metrics


def warm_alone(items: int, budget_mb: int) -> None:
    """Runs in a process of its own: warms the first `items` items, ranks three requests, prints what it took."""
    data = dataset("amazon_scientific")
    config = Config(cache=CacheConfig(memory_mb=budget_mb), prompt=PromptConfig())
    engine = Engine.build(data.catalogue, config)
    warmed = engine.warm(list(data.catalogue)[:items])
    for request in build_requests(data, 3, num_candidates=20):
        engine.rank(request)
    engine.pool.check()
    told = {"done": warmed.done_blocks, "total": warmed.total_blocks, "evictions": engine.stats().evictions}
    print(json.dumps({**told, "peak_rss_mb": peak_rss_mb()}))


def peak_rss_mb() -> float:
    """Of this process alone: getrusage would count what its parent held when it was started."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def _flat(level: str) -> str:
    return level.replace("(", "").replace(")", "").replace(".", "")


if __name__ == "__main__":
    main()
