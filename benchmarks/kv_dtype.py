"""In which dtype should cached KV be kept beside fp32 compute?

Regime: level `blocks`, which reads the most of the cache, SmolLM2-135M in fp32. Every dtype has an engine of its own,
which computes, keeps and reads its blocks in it; answers are paired, request by request, with those of KV in fp32.
Quality: the two tuned rankers (adapters/) on held-out users, short prompts, read-out `pointwise`, 20 candidates.
Agreement beside it: the untuned model on prompts of the paper's length, read-out `label`. TTFT: those prompts,
everything warm, all dtypes interleaved in one run over the same blocks. A block is widened tile by tile as attention
reads it, so the ceiling is the time of fp32.

Answers are kept in the cache folder of rcllm, so that an interrupted run goes on where it was; times are not.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from benchmarks.fidelity_setup import SETS, TEMPLATES, engine_of, held_out, paper_shaped, scored
from benchmarks.harness import Options, dataset, options, run_parts, show, timed, turns
from rcllm.cache.pool import Pool
from rcllm.config import MIB, CacheConfig, Config
from rcllm.core.ranking import Level, RankOptions, RankRequest
from rcllm.data import Dataset
from rcllm.engine.engine import Engine
from rcllm.engine.prefill import keys_of
from rcllm.fetch import cache_dir
from rcllm.fidelity.intervals import bootstrap
from rcllm.fidelity.records import Record, RecordFile
from rcllm.fidelity.summary import summarise
from rcllm.store.codec import DTYPES as TORCH_DTYPES

QUESTION = "Bytes, score error, NDCG@10 and TTFT of KV kept in fp32, fp16, bf16 and int8"
DTYPES = ("fp32", "fp16", "bf16", "int8")
SET = "scientific"
ROUNDS = 5
POOL_MB = 3000
COLUMNS = ["dtype", "requests", "mean |error|", "largest", "Kendall τ", "top-1", "NDCG@10", "Δ fp32", "95 %"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many requests each part takes."""

    quality: int
    sixteen_bits: int  # of fp16 and bf16, whose errors are so small that fewer show them
    agreement: int
    timed: int


FULL, QUICK = Sizes(1000, 40, 50, 24), Sizes(6, 6, 2, 3)


def main() -> None:
    chosen = options("kv_dtype", QUESTION, tuple(PARTS))
    sizes = QUICK if chosen.quick else FULL
    if chosen.requests is not None:
        sizes = Sizes(*(min(count, chosen.requests) for count in dataclasses.astuple(sizes)))
    with RecordFile(cache_dir() / "benchmarks" / "kv_dtype.jsonl") as kept:
        run_parts(
            "kv_dtype", QUESTION, chosen, {name: partial(part, sizes, chosen, kept) for name, part in PARTS.items()}
        )


def tuned(variant: str, sizes: Sizes, chosen: Options, kept: RecordFile) -> dict[str, float]:
    """What a dtype costs a tuned ranker in scores, order and quality."""
    data = dataset(SETS[SET])
    requests = held_out(data, SET, "uniform", sizes.quality, chosen.seed)
    found = {}
    for dtype in DTYPES:
        with engine_of(variant, TEMPLATES[variant], data, chosen.seed, kv_dtype=dtype) as engine:
            some = requests[: sizes.sixteen_bits] if dtype in ("fp16", "bf16") else requests
            found[dtype] = scored(engine, ["blocks"], some, kept)["blocks"]
    return closeness(f"{variant} mask", variant, found)


def untuned(sizes: Sizes, chosen: Options, kept: RecordFile) -> dict[str, float]:
    """Agreement of the scores on long prompts: fidelity without any claim of quality."""
    data = dataset(SETS[SET])
    found = {}
    for dtype in DTYPES:
        with engine_of("untuned", "shopping", data, chosen.seed, base=RankOptions(), kv_dtype=dtype) as engine:
            requests = paper_shaped(engine, data, SET, 20, sizes.agreement, chosen.seed)
            found[dtype] = scored(engine, ["blocks"], requests, kept, RankOptions())["blocks"]
    return closeness("untuned, paper-shaped prompts", "untuned", found)


def closeness(title: str, at: str, found: Mapping[str, Sequence[Record]]) -> dict[str, float]:
    """Every dtype against fp32; NDCG@10 means something for tuned models alone."""
    metrics: dict[str, float] = {}
    rows = []
    for dtype, records in found.items():
        reference = found["fp32"][: len(records)]
        metrics[f"num_requests_{dtype}_{at}"] = len(records)
        errors = np.abs(np.array([r.scores for r in records]) - np.array([r.scores for r in reference]))
        summary = summarise(records, reference)
        top1, ndcg10 = (summary.measures[name].mean for name in ("top1", "ndcg10"))
        tau, delta = summary.measures["tau"], summary.deltas["ndcg10"]
        metrics |= {f"mean_error_{dtype}_{at}": errors.mean(), f"max_error_{dtype}_{at}": errors.max()}
        metrics |= {f"tau_{dtype}_{at}": tau.mean, f"tau_lo_{dtype}_{at}": tau.low, f"tau_hi_{dtype}_{at}": tau.high}
        metrics |= {f"top1_{dtype}_{at}": top1}
        if at != "untuned":
            metrics |= {f"ndcg10_{dtype}_{at}": ndcg10, f"{dtype}_ndcg10_delta_{at}": delta.mean}
            metrics |= {f"{dtype}_ndcg10_delta_lo_{at}": delta.low, f"{dtype}_ndcg10_delta_hi_{at}": delta.high}
        order = f"{tau.mean:.4f} [{tau.low:.4f}, {tau.high:.4f}]"
        close = [f"{errors.mean():.1e}", f"{errors.max():.1e}", order, f"{top1:.3f}"]
        rows.append(
            [
                dtype,
                str(len(records)),
                *close,
                f"{ndcg10:.4f}",
                f"{delta.mean:+.4f}",
                f"[{delta.low:+.4f}, {delta.high:+.4f}]",
            ]
        )
    show(f"KV dtype, {title}", COLUMNS, rows)
    return metrics


