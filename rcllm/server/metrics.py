"""Figures of this server for Prometheus: how long, how many, from where.

Names are vLLM's where it has one, with its label for the model. Knows nothing of endpoints. Invariant: every label is
one of a few words of ours, so that no request can make a new series, and none holds what a user wrote.
"""

from __future__ import annotations

from collections import Counter as Counted
from collections.abc import Callable, Iterable

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
        self._levels.labels(model, kind, level if level in _LEVELS else "other").inc()
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

    def text(self) -> bytes:
        """In Prometheus' own format."""
        return generate_latest(self.registry)


class _OfBackend(Collector):
    """What the backend holds, asked when somebody looks."""

    def __init__(self, model: str, stats: Callable[[], Stats]) -> None:
        self._model, self._stats = model, stats

    def describe(self) -> Iterable[Metric]:
        return ()  # so that registering asks for nothing

    def collect(self) -> Iterable[Metric]:
        now = self._stats()
        share = now.num_bytes / now.budget_bytes if now.budget_bytes else 0.0
        gauges = {
            "vllm:num_requests_running": ("Requests that wait or are computed.", now.num_unanswered),
            "vllm:kv_cache_usage_perc": ("Share of the pool that is in use.", share),
            "rcllm:cache_blocks": ("KV blocks in the pool.", now.num_blocks),
            "rcllm:cache_bytes": ("Bytes of KV in the pool.", now.num_bytes),
            "rcllm:cache_budget_bytes": ("Bytes of KV that the pool may hold.", now.budget_bytes),
            "rcllm:items": ("Items of the catalogue.", now.num_items),
            "rcllm:warm_blocks": ("Blocks that warming has done.", now.warmth.done_blocks),
            "rcllm:warm_blocks_wanted": ("Blocks that warming is to do.", now.warmth.total_blocks),
        }
        counters = {
            "rcllm:cache_misses": ("Blocks that were not found.", now.misses),
            "rcllm:cache_evictions": ("Blocks that were dropped for others.", now.evictions),
            "rcllm:store_errors": ("Errors of stores; each was a miss.", now.store_errors),
            "rcllm:loop_failures": ("Passes that ended by a mistake of the server.", now.loop_failures),
        }
        hits = CounterMetricFamily("rcllm:cache_hits", "Blocks that were found.", labels=[_MODEL, "tier"])
        for tier, number in now.hits.items():
            hits.add_metric([self._model, tier], number)
        yield hits
        for name, (about, value) in gauges.items():
            gauge = GaugeMetricFamily(name, about, labels=[_MODEL])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, (about, value) in counters.items():
            counter = CounterMetricFamily(name, about, labels=[_MODEL])
            counter.add_metric([self._model], value)
            yield counter
