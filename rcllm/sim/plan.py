"""How many nodes, how much memory, which latencies and what cost: formulas for bytes, simulation for times.

Knows nothing of the command line. The formulas stand in docs/planning.md under the names of the functions here.
Invariant: the number of nodes is the smallest of those tried that meets the target, and every one that was tried is in
the plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from rcllm.errors import ConfigError
from rcllm.model.spec import ModelSpec
from rcllm.sim.cost import Costs, Network
from rcllm.sim.demand import Demand, Reuse, There, Tokens, demand
from rcllm.sim.hardware import KV_BYTES, find_model
from rcllm.sim.holdings import LazyPlacement
from rcllm.sim.holdings import expected_hit_rate as hit_rate_on_owner
from rcllm.sim.options import PlanOptions, RunOptions, System, Workload
from rcllm.sim.outcome import Answered, FloatArray, Summary
from rcllm.sim.setup import costs_of, resolve, simulate

_HARDLY = 0.02  # share by which twice the nodes must be better, or more do not help
_INSTRUCTION = Workload().instruction_tokens
_HOUR, _MILLION, _MS = 3600.0, 1e6, 1e3


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of KV on one node, by stratum."""

    instruction: float
    prototypes: float
    histories: float
    hot: float
    shard: float
    evicted_share: float  # of the catalogue's items, which no node has room for

    @property
    def total(self) -> float:
        return self.instruction + self.prototypes + self.histories + self.hot + self.shard


@dataclass(frozen=True, slots=True)
class Trial:
    """One number of nodes, simulated."""

    nodes: int
    at_percentile_ms: float
    meets: bool
    overloaded: bool  # so many waited longer than the target that the rest was not simulated: figures are of the first
    summary: Summary


@dataclass(frozen=True, slots=True)
class Plan:
    """What it takes."""

    options: PlanOptions
    nodes: int | None  # None: no number up to max_nodes meets the target
    why: str
    memory: Mapping[str, Memory]  # by dtype of KV, at that number of nodes
    expected_hit_rate: float  # by formula
    floor_ms: float  # of the median request, alone on a node that holds all of its items
    trials: tuple[Trial, ...]  # by nodes
    best: Trial | None
    node_hours_per_million: float | None
    ttft: FloatArray | None = None  # [requests] seconds, of the plan's own simulation

    @property
    def cost_per_million(self) -> float | None:
        if self.node_hours_per_million is None or self.options.price_per_hour is None:
            return None
        return self.node_hours_per_million * self.options.price_per_hour


def plan(options: PlanOptions, near: int = 0) -> Plan:
    """The smallest number of nodes that meets the target. `near`: a guess, where to begin; 0: there is none.

    Raises ConfigError, DataError.
    """
    if options.topics > options.items:
        options = replace(options, topics=options.items)
    planner = _Planner(options)
    trials = planner.search(near)
    best = next((trial for trial in trials if trial.meets), None)
    nodes = best.nodes if best else None
    sized = nodes or options.max_nodes
    return Plan(
        options=options,
        nodes=nodes,
        why=planner.why(best),
        memory={name: memory(options, sized, name) for name in KV_BYTES},
        expected_hit_rate=expected_hit_rate(options, sized),
        floor_ms=planner.floor_s * _MS,
        trials=tuple(trials),
        best=best,
        node_hours_per_million=node_hours_per_million(nodes, options.qps) if nodes else None,
        ttft=planner.ttft.get(nodes) if nodes else None,
    )


