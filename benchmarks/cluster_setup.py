"""What `benchmarks.cluster` runs on: films, requests with a known locality, and replicas of SmolLM2."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from rcllm.cluster.files import write_placement
from rcllm.cluster.place import make_place
from rcllm.cluster.placement import Room
from rcllm.cluster.statistics import collect, ragged
from rcllm.config import CacheConfig, ClusterConfig, Config, PromptConfig, ServerConfig
from rcllm.core.ranking import Item, ItemId, Level, RankOptions
from rcllm.data import fetch_movielens
from rcllm.engine.engine import Engine
from rcllm.on_ray import application
from rcllm.on_ray.recipe import Built, Front, for_node, front_of
from rcllm.server.on_engine import EngineBackend
from rcllm.store.contract import Store

GROUP = 10  # films that are asked for together
CANDIDATES, EVENTS, STRAY = 8, 3, 0.15  # of a request, and the share of candidates from any group
_ITEM_BYTES = 600_000  # of the KV of a film, as a candidate and as an event: 13 tokens each, in fp16


@dataclass(frozen=True, slots=True)
class FilmRecipe:
    """See `on_ray.recipe.Recipe`. The first `num_items` films of MovieLens-100K."""

    config: Config
    cluster: ClusterConfig
    num_items: int

    def item_ids(self) -> tuple[ItemId, ...]:
        return tuple(self._films())

    def front(self) -> Front:
        return front_of(self.config, self._films())

    def build(self, node: int, peers: Store | None) -> Built:
        config = for_node(self.config, self.cluster, node)
        engine = Engine.build(self._films(), config, peers=peers, node=f"node {node}")
        return Built(engine, EngineBackend(engine, config.model.path), engine.close)

    def _films(self) -> Mapping[ItemId, Item]:
        films = fetch_movielens().catalogue
        return {item_id: films[item_id] for item_id in list(films)[: self.num_items]}


@dataclass(frozen=True, slots=True)
class Reply:
    """One request as its client saw it."""

    number: int
    status: int
    ms: float
    node: str = ""
    request_id: str = ""
    num_held: int = 0  # candidates whose KV was read and not computed
    num_fetched: int = 0  # of them, from other replicas
    num_computed: int = 0  # tokens of blocks that were computed


class Films:
    """Requests of `num_items` films in groups; the same for the same seed."""

    def __init__(self, num_items: int, seed: int) -> None:
        self.num_items = num_items
        self._item_ids = list(fetch_movielens().catalogue)[:num_items]
        self._seed = seed
        order = np.random.default_rng(seed).permutation(num_items)
        self._groups = order.reshape(-1, GROUP)

    def drawn(self, count: int, stream: int) -> Iterator[list[int]]:
        """Items of requests: candidates, then events."""
        random = np.random.default_rng([self._seed, stream])
        weights = 1.0 / np.arange(1, len(self._groups) + 1) ** 0.6
        for _ in range(count):
            group = self._groups[random.choice(len(self._groups), p=weights / weights.sum())]
            near = random.permutation(group)
            stray = random.integers(self.num_items, size=CANDIDATES)
            candidates = np.where(random.random(CANDIDATES) < STRAY, stray, near[:CANDIDATES])
            yield [*dict.fromkeys(candidates.tolist()), *near[-EVENTS:].tolist()]

    def bodies(self, count: int, stream: int) -> list[dict[str, Any]]:
        bodies = []
        for items in self.drawn(count, stream):
            ids = [self._item_ids[item] for item in items]
            bodies.append({"candidates": ids[:-EVENTS], "history": ids[-EVENTS:], "explain": True})
        return bodies

    def placement(self, path: Path, num_nodes: int, copies: float) -> None:
        """Learned from requests that come before those that are measured."""
        past = [np.unique(items[:-EVENTS]) for items in self.drawn(4000, 0)]
        sizes = [_ITEM_BYTES] * self.num_items
        room = Room(num_nodes, int(copies * self.num_items / num_nodes) * _ITEM_BYTES)
        write_placement(path, make_place("learned")(collect(ragged(past), self._item_ids, sizes), room))


@contextmanager
def films_served(films: Films, num_nodes: int, copies: float, **cluster: Any) -> Iterator[httpx.Client]:
    """A cluster on this machine, warm; each replica has one thread, and memory for its part of the catalogue."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "placement.json"
        films.placement(path, num_nodes, copies)
        section = ClusterConfig(replicas=num_nodes, cpus=1.0, placement=str(path), report_ms=200.0, **cluster)
        pool_mb = int(1.2 * copies * films.num_items / num_nodes * _ITEM_BYTES / 2**20)
        config = Config(
            cache=CacheConfig(pool_mb=pool_mb),
            prompt=PromptConfig(template="movies"),
            rank=RankOptions(level=Level("blocks")),
            server=ServerConfig(port=0, drain_s=5.0),
        )
        recipe = FilmRecipe(config, section, films.num_items)
        with application.running(recipe, section) as address, httpx.Client(base_url=address, timeout=120) as client:
            while client.get("/ready").status_code != 200:
                time.sleep(0.5)
            yield client


def ask(client: httpx.Client, body: Mapping[str, Any], number: int, since_s: float | None = None) -> Reply:
    """`since_s`: when it was meant to be asked, by the monotonic clock; else now."""
    start = time.monotonic() if since_s is None else since_s
    try:
        reply = client.post("/v1/rank", json={**body, "request_id": f"r{number}"})
    except httpx.HTTPError:
        return Reply(number, 0, (time.monotonic() - start) * 1e3)
    ms = (time.monotonic() - start) * 1e3
    if reply.status_code != 200:
        return Reply(number, reply.status_code, ms)
    told = reply.json()
    receipt = told["receipt"]
    items = [block for block in receipt["blocks"] if block["kind"] == "item"]
    read = [block for block in items if block["source"] != "computed"]
    fetched = sum(block["source"] == "peer" for block in read)
    return Reply(number, 200, ms, receipt["node"], told["request_id"], len(read), fetched, receipt["num_computed"])


def ask_at_rate(client: httpx.Client, bodies: Sequence[Mapping[str, Any]], rate: float, seed: int) -> list[Reply]:
    """Poisson arrivals, whatever is still under way; times count from when a request was due."""
    random = np.random.default_rng([seed, 99])
    due = time.monotonic() + np.cumsum(random.exponential(1.0 / rate, size=len(bodies)))

    def one(number: int) -> Reply:
        time.sleep(max(0.0, due[number] - time.monotonic()))
        return ask(client, bodies[number], number, float(due[number]))

    with ThreadPoolExecutor(64) as threads:
        return list(threads.map(one, range(len(bodies))))


def ask_steadily(
    client: httpx.Client, bodies: Sequence[Mapping[str, Any]], at_once: int, answered: threading.Semaphore
) -> list[Reply]:
    """So many under way at any time; `answered` is told of each."""

    def one(number: int) -> Reply:
        reply = ask(client, bodies[number], number)
        answered.release()
        return reply

    with ThreadPoolExecutor(at_once) as threads:
        return list(threads.map(one, range(len(bodies))))


def replicas() -> list[psutil.Process]:
    """The processes of engines."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "".join(process.cmdline()[:1]).startswith("ray::ServeReplica:rcllm:engine"):
                found.append(process)
        except psutil.Error:  # it ended while it was looked at
            continue
    return found
