"""The fidelity guard in the server: it watches a sample in idle time, and a trip holds for the next request."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any

import httpx
import pytest

from rcllm.config import ServerConfig
from rcllm.core.ranking import RankRequest
from rcllm.engine.engine import Engine
from rcllm.fidelity.calibration import Calibrated, Calibration
from rcllm.fidelity.monitor import GuardPolicy
from rcllm.fidelity.online import OnlineGuard
from rcllm.schedule.admission import Identity, Open
from rcllm.server.backend import EraseUser
from rcllm.server.guarding import guard_of
from rcllm.server.on_engine import EngineBackend
from rcllm.wire.requests import request_to_json
from tests.fidelity.test_calibration import rung, summary
from tests.fidelity.test_guard_drift import requests
from tests.fidelity.test_online import ALL, AUTO, POLICY, spoil
from tests.fidelity.test_online import Calibrated as AsIfCalibrated
from tests.server.asking import asking, scheduled

pytestmark = pytest.mark.usefixtures("one_compute_thread")


def guarded(policy: GuardPolicy = POLICY) -> tuple[Engine, OnlineGuard, EngineBackend]:
    """`blocks` is as if calibrated, and every ranking is watched."""
    engine = scheduled(AsIfCalibrated())
    guard = OnlineGuard(engine, policy, ALL)
    return engine, guard, EngineBackend(engine, "tiny", guard=guard)


async def rank(client: httpx.AsyncClient, request: RankRequest) -> dict[str, Any]:
    reply = await client.post("/v1/rank", json=request_to_json(request))
    assert reply.status_code == 200, reply.text
    told: dict[str, Any] = reply.json()
    return told


async def settled(guard: OnlineGuard) -> None:
    """What was sampled has been looked at."""
    while (status := guard.status()).num_waiting or status.stats.counts.num_sampled > _looked_at(guard):
        await asyncio.sleep(0.002)


def _looked_at(guard: OnlineGuard) -> int:
    counts = guard.status().stats.counts
    return counts.num_shadowed + counts.num_stale + counts.num_undefined + counts.num_failed + counts.num_dropped


def test_drift_trips_in_the_running_server_and_everybody_is_told(caplog: pytest.LogCaptureFixture) -> None:
    engine, guard, backend = guarded()
    asked = requests(AUTO, seed=0)

    async def ask(client: httpx.AsyncClient) -> tuple[list[str], dict[str, Any], dict[str, Any], str]:
        before = await rank(client, next(asked))
        await settled(guard)
        assert (await client.get("/v1/guard")).json()["events"] == []
        for _ in range(8):
            await rank(client, next(asked))
            await settled(guard)
        assert spoil(engine)
        levels = [before["level"]]
        for _ in range(60):
            told = await rank(client, next(asked))
            await settled(guard)
            levels.append(told["level"])
            if told["level"] == "exact":
                break
        return levels, told, (await client.get("/v1/guard")).json(), (await client.get("/metrics")).text

    with caplog.at_level(logging.WARNING, "rcllm.fidelity"):
        levels, last, status, text = asking(backend, ask)
    assert levels[0] == "blocks"
    assert levels[-1] == "exact"
    assert "trip" in last["guard"] or "exact" in last["guard"]
    assert "guard has left" in " ".join(last["notes"])
    assert status["guarding"] is True
    assert [event["kind"] for event in status["events"]] == ["trip"]
    assert 'rcllm:guard_steps{model_name="tiny",step="trip"} 1.0' in text
    assert 'rcllm:guard_requests_total{fate="failed",model_name="tiny"} 0.0' in text
    assert "rcllm:guard_rung" in text
    assert "trip from blocks to exact" in caplog.text


def test_a_mistake_of_the_guard_ends_no_request(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        due_s: float | None = None

        def turn(self) -> bool:
            raise RuntimeError(" ".join(["words", "of", "a", "user"]))

    engine = scheduled()
    backend = EngineBackend(engine, "tiny")
    backend._loop._idle._idle = Broken()
    asked = requests(AUTO, seed=0)

    async def ask(client: httpx.AsyncClient) -> list[dict[str, Any]]:
        return [await rank(client, next(asked)) for _ in range(3)]

    assert len(asking(backend, ask)) == 3
    assert backend.stats().guard_failures >= 1
    assert backend.stats().loop_failures == 0
    assert "words of a user" not in caplog.text


def test_what_waits_of_a_user_who_is_erased_is_not_looked_at() -> None:
    _, guard, backend = guarded()
    asked = replace(next(requests(AUTO, seed=0)), user_id="u7")  # type: ignore[arg-type]

    async def ask(client: httpx.AsyncClient) -> tuple[int, int]:
        guard.observe(asked, backend._engine.rank(asked))
        waiting = guard.status().num_waiting
        await backend.change(EraseUser(asked.user_id))  # type: ignore[arg-type]
        return waiting, guard.status().num_waiting

    assert asking(backend, ask) == (1, 0)


def test_without_a_guard_its_address_says_so() -> None:
    async def ask(client: httpx.AsyncClient) -> Any:
        return (await client.get("/v1/guard")).json()

    assert asking(EngineBackend(scheduled(), "tiny"), ask) == {"guarding": False}


# ---- whether there is one -------------------------------------------------------------------------------------------


def calibrated(*levels: str, mask: str = "causal", tau: float = 0.95) -> Engine:
    """An engine whose calibration passes these levels."""
    engine = scheduled()
    identity: Identity = replace(engine.identity, mask=mask)  # type: ignore[arg-type]
    context = engine.prompter.context_name
    found = summary(0.0, -0.003, tau, ms=50.0)
    rungs = tuple(rung(level, found, context) for level in levels)
    engine.admission = Calibrated.of(Calibration(identity, {}, "shop", 0, 100, rungs), identity, context)
    return engine


def test_a_guard_where_a_calibration_allows_reuse_and_nowhere_else() -> None:
    watched = calibrated("blocks", "tail(0.1)")
    guard = guard_of(watched, ServerConfig())
    assert guard is not None
    assert guard.status().ladder[-1] == "exact"
    assert set(guard.status().ladder[:-1]) == {"blocks", "tail(0.1)"}
    assert guard.status().share == 0.05
    assert guard_of(calibrated("blocks"), ServerConfig(guard_share=0.0)) is None
    assert guard_of(calibrated("blocks", tau=0.5), ServerConfig()) is None, "nothing passes"
    uncalibrated = scheduled()
    uncalibrated.admission = Open("causal")
    assert guard_of(uncalibrated, ServerConfig()) is None
