"""From options to a run: puts workload, placement, routing and costs together. Knows nothing of the command line.

Invariant: everything that a run depends on is in its three option groups and, where there is one, the request log.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from rcllm.cluster.placement import Room
from rcllm.cluster.route import make_route
from rcllm.cluster.view import Holdings, Route
from rcllm.core.requests import Level, Mask, RankOptions, RankRequest
from rcllm.errors import ConfigError, DataError
from rcllm.model.spec import ModelSpec
from rcllm.schedule.admission import Open
from rcllm.sim.cluster import Simulation
from rcllm.sim.cost import Costs, Network, fit, read_points, roofline
from rcllm.sim.demand import Reuse
from rcllm.sim.hardware import KV_BYTES, find_gpu, find_model
from rcllm.sim.holdings import LazyPlacement
from rcllm.sim.learned import learn
from rcllm.sim.node import PassRecord
from rcllm.sim.options import PlacedBy, RunOptions, System, Workload, check_workload
from rcllm.sim.outcome import Answered, Outcome, Summary, summarise
from rcllm.sim.spec import ClusterSpec, Failure
from rcllm.sim.workload import SimRequest, generate, number_items, of_log, updates

_LEARNED = ("metis", "halo", "learned")
_PAST = 1_000_003  # added to the seed of past requests
_CPU_BYTES_PER_S = 12e9  # KV from memory, where a processor computes: no copy, so a hit is nearly free
_FAILURE = re.compile(r"^(\d+)@([\d.]+)(?:-([\d.]+))?$")
_SLOW = re.compile(r"^(\d+)@([\d.]+)$")


@dataclass(frozen=True, slots=True)
class Run:
    """What was simulated, and how long that took."""

    outcome: Outcome
    summary: Summary
    warm_s: float  # of simulated time: figures are of requests that came later
    cpu_s: float  # of this process, so that what else the machine does is left out

    @property
    def requests_per_minute(self) -> float:
        """The simulator's own speed, on one core."""
        return (len(self.outcome.answers) + self.outcome.num_unanswered) / self.cpu_s * 60


def simulate(
    workload: Workload,
    system: System,
    options: RunOptions,
    log: Sequence[RankRequest] | None = None,
    *,
    reuse: Reuse | None = None,
    on_pass: Callable[[PassRecord], None] | None = None,
    is_enough: Callable[[Answered], bool] | None = None,
) -> Run:
    """`log`: requests to replay in place of generated ones. `reuse`: in place of what `system` says.

    `on_pass`, `is_enough`: see `Simulation`.

    Raises ConfigError, DataError, CapacityError.
    """
    check_workload(workload)
    source = _Source.of(workload, log, system)
    spec = cluster_spec(system, reuse)
    simulation = Simulation(
        spec,
        _place(source, system, spec, options.seed),
        route_of(system),
        failures=failures_of(system),
        updates=updates(source.workload, options.seed),
        on_pass=on_pass,
        is_enough=is_enough,
    )
    warm_up = _WarmUp(source.coming(options.requests, options.seed), int(options.requests * options.warm_up))
    start = time.process_time()
    outcome = simulation.run(warm_up)
    cpu_s = time.process_time() - start
    return Run(outcome, summarise(outcome, warm_up.end_s), warm_up.end_s, cpu_s)


@dataclass(frozen=True, slots=True)
class _Source:
    """Where requests come from, those of the past and those that are simulated."""

    workload: Workload
    placement: PlacedBy
    log: Sequence[RankRequest]
    numbers: Mapping[str, int]  # of the log's items

    @classmethod
    def of(cls, workload: Workload, log: Sequence[RankRequest] | None, system: System) -> _Source:
        if log is None:
            return cls(workload, system.placement or "topics", (), {})
        placement = system.placement or "halo"
        if placement == "topics":
            raise ConfigError("--placement topics: a log says nothing of topics; take halo, metis, learned or hash")
        if not log:
            raise DataError("the request log is empty: expected at least one request")
        if placement in _LEARNED and len(log) < 2:
            raise DataError(
                f"placement {placement} is learnt from the first half of a log and simulated on the second: expected "
                "two requests or more, got one; give more, or take --placement hash"
            )
        numbers = number_items(log)
        return cls(replace(workload, items=len(numbers), topics=1), placement, log, numbers)

    def past(self, count: int, seed: int) -> Iterator[SimRequest]:
        """Of a log, its first half."""
        if not self.log:
            return generate(self.workload, count, seed + _PAST)
        earlier = self.log[: self._first]
        return of_log(earlier, self.numbers, self.workload, min(count, len(earlier)), seed)

    def coming(self, count: int, seed: int) -> Iterator[SimRequest]:
        """Of a log, the second half where the first was learnt from, else all of it."""
        if not self.log:
            return generate(self.workload, count, seed)
        later = self.log[self._first :] if self.placement in _LEARNED else self.log
        return of_log(later, self.numbers, self.workload, count, seed)

    @property
    def _first(self) -> int:
        return len(self.log) // 2


