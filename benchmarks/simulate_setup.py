"""RcLLM's evaluation (arXiv 2605.07443, §V) as the simulator is told it: what the paper says, and what is assumed.

[S] stated in the paper, [F] read off a figure by eye (± 5 %), [A] assumed here, because it is not disclosed. Nothing is
fitted to a latency: the two parameters of locality are solved from the hit rates of Fig. 9 (two points for each data
set), so hit rates are an input here, and every time is a prediction.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

from scipy.optimize import brentq

from rcllm.config import RouteName
from rcllm.core.requests import Level
from rcllm.sim.demand import Reuse
from rcllm.sim.hardware import find_model
from rcllm.sim.holdings import LazyPlacement, expected_hit_rate
from rcllm.sim.options import Arrivals, KvDtype, RunOptions, System, Workload
from rcllm.sim.setup import Run, simulate


@dataclass(frozen=True)
class Shape:
    """One data set of the paper."""

    items: int
    item_tokens: float  # [S] mean
    candidates: int  # [A] so that medians are [S] 2.2–3.0K tokens and items 66–82 % of them
    history_tokens: float  # [A] in the median, so that histories are [S] 11–26 %
    item_budget: float  # [S]
    history_budget: float  # [S]
    hits: tuple[tuple[int, float], tuple[int, float]]  # [F] Fig. 9: nodes and hit rate, at two of its points


SHAPES = {
    "amazon": Shape(778_000, 87, 21, 400, 0.3, 0.3, ((10, 0.88), (100, 0.85))),
    "yelp": Shape(145_000, 76, 20, 420, 0.4, 0.5, ((10, 0.96), (100, 0.77))),
    "goodreads": Shape(242_000, 124, 18, 290, 0.3, 0.2, ((10, 0.92), (100, 0.86))),
}
MODELS = {"8b": ("qwen3-8b", 1, 1.0), "72b": ("qwen2.5-72b", 4, 0.5)}  # [S] GPUs of a node, requests a second per node
NODES = (1, 20, 40, 80, 100)

# [S] Fig. 8: labels, the largest of the P50, P90 and P99 speed-ups
SPEED_UPS = {
    ("8b", "amazon"): (3.02, 2.28, 2.23, 2.23, 2.29),
    ("8b", "yelp"): (2.07, 1.75, 1.51, 1.37, 1.31),
    ("8b", "goodreads"): (3.55, 2.52, 2.38, 2.34, 2.40),
    ("72b", "amazon"): (7.22, 4.93, 2.76, 2.30, 2.60),
    ("72b", "yelp"): (2.28, 1.46, 1.44, 1.28, 1.27),
    ("72b", "goodreads"): (9.51, 2.15, 2.29, 2.18, 2.35),
}
# [F] Fig. 10: mean seconds at 10, 20, 30, 40 requests a second, 40 nodes, 8B
RATES = (10, 20, 30, 40)
POLICIES: dict[str, RouteName] = {"rcllm": "affinity", "hit_only": "hit_only", "load_only": "load_only"}
POLICY_MEANS = {
    ("amazon", "rcllm"): (0.118, 0.138, 0.169, 0.205),
    ("amazon", "hit_only"): (0.117, 0.141, 0.19, 0.32),
    ("amazon", "load_only"): (0.197, 0.202, 0.216, 0.26),
    ("yelp", "rcllm"): (0.10, 0.13, 0.155, 0.22),
    ("yelp", "hit_only"): (0.10, 0.135, 0.40, 0.87),
    ("yelp", "load_only"): (0.165, 0.17, 0.18, 0.20),
    ("goodreads", "rcllm"): (0.155, 0.19, 0.23, 0.31),
    ("goodreads", "hit_only"): (0.15, 0.195, 0.32, 0.625),
    ("goodreads", "load_only"): (0.24, 0.26, 0.30, 0.495),
}
RECOMPUTED_P90_MS = (380.0, 180.0)  # [S] Fig. 11, Amazon 8B: prefix cache, and r = .3


@dataclass(frozen=True)
class Assumptions:
    """What the paper does not disclose. The defaults are the plainest choice, not the one that fits best."""

    zipf: float = 0.6  # of items; [S] Load-Only hits < 11 %, and its hits are the hot items alone, which bounds it
    topic_zipf: float = 0.3  # how much more some topics are asked for
    topics: int = 2000
    lengths_spread: float = 0.45  # of the number of candidates; [S] P90 of 4.0–4.3K tokens bounds it
    arrivals: Arrivals = "poisson"  # the paper replays an agent-recommender trace
    baseline_route: RouteName = "load_only"  # of Prefix-Cache: every node has the instruction, so load decides
    alpha: float = 1.0
    beta: float = 1.0
    full_queue_ms: float = 1000.0  # the queue that is load 1
    view_ms: float = 0.0  # how old the router's knowledge of queues is
    pass_rows: int = 1  # whether requests share passes; 1: one after the other
    kv_dtype: KvDtype = "fp32"  # what the paper's sizes of pools come to
    structure_share: float = 0.0  # of a history: ids and times, always recomputed
    window: int = 0
    copies: float = 1.0  # memory of all nodes, in catalogues; beside the hot items
    fetch: bool = False  # misses may come from other nodes: the text speaks of it, the mechanism computes them
    fresh_tokens: int = 80  # of labels and question, beside the instruction


SWEEPS: dict[str, tuple[Any, ...]] = {
    "zipf": (0.3, 0.9),
    "topic_zipf": (0.0, 0.8),
    "topics": (500, 8000),
    "lengths_spread": (0.2, 0.6),
    "arrivals": ("bursty",),
    "baseline_route": ("round_robin", "power_of_two"),
    "beta": (0.25, 4.0),
    "full_queue_ms": (100.0, 10_000.0),
    "view_ms": (200.0,),
    "pass_rows": (4096, 16_384),
    "kv_dtype": ("bf16",),
    "structure_share": (0.3,),
    "window": (128,),
    "copies": (0.5, 2.0),
    "fetch": (True,),
    "fresh_tokens": (20, 160),
}


@dataclass(frozen=True)
class Bench:
    """One side of a comparison on one data set."""

    shape: Shape
    model: str = "8b"
    nodes: int = 40
    qps: float | None = None  # None: [S] as many as nodes, and half of that for 72B
    assumed: Assumptions = Assumptions()
    requests: int = 5_000
    seed: int = 0

    @property
    def workload(self) -> Workload:
        found = self.assumed
        plain = Workload(
            items=self.shape.items,
            candidates=self.shape.candidates,
            candidates_spread=found.lengths_spread,
            zipf=found.zipf,
            topics=found.topics,
            topic_zipf=found.topic_zipf,
            qps=self.qps or self.nodes * MODELS[self.model][2],
            arrivals=found.arrivals,
            item_tokens=self.shape.item_tokens,
            history_tokens=self.shape.history_tokens,
            history_spread=0.7,
            fresh_tokens=found.fresh_tokens,
            users=10**9,  # [A] nobody comes twice, so that a prefix cache holds the instruction alone
        )
        return solve_locality(plain, self.shape)

    def prefix_cache(self) -> Run:
        """The baseline: the instruction is cached, everything else is computed."""
        return self.run(self._system(level=Level("exact"), route=self.assumed.baseline_route))

    def rcllm(self, route: RouteName = "affinity", budgets: tuple[float, float] | None = None) -> Run:
        """As the paper describes itself. `budgets`: of items and histories."""
        items, history = budgets or (self.shape.item_budget, self.shape.history_budget)
        reuse = Reuse.rcllm_paper(items, history, self.assumed.structure_share, self.assumed.window)
        return self.run(self._system(route=route), reuse)

    def ours(self, level: str, route: RouteName = "ttft", **changed: Any) -> Run:
        """Our levels and rules on the same requests and machines."""
        system = self._system(level=Level.parse(level), route=route, fetch=True, cache_gb=20.0, semantic_history=True)
        return self.run(replace(system, kv_dtype="bf16", **changed))

    def run(self, system: System, reuse: Reuse | None = None) -> Run:
        options = RunOptions(requests=self.requests, warm_up=0.05, seed=self.seed)
        return simulate(self.workload, system, options, reuse=reuse)

    def _system(self, **changed: Any) -> System:
        name, gpus, _ = MODELS[self.model]
        found = self.assumed
        plain = System(
            nodes=self.nodes,
            model=name,
            gpus=gpus,
            pass_rows=found.pass_rows,
            kv_dtype=found.kv_dtype,
            copies=found.copies + 0.001 * self.nodes,  # and the hot items on every node
            cache_gb=0.0,
            semantic_history=True,
            alpha=found.alpha,
            beta=found.beta,
            full_queue_ms=found.full_queue_ms,
            view_ms=found.view_ms,
            fetch=found.fetch,
        )
        return replace(plain, **changed)

    def assuming(self, **changed: Any) -> Bench:
        return dataclasses.replace(self, assumed=replace(self.assumed, **changed))


def solve_locality(workload: Workload, shape: Shape) -> Workload:
    """With the locality and the spread at which the expected hit rates are those of Fig. 9, at its two points."""
    (few, high), (many, low) = shape.hits

    def hits(locality: float, spread: float, nodes: int) -> float:
        asked = replace(workload, locality=locality, spread=spread)
        item_bytes = workload.item_tokens * find_model("qwen3-8b").kv_bytes_per_token(4)
        hot = round(0.001 * workload.items)
        room = workload.items * item_bytes * (1 / nodes + 0.001)
        return expected_hit_rate(asked, LazyPlacement.of(asked, nodes, room, item_bytes, hot, by_topic=True))

    def locality(spread: float) -> float:
        most = hits(1.0, spread, few)
        return 1.0 if most < high else float(brentq(lambda share: hits(share, spread, few) - high, 0.0, 1.0))

    def miss(spread: float) -> float:
        return hits(locality(spread), spread, many) - low

    spread = float(brentq(miss, 1e-7, 0.02)) if miss(1e-7) > 0 > miss(0.02) else 1e-7
    return replace(workload, locality=locality(spread), spread=spread)
