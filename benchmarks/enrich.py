"""What do richer items and scores that a team already has add to a ranker under the block mask, and at what cost?

Regime: as `benchmarks.fidelity`: held-out users of three data sets, 20 candidates, up to 8 events, SmolLM2-135M,
read-out `pointwise`, level `blocks`. Every way answers the same requests; differences from item-kNN are paired, and
intervals are 95 % bootstrap. The ways: the committed ranker; late fusion of its scores with item-kNN's, by one weight
that validation users chose; and rankers that were tuned on richer prompts (`rcllm tune --template echo_scored`,
`echo_enriched`), alone and fused. Fields and lists are made of training users alone.
Ceiling: 1; what item-kNN and the ranker know together is bounded by what either ranks first.

Adapters of richer prompts are looked for in adapters/, then in the cache folder; a way without one is left out. What is
scored is kept in the cache folder. Times are measured in one run, ways by turns.
"""

from __future__ import annotations

import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.fidelity_setup import FULL, POINTWISE, QUICK, SETS, TARGETS, Sizes, scored
from benchmarks.harness import ROOT, Options, console, dataset, options, run_parts, show
from rcllm.config import CacheConfig, Config, ModelConfig, PromptConfig
from rcllm.core.enrichment import NeighbourConfig
from rcllm.core.ranking import Interaction, ItemId, Level, RankRequest
from rcllm.data import Dataset, Negatives, Split, build_requests, fetch_movielens, histories, named_items, split_of
from rcllm.data.neighbours import Neighbours as Found
from rcllm.data.neighbours import find_neighbours, with_neighbours
from rcllm.engine.engine import Engine
from rcllm.errors import TextWarning
from rcllm.fetch import cache_dir
from rcllm.fidelity.baselines import Neighbours, baseline_gains, training_pool
from rcllm.fidelity.evaluate import evaluate_timed
from rcllm.fidelity.fusion import Scored, best_weight, gains
from rcllm.fidelity.intervals import bootstrap
from rcllm.fidelity.records import RecordFile

QUESTION = "NDCG@10, TTFT and bytes of a block-mask ranker with a score field, with neighbours, and with late fusion"
VALIDATION = 100  # requests that choose the weight
DAYS, DAY_S = 10, 86_400  # of new interactions, one after another
LENGTHS = ((4, 4), (8, 8))  # neighbours, and words of each
SHORT = "short"


@dataclass(frozen=True)
class Way:
    """One ranker and the prompts that it was tuned on."""

    name: str
    template: str
    adapter: str  # a folder of adapters/
    trained: str = ""  # or of the cache folder, where a training writes

    @property
    def folder(self) -> Path | None:
        places = [ROOT / "adapters" / self.adapter]
        places += [cache_dir() / "benchmarks" / self.trained / "best"] if self.trained else []
        return next((path for path in places if path.is_dir()), None)


NOTHING = Way("committed", "echo", "smollm2-135m-blocks")
WAYS = (
    NOTHING,
    Way("scored", "echo_scored", "smollm2-135m-scored-blocks", "enrich-scored"),
    Way("enriched", "echo_enriched", "smollm2-135m-enriched", "enrich-neighbours"),
)


def main() -> None:
    chosen = options("enrich", QUESTION, tuple(PARTS), precision=True)
    with RecordFile(cache_dir() / "benchmarks" / "enrich.jsonl") as kept:
        run_parts("enrich", QUESTION, chosen, {name: partial(part, chosen, kept) for name, part in PARTS.items()})


# ---- quality --------------------------------------------------------------------------------------------------------


def quality(name: str, kind: Negatives, chosen: Options, kept: RecordFile) -> dict[str, float]:
    """Every way on the same requests, alone and fused with item-kNN."""
    data = dataset(SETS[name])
    sizes = sizes_of(chosen)
    count, suffix = (sizes.quality, "") if kind == "uniform" else (sizes.popular, "_popular")
    test = asked(data, name, kind, count, chosen.seed)
    choosing = asked(data, name, kind, min(count, VALIDATION), chosen.seed, "validation")
    found = baseline_gains(data, test)
    weights: dict[str, float] = {}
    for way in WAYS:
        if (folder := way.folder) is None:
            console.print(f"[yellow]{way.name}: no adapter {way.adapter}; left out")
            continue
        with engine_of(way.template, data, folder, model=chosen.model) as engine:
            validation, held_out = (both(data, engine, some, kept) for some in (choosing, test))
        fused = f"{way.name} + item-kNN"
        weights[fused] = best_weight(validation)
        found[way.name], found[fused] = gains(held_out, 0.0), gains(held_out, weights[fused])
    metrics: dict[str, float] = {f"requests_{name}{suffix}": len(test), f"validation_{name}{suffix}": len(choosing)}
    rows = []
    for who, values in found.items():
        key = f"{flat(who)}_{name}{suffix}"
        figures, row = beside(values, found["item-kNN"], "knn", key, chosen.seed)
        metrics |= figures
        if who in weights:
            metrics[f"weight_{key}"] = weights[who]
        rows.append([who, *row, f"{weights[who]:.2f}" if who in weights else ""])
    columns = ["", "NDCG@10", "minus item-kNN", "weight of item-kNN"]
    show(f"{data.name}, {kind} candidates, {len(test)} held-out requests, level blocks", columns, rows)
    return metrics


