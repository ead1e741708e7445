"""What does the semantic history pool save, and what does it cost, against exact KV per user?

Regime: held-out users of Amazon Scientific, 20 candidates, items warm, SmolLM2-135M in fp32 on the CPU; one request at
a time, all ways of treating the history interleaved on the same requests in one run, all else at level `blocks`. The
pool is built from histories of training users; a prototype is one occurrence, as in RcLLM. Parts: `untuned`, agreement,
TTFT and bytes on paper-shaped prompts, read-out `label`; `causal`, quality of the ranker tuned under the causal mask,
short prompts, read-out `pointwise`.

Ceiling: RcLLM (§III-B) finds a prototype for over 93 % of the tokens of reviews; `shared`, whose history has no fresh
token at all, bounds the TTFT of `semantic`.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from dataclasses import replace
from functools import partial

from benchmarks.harness import ROOT, console, dataset, options, percentile, run_parts, show, timed
from rcllm.config import CacheConfig, Config, ModelConfig, PromptConfig
from rcllm.core.ranking import Level, RankOptions, RankRequest, UserId
from rcllm.core.receipts import BlockKind
from rcllm.data import Dataset, build_requests, named_items
from rcllm.engine.engine import Engine
from rcllm.fetch import cache_dir
from rcllm.fidelity.intervals import bootstrap
from rcllm.fidelity.measures import agreement, ndcg
from rcllm.prototypes.build import BuildReport, PrototypeBuilder
from rcllm.prototypes.config import PrototypeConfig
from rcllm.prototypes.pool import PrototypePool
from rcllm.prototypes.texts import dataset_histories, token_runs

QUESTION = "Quality, bytes and TTFT of the semantic history pool against exact history per user"
NUM_EVENTS = 12
ADAPTER = ROOT / "adapters" / "smollm2-135m-causal"
MODES: dict[str, RankOptions] = {  # "back": the user's chain is there from an earlier request
    "full": RankOptions(level=Level("full")),
    "exact_new": RankOptions(level=Level("blocks"), history="chain"),
    "exact_back": RankOptions(level=Level("blocks"), history="chain"),
    "shared": RankOptions(level=Level("blocks"), history="shared"),
    "semantic": RankOptions(level=Level("blocks"), history="semantic"),
    "semantic_corrected30": RankOptions(level=Level("corrected", 0.3, 0.3), history="semantic"),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    users: int  # whose histories the pool is made from
    quality: int  # requests
    timed: int


FULL, QUICK = Sizes(400, 200, 16), Sizes(60, 10, 4)


def main() -> None:
    chosen = options("semantic_pool", QUESTION, tuple(PARTS))
    sizes = QUICK if chosen.quick else FULL
    if chosen.requests is not None:
        sizes = Sizes(sizes.users, min(sizes.quality, chosen.requests), min(sizes.timed, chosen.requests))
    data = dataset("amazon_scientific")
    parts = {name: partial(part, data, sizes, chosen.seed) for name, part in PARTS.items()}
    run_parts("semantic_pool", QUESTION, chosen, parts)


def untuned(data: Dataset, sizes: Sizes, seed: int) -> dict[str, float]:
    engine, built = engine_with_pool(data, "shopping", "", sizes.users, seed)
    requests = build_requests(data, sizes.timed, 20, NUM_EVENTS, seed=seed, min_history=4)
    found = measured(engine, requests, RankOptions(), "Untuned, label")
    return {**size(engine, built, requests), **{f"{name}_untuned": value for name, value in found.items()}}


def causal(data: Dataset, sizes: Sizes, seed: int) -> dict[str, float]:
    engine, _ = engine_with_pool(data, "titles", str(ADAPTER), sizes.users, seed)
    requests = build_requests(data, sizes.quality, 20, 8, "uniform", "test", seed, 2, min_history=2)
    found = measured(engine, requests, RankOptions(readout="pointwise"), "Tuned (causal), pointwise")
    return {f"{name}_causal": value for name, value in found.items() if not name.startswith("ttft_")}


def engine_with_pool(data: Dataset, template: str, adapter: str, users: int, seed: int) -> tuple[Engine, BuildReport]:
    """An engine over a pool that is built in rcllm's cache folder; an interrupted build goes on there."""
    config = Config(ModelConfig(adapter=adapter), PromptConfig(template), CacheConfig(pool_mb=6000))
    engine = Engine.build(data.catalogue, config)
    path = cache_dir() / "benchmarks" / f"semantic-{template}-{users}-{seed}.pool"
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = PrototypeConfig(seed=seed)
    builder = PrototypeBuilder(
        engine.decoder, engine.prompter, chosen, path, model_id=engine.model_id, kv_dtype=engine.pool.dtype
    )
    texts = token_runs(engine.prompter, dataset_histories(data, NUM_EVENTS)[:users], chosen.member_context)
    with console.status("building the pool") as status:
        built = builder.run(
            texts, data.name, lambda now: status.update(f"building the pool: {now.done_shards} of {now.num_shards}")
        )
    pool = PrototypePool.open(path, engine.decoder, engine.prompter.namespace)
    parts = engine.config, engine.decoder, engine.prompter, engine.pool, engine.model_id
    return Engine(*parts, prototypes=pool), built