class _WarmUp:
    """Passes requests on, and notes when the first comes that counts."""

    def __init__(self, requests: Iterator[SimRequest], count: int) -> None:
        self._requests, self._count = requests, count
        self.end_s = 0.0

    def __iter__(self) -> Iterator[SimRequest]:
        for number, request in enumerate(self._requests):
            if number == self._count:
                self.end_s = request.arrival_s
            yield request


def _place(source: _Source, system: System, spec: ClusterSpec, seed: int) -> Holdings:
    """The placement that the options name, in `copies` times the memory of the catalogue."""
    workload = source.workload
    item_bytes = workload.item_tokens * spec.kv_bytes_per_token
    node_bytes = system.copies * workload.items * item_bytes / system.nodes
    if source.placement in _LEARNED:
        room = Room(system.nodes, int(node_bytes))
        past = source.past(system.past, seed)
        return learn(source.placement, past, workload, room, spec.kv_bytes_per_token, system.hot_share)
    hot = round(system.hot_share * workload.items)
    by_topic = source.placement == "topics"
    return LazyPlacement.of(workload, system.nodes, node_bytes, item_bytes, hot, by_topic=by_topic)


# ---- parts ----------------------------------------------------------------------------------------------------------


def cluster_spec(system: System, reuse: Reuse | None = None) -> ClusterSpec:
    """Raises ConfigError, DataError."""
    model = find_model(system.model)
    network = Network(bytes_per_s=system.network_gbps * 1e9 / 8)
    return ClusterSpec(
        num_nodes=system.nodes,
        costs=costs_of(system, network),
        model=model,
        kv_bytes_per_token=kv_bytes_per_token(system, model),
        reuse=reuse or Reuse(resolve(system.level, system.mask), semantic_history=system.semantic_history),
        cache_bytes=int(system.cache_gb * 1e9),
        pass_rows=system.pass_rows,
        fetches=system.fetch,
        full_queue_s=system.full_queue_ms / 1e3,
        view_s=system.view_ms / 1e3,
        host_bytes_per_s=_CPU_BYTES_PER_S if system.costs else find_gpu(system.gpu).host_bytes_per_s * system.gpus,
        fetch_bytes_per_s=network.bytes_per_s,
        slow=slow_of(system),
    )


def costs_of(system: System, network: Network) -> Costs:
    """Fitted where measured passes are given, else a roofline. Raises ConfigError, DataError."""
    if system.costs is not None:
        return fit(read_points(system.costs), network)
    return roofline(system.model, system.gpu, system.gpus, network)


def kv_bytes_per_token(system: System, model: ModelSpec) -> int:
    return model.kv_bytes_per_token(KV_BYTES[system.kv_dtype])


def resolve(level: Level, mask: Mask) -> Level:
    """What `auto` comes to for a model of that mask that nobody has calibrated: the engine's own rule."""
    return Open(mask).admit(RankOptions(level=level)).options.level


def route_of(system: System) -> Route:
    weights = {"alpha": system.alpha, "beta": system.beta} if system.route == "affinity" else {}
    return make_route(system.route, **weights)


def failures_of(system: System) -> list[Failure]:
    """Raises ConfigError."""
    failures = []
    for text in system.fail:
        found = _FAILURE.match(text)
        if found is None:
            raise ConfigError(f"--fail {text}: expected NODE@SECOND or NODE@SECOND-SECOND, such as 3@10-20")
        failure = Failure(_node(found[1], "--fail", system), float(found[2]), float(found[3] or "inf"))
        if failure.back_s <= failure.at_s:
            raise ConfigError(f"--fail {text}: the node would be back before it fails")
        failures.append(failure)
    return failures


def slow_of(system: System) -> tuple[tuple[int, float], ...]:
    """Raises ConfigError."""
    slow = []
    for text in system.slow:
        found = _SLOW.match(text)
        if found is None or float(found[2]) <= 0:
            raise ConfigError(f"--slow {text}: expected NODE@TIMES, such as 3@2")
        slow.append((_node(found[1], "--slow", system), float(found[2])))
    return tuple(slow)


def _node(text: str, option: str, system: System) -> int:
    if int(text) >= system.nodes:
        raise ConfigError(
            f"{option}: there is no node {text}; with --nodes {system.nodes} the last is {system.nodes - 1}"
        )
    return int(text)
