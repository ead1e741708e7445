"""What goes wrong with real replicas: one that is slow or cut, a full object store, a block that is damaged on its way.

And what goes right: a block that one replica has is read by another one, and the receipt says so.
"""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from rcllm.cluster.files import write_placement
from rcllm.config import ClusterConfig
from rcllm.errors import ConfigError
from rcllm.late import Late
from tests.on_ray.test_cluster import body, replicas
from tests.on_ray.test_cluster import pytestmark as ray_marks
from tests.on_ray.test_replacing import by_parity
from tests.on_ray.tiny_recipe import DAMAGE, BrokenRecipe, TinyRecipe

pytest.importorskip("ray", reason="Ray is not installed: pip install 'rcllm[cluster]'")

application, ray = Late("rcllm.on_ray.application"), Late("ray")
pytestmark = [*ray_marks, pytest.mark.slow]


@contextmanager
def served(**changed: Any) -> Iterator[httpx.Client]:
    """Two replicas; routed one after the other, so that each is asked for what the other one has."""
    cluster = replace(ClusterConfig(replicas=2, cpus=1.0, route="round_robin", report_ms=200.0), **changed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with (
            application.running(TinyRecipe.of(cluster), cluster) as address,
            httpx.Client(base_url=address, timeout=60) as client,
        ):
            while client.get("/ready").status_code != 200:
                time.sleep(0.1)
            yield client


def rank(client: httpx.Client, number: int) -> dict[str, Any]:
    reply = client.post("/v1/rank", json=body(number, explain=True))
    assert reply.status_code == 200, reply.text
    told: dict[str, Any] = reply.json()
    return told


def sources(told: dict[str, Any]) -> set[str]:
    return {block["source"] for block in told["receipt"]["blocks"] if block["kind"] == "item"}


def test_why_no_replica_can_begin_is_said() -> None:
    cluster = ClusterConfig(replicas=1, cpus=1.0)
    running = application.running(BrokenRecipe.of(cluster), cluster)
    with warnings.catch_warnings(), ExitStack() as life:
        warnings.simplefilter("ignore")
        with pytest.raises(ConfigError, match="ModelError: its weights are of another model"):
            life.enter_context(running)


def test_a_block_of_another_replica_is_fetched_and_the_receipt_says_so() -> None:
    with served() as client:
        found = [sources(rank(client, number)) for number in range(40)]
        assert any("peer" in each for each in found), found


def test_a_block_that_is_damaged_on_its_way_is_computed_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DAMAGE, "1")
    with served() as client:
        told = [rank(client, number) for number in range(40)]
        assert not any("peer" in sources(each) for each in told)
        assert client.get("/v1/cache/stats").json()["store_errors"] > 0
    monkeypatch.delenv(DAMAGE)
    with served(peers=False) as client:
        same = [rank(client, number) for number in range(40)]
    for one, other in zip(told, same, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-4)


def test_a_replica_that_is_stopped_delays_nobody_for_long_where_requests_are_hedged() -> None:
    """SIGSTOP: to everybody else a host that is cut, whose connections stay open. It comes back with SIGCONT."""
    with served(hedge_ms=300.0) as client, ThreadPoolExecutor(6) as threads:
        for number in range(40):
            rank(client, number)
        stopped = replicas()[0]
        os.kill(stopped.pid, signal.SIGSTOP)
        try:
            start = time.monotonic()
            replies = list(threads.map(lambda number: client.post("/v1/rank", json=body(number)), range(40)))
            took_s = time.monotonic() - start
        finally:
            os.kill(stopped.pid, signal.SIGCONT)
        assert [reply.status_code for reply in replies] == [200] * 40
        assert {reply.json()["request_id"] for reply in replies} == {f"r{number}" for number in range(40)}
        assert took_s < 30
        end = time.monotonic() + 60
        while len(client.put("/v1/items/i1", json={"fields": {"title": "lamp"}}).json().get("acknowledged", ())) < 2:
            assert time.monotonic() < end, "both replicas live again"
            time.sleep(0.5)


def test_a_full_object_store_fails_no_request() -> None:
    """Ray's store is filled from outside, with objects that are held: blocks have no room in it."""
    with served() as client:
        block = np.zeros(int(ray.cluster_resources()["object_store_memory"]) // 40, dtype=np.uint8)
        held = [ray.put(block) for _ in range(39)]
        replies = [client.post("/v1/rank", json=body(number)) for number in range(40)]
        assert [reply.status_code for reply in replies] == [200] * 40
        assert len(held) == 39, "kept until here"


def test_placed_anew_under_load_no_request_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    write_placement(path, by_parity())
    with served(route="affinity") as client, ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(rank, client, number) for number in range(200)]
        left, moved = 1, []
        while left:
            reply = client.put("/v1/placement", json={"file": str(path), "max_moves": 8})
            assert reply.status_code == 200, reply.text
            told = reply.json()
            assert told["acknowledged"] == ["node 0", "node 1"]
            assert told["num_moved"] <= 8
            left = told["num_left"]
            moved.append(told["num_moved"])
        answers = [each.result() for each in asking]
        assert sorted(each["request_id"] for each in answers) == sorted(f"r{number}" for number in range(200))
        assert len(moved) > 1
        assert sum(moved) > 8