def variants(options: PlanOptions) -> dict[str, PlanOptions]:
    """Half and double of the catalogue and of the load."""
    return {
        "half the catalogue": replace(options, items=max(1, options.items // 2)),
        "double the catalogue": replace(options, items=options.items * 2),
        "half the load": replace(options, qps=options.qps / 2),
        "double the load": replace(options, qps=options.qps * 2),
    }


# ---- formulas -------------------------------------------------------------------------------------------------------


def memory(options: PlanOptions, nodes: int, dtype: str) -> Memory:
    """Bytes on each of so many nodes, with KV in `dtype`."""
    per_token = find_model(options.model).kv_bytes_per_token(KV_BYTES[dtype])
    instruction, prototypes, histories = _shared(options, per_token)
    placed = _placed(options, nodes, per_token)
    held = placed.bytes_of(0)
    return Memory(
        instruction=instruction,
        prototypes=prototypes,
        histories=histories,
        hot=held["replicated"],
        shard=held["sharded"],
        evicted_share=1 - placed.kept / options.items,
    )


def _shared(options: PlanOptions, per_token: int) -> tuple[float, float, float]:
    """Bytes of instruction, prototypes and histories, which every node has."""
    prototypes = options.prototypes * per_token if options.semantic_history else 0.0
    histories = 0.0 if options.semantic_history else options.history_gb * 1e9
    return _INSTRUCTION * per_token, prototypes, histories


def _placed(options: PlanOptions, nodes: int, per_token: int) -> LazyPlacement:
    """As the simulation places items: in what the other strata leave of a node's memory."""
    room = max(0.0, options.memory_gb * 1e9 - sum(_shared(options, per_token)))
    item_bytes = options.tokens_per_item * per_token
    hot = round(options.hot_share * options.items)
    room = min(room, options.items * item_bytes)
    return LazyPlacement.of(workload_of(options), nodes, room, item_bytes, hot, by_topic=True)


def expected_hit_rate(options: PlanOptions, nodes: int) -> float:
    """Share of candidates on the node that owns the request's topic, by the law that candidates are drawn from."""
    per_token = _per_token(options, find_model(options.model))
    return hit_rate_on_owner(workload_of(options), _placed(options, nodes, per_token))


def node_hours_per_million(nodes: int, qps: float) -> float:
    """How many hours of one node a million requests take, at that rate."""
    return nodes * _MILLION / qps / _HOUR


def workload_of(options: PlanOptions) -> Workload:
    """The requests that a plan is simulated with."""
    return Workload(
        items=options.items,
        candidates=options.candidates,
        candidates_spread=0.4 if options.candidates > 1 else 0.0,
        zipf=options.zipf,
        locality=options.locality,
        topics=min(options.topics, options.items),
        qps=options.qps,
        arrivals=options.arrivals,
        item_tokens=options.tokens_per_item,
        history_tokens=options.history_tokens,
    )


# ---- search ---------------------------------------------------------------------------------------------------------


class _Planner:
    """Tries numbers of nodes, each once."""

    def __init__(self, options: PlanOptions) -> None:
        self._options, self._model = options, find_model(options.model)
        self._costs: Costs = costs_of(_system(options, 1), Network())
        self.floor_s = self._costs.pass_s(self._typical(1.0).shape)
        self.ttft: dict[int, FloatArray] = {}
        self._trials: dict[int, Trial] = {}

    def search(self, near: int) -> list[Trial]:
        """Doubles from a guess or a lower bound until the target is met, or more nodes do not help.

        Then it halves: from a guess that meets the target until one does not, and after that the interval.
        """
        options = self._options
        if self.floor_s * _MS > options.slo_ms:
            return []
        low = self._too_few()
        nodes = min(options.max_nodes, max(near, low + 1))
        while not self._try(nodes).meets:
            if nodes == options.max_nodes or self._is_stuck():
                return self._sorted()
            low, nodes = nodes, min(2 * nodes, options.max_nodes)
        while nodes // 2 > low:
            if self._try(nodes // 2).meets:
                nodes //= 2
            else:
                low = nodes // 2
        while nodes - low > max(1, nodes // 50):  # within 2 %
            middle = (low + nodes) // 2
            if self._try(middle).meets:
                nodes = middle
            else:
                low = middle
        return self._sorted()

    def _too_few(self) -> int:
        """qps · seconds of a request's own rows ≥ nodes: so many cannot keep up, however passes are shared."""
        return math.floor(self._options.qps * self._costs.rows_s(self._typical(1.0).shape.rows))

    def _is_stuck(self) -> bool:
        """Twice the nodes were hardly better: what is too slow is slow by itself."""
        last = self._sorted()[-2:]
        if len(last) < 2 or any(trial.overloaded for trial in last):
            return False
        return last[1].at_percentile_ms > (1 - _HARDLY) * last[0].at_percentile_ms

    def why(self, best: Trial | None) -> str:
        """In a sentence."""
        options = self._options
        if self.floor_s * _MS > options.slo_ms:
            return (
                f"a median request alone on a node takes {self.floor_s * _MS:,.0f} ms, more than the target: a level "
                "that reuses more, a faster GPU, more GPUs per node, or fewer candidates"
            )
        if best is None and self._is_stuck():
            last = self._sorted()[-1]
            return (
                f"{last.nodes:,} nodes are hardly better than half as many, with P{options.percentile:g} "
                f"{last.at_percentile_ms:,.0f} ms: what is missing is computed or fetched, so more memory per node "
                "helps, more nodes do not"
            )
        if best is None:
            return f"{options.max_nodes:,} nodes do not meet the target either: raise --slo-ms or --max-nodes"
        return (
            f"{best.nodes:,} nodes are the fewest of those tried with P{options.percentile:g} ≤ {options.slo_ms:g} ms"
        )

    def _typical(self, hit_rate: float) -> Demand:
        """Of a request of median size, with that share of its items on the node, and its user's history."""
        options = self._options
        size = round(options.tokens_per_item)
        hits = round(options.candidates * hit_rate)
        fresh = Workload().fresh_tokens
        tokens = Tokens(_INSTRUCTION, round(options.history_tokens), (size,) * options.candidates, fresh)
        there = There(hits * size, (size,) * (options.candidates - hits), history=True)
        return demand(tokens, there, _reuse(options), self._model, _per_token(options, self._model))

    def _try(self, nodes: int) -> Trial:
        if nodes not in self._trials:
            options = self._options
            running = RunOptions(requests=options.requests, seed=options.seed)
            queues = _Queues.of(options, running)
            run = simulate(workload_of(options), _system(options, nodes), running, is_enough=queues.is_enough)
            self.ttft[nodes] = run.outcome.ttft(run.warm_s)
            at = _percentile(self.ttft[nodes], options.percentile) * _MS
            self._trials[nodes] = Trial(nodes, at, at <= options.slo_ms, queues.are_too_long, run.summary)
        return self._trials[nodes]

    def _sorted(self) -> list[Trial]:
        return [self._trials[nodes] for nodes in sorted(self._trials)]


@dataclass(slots=True)
class _Queues:
    """Watches a simulation, and ends it where so many have waited longer than the target that it is missed for sure."""

    first: int  # request that counts
    limit_s: float
    allowed: int  # so many may be late
    late: int = 0  # by their queue alone

    @classmethod
    def of(cls, options: PlanOptions, running: RunOptions) -> _Queues:
        first = int(running.requests * running.warm_up)
        counted = running.requests - first
        return cls(first, options.slo_ms / _MS, counted - math.ceil(counted * options.percentile / 100))

    @property
    def are_too_long(self) -> bool:
        return self.late > self.allowed

    def is_enough(self, answered: Answered) -> bool:
        self.late += answered.number >= self.first and answered.queue_s > self.limit_s
        return self.are_too_long


def _percentile(values: FloatArray, percent: float) -> float:
    """Nearest rank."""
    ordered: list[float] = sorted(values.tolist())
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def _system(options: PlanOptions, nodes: int) -> System:
    """The cluster of so many nodes: memory for items is what the other strata leave of a node's."""
    model = find_model(options.model)
    per_token = _per_token(options, model)
    catalogue = options.items * options.tokens_per_item * per_token
    room = options.memory_gb * 1e9 - sum(_shared(options, per_token))
    if room <= 0:
        raise ConfigError(
            f"--memory-gb {options.memory_gb:g} is taken by instruction, histories and prototypes alone "
            f"({sum(_shared(options, per_token)) / 1e9:,.1f} GB): give more, or a smaller --history-gb or --prototypes"
        )
    return System(
        nodes=nodes,
        model=options.model,
        gpu=options.gpu,
        gpus=options.gpus,
        costs=options.costs,
        level=options.level,
        mask=options.mask,
        semantic_history=options.semantic_history,
        kv_dtype=options.kv_dtype,
        copies=min(room, catalogue) * nodes / catalogue,
        cache_gb=0.0 if options.semantic_history else options.history_gb,
        hot_share=options.hot_share,
    )


def _reuse(options: PlanOptions) -> Reuse:
    return Reuse(resolve(options.level, options.mask), semantic_history=options.semantic_history)


def _per_token(options: PlanOptions, model: ModelSpec) -> int:
    return model.kv_bytes_per_token(KV_BYTES[options.kv_dtype])
