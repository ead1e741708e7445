"""Mixed load with whatever clients do: nothing is lost, nothing breaks, and at the end everything agrees with itself.

RCLLM_SOAK_S sets how long it takes; a memory that grows shows only in a long one.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from rcllm.config import ScheduleConfig, ServerConfig
from rcllm.server.on_engine import EngineBackend
from tests.conftest import assert_no_pins
from tests.engine.test_restart import built
from tests.server.asking import rank_body
from tests.server.live import living

SECONDS = float(os.environ.get("RCLLM_SOAK_S", "20"))
CLIENTS = 8
FINE = {200, 202, 400, 404, 413, 429, 503}


class Client:
    """Does what comes to its mind, one thing after another."""

    def __init__(self, http: httpx.AsyncClient, number: int) -> None:
        self._http, self._random = http, random.Random(number)
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []
        self.num_left = 0

    async def live(self, until_s: float) -> None:
        actions = [self.rank] * 6 + [self.rerank, self.score, self.text, self.stream, self.malformed, self.leave]
        actions += [self.item, self.erase, self.look]
        while time.monotonic() < until_s:
            await self._random.choice(actions)()

    async def _post(self, path: str, body: Any, method: str = "POST") -> httpx.Response:
        reply = await self._http.request(method, path, json=body)
        self.statuses[reply.status_code] += 1
        code = reply.json()["error"]["code"] if reply.status_code >= 500 else ""
        if reply.status_code not in FINE or code not in ("", "deadline"):
            self.wrong.append(f"{method} {path}: {reply.status_code} {reply.text[:200]}")
        return reply

    def _ranking(self, **more: Any) -> dict[str, Any]:
        draw = self._random
        who = {"user_id": f"u{draw.randrange(6)}", "tenant": draw.choice(["", "a", "b"])}
        level = draw.choice(["blocks", "exact", "tail(0.3)", "corrected(0.3, 0.3)"])
        return rank_body(draw.randint(1, 12), f"words {draw.randrange(9)}", **{**who, "level": level, **more})

    async def rank(self) -> None:
        deadline = self._random.choice([None, None, None, 0.5, 30.0, 2000.0])
        body = self._ranking(**({"deadline_ms": deadline} if deadline else {}))
        reply = await self._post("/v1/rank", body)
        if reply.status_code == 200:
            told = reply.json()
            assert set(told["ranking"]) <= set(body["candidates"])
            assert told["degraded"] if len(told["ranking"]) < len(body["candidates"]) else True

    async def rerank(self) -> None:
        await self._post("/rerank", {"query": "red", "documents": [f"lamp {n}" for n in range(5)], "user": "u1"})

    async def score(self) -> None:
        await self._post("/v1/score", {"query": "red", "items": ["lamp", "chair"], "label_token_ids": [9, 10]})

    async def text(self) -> None:
        await self._post("/v1/completions", {"prompt": "old lamp", "max_tokens": 6, "user": "u2", "pool": "p"})

    async def stream(self) -> None:
        body = {"prompt": "old", "max_tokens": 12, "stream": True}
        async with self._http.stream("POST", "/v1/completions", json=body) as reply:
            self.statuses[reply.status_code] += 1
            lines = [line async for line in reply.aiter_lines() if line]
        if reply.status_code == 200 and lines[-1] != "data: [DONE]":
            self.wrong.append(f"a stream ended with {lines[-1]}")

    async def malformed(self) -> None:
        bodies = ({"candidates": "none"}, {"candidates": ["nothing"]}, {"history": 3}, {"candidates": ["i1", "i1"]}, [])
        await self._post("/v1/rank", self._random.choice(bodies))

    async def leave(self) -> None:
        """Goes away in the middle of it."""
        body = self._random.choice(
            [("/v1/rank", self._ranking()), ("/v1/completions", {"prompt": "a", "max_tokens": 500})]
        )
        asking = asyncio.create_task(self._http.post(body[0], json=body[1]))
        await asyncio.sleep(self._random.random() * 0.03)
        asking.cancel()
        self.num_left += 1

    async def item(self) -> None:
        number = self._random.randrange(12)
        await self._post(f"/v1/items/i{number}", {"fields": {"title": f"thing {self._random.randrange(99)}"}}, "PUT")

    async def erase(self) -> None:
        who = f"u{self._random.randrange(6)}?tenant={self._random.choice(['', 'a', 'b'])}"
        await self._post(f"/v1/users/{who}", None, "DELETE")

    async def look(self) -> None:
        for path in ("/metrics", "/v1/cache/stats", "/v1/guard", "/ready"):
            assert (await self._http.get(path)).status_code == 200


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_breaks(one_compute_thread: None, tmp_path: Path) -> None:
    with built(tmp_path) as engine:
        limits = ScheduleConfig(max_waiting=6, last_scores=50, min_candidates=2)
        engine.intake._config = limits
        engine.config = replace(engine.config, schedule=limits)
        backend = EngineBackend(engine, "tiny")

        async def soak(address: str) -> list[Client]:
            pool = httpx.Limits(max_connections=100, max_keepalive_connections=20)
            async with httpx.AsyncClient(base_url=address, timeout=60, limits=pool) as http:
                clients = [Client(http, number) for number in range(CLIENTS)]
                until_s = time.monotonic() + SECONDS
                await asyncio.gather(*(client.live(until_s) for client in clients))
                return clients

        process = psutil.Process()
        with living(backend, ServerConfig(warm=False)) as address:
            rss = process.memory_info().rss
            clients = asyncio.run(soak(address))
            for _ in range(500):
                if not backend.stats().num_unanswered:
                    break
                time.sleep(0.01)
            stats, growth_mb = backend.stats(), (process.memory_info().rss - rss) / (1 << 20)
        wrong = [each for client in clients for each in client.wrong]
        statuses = sum((client.statuses for client in clients), Counter[int]())
        print(f"{sum(statuses.values())} answers {dict(statuses)}, RSS {growth_mb:+.0f} MB, {stats.door}")
        assert not wrong, wrong[:5]
        assert statuses[200] > 20
        assert sum(client.num_left for client in clients)
        assert (stats.num_unanswered, stats.loop_failures, stats.guard_failures) == (0, 0, 0)
        assert not engine.loop.tickets
        engine.loop.scheduler.check()
        engine.pool.check()
        assert_no_pins(engine)
        assert engine.stats().store_errors == 0
    gc.unfreeze()
