"""Figures of this server for Prometheus: how long, how many, from which tier, and how well that was foreseen.

Names are vLLM's where it has one, with its label for the model. Knows nothing of endpoints. Invariant: every label is
one of a few words of ours, so that no request can make a new series, and none holds what a user wrote.
"""

from __future__ import annotations

from collections import Counter as Counted
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import (
    GC_COLLECTOR,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from rcllm.core.decoding import Generated
from rcllm.core.ranking import RankResponse
from rcllm.server.backend import Response, Stats

# seconds; vLLM's begin at .3 for whole requests, where a ranking has long been answered
BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30, 60)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
_LEVELS = ("full", "exact", "corrected", "linked", "tail", "blocks")
_MODEL = "model_name"


class Metrics:
    """One registry per application, so that two in one process do not share figures."""

    def __init__(self, model: str, stats: Callable[[], Stats]) -> None:
        """`stats`: of the backend, asked at every scrape."""
        self.registry = CollectorRegistry()
        self._model = model
        self._ttft = self._times("vllm:time_to_first_token_seconds", "until the scores, or the first token of a text")
        self._ttft_by_level = Histogram(
            "rcllm:time_to_first_token_seconds",
            "Seconds until the scores, or the first token of a text, by reuse level.",
            (_MODEL, "kind", "level"),
            buckets=BUCKETS,
            registry=self.registry,
        )
        self._whole = self._times("vllm:e2e_request_latency_seconds", "of whole requests, in the application")
        self._queue = self._times("vllm:request_queue_time_seconds", "between look-up and the first pass")
        self._forward = self._times("rcllm:request_forward_seconds", "of the passes that a request took part in")
        self._batch = Histogram(
            "rcllm:batch_size",
            "Requests whose prompts were computed together.",
            (_MODEL, "kind"),
            buckets=_BATCHES,
            registry=self.registry,
        )
        self._prompt_tokens = self._count("vllm:prompt_tokens", "Tokens of prompts.")
        self._answer_tokens = self._count("vllm:generation_tokens", "Tokens that were generated.")
        self._queries = self._count("vllm:prefix_cache_queries", "Tokens of prompts that the cache was asked for.")
        self._hits = self._count("vllm:prefix_cache_hits", "Of them, those that were reused.")
        self._success = self._count("vllm:request_success", "Answered requests.", "finished_reason", "kind")
        self._tokens = self._count("rcllm:tokens", "Tokens of rankings by block and source.", "block", "source")
        self._reads = self._count("rcllm:block_reads", "Blocks of rankings by the tier they came from.", "tier")
        self._levels = self._count("rcllm:answers", "Answers by reuse level.", "kind", "level")
        self._degraded = self._count("rcllm:degraded", "What was given up to keep deadlines.", "step")
        self._failures = self._count("rcllm:request_failures", "Requests without an answer.", "kind", "code")
        self.registry.register(_OfBackend(model, stats))
        ProcessCollector(registry=self.registry)
        self.registry.register(GC_COLLECTOR)

    def _times(self, name: str, about: str) -> Histogram:
        told = f"Seconds {about}."
        return Histogram(name, told, (_MODEL, "kind"), buckets=BUCKETS, registry=self.registry)

    def _count(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(name, about, (_MODEL, *labels), registry=self.registry)

    def answered(self, kind: str, response: Response, whole_s: float, first_s: float) -> None:
        """`first_s`: until the first token; of a ranking, as long as the whole."""
        receipt, model = response.receipt, self._model
        self._whole.labels(model, kind).observe(whole_s)
        self._ttft.labels(model, kind).observe(first_s)
        self._queue.labels(model, kind).observe(receipt.stage_ms.get("wait", 0.0) / 1e3)
        forward_ms = receipt.stage_ms.get("forward", 0.0) + receipt.stage_ms.get("step", 0.0)
        self._forward.labels(model, kind).observe(forward_ms / 1e3)
        self._batch.labels(model, kind).observe(receipt.batch_size)
        self._prompt_tokens.labels(model).inc(receipt.num_tokens)
        self._queries.labels(model).inc(receipt.num_tokens)
        self._hits.labels(model).inc(receipt.num_reused)
        level = receipt.level.partition("(")[0]
        level = level if level in _LEVELS else "other"
        self._levels.labels(model, kind, level).inc()
        self._ttft_by_level.labels(model, kind, level).observe(first_s)
        for step in receipt.degraded:
            self._degraded.labels(model, step).inc()
        reason = "stop"
        if isinstance(response, Generated):
            self._answer_tokens.labels(model).inc(len(response.token_ids))
            reason = "length" if response.finish_reason == "length" else "stop"
        self._success.labels(model, reason, kind).inc()
        if isinstance(response, RankResponse):
            self._blocks(response)

    def _blocks(self, response: RankResponse) -> None:
        tokens, reads = Counted[tuple[str, str]](), Counted[str]()
        for block in response.receipt.blocks:
            tokens[block.kind, "fresh"] += block.num_fresh
            tokens[block.kind, block.source] += block.num_reused
            reads[block.source] += block.num_reused > 0
        for (kind, source), number in tokens.items():
            self._tokens.labels(self._model, kind, source).inc(number)
        for source, number in reads.items():
            self._reads.labels(self._model, source).inc(number)

    def failed(self, kind: str, code: str) -> None:
        self._failures.labels(self._model, kind, code).inc()

    def tally(self) -> Tally:
        """What the page shows of requests."""
        times: dict[tuple[str, str], dict[float, float]] = {}
        for labels, value in _samples(self._ttft_by_level, "_bucket"):
            times.setdefault((labels["kind"], labels["level"]), {})[float(labels["le"])] = value
        return Tally(
            bounds_s=BUCKETS,
            ttft=tuple(LevelTimes(kind, level, _apart(found)) for (kind, level), found in times.items()),
            answered=_sums(self._success, "kind"),
            failed=_sums(self._failures, "code"),
            degraded=_sums(self._degraded, "step"),
            tokens=_sums(self._tokens, "source"),
        )

    def text(self) -> bytes:
        """In Prometheus' own format."""
        return generate_latest(self.registry)


@dataclass(frozen=True, slots=True)
class LevelTimes:
    """How long answers of one level took until their first token."""

    kind: str
    level: str
    counts: tuple[float, ...]  # for each bound, those up to it and above the one before; the last: above all


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of requests since the start."""

    bounds_s: tuple[float, ...]
    ttft: tuple[LevelTimes, ...]
    answered: Mapping[str, float]  # by kind
    failed: Mapping[str, float]  # by code
    degraded: Mapping[str, float]  # by what was given up
    tokens: Mapping[str, float]  # of rankings, by source


def _samples(metric: Counter | Histogram, ending: str) -> Iterable[tuple[Mapping[str, str], float]]:
    for family in metric.collect():
        yield from ((each.labels, each.value) for each in family.samples if each.name.endswith(ending))


def _sums(counter: Counter, label: str) -> dict[str, float]:
    sums = Counted[str]()
    for labels, value in _samples(counter, "_total"):
        sums[labels[label]] += value  # type: ignore[assignment]  # a counter of floats
    return dict(sums)


def _apart(up_to: Mapping[float, float]) -> tuple[float, ...]:
    """Prometheus counts everything up to a bound; here each is counted once."""
    counts = [up_to[bound] for bound in sorted(up_to)]
    return tuple(count - before for before, count in zip([0.0, *counts], counts, strict=False))


class _OfBackend(Collector):
    """What the backend holds, asked when somebody looks."""

    def __init__(self, model: str, stats: Callable[[], Stats]) -> None:
        self._model, self._stats = model, stats

    def describe(self) -> Iterable[Metric]:
        return ()  # so that registering asks for nothing

    def collect(self) -> Iterable[Metric]:
        now = self._stats()
        for figures in (_cache(now), _tiers(now), _schedule(now), _guard(now)):
            yield from (self._family(each) for each in figures)

    def _family(self, figure: Figure) -> Metric:
        labels = (_MODEL, *((figure.label,) if figure.label else ()))
        family = (CounterMetricFamily if figure.counts else GaugeMetricFamily)(figure.name, figure.about, labels=labels)
        for word, value in figure.values.items():
            family.add_metric((self._model, *((word,) if figure.label else ())), value)
        return family


@dataclass(frozen=True, slots=True)
class Figure:
    """One name of figures, with a value for each word of its label."""

    name: str
    about: str
    values: Mapping[str, float]
    label: str = ""  # empty: one value, whose word is empty
    counts: bool = False  # it never falls


def _gauge(name: str, about: str, value: float) -> Figure:
    return Figure(name, about, {"": value})


def _counter(name: str, about: str, value: float) -> Figure:
    return Figure(name, about, {"": value}, counts=True)


def _cache(now: Stats) -> Iterable[Figure]:
    yield _gauge("vllm:num_requests_running", "Requests that wait or are computed.", now.num_unanswered)
    share = now.num_bytes / now.budget_bytes if now.budget_bytes else 0.0
    yield _gauge("vllm:kv_cache_usage_perc", "Share of the pool that is in use.", share)
    yield _gauge("rcllm:cache_blocks", "KV blocks in the pool.", now.num_blocks)
    yield _gauge("rcllm:cache_bytes", "Bytes of KV in the pool.", now.num_bytes)
    yield _gauge("rcllm:cache_budget_bytes", "Bytes of KV that the pool may hold.", now.budget_bytes)
    yield _gauge("rcllm:code_bytes", "Bytes of a catalogue's codes on a GPU, beside the pool.", now.code_bytes)
    yield _gauge("rcllm:items", "Items of the catalogue.", now.num_items)
    yield _gauge("rcllm:warm_blocks", "Blocks that warming has done.", now.warmth.done_blocks)
    yield _gauge("rcllm:warm_blocks_wanted", "Blocks that warming is to do.", now.warmth.total_blocks)
    yield Figure(
        "rcllm:cache_hits", "Blocks that were found, by the tier that had them.", now.hits, "tier", counts=True
    )
    yield _counter("rcllm:cache_misses", "Blocks that were not found.", now.misses)
    yield _counter("rcllm:cache_evictions", "Blocks that the pool dropped for others.", now.evictions)
    yield _counter("rcllm:store_errors", "Errors of stores; each was a miss.", now.store_errors)
    yield _counter("rcllm:loop_failures", "Passes that ended by a mistake of the server.", now.loop_failures)


def _tiers(now: Stats) -> Iterable[Figure]:
    """Of the tiers below the pool."""
    for name, (attribute, told) in _TIER_GAUGES.items():
        yield Figure(f"rcllm:tier_{name}", told, _by_tier(now, attribute), "tier")
    for name, told in _TIER_COUNTS.items():
        yield Figure(f"rcllm:tier_{name}", told, _by_tier(now, name), "tier", counts=True)
    yield Figure("rcllm:rate", "Bytes or FLOPs per second that were timed.", now.rates, "of")


def _by_tier(now: Stats, attribute: str) -> dict[str, float]:
    return {each.tier: getattr(each, attribute) for each in now.tiers}


_TIER_GAUGES = {
    "blocks": ("num_blocks", "Blocks in each tier below the pool."),
    "bytes": ("num_bytes", "Bytes in each tier below the pool."),
    "budget_bytes": ("budget_bytes", "Bytes that each tier below the pool may take."),
    "waiting_bytes": ("waiting_bytes", "Bytes that are still to be written to each tier."),
}
_TIER_COUNTS = {
    "evictions": "Blocks that each tier dropped for others.",
    "dropped": "Blocks that each tier was given and could not take.",
    "errors": "Calls of each tier that failed, and blocks that were not whole.",
    "promoted": "Blocks that were copied from each tier into nearer ones.",
}


def _schedule(now: Stats) -> Iterable[Figure]:
    door, costs = now.door, now.costs
    yield _gauge("vllm:num_requests_waiting", "Requests that wait for their first pass.", door.num_waiting)
    yield _gauge("rcllm:queue_wait_estimate_seconds", "That the next ranking would wait.", door.wait_ms / 1e3)
    yield Figure("rcllm:door", "Requests by what became of them.", door.outcomes, "outcome", counts=True)
    if costs is not None:
        yield _gauge("rcllm:estimate_error_ratio", "Median of |estimate / time - 1| of passes.", costs.median_error)
        yield _gauge("rcllm:load_ratio", "How many times as long as usual passes take lately.", costs.load)


def _guard(now: Stats) -> Iterable[Figure]:
    """`requests`: kinds of rankings that are answered alike."""
    if (guard := now.guard) is None:
        return
    kinds, counts = guard.stats.kinds, guard.stats.counts
    rungs = {each.requests: float(each.rung) for each in kinds}
    yield Figure("rcllm:guard_rung", "Rung in use of the guard's ladder; 0 is the cheapest.", rungs, "requests")
    losses = {each.requests: each.mean_loss for each in kinds}
    yield Figure("rcllm:guard_mean_loss", "Mean loss of the level in use.", losses, "requests")
    evidence = {each.requests: each.e_value for each in kinds}
    yield Figure("rcllm:guard_e_value", "Evidence of drift of the level in use.", evidence, "requests")
    steps = Counted[str](event.kind for event in guard.events)
    yield Figure("rcllm:guard_steps", "Latest steps of the guard, by kind.", steps, "step")
    fates = {name: getattr(counts, f"num_{name}") for name in _FATES}
    yield Figure("rcllm:guard_requests", "Rankings by how far the guard went with them.", fates, "fate", counts=True)
    yield _counter("rcllm:guard_seconds", "Time that the guard computed.", counts.shadow_s)
    yield _counter("rcllm:guard_failures", "Turns of the guard that ended by a mistake.", now.guard_failures)


_FATES = ("observed", "sampled", "dropped", "stale", "undefined", "failed", "shadowed")