def size(engine: Engine, built: BuildReport, requests: list[RankRequest]) -> dict[str, float]:
    """Bytes of the pool and of exact histories, and how much of held-out texts the pool stands for."""
    assert built.held_out is not None
    prompts = [engine.prompter.build(request) for request in requests]
    tokens = [sum(len(b) for b in prompt.blocks if b.kind is BlockKind.HISTORY) for prompt in prompts]
    per_user = statistics.mean(tokens) * engine.decoder.spec.kv_bytes_per_token(engine.pool.dtype.itemsize)
    pool = engine.prototypes
    assert pool is not None
    took = [timed(pool.borrow, prompt)[0] for prompt in prompts]
    found = {
        "pool_prototypes": built.header.prototypes,
        "pool_mb": built.file_bytes / 1e6,
        "exact_mb_per_user": per_user / 1e6,
        "break_even_users": built.file_bytes / per_user,
        "held_out_reused_share": built.held_out.reused_share,
        "held_out_language_share": built.held_out.language_share,
        "held_out_mean_cosine": built.held_out.mean_cosine,
        "lookup_ms_p50": statistics.median(took) * 1e3,
    }
    show("The pool", ["what", "value"], [[name, f"{value:,.3f}"] for name, value in found.items()])
    return found


def measured(engine: Engine, requests: list[RankRequest], base: RankOptions, title: str) -> dict[str, float]:
    """TTFT, agreement with full recompute and NDCG@10 of every mode."""
    engine.warm(named_items(requests))
    times, fresh, tau, shift, gains = (defaultdict[str, list[float]](list) for _ in range(5))
    for request in requests:
        reference: tuple[float, ...] = ()
        for mode, chosen in MODES.items():
            user = UserId(f"{request.user_id}/{mode}")  # of its own: no mode finds what another one published
            wanted = replace(base, level=chosen.level, history=chosen.history)
            asked = replace(request, user_id=user, options=wanted)
            if request is requests[0] or mode == "exact_back":
                engine.rank(asked)
            if mode != "exact_back":
                engine.erase_user(user)
            took, answer = timed(engine.rank, asked)
            engine.erase_user(user)
            reference = reference or answer.scores
            close = agreement(reference, answer.scores)
            times[mode].append(took)
            fresh[mode].append(answer.receipt.num_fresh)
            tau[mode].append(close.tau)
            shift[mode].append(close.max_shift)
            assert request.positive is not None
            gains[mode].append(ndcg(answer.order, request.candidates.index(request.positive), 10))
    metrics, rows = {"num_requests": float(len(requests))}, []
    for mode in MODES:
        change = [[a - b] for a, b in zip(gains[mode], gains["full"], strict=True)]
        delta = bootstrap(change, seed=0)[0]
        p50 = statistics.median(times[mode])
        metrics |= {
            f"ttft_ms_{mode}": p50 * 1e3,
            f"ttft_speedup_{mode}": statistics.median(times["exact_new"]) / p50,
            f"fresh_tokens_{mode}": statistics.median(fresh[mode]),
            f"tau_{mode}": statistics.mean(tau[mode]),
            f"max_shift_{mode}": statistics.mean(shift[mode]),
            f"ndcg10_{mode}": statistics.mean(gains[mode]),
            f"ndcg10_delta_{mode}": delta.mean,
            f"ndcg10_delta_lo_{mode}": delta.low,
            f"ndcg10_delta_hi_{mode}": delta.high,
        }
        row = [mode, f"{p50 * 1e3:.0f}", f"{percentile(times[mode], 0.9) * 1e3:.0f}"]
        row += [f"{metrics[f'fresh_tokens_{mode}']:.0f}", f"{metrics[f'tau_{mode}']:.3f}"]
        row += [f"{metrics[f'max_shift_{mode}']:.3f}", f"{metrics[f'ndcg10_{mode}']:.3f}", str(delta)]
        rows.append(row)
    columns = ["history", "P50 ms", "P90 ms", "fresh tokens", "Kendall τ", "largest shift", "NDCG@10", "Δ full"]
    show(f"{title}, {len(requests)} requests", columns, rows)
    return metrics


PARTS = {"untuned": untuned, "causal": causal}


if __name__ == "__main__":
    main()