def ttft(sizes: Sizes, chosen: Options, kept: RecordFile) -> dict[str, float]:
    """Bytes and time. One model, blocks that are computed once, and a pool for every dtype; the pools take turns."""
    data = dataset(SETS[SET])
    engines = engines_of(data)
    requests = paper_shaped(engines["fp32"], data, SET, 20, sizes.timed, chosen.seed)
    asked = [dataclasses.replace(r, user_id=None, options=RankOptions(level=Level("blocks"))) for r in requests]
    warm(engines, asked)
    times: dict[str, list[float]] = {name: [] for name in DTYPES}
    for request, turn in zip(asked * ROUNDS, turns(DTYPES), strict=False):
        for name in turn:
            took, answer = timed(engines[name].rank, request)
            assert not answer.receipt.num_computed, "everything is warm"
            times[name].append(took)
    return times_and_bytes(engines, times, len(requests), chosen.seed)


def engines_of(data: Dataset) -> dict[str, Engine]:
    """Over one model and one prompter, so that a block has one key in every pool."""
    wide = Engine.build(data.catalogue, Config(cache=CacheConfig(kv_dtype="fp32", pool_mb=POOL_MB)))
    pools = {name: Pool(POOL_MB * MIB, TORCH_DTYPES[name], wide.decoder.device) for name in DTYPES[1:]}
    others = {
        name: Engine(wide.config, wide.decoder, wide.prompter, pool, wide.model_id) for name, pool in pools.items()
    }
    return {"fp32": wide, **others}


def warm(engines: Mapping[str, Engine], asked: Sequence[RankRequest]) -> None:
    """Puts what the requests read into every pool, and asks each once.

    The first request's blocks are computed; the others' are cut out of these, for times depend on no value.
    """
    wide = engines["fp32"]
    wide.rank(asked[0])
    with wide.pool.hold() as held:
        held.fetch(keys_of(wide.prompter.build(asked[0])))
        rows = torch.cat(list(held.blocks.values()), dim=3)  # [layers, 2, kv_heads, tokens, head_dim]
    for request in asked:
        for block in wide.prompter.build(request).blocks:
            if block.key is not None:
                for engine in engines.values():
                    with engine.pool.hold() as kept:
                        kept.publish(block.key, rows[:, :, :, : len(block)], cost=1.0, owner=None)
        for engine in engines.values():
            engine.rank(request)


def times_and_bytes(
    engines: Mapping[str, Engine],
    times: Mapping[str, Sequence[float]],
    num_requests: int,
    seed: int,
) -> dict[str, float]:
    metrics: dict[str, float] = {"num_requests_ttft": num_requests}
    rows = []
    for name in DTYPES:
        p50 = statistics.median(times[name])
        paired = [a / b for a, b in zip(times[name], times["fp32"], strict=True)]
        [ratio] = bootstrap([[value] for value in paired], seed=seed)
        metrics |= {f"ttft_ms_{name}": p50 * 1e3, f"ttft_ratio_{name}": statistics.median(paired)}
        metrics |= {f"ttft_ratio_mean_{name}": ratio.mean, f"ttft_ratio_lo_{name}": ratio.low}
        metrics |= {f"ttft_ratio_hi_{name}": ratio.high}
        spec, itemsize = engines[name].decoder.spec, engines[name].pool.dtype.itemsize
        smaller = spec.kv_bytes_per_token(4) / spec.kv_bytes_per_token(itemsize)
        metrics |= {
            f"{name}_bytes_per_token": spec.kv_bytes_per_token(itemsize),
            f"{name}_bytes_ratio_vs_fp32": smaller,
        }
        size = [
            f"{spec.kv_bytes_per_token(itemsize):,}",
            f"{smaller:.2f}",
            f"{engines[name].stats().num_bytes / 1e6:.0f}",
        ]
        took = [
            f"{p50 * 1e3:.0f}",
            f"{statistics.median(paired):.3f}",
            f"{ratio.mean:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
        ]
        rows.append([name, *size, *took])
    columns = ["dtype", "bytes per token", "times smaller", "pool MB", "P50 ms", "of fp32, paired P50", "paired mean"]
    show(f"TTFT at blocks, {num_requests} requests, {ROUNDS} rounds", columns, rows)
    return metrics


PARTS: dict[str, Callable[[Sizes, Options, RecordFile], dict[str, float]]] = {
    "ttft": ttft,
    "blocks": partial(tuned, "blocks"),
    "causal": partial(tuned, "causal"),
    "untuned": untuned,
}


if __name__ == "__main__":
    main()
