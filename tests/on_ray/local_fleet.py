"""A fleet in one process: workers with tiny engines, envelopes aimed as Ray's router does, and deaths on demand."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from rcllm.cluster.live import LiveCluster, dealt
from rcllm.cluster.route import make_route
from rcllm.config import ClusterConfig
from rcllm.data.live import LiveCatalogue
from rcllm.engine.engine import Engine
from rcllm.on_ray.aim import REPORT
from rcllm.on_ray.backend import ClusterBackend
from rcllm.on_ray.envelope import Asked, Describe, Described, Envelope, LostError, Outcome
from rcllm.on_ray.ledger import Ledger, Page
from rcllm.on_ray.recipe import Built
from rcllm.on_ray.requests import Sizes
from rcllm.on_ray.worker import Worker
from rcllm.server.on_engine import EngineBackend, EngineTexts
from tests.engine import tiny


class LocalLedger:
    """See `backend.Keeper` and `worker.Changes`; pickles what an actor would be sent."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.num_adopted = 0

    async def version(self) -> int:
        return self.ledger.version

    async def adopt(self, ledger: Ledger) -> int:
        self.num_adopted += 1
        self.ledger.adopt(pickle.loads(pickle.dumps(ledger)))
        return self.ledger.version

    async def since(self, version: int) -> Page:
        page: Page = pickle.loads(pickle.dumps(self.ledger.since(version)))
        return page


class LocalFleet:
    """See `backend.Fleet`. `before`: called with node and envelope, may raise LostError or wait."""

    def __init__(self, ledger: LocalLedger) -> None:
        self.workers: dict[int, Worker] = {}
        self.engines: dict[int, Engine] = {}
        self.cut: set[int] = set()  # nodes that take no request and refuse none: their connections stay open
        self.asked: list[tuple[int, str]] = []  # node and name of each request that a replica was sent
        self.before: Callable[[int, Envelope], Any] = lambda node, envelope: None
        self._ledger = ledger
        self._lives: list[Worker] = []  # of all replicas, the dead ones as well

    async def begin(self, node: int, num_nodes: int, *, warm: bool = False) -> None:
        """A replica comes up, on the catalogue of the file."""
        engine = tiny.fresh(items=tiny.catalogue())
        built = Built(engine, EngineBackend(engine, "tiny"), engine.close)
        worker = Worker(node, f"life {len(self._lives)}", built, dealt(tiny.IDS, num_nodes), self._ledger)
        await worker.start(warm)
        self.workers[node], self.engines[node] = worker, engine
        self._lives.append(worker)

    def kill(self, node: int) -> None:
        """It answers nothing any more."""
        del self.workers[node]

    async def stop(self) -> None:
        for worker in self._lives:
            await worker.stop(1.0)

    async def ask(self, envelope: Envelope) -> Outcome:
        node, sent = self._route(envelope)
        worker = self.workers[node]
        if node in self.cut:
            await asyncio.Event().wait()
        await self._happening(node, envelope)
        outcome = await worker.handle(sent)
        if self.workers.get(node) is not worker:
            raise LostError(f"node {node} died")
        received: Outcome = pickle.loads(pickle.dumps(outcome))
        return received

    async def stream(self, envelope: Envelope) -> AsyncIterator[tuple[int, ...] | Outcome]:
        node, sent = self._route(envelope)
        worker = self.workers[node]
        async for part in worker.stream(sent):
            await self._happening(node, envelope)
            if self.workers.get(node) is not worker:
                raise LostError(f"node {node} died")
            yield part

    async def _happening(self, node: int, envelope: Envelope) -> None:
        happened = self.before(node, envelope)
        if asyncio.iscoroutine(happened):
            await happened

    def _route(self, envelope: Envelope) -> tuple[int, Envelope]:
        living: Mapping[int, Mapping[str, Any]] = {
            node: {REPORT: asdict(worker.report())} for node, worker in self.workers.items()
        }
        node = next(iter(living)) if envelope.aim is None else envelope.aim.choose(living)[0]
        if envelope.aim is not None and node not in self.cut:
            envelope.aim.routed(node)
        if isinstance(envelope.ask, Asked):
            self.asked.append((node, envelope.name))
        sent: Envelope = pickle.loads(pickle.dumps(envelope))
        return node, sent


@asynccontextmanager
async def local_cluster(
    num_nodes: int = 2, route: str = "affinity", **config: Any
) -> AsyncIterator[tuple[ClusterBackend, LocalFleet, LiveCluster]]:
    ledger = LocalLedger()
    fleet = LocalFleet(ledger)
    for node in range(num_nodes):
        await fleet.begin(node, num_nodes)
    described: Described = (await fleet.ask(Envelope("describe", Describe()))).value
    live = LiveCluster(dealt(tiny.IDS, num_nodes), make_route(route), 1.0, time.monotonic)
    prompter = fleet.engines[0].prompter
    backend = ClusterBackend(
        fleet,
        ledger,
        live,
        ClusterConfig(replicas=num_nodes, **config),
        described.about,
        EngineTexts(prompter.tokenizer, None),  # type: ignore[arg-type]
        Sizes(LiveCatalogue(tiny.catalogue()), prompter.texts, described.kv_bytes_per_token),
        Ledger(),
    )
    await backend.start()
    try:
        yield backend, fleet, live
    finally:
        await backend.stop(1.0)
        await fleet.stop()


def requests(count: int) -> Iterator[Any]:
    """Rankings of five candidates from anywhere in the catalogue."""
    for number in range(count):
        yield tiny.request(tuple((number * 7 + k) % 50 for k in range(5)), name=f"r{number}", user=f"u{number % 5}")
