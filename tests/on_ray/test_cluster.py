"""A real cluster on Ray: two replicas of a tiny model, one of which is killed under load."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from rcllm.config import ClusterConfig
from rcllm.late import Late
from tests.on_ray.tiny_recipe import TinyRecipe

pytest.importorskip("ray", reason="Ray is not installed: pip install 'rcllm[cluster]'")

application = Late("rcllm.on_ray.application")

# what Ray itself, and what it is made of, warn of is nobody's concern here
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]
NUM_REQUESTS, AT_ONCE = 120, 6


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    cluster = ClusterConfig(replicas=2, cpus=1.0, route="affinity", report_ms=200.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with application.running(TinyRecipe.of(cluster), cluster) as found:
            yield found


def body(number: int, **more: Any) -> dict[str, Any]:
    candidates = [f"i{(number * 7 + k) % 50}" for k in range(5)]
    return {"candidates": candidates, "history": ["i52"], "level": "blocks", "request_id": f"r{number}", **more}


def replicas() -> list[psutil.Process]:
    """The processes of the replicas, which are children of this one's Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith("ray::ServeReplica:rcllm:engine"):  # then what it does
                found.append(process)
        except psutil.Error:  # it ended while it was looked at
            continue
    return found


def test_one_killed_under_load_loses_and_repeats_nothing(address: str) -> None:
    answered: list[tuple[int, str, str]] = []
    half = threading.Event()

    def ask(client: httpx.Client, number: int) -> None:
        reply = client.post("/v1/rank", json=body(number, explain=True), headers={"x-request-id": f"r{number}"})
        told = reply.json()
        answered.append((reply.status_code, told.get("request_id", str(told)), told.get("receipt", {}).get("node", "")))
        if len(answered) >= NUM_REQUESTS // 3:
            half.set()

    with httpx.Client(base_url=address, timeout=60) as client, ThreadPoolExecutor(AT_ONCE) as threads:
        before = {each.pid for each in replicas()}
        assert len(before) == 2
        asking = [threads.submit(ask, client, number) for number in range(NUM_REQUESTS)]
        assert half.wait(60)
        os.kill(min(before), signal.SIGKILL)
        for each in asking:
            each.result()

        assert Counter(status for status, _, _ in answered) == {200: NUM_REQUESTS}
        assert Counter(name for _, name, _ in answered) == Counter(f"r{n}" for n in range(NUM_REQUESTS))
        assert {node for _, _, node in answered} == {"node 0", "node 1"}
        _comes_back(client, before)


def _comes_back(client: httpx.Client, before: set[int]) -> None:
    """Another process takes the dead one's shard, and knows what changed while it was away."""
    changed = client.put("/v1/items/i1", json={"fields": {"title": "quite other words"}}).json()
    end = time.monotonic() + 60
    while len(changed["acknowledged"]) < 2:
        assert time.monotonic() < end, f"{changed} after a minute; {len(replicas())} replicas live"
        time.sleep(0.5)
        changed = client.put("/v1/items/i1", json={"fields": {"title": "quite other words"}}).json()
    assert changed["acknowledged"] == ["node 0", "node 1"]
    assert {each.pid for each in replicas()} - before
    for number in range(20):
        assert client.post("/v1/rank", json=body(number)).status_code == 200
    stats = client.get("/v1/cache/stats").json()
    assert stats["num_items"] == 60
    text = client.post("/v1/completions", json={"prompt": "red lamp", "max_tokens": 4, "temperature": 0}).json()
    assert text["usage"]["completion_tokens"] > 0
    assert client.delete("/v1/users/u1").status_code == 200
