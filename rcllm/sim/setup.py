"""From options to a run: puts workload, placement, routing and costs together. Knows nothing of the command line.

Invariant: everything that a run depends on is in its three option groups and, where there is one, the request log.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from rcllm.cluster.route import make_route
from rcllm.cluster.view import Holdings, Route
from rcllm.core.ranking import Level, Mask, RankOptions, RankRequest
from rcllm.errors import ConfigError
from rcllm.model.spec import ModelSpec
from rcllm.schedule.admission import Open
from rcllm.sim.cluster import ClusterSpec, Failure, Simulation
from rcllm.sim.cost import Costs, Network, fit, read_points, roofline
from rcllm.sim.demand import Reuse
from rcllm.sim.hardware import KV_BYTES, find_gpu, find_model
from rcllm.sim.holdings import LazyPlacement
from rcllm.sim.node import PassRecord
from rcllm.sim.options import RunOptions, System, Workload, check_workload
from rcllm.sim.outcome import Outcome, Summary, summarise
from rcllm.sim.workload import SimRequest, generate, number_items, of_log, updates

_CPU_BYTES_PER_S = 12e9  # KV from memory, where a processor computes: no copy, so a hit is nearly free
_FAILURE = re.compile(r"^(\d+)@([\d.]+)(?:-([\d.]+))?$")
_SLOW = re.compile(r"^(\d+)@([\d.]+)$")


@dataclass(frozen=True, slots=True)
class Run:
    """What was simulated, and how long that took."""

    outcome: Outcome
    summary: Summary
    warm_s: float  # of simulated time: figures are of requests that came later
    wall_s: float

    @property
    def requests_per_minute(self) -> float:
        """The simulator's own speed."""
        return (len(self.outcome.answers) + self.outcome.num_unanswered) / self.wall_s * 60


def simulate(
    workload: Workload,
    system: System,
    options: RunOptions,
    log: Sequence[RankRequest] = (),
    *,
    reuse: Reuse | None = None,
    placed: Holdings | None = None,
    on_pass: Callable[[PassRecord], None] | None = None,
) -> Run:
    """`log`: requests to replay in place of generated ones. `reuse` and `placed`: in place of what `system` says.

    Raises ConfigError, DataError.
    """
    if log:
        workload = replace(workload, items=len(number_items(log)), topics=1)
    check_workload(workload)
    spec = cluster_spec(system, reuse)
    simulation = Simulation(
        spec,
        placed or place(workload, system, spec),
        route_of(system),
        failures=failures_of(system),
        updates=updates(workload, options.seed),
        on_pass=on_pass,
    )
    warm_up = _WarmUp(_requests(workload, options, log), int(options.requests * options.warm_up))
    start = time.perf_counter()
    outcome = simulation.run(warm_up)
    wall_s = time.perf_counter() - start
    return Run(outcome, summarise(outcome, warm_up.end_s), warm_up.end_s, wall_s)


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


def _requests(workload: Workload, options: RunOptions, log: Sequence[RankRequest]) -> Iterator[SimRequest]:
    if log:
        return of_log(log, workload, options.requests, options.seed)
    return generate(workload, options.requests, options.seed)


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


def place(workload: Workload, system: System, spec: ClusterSpec) -> Holdings:
    """The placement that the options name."""
    item_bytes = workload.item_tokens * spec.kv_bytes_per_token
    node_bytes = system.copies * workload.items * item_bytes / system.nodes
    hot = round(system.hot_share * workload.items)
    return LazyPlacement.of(workload, system.nodes, node_bytes, item_bytes, hot, by_topic=system.placement == "topics")


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
