"""What `benchmarks.cluster` runs on: real items, requests with a known locality, and replicas of SmolLM2."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import psutil

from benchmarks.harness import dataset
from rcllm.cluster.files import write_placement
from rcllm.cluster.place import make_place
from rcllm.cluster.placement import Placement, Room
from rcllm.cluster.statistics import collect, ragged
from rcllm.config import CacheConfig, ClusterConfig, Config, PromptConfig, ServerConfig
from rcllm.core.ranking import Item, ItemId, Level, RankOptions
from rcllm.engine.engine import Engine
from rcllm.on_ray import application
from rcllm.on_ray.recipe import Built, Front, for_node, front_of
from rcllm.server.on_engine import EngineBackend
from rcllm.store.contract import Store

GROUP = 10  # items that are asked for together
CANDIDATES, EVENTS, STRAY = 8, 3, 0.15  # of a request, and the share of candidates from any group
_DATA = "amazon_scientific"
ITEM_TOKENS = 64  # longer texts are cut, so that every item has about as many
KV_DTYPE_BYTES = 2
_ITEM_BYTES = 2_900_000  # of the KV of an item, as a candidate and as an event: 63 tokens each in the mean


@dataclass(frozen=True, slots=True)
class ItemRecipe:
    """See `on_ray.recipe.Recipe`. The first `num_items` of the catalogue."""

    config: Config
    cluster: ClusterConfig
    num_items: int

    def item_ids(self) -> tuple[ItemId, ...]:
        return tuple(self._items())

    def front(self) -> Front:
        return front_of(self.config, self._items())

    def build(self, node: int, peers: Store | None) -> Built:
        config = for_node(self.config, self.cluster, node)
        engine = Engine.build(self._items(), config, peers=peers, node=f"node {node}")
        return Built(engine, EngineBackend(engine, config.model.path), engine.close)

    def _items(self) -> Mapping[ItemId, Item]:
        catalogue = dataset(_DATA).catalogue
        return {item_id: catalogue[item_id] for item_id in list(catalogue)[: self.num_items]}


@dataclass(frozen=True, slots=True)
class Reply:
    """One request as its client saw it."""

    number: int
    status: int
    ms: float
    node: str = ""
    request_id: str = ""
    receipt: Mapping[str, Any] = field(default_factory=dict)

    @property
    def items(self) -> list[Mapping[str, Any]]:
        """What the receipt says of the blocks of candidates."""
        return [block for block in self.receipt["blocks"] if block["kind"] == "item"]

    @property
    def num_held(self) -> int:
        """Candidates whose KV the replica had."""
        return sum(block["source"] not in ("computed", "peer") for block in self.items)

    @property
    def num_fetched(self) -> int:
        """Candidates whose KV came from other replicas."""
        return sum(block["source"] == "peer" for block in self.items)


class Items:
    """Requests of `num_items` items in groups; the same for the same seed."""

    def __init__(self, num_items: int, seed: int) -> None:
        self.num_items = num_items
        self.item_ids = list(dataset(_DATA).catalogue)[:num_items]
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
            ids = [self.item_ids[item] for item in items]
            bodies.append({"candidates": ids[:-EVENTS], "history": ids[-EVENTS:], "explain": True})
        return bodies

    def placed(self, num_nodes: int, copies: float) -> Placement:
        """Learned from requests that come before those that are measured."""
        past = [np.unique(items[:-EVENTS]) for items in self.drawn(4000, 0)]
        sizes = [_ITEM_BYTES] * self.num_items
        room = Room(num_nodes, int(copies * self.num_items / num_nodes) * _ITEM_BYTES)
        return make_place("learned")(collect(ragged(past), self.item_ids, sizes), room)


@contextmanager
def served(items: Items, num_nodes: int, copies: float, **cluster: Any) -> Iterator[httpx.Client]:
    """A cluster on this machine, warm; each replica has one thread, and memory for its part of the catalogue."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "placement.json"
        write_placement(path, items.placed(num_nodes, copies))
        section = ClusterConfig(replicas=num_nodes, cpus=1.0, placement=str(path), report_ms=200.0, **cluster)
        config = Config(
            cache=CacheConfig(pool_mb=pool_bytes(items, num_nodes, copies) // 2**20),
            prompt=PromptConfig(max_item_tokens=ITEM_TOKENS),
            rank=RankOptions(level=Level("blocks")),
            server=ServerConfig(port=0, drain_s=5.0),
        )
        recipe = ItemRecipe(config, section, items.num_items)
        with application.running(recipe, section) as address, httpx.Client(base_url=address, timeout=120) as client:
            while client.get("/ready").status_code != 200:
                time.sleep(0.5)
            yield client


def pool_bytes(items: Items, num_nodes: int, copies: float) -> int:
    """Memory of a replica for KV: its part, and a fifth of that for what comes by."""
    return int(1.2 * copies * items.num_items / num_nodes * _ITEM_BYTES)


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
    return Reply(number, 200, ms, told["receipt"]["node"], told["request_id"], told["receipt"])


def arrivals(count: int, rate: float, seed: int) -> npt.NDArray[np.float64]:
    """Seconds, of a Poisson process."""
    times: npt.NDArray[np.float64] = np.cumsum(np.random.default_rng([seed, 99]).exponential(1.0 / rate, size=count))
    return times


def ask_at_rate(client: httpx.Client, bodies: Sequence[Mapping[str, Any]], rate: float, seed: int) -> list[Reply]:
    """Poisson arrivals, whatever is still under way; times count from when a request was due."""
    due = time.monotonic() + arrivals(len(bodies), rate, seed)

    def one(number: int) -> Reply:
        time.sleep(max(0.0, due[number] - time.monotonic()))
        return ask(client, bodies[number], number, float(due[number]))

    with ThreadPoolExecutor(64) as threads:
        return list(threads.map(one, range(len(bodies))))


def ask_steadily(
    client: httpx.Client, bodies: Sequence[Mapping[str, Any]], at_once: int, answered: threading.Semaphore | None = None
) -> list[Reply]:
    """So many under way at any time; `answered` is told of each."""

    def one(number: int) -> Reply:
        reply = ask(client, bodies[number], number)
        if answered is not None:
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
