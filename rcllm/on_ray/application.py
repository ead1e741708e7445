"""The Ray Serve application: replicas of the engine behind the HTTP application, and its life on this machine.

Knows nothing of the command line. Invariant: the HTTP application is the one that `rcllm serve` has without a cluster,
and a replica takes the shard of the number that Ray Serve gives it, so that who replaces a dead one takes its shard.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from rcllm.cluster.files import read_placement
from rcllm.cluster.live import LiveCluster, dealt
from rcllm.cluster.placement import Placement
from rcllm.cluster.route import make_route
from rcllm.config import ClusterConfig, num_usable_cores
from rcllm.core.ranking import ItemId
from rcllm.data.live import LiveCatalogue
from rcllm.errors import ConfigError
from rcllm.on_ray.aim import REPORT
from rcllm.on_ray.backend import ClusterBackend
from rcllm.on_ray.envelope import Describe, Described, Envelope, Outcome
from rcllm.on_ray.fleet import PeerQuestions, RayFleet, RayLedger, end_ledger
from rcllm.on_ray.peers import PeerStore
from rcllm.on_ray.recipe import Plan, Recipe
from rcllm.on_ray.requests import Sizes
from rcllm.on_ray.router import NODE, PolicyRouter
from rcllm.on_ray.worker import Worker
from rcllm.server import logs
from rcllm.server.app import make_app
from rcllm.server.keys import check_address
from rcllm.server.run import check_free
from rcllm.server.spans import open_spans

logger = logging.getLogger(__name__)
ENGINE, FRONT = "engine", "front"  # deployments
_PROXY_S, _LOOK_S = 120.0, 0.2  # until Ray's proxy listens, and how often that is looked at
_AT_ONCE = 10_000  # envelopes at one replica: its own queue decides what is too much


# What Ray's own processes read. Nothing is told to anybody; replicas are no background jobs, as which Ray begins its
# processes; and a busy machine takes longer than Ray's few seconds to begin a proxy, which would be begun anew.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1",
}


class Replica:
    """One engine. Its methods are called by Ray Serve, in one event loop."""

    async def __init__(self, plan: Plan) -> None:  # type: ignore[misc]
        logs.configure()
        node = serve.get_replica_context().rank.rank
        recipe, peers = plan.recipe, None
        if plan.cluster.peers:
            handle = serve.get_deployment_handle(ENGINE, plan.app)
            peers = PeerStore(PeerQuestions(handle, plan.cluster.peer_timeout_ms / 1e3), time.monotonic)
            peers.suggest(each for each in range(plan.cluster.replicas) if each != node)
        built = recipe.build(node, peers)
        placement = placement_of(tuple(built.engine.catalogue), plan.cluster)
        self._drain_s = recipe.config.server.drain_s
        self._worker = Worker(node, uuid.uuid4().hex, built, placement, RayLedger(plan.run), peers)
        await self._worker.start(recipe.config.server.warm)

    def reconfigure(self, user_config: Any, rank: Any) -> None:
        """Ray Serve gives it another number where replicas before it were taken away."""
        self._worker.move(rank.rank)

    def record_replica_metadata(self) -> dict[str, Any]:
        return {NODE: self._worker.node}

    def record_routing_stats(self) -> dict[str, Any]:
        return {REPORT: asdict(self._worker.report())}

    async def handle(self, envelope: Envelope) -> Outcome:
        return await self._worker.handle(envelope)

    async def stream(self, envelope: Envelope) -> AsyncIterator[tuple[int, ...] | Outcome]:
        async for part in self._worker.stream(envelope):
            yield part

    async def __del__(self) -> None:
        await self._worker.stop(self._drain_s)


@serve.ingress()
class Front:
    """The HTTP side."""

    async def __init__(self, plan: Plan, engine: DeploymentHandle) -> None:  # type: ignore[misc]
        logs.configure()
        fleet, ledger, front = RayFleet(engine), RayLedger(plan.run), plan.recipe.front()
        described: Described = (await fleet.ask(Envelope(uuid.uuid4().hex, Describe()))).value
        config, cluster = plan.recipe.config, plan.cluster
        weights = {"alpha": cluster.alpha, "beta": cluster.beta} if cluster.route == "affinity" else {}
        live = LiveCluster(
            placement_of(tuple(front.catalogue), cluster),
            make_route(cluster.route, **weights),
            cluster.full_queue_ms / 1e3,
            time.monotonic,
        )
        sizes = Sizes(
            LiveCatalogue(front.catalogue),
            front.prompt_texts,
            described.kv_bytes_per_token,
            config.rank.readout != "likelihood",
        )
        backend = ClusterBackend(
            fleet, ledger, live, cluster, described.about, front.texts, sizes, await ledger.whole()
        )
        spans = open_spans(os.environ, config.server.served_name or described.about.model)
        self._app = make_app(backend, config.server, spans=spans)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app


def placement_of(item_ids: Sequence[ItemId], cluster: ClusterConfig) -> Placement:
    """The placement that is configured, or these items dealt by their hash. Raises DataError, ConfigError."""
    if not cluster.placement:
        return dealt(item_ids, cluster.replicas)
    placement = read_placement(Path(cluster.placement).expanduser())
    if placement.room.num_nodes != cluster.replicas:
        raise ConfigError(
            f"{cluster.placement} is for {placement.room.num_nodes} nodes, and cluster.replicas is {cluster.replicas}: "
            f"build it with --nodes {cluster.replicas}, or say so many replicas"
        )
    return placement


def application(plan: Plan) -> serve.Application:
    """What `serve.run` takes."""
    cluster, server = plan.cluster, plan.recipe.config.server
    scaling: dict[str, Any] = {"num_replicas": cluster.replicas}
    if cluster.max_replicas > cluster.replicas:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=cluster.replicas,
                initial_replicas=cluster.replicas,
                max_replicas=cluster.max_replicas,
                target_ongoing_requests=cluster.target_requests,
            )
        }
    engine = serve.deployment(
        Replica,
        name=ENGINE,
        max_ongoing_requests=_AT_ONCE,
        ray_actor_options={"num_cpus": cluster.cpus, "num_gpus": cluster.gpus},
        graceful_shutdown_timeout_s=server.drain_s + 5.0,
        health_check_period_s=1.0,
        health_check_timeout_s=5.0,  # a host that is cut answers nothing; three times, and it is given up
        request_router_config=RequestRouterConfig(
            request_router_class=PolicyRouter, request_routing_stats_period_s=cluster.report_ms / 1e3
        ),
        **scaling,
    )
    front = serve.deployment(
        Front,
        name=FRONT,
        num_replicas=1,  # receipts and events are kept there
        max_ongoing_requests=_AT_ONCE,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=server.drain_s + 5.0,
    )
    return front.bind(plan, engine.bind(plan))


# ---- its life --------------------------------------------------------------------------------------------------------


@contextmanager
def running(recipe: Recipe, cluster: ClusterConfig) -> Iterator[str]:
    """The cluster, while the block runs; yields its address. Raises RcllmError for what cannot be.

    What is wrong with the model's files, the template or the placement is said before anything is begun.
    """
    server = recipe.config.server
    check_address(server)
    placement_of(tuple(recipe.front().catalogue), cluster)
    port = server.port or _free_port(server.host)
    check_free(replace(server, port=port))
    plan = Plan(recipe, cluster, uuid.uuid4().hex)
    begin_ray(cluster)
    try:
        with suppress(TimeoutError):  # of the proxy: on a busy machine it may take longer, and comes all the same
            serve.start(http_options=HTTPOptions(host=server.host, port=port))
        _deploy(plan)
        _wait_for(server.host, port)
        yield f"http://{f'[{server.host}]' if ':' in server.host else server.host}:{port}"
    finally:
        try:
            serve.shutdown()
            end_ledger(plan.run)
        finally:
            ray.shutdown()


def _deploy(plan: Plan) -> None:
    """Raises ConfigError where no replica can begin, with the last line that one said."""
    try:
        serve.run(application(plan), name=plan.app, route_prefix="/", blocking=False)
    except RuntimeError as error:
        found = serve.status().applications.get(plan.app)
        parts = found.deployments.values() if found is not None else ()
        said = next((each.message for each in parts if each.status == "DEPLOY_FAILED"), str(error))
        raise ConfigError(f"no replica could begin: {last_line(said)}") from error


def last_line(said: str) -> str:
    """Of what Ray tells of a process that could not begin: its own error."""
    return said.strip().rpartition("\n")[2]


def run(recipe: Recipe, cluster: ClusterConfig, on_listening: Callable[[str], None]) -> None:
    """Serves until a signal comes: the first one drains, a second one ends at once."""
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        if ended.is_set():
            raise KeyboardInterrupt
        ended.set()

    with running(recipe, cluster) as address:
        for each in (signal.SIGINT, signal.SIGTERM):  # after Ray has begun, which has handlers of its own
            signal.signal(each, end)
        on_listening(address)
        while not ended.wait(_LOOK_S):
            pass
        logger.info("draining: requests under way are answered, no new ones are taken; a second signal ends at once")


def local(cluster: ClusterConfig, replicas: int) -> ClusterConfig:
    """So many replicas on this machine, which share its cores."""
    cpus = max(num_usable_cores() // replicas, 1)
    return replace(cluster, replicas=replicas, address="", cpus=float(cpus))


def begin_ray(cluster: ClusterConfig) -> None:
    """Connects this process with the Ray cluster that is named, or begins one on this machine."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    if cluster.address:
        ray.init(cluster.address, **quiet)
        return
    most = max(cluster.replicas, cluster.max_replicas)
    ray.init(num_cpus=max(int(cluster.cpus * most + 0.999), num_usable_cores()), include_dashboard=False, **quiet)


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=_family(host)) as found:
        return int(found.getsockname()[1])


def _wait_for(host: str, port: int) -> None:
    """Until the proxy takes connections. Raises ConfigError where it does not."""
    for _ in range(int(_PROXY_S / _LOOK_S)):
        with suppress(OSError), socket.create_connection((host, port), timeout=1.0):
            return
        time.sleep(_LOOK_S)
    raise ConfigError(f"Ray's proxy did not begin to listen at {host}:{port} within {_PROXY_S:g} s; look into its logs")


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