def beside(
    values: Sequence[float], base: Sequence[float], whose: str, key: str, seed: int
) -> tuple[dict[str, float], list[str]]:
    """NDCG@10 and what it is more than that of `base`, paired: as metrics of `key`, and for a row."""
    mean = bootstrap([[value] for value in values], seed=seed)[0]
    delta = bootstrap([[a - b] for a, b in zip(values, base, strict=True)], seed=seed)[0]
    metrics = {f"ndcg10_{key}": mean.mean, f"ndcg10_minus_{whose}_{key}": delta.mean}
    metrics |= {f"ndcg10_minus_{whose}_lo_{key}": delta.low, f"ndcg10_minus_{whose}_hi_{key}": delta.high}
    return metrics, [str(mean), str(delta)]


def sizes_of(chosen: Options) -> Sizes:
    sizes = QUICK if chosen.quick else FULL
    if chosen.requests is None:
        return sizes
    return replace(
        sizes, quality=min(sizes.quality, chosen.requests), popular=min(sizes.popular, chosen.requests),
        timed=min(sizes.timed, chosen.requests),
    )  # fmt: skip


def asked(data: Dataset, name: str, kind: Negatives, count: int, seed: int, split: Split = "test") -> list[RankRequest]:
    """Those of `benchmarks.fidelity`, or as many of validation users as there are."""
    return build_requests(data, None, 20, 8, kind, split, seed, TARGETS[name], min_history=2)[:count]


def both(data: Dataset, engine: Engine, requests: Sequence[RankRequest], kept: RecordFile) -> list[Scored]:
    """The ranker's scores beside those of item-kNN."""
    knn = Neighbours(training_pool(data))
    records = scored(engine, ["blocks"], requests, kept)["blocks"]
    return [
        Scored(record.scores, knn.score(request), place(request))
        for request, record in zip(requests, records, strict=True)
    ]


def place(request: RankRequest) -> int:
    assert request.positive is not None
    return request.candidates.index(request.positive)


