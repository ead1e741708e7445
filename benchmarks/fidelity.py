"""What does reuse cost in ranking quality, on rankers that rank, and what does it gain?

Regime: held-out users of three data sets; short prompts (templates `titles` and, under the block mask, `echo`: 20
candidates, up to 8 events, 500 to 700 tokens), read-out `pointwise`, SmolLM2-135M tuned by `rcllm tune` under the
causal mask and under the block mask (adapters/), and untuned for score agreement. NDCG@10 against the item that the
user did choose next; every difference is paired with full recompute of the same variant, intervals are 95 % bootstrap.
Beside it popularity and item-kNN on the same requests. TTFT is measured apart, on prompts of the paper's length.
Ceiling: see `benchmarks.ttft`.

What is scored is kept in the cache folder of rcllm, so that an interrupted run goes on where it was. What is timed is
not: both sides are measured in one run.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial

import numpy as np

from benchmarks.fidelity_setup import (
    CONTEXT,
    FULL,
    LONG_TEMPLATES,
    POINTWISE,
    QUICK,
    SETS,
    TEMPLATES,
    Sizes,
    engine_of,
    evaluated,
    held_out,
    kinds,
    paper_shaped,
    scored,
)
from benchmarks.harness import Options, dataset, options, run_parts, show
from rcllm.core.ranking import Block, Level, Policy, RankOptions, RankRequest, Selection, order
from rcllm.data import named_items
from rcllm.engine.engine import Engine
from rcllm.fetch import cache_dir
from rcllm.fidelity.baselines import Baseline, Neighbours, Popularity, gain, training_pool
from rcllm.fidelity.evaluate import evaluate_timed
from rcllm.fidelity.intervals import Interval, bootstrap
from rcllm.fidelity.measures import chance_ndcg, ndcg
from rcllm.fidelity.records import Record, RecordFile
from rcllm.fidelity.summary import CLOSENESS, Summary, summarise, timing

QUESTION = "NDCG@10, score agreement and TTFT of the reuse levels on tuned rankers, three data sets"
LEVELS = {
    "causal": ("full", "blocks", "tail(0.1)", "tail(0.3)", "corrected(0.3,0.3)"),
    "blocks": ("full", "blocks"),
    "untuned": ("full", "blocks"),
}
POLICIES: tuple[Policy, ...] = (
    "rcllm",
    "k_difference",
    "question",
    "static",
    "two_pass",
    "first",
    "tail",
    "random",
)
POLICY_BUDGETS = (0.1, 0.3)
CONTEXTS = ("none", "bos", "instruction", "typical", "mean(4)", "mean(16)")
BUDGETS = (0.0, 0.1, 0.3, 0.5, 0.7, 1.0)
TTFT_LEVELS = {
    "causal": (
        "exact",
        "full",
        "corrected(0.3,0.3)",
        "tail(0.3)",
        "tail(0.1)",
        "linked(16)",
        "linked(4)",
        "blocks",
    ),
    "blocks": ("exact", "full", "blocks"),
}
SLOW = ("policies_goodreads", "contexts", "ttft_yelp", "ttft_goodreads")
TTFT_CANDIDATES = {"scientific": 20, "yelp": 60, "goodreads": 75}  # so many texts make a prompt of the paper's length
TTFT_TURN = 3  # requests that one engine answers before the other one does


def main() -> None:
    chosen = options("fidelity", QUESTION, tuple(PARTS), precision=True)
    sizes = QUICK if chosen.quick else FULL
    if chosen.requests is not None:
        sizes = Sizes(**{name: min(count, chosen.requests) for name, count in asdict(sizes).items()})
    with RecordFile(cache_dir() / "benchmarks" / "fidelity.jsonl") as kept:
        parts = {name: partial(part, sizes, chosen, kept) for name, part in PARTS.items()}
        run_parts("fidelity", QUESTION, chosen, parts, SLOW)


# ---- quality --------------------------------------------------------------------------------------------------------


def baselines(name: str, sizes: Sizes, chosen: Options, kept: RecordFile) -> dict[str, float]:
    """What a ranker must beat, on the same requests."""
    data = dataset(SETS[name])
    pool = training_pool(data)
    models: Mapping[str, Baseline] = {"popularity": Popularity(pool), "knn": Neighbours(pool)}
    metrics = {f"ndcg10_chance_{name}": chance_ndcg(20, 10)}
    for kind, suffix, count in kinds(sizes):
        requests = held_out(data, name, kind, count, chosen.seed)
        metrics[f"num_requests_{name}{suffix}"] = len(requests)
        for model, fitted in models.items():
            metrics[f"ndcg10_{model}_{name}{suffix}"] = statistics.mean(gain(fitted.score(r), r) for r in requests)
    return metrics


def quality(name: str, variant: str, sizes: Sizes, chosen: Options, kept: RecordFile) -> dict[str, float]:
    """The table of levels of one variant on one set, with both kinds of negatives."""
    data = dataset(SETS[name])
    metrics: dict[str, float] = {}
    with engine_of(variant, TEMPLATES[variant], data, chosen.seed, model=chosen.model) as engine:
        for kind, suffix, count in kinds(sizes):
            requests = held_out(data, name, kind, count, chosen.seed)
            rows = []
            for level, summary in levels(engine, variant, requests, sizes, kept).items():
                ndcg10, delta, tau = summary.measures["ndcg10"], summary.deltas["ndcg10"], summary.measures["tau"]
                at = f"{flat(level)}_{variant}_{name}{suffix}"
                metrics |= {f"ndcg10_{at}": ndcg10.mean, f"tau_{at}": tau.mean, f"num_{at}": summary.num_requests}
                metrics |= {f"ndcg10_delta_{at}": delta.mean, f"ndcg10_delta_lo_{at}": delta.low}
                metrics |= {f"ndcg10_delta_hi_{at}": delta.high, f"flops_saved_{at}": summary.flops_saved}
                row = [level, str(summary.num_requests), str(ndcg10), f"{delta.mean:+.4f}"]
                row += [f"[{delta.low:+.4f}, {delta.high:+.4f}]", f"{tau.mean:.3f}", f"{summary.flops_saved:.0%}"]
                rows.append(row)
            columns = ["level", "requests", "NDCG@10", "Δ full", "95 %", "Kendall τ", "FLOPs saved"]
            show(f"{name}, {variant} mask, {kind} negatives", columns, rows)
    return metrics


def levels(
    engine: Engine, variant: str, requests: Sequence[RankRequest], sizes: Sizes, kept: RecordFile
) -> dict[str, Summary]:
    """Under the block mask `blocks` is exact by construction: full recompute of some requests is there to prove it."""
    if variant == "blocks":
        every = scored(engine, ["blocks"], requests, kept)["blocks"]
        oracle = scored(engine, ["full"], requests[: sizes.oracle], kept)["full"]
        some, whole = summarise(every[: len(oracle)], oracle), summarise(every, every)
        close = {name: some.measures[name] for name in CLOSENESS}
        reused = replace(whole, deltas=some.deltas, measures={**whole.measures, **close}, flops_saved=some.flops_saved)
        return {"full": summarise(oracle, oracle), "blocks": reused}
    found = scored(engine, LEVELS[variant], requests, kept)
    return {level: summarise(records, found["full"]) for level, records in found.items()}


def rankers(name: str, sizes: Sizes, chosen: Options, kept: RecordFile) -> dict[str, float]:
    """The block-mask ranker at `blocks` against the causal one in full: what it costs a team to change over."""
    data = dataset(SETS[name])
    requests = {kind: held_out(data, name, kind, count, chosen.seed) for kind, _, count in kinds(sizes)}
    gains: dict[tuple[str, str], list[float]] = {}
    for variant, level in (("blocks", "blocks"), ("causal", "full")):
        with engine_of(variant, TEMPLATES[variant], data, chosen.seed, model=chosen.model) as engine:
            for kind, some in requests.items():
                records = scored(engine, [level], some, kept)[level]
                gains[variant, kind] = [
                    ndcg(order(r.scores), r.positive, 10) for r in records if r.positive is not None
                ]
    metrics: dict[str, float] = {}
    rows = []
    for kind, suffix, _ in kinds(sizes):
        ours, theirs = gains["blocks", kind], gains["causal", kind]
        delta = bootstrap([[a - b] for a, b in zip(ours, theirs, strict=True)], seed=chosen.seed)[0]
        at = f"blocks_blocks_over_full_causal_{name}{suffix}"
        metrics |= {f"ndcg10_delta_{at}": delta.mean, f"ndcg10_delta_lo_{at}": delta.low}
        metrics |= {f"ndcg10_delta_hi_{at}": delta.high}
        means = [f"{statistics.mean(some):.3f}" for some in (ours, theirs)]
        rows.append([kind, str(len(ours)), *means, str(delta)])
    columns = ["negatives", "requests", "block mask, blocks", "causal mask, full", "difference"]
    show(f"NDCG@10 of the two rankers, {name}", columns, rows)
    return metrics


# ---- which tokens to correct ----------------------------------------------------------------------------------------


def policies(name: str, sizes: Sizes, chosen: Options, kept: RecordFile) -> dict[str, float]:
    """All selection policies at equal numbers of fresh tokens, on the causal ranker."""
    data = dataset(SETS[name])
    metrics: dict[str, float] = {}
    rows: list[list[str]] = []
    requests = held_out(data, name, "uniform", sizes.policies, chosen.seed)
    with engine_of("causal", "titles", data, chosen.seed, model=chosen.model) as engine:
        full = scored(engine, ["full"], requests, kept)["full"]
        for share in POLICY_BUDGETS:
            for policy in POLICIES:
                level = Level("corrected", share, share)
                check = 1 if policy == "k_difference" else 0  # in layer 0 keys depend on their token alone
                asked = replace(POINTWISE, level=level, selection=Selection(policy, check_layer=check))
                summary = summarise(evaluated(engine, requests, [asked], kept)[asked], full)
                tau, shift, delta = summary.measures["tau"], summary.measures["max_shift"], summary.deltas["ndcg10"]
                at = f"corrected{round(share * 100)}_{policy}_{name}"
                metrics |= {f"tau_{at}": tau.mean, f"max_shift_{at}": shift.mean, f"fresh_{at}": summary.fresh_tokens}
                row = [
                    f"{share:.0%}",
                    policy,
                    f"{summary.fresh_tokens:.0f}",
                    str(tau),
                    str(shift),
                    f"{delta.mean:+.4f}",
                ]
                rows.append(row)
    columns = ["budget", "policy", "fresh tokens", "Kendall τ", "largest shift", "Δ NDCG@10"]
    show(f"Selection policies at equal fresh tokens, {name}, {len(requests)} requests", columns, rows)
    return metrics


def budgets(name: str, sizes: Sizes, chosen: Options, kept: RecordFile) -> dict[str, float]:
    """The error of `corrected` as its budget grows: it falls, and ends at zero."""
    data = dataset(SETS[name])
    metrics: dict[str, float] = {}
    rows: list[list[str]] = []
    requests = held_out(data, name, "uniform", sizes.policies, chosen.seed)
    with engine_of("causal", "titles", data, chosen.seed, model=chosen.model) as engine:
        full = scored(engine, ["full"], requests, kept)["full"]
        for share in BUDGETS:
            asked = replace(POINTWISE, level=Level("corrected", share, share))
            records = evaluated(engine, requests, [asked], kept)[asked]
            error = mean_shift([(a.scores, b.scores) for a, b in zip(full, records, strict=True)], chosen.seed)
            tau = summarise(records, full).measures["tau"]
            at = f"corrected{round(share * 100)}_causal_{name}"
            metrics |= {
                f"mean_shift_{at}": error.mean,
                f"mean_shift_lo_{at}": error.low,
                f"mean_shift_hi_{at}": error.high,
            }
            metrics[f"tau_{at}_n{len(requests)}"] = tau.mean
            rows.append([f"{share:.0%}", str(error), str(tau)])
    show(f"Error by budget, {name}, {len(requests)} requests", ["budget", "mean |score shift|", "Kendall τ"], rows)
    return metrics


def mean_shift(pairs: Sequence[tuple[Sequence[float], Sequence[float]]], seed: int) -> Interval:
    values = [[float(np.abs(np.subtract(a, b)).mean())] for a, b in pairs]
    return bootstrap(values, seed=seed)[0]


# ---- the untuned model, and time ------------------------------------------------------------------------------------


def untuned(sizes: Sizes, chosen: Options, kept: RecordFile) -> dict[str, float]:
    """Agreement of the scores on paper-shaped prompts, label read-out: fidelity without any claim of quality."""
    data = dataset(SETS["scientific"])
    metrics: dict[str, float] = {}
    rows: list[list[str]] = []
    for context in ("instruction", CONTEXT["untuned"]):
        with engine_of("untuned", "shopping", data, chosen.seed, context, RankOptions(), model=chosen.model) as engine:
            requests = paper_shaped(engine, data, "scientific", 20, sizes.agreement, chosen.seed)
            found = scored(engine, LEVELS["untuned"], requests, kept, RankOptions())
            for level, records in found.items():
                summary = summarise(records, found["full"])
                suffix = "" if context == CONTEXT["untuned"] else f"_{context}"
                metrics[f"tau_{flat(level)}_untuned_scientific{suffix}"] = summary.measures["tau"].mean
                shift, top1 = summary.measures["max_shift"], summary.measures["top1"]
                rows.append([context, level, str(summary.measures["tau"]), f"{top1.mean:.2f}", str(shift)])
    metrics["num_requests_untuned_scientific"] = len(requests)
    columns = ["context", "level", "Kendall τ", "top-1", "largest log-prob shift"]
    show(f"Untuned, paper-shaped prompts, label read-out, {len(requests)} requests", columns, rows)
    return metrics


def contexts(sizes: Sizes, chosen: Options, kept: RecordFile) -> dict[str, float]:
    """What stood before an item when its KV was computed: the effect on `blocks`, and what warming it takes."""
    data = dataset(SETS["scientific"])
    metrics: dict[str, float] = {}
    rows: list[list[str]] = []
    for context in CONTEXTS:
        with engine_of("untuned", "shopping", data, chosen.seed, context, RankOptions(), model=chosen.model) as engine:
            requests = paper_shaped(engine, data, "scientific", 20, sizes.contexts, chosen.seed)
            found = scored(engine, ["full", "blocks"], requests, kept, RankOptions())
            tau = summarise(found["blocks"], found["full"]).measures["tau"]
            engine.pool.clear()
            warmed = engine.warm(named_items(requests[:2]))
            blocks = sum(len(b) for b in {b.key: b for b in _cached_blocks(engine, requests[:2])}.values())
            name = context.replace("(", "").replace(")", "")
            metrics[f"tau_blocks_untuned_context_{name}"] = tau.mean
            metrics[f"warm_tokens_per_token_{name}"] = warmed.computed_tokens / blocks
            metrics[f"warm_tokens_per_s_{name}"] = blocks / warmed.elapsed_s
            rows.append(
                [context, str(tau), f"{warmed.computed_tokens / blocks:.2f}", f"{blocks / warmed.elapsed_s:.0f}"]
            )
    columns = ["context", "Kendall τ of blocks", "tokens computed per token kept", "tokens warmed per second"]
    show(f"Canonical contexts, untuned, {sizes.contexts} paper-shaped requests", columns, rows)
    return metrics


def _cached_blocks(engine: Engine, requests: Sequence[RankRequest]) -> Iterator[Block]:
    """What `warm` computes for the items of the requests."""
    for item_id in named_items(requests):
        item = engine.prompter.item(item_id)
        yield engine.prompter.item_block(item, "history_first")
        yield engine.prompter.event_block(item, "history_first")


def ttft(name: str, sizes: Sizes, chosen: Options, kept: RecordFile) -> dict[str, float]:
    """Paper-shaped prompts, one request at a time, items warm, users new; level `exact` is prefix caching.

    Both rankers answer the same requests in turns. The one of the block mask is held against prefix caching of its own
    prompts, and against prefix caching of the causal ranker, which is what engines offer today.
    """
    data = dataset(SETS[name])
    num_candidates = TTFT_CANDIDATES[name]
    with (
        engine_of("causal", LONG_TEMPLATES["causal"], data, chosen.seed, model=chosen.model) as causal,
        engine_of("blocks", LONG_TEMPLATES["blocks"], data, chosen.seed, model=chosen.model) as blocks,
    ):
        requests = paper_shaped(causal, data, name, num_candidates, sizes.timed, chosen.seed)
        found: dict[tuple[str, str], list[Record]] = defaultdict(list)
        for start in range(0, len(requests), TTFT_TURN):
            some = requests[start : start + TTFT_TURN]
            for variant, engine in {"causal": causal, "blocks": blocks}.items():
                asked = {replace(POINTWISE, level=Level.parse(level)): level for level in TTFT_LEVELS[variant]}
                for option, records in evaluate_timed(engine, some, list(asked), RecordFile(None)).items():
                    found[variant, asked[option]] += records
    metrics: dict[str, float] = {f"ttft_num_{name}": len(requests)}
    rows: list[list[str]] = []
    for (variant, level), records in found.items():
        full, exact = found[variant, "full"], found[variant, "exact"]
        took, over_causal = timing(records, full, exact), timing(records, full, found["causal", "exact"])
        at = f"{flat(level)}_{variant}"
        metrics[f"ttft_speedup_{at}_{name}"] = took.speedup_exact
        if variant == "blocks":
            metrics[f"ttft_speedup_{at}_over_causal_{name}"] = over_causal.speedup_exact
        metrics[f"ttft_prompt_tokens_{variant}_{name}"] = statistics.median(record.num_tokens for record in full)
        fresh = statistics.median(record.num_fresh for record in records)
        row = [f"{variant}, {level}", f"{fresh:.0f}", f"{took.ttft_ms:.0f}", f"{took.speedup_exact:.2f}×"]
        rows.append([*row, f"{over_causal.speedup_exact:.2f}×"])
    columns = ["mask, level", "fresh tokens", "P50 ms", "over its prefix caching", "over the causal ranker's"]
    tokens = metrics[f"ttft_prompt_tokens_causal_{name}"]
    show(f"TTFT, {name}, {num_candidates} candidates, {tokens:.0f} tokens, {len(requests)} requests", columns, rows)
    return metrics


def flat(level: str) -> str:
    """`corrected(0.3,0.3)` → corrected30, `linked(4)` → linked4."""
    parsed = Level.parse(level)
    share = {"tail": 100, "corrected": 100, "linked": 1}.get(parsed.name, 0)
    return parsed.name + (str(round(parsed.budget * share)) if share else "")


PARTS: dict[str, Callable[[Sizes, Options, RecordFile], dict[str, float]]] = {
    **{f"baselines_{name}": partial(baselines, name) for name in SETS},
    **{f"{variant}_{name}": partial(quality, name, variant) for variant in TEMPLATES for name in SETS},
    **{f"rankers_{name}": partial(rankers, name) for name in SETS},
    "policies_scientific": partial(policies, "scientific"),
    "policies_goodreads": partial(policies, "goodreads"),
    "budgets": partial(budgets, "scientific"),
    "untuned": untuned,
    "contexts": contexts,
    **{f"ttft_{name}": partial(ttft, name) for name in SETS},
}


if __name__ == "__main__":
    main()
