"""What the parts of `benchmarks.fidelity` share: their sizes, the requests, the engines, and how these are asked.

Knows nothing of what is measured. Invariant: held-out users alone are asked about; only training users stand in
contexts.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.harness import ROOT, console
from rcllm.config import CacheConfig, Config, ModelConfig, PromptConfig, context_samples
from rcllm.core.ranking import Level, RankOptions, RankRequest
from rcllm.data import Dataset, Negatives, build_requests, split_of
from rcllm.engine.engine import Engine
from rcllm.fidelity.evaluate import Evaluated, evaluate
from rcllm.fidelity.records import Record, RecordFile

SETS = {"scientific": "amazon_scientific", "yelp": "yelp", "goodreads": "goodreads"}
TARGETS = {"scientific": 2, "yelp": 1, "goodreads": 3}  # per user, where the test users are too few
TEMPLATES = {"causal": "titles", "blocks": "echo"}  # short prompts, as the rankers were tuned on
LONG_TEMPLATES = {"causal": "shopping", "blocks": "shopping_echo"}  # the same forms with whole item texts
CONTEXT = {"untuned": "mean(4)", "causal": "instruction", "blocks": "instruction"}
POINTWISE = RankOptions(readout="pointwise")


@dataclass(frozen=True)
class Sizes:
    """How many requests each part takes."""

    quality: int
    popular: int  # with popularity-matched negatives
    oracle: int  # of a blocks model, whose full recompute is the slow proof of an equality
    policies: int
    agreement: int  # paper-shaped, untuned
    contexts: int  # the same, for every canonical context
    timed: int


FULL, QUICK = Sizes(1000, 100, 20, 60, 50, 10, 10), Sizes(6, 6, 2, 3, 2, 1, 2)


def kinds(sizes: Sizes) -> Iterator[tuple[Negatives, str, int]]:
    """Negatives, the suffix of their metrics, requests."""
    yield "uniform", "", sizes.quality
    yield "popularity", "_popular", sizes.popular


def held_out(data: Dataset, name: str, kind: Negatives, count: int, seed: int) -> list[RankRequest]:
    return build_requests(data, count, 20, 8, kind, "test", seed, TARGETS[name], min_history=2)


def paper_shaped(
    engine: Engine, data: Dataset, name: str, num_candidates: int, count: int, seed: int
) -> list[RankRequest]:
    """Held-out requests of the paper's length, 2.2–3.0K tokens; those nearest to it where a data set has too few."""
    found = build_requests(data, None, num_candidates, 12, "uniform", "test", seed, TARGETS[name], min_history=4)
    sizes = {r.request_id: engine.prompter.build(replace(r, options=POINTWISE)).num_tokens for r in found[: count * 20]}
    some = sorted(found[: count * 20], key=lambda r: max(0, 2200 - sizes[r.request_id], sizes[r.request_id] - 3000))
    return some[:count]


@contextmanager
def engine_of(
    variant: str,
    template: str,
    data: Dataset,
    seed: int,
    context: str | None = None,
    base: RankOptions = POINTWISE,
    kv_dtype: str = "auto",
    model: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[Engine]:
    """The engine of one variant over one data set; gone afterwards, for the next one's memory.

    `model`: fields of ModelConfig beside the adapter, such as the dtype.
    """
    adapter = "" if variant == "untuned" else str(adapter_of(variant))
    context = context or CONTEXT[variant]
    cache = CacheConfig(pool_mb=4000, kv_dtype=kv_dtype)  # type: ignore[arg-type]
    config = Config(ModelConfig(adapter=adapter, **model), PromptConfig(template, context=context), cache, base)
    count = context_samples(context)
    samples = build_requests(data, count, 20, 8, split="train", seed=seed, min_history=4) if count else ()
    assert all(split_of(sample.user_id) == "train" for sample in samples if sample.user_id)
    engine = Engine.build(data.catalogue, config, samples)
    yield engine
    engine.pool.clear()
    gc.collect()


def adapter_of(variant: str) -> Path:
    return ROOT / "adapters" / f"smollm2-135m-{variant}"


def scored(
    engine: Engine,
    names: Sequence[str],
    requests: Sequence[RankRequest],
    kept: RecordFile,
    base: RankOptions = POINTWISE,
) -> dict[str, list[Record]]:
    """Records per level, under a progress bar."""
    asked = {name: replace(base, level=Level.parse(name)) for name in names}
    found = evaluated(engine, requests, list(asked.values()), kept)
    return {name: found[option] for name, option in asked.items()}


def evaluated(
    engine: Engine, requests: Sequence[RankRequest], asked: Sequence[RankOptions], kept: RecordFile
) -> Evaluated:
    done, total = 0, len(requests) * len(asked)
    with console.status("") as status:

        def more(count: int) -> None:
            nonlocal done
            done += count
            status.update(f"{done} of {total} answers")

        return evaluate(engine, requests, asked, kept, on_records=more)