@contextmanager
def engine_of(
    template: str,
    data: Dataset,
    adapter: Path,
    pool_mb: int = 3000,
    *,
    max_item_tokens: int = 0,
    model: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[Engine]:
    """`max_item_tokens`: 0 keeps the template's; `model`: fields of ModelConfig."""
    prompt = PromptConfig(template, max_item_tokens=max_item_tokens)
    config = Config(ModelConfig(adapter=str(adapter), **model), prompt, CacheConfig(pool_mb=pool_mb), POINTWISE)
    engine = Engine.build(data.catalogue, config)
    yield engine
    engine.pool.clear()


# ---- what it costs --------------------------------------------------------------------------------------------------


def costs(name: str, chosen: Options, kept: RecordFile) -> dict[str, float]:
    """TTFT at `blocks` and at `exact` (prefix caching), and bytes an item, of every length of prompt, by turns.

    Weights do not change times, so that the committed adapter stands in for all; items are warm and users are new.
    """
    data = dataset(SETS[name])
    test = asked(data, name, "uniform", sizes_of(chosen).timed, chosen.seed)
    folder = NOTHING.folder
    assert folder is not None
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    options_of = {level: replace(POINTWISE, level=Level(level)) for level in ("blocks", "exact")}
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore", TextWarning)  # the adapter was tuned on other prompts
        shapes = shapes_of(data)
        engines = {
            who: stack.enter_context(
                engine_of(shape.template, shape.data, folder, 800, max_item_tokens=shape.limit, model=chosen.model)
            )
            for who, shape in shapes.items()
        }
        for engine in engines.values():
            engine.warm(named_items(test))
        for request in test:
            for who, engine in engines.items():
                found = evaluate_timed(engine, [request], list(options_of.values()), RecordFile(None))
                for level, option in options_of.items():
                    seconds[who, level].append(found[option][0].seconds or 0.0)
        tokens = {who: _mean_len(engine, named_items(test)) for who, engine in engines.items()}
        per_token = engines[SHORT].decoder.spec.kv_bytes_per_token(4)
    metrics: dict[str, float] = {f"cost_requests_{name}": len(test)}
    rows = []
    for who in shapes:
        pairs = zip(seconds[who, "blocks"], seconds[SHORT, "blocks"], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        over_prefix = statistics.median(seconds[who, "exact"]) / statistics.median(seconds[who, "blocks"])
        key = f"{flat(who)}_{name}"
        metrics |= {f"ttft_ratio_{key}": ratio, f"ttft_speedup_exact_{key}": over_prefix}
        metrics |= {f"item_tokens_{key}": tokens[who], f"item_bytes_{key}": tokens[who] * per_token}
        ms = statistics.median(seconds[who, "blocks"]) * 1000
        row = [f"{tokens[who]:.0f}", f"{tokens[who] * per_token / 1e6:.2f} MB", f"{ms:.0f} ms"]
        rows.append([who, *row, f"{ratio:.2f}", f"{over_prefix:.1f}×"])
    columns = [
        "prompts",
        "tokens of an item",
        "KV of an item (fp32)",
        "TTFT at blocks",
        "to short",
        "over prefix caching",
    ]
    show(f"{data.name}, {len(test)} requests, 20 candidates", columns, rows)
    return metrics


@dataclass(frozen=True)
class Shape:
    """Prompts of one length."""

    template: str
    data: Dataset
    limit: int  # tokens of an item, at most


def shapes_of(data: Dataset) -> dict[str, Shape]:
    """Today's short prompts first."""
    shapes = {SHORT: Shape("echo", data, 18), "score field": Shape("echo_scored", data, 18)}
    for count, words in LENGTHS:
        config = NeighbourConfig(count, words)
        catalogue = with_neighbours(data.catalogue, data.interactions, config)
        limit = 18 + 2 * count * words  # two tokens a word are enough for nearly all titles
        shapes[f"{count} neighbours, {words} words"] = Shape("echo_enriched", replace(data, catalogue=catalogue), limit)
    return shapes


def _mean_len(engine: Engine, item_ids: Sequence[ItemId]) -> float:
    """Tokens of an item's block."""
    items = (engine.prompter.item(item_id) for item_id in item_ids)
    return statistics.mean(len(engine.prompter.item_block(item, "history_first")) for item in items)


# ---- how often it changes -------------------------------------------------------------------------------------------


def stability(chosen: Options, kept: RecordFile) -> dict[str, float]:
    """Items whose neighbours a day of new interactions changes, with the rule that keeps lists and without.

    MovieLens-100K, which has a clock: the last days of its log, one after another, of training users.
    """
    data = fetch_movielens()
    rows = sorted((row for row in data.interactions if split_of(row.user_id) == "train"), key=lambda row: row.timestamp)
    days = sorted({int(row.timestamp // DAY_S) for row in rows})[-DAYS:]
    config = NeighbourConfig()
    before = _lists(data, rows, days[0], config)
    anew = before
    touched, changed, would, new_rows = [], [], [], []
    for day in days:
        today = [row for row in rows if int(row.timestamp // DAY_S) == day]
        found = find_neighbours(data.catalogue, _until(rows, day + 1), config, before.lists)
        fresh = find_neighbours(data.catalogue, _until(rows, day + 1), config)
        would.append(sum(fresh.texts.get(i) != anew.texts.get(i) for i in data.catalogue))
        changed.append(sum(found.texts.get(i) != before.texts.get(i) for i in data.catalogue))
        touched.append(len({row.item_id for row in today}))
        new_rows.append(len(today))
        before, anew = found, fresh
    means = {
        "interactions_a_day": statistics.mean(new_rows),
        "items_interacted_a_day": statistics.mean(touched),
        "items_changed_a_day": statistics.mean(changed),
        "items_changed_a_day_without_rule": statistics.mean(would),
    }
    columns = ["a day", "mean", "share of items"]
    shares = {key: f"{value / len(data.catalogue):.1%}" for key, value in means.items() if key.startswith("items")}
    table = [[key, f"{value:.1f}", shares.get(key, "")] for key, value in means.items()]
    show(f"MovieLens-100K, {len(data.catalogue):,} items, the last {len(days)} days with interactions", columns, table)
    return {f"{key}_movielens": value for key, value in means.items()} | {"items_movielens": len(data.catalogue)}


def _until(rows: Sequence[Interaction], day: int) -> list[list[ItemId]]:
    """What each user had chosen before that day."""
    return [
        [row.item_id for row in some]
        for some in histories(row for row in rows if int(row.timestamp // DAY_S) < day).values()
    ]


def _lists(data: Dataset, rows: Sequence[Interaction], day: int, config: NeighbourConfig) -> Found:
    return find_neighbours(data.catalogue, _until(rows, day), config)


def flat(who: str) -> str:
    """`committed + item-kNN` → committed_item_knn."""
    return "_".join("".join(c if c.isalnum() else " " for c in who.lower()).split())


PARTS: dict[str, Callable[[Options, RecordFile], dict[str, float]]] = {
    **{f"quality_{name}": partial(quality, name, "uniform") for name in SETS},
    **{f"popular_{name}": partial(quality, name, "popularity") for name in SETS},
    **{f"costs_{name}": partial(costs, name) for name in SETS},
    "stability": stability,
}


if __name__ == "__main__":
    main()
