"""Over HTTP as in the engine: one bounded queue, turns between tenants and kinds, deadlines that cost something."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from rcllm.config import ScheduleConfig, ServerConfig, for_serving
from rcllm.engine.engine import Engine
from rcllm.schedule.cost import CostModel, Rates
from rcllm.server.on_engine import EngineBackend
from tests.conftest import assert_no_pins
from tests.engine.test_intake import Fixed, Levels
from tests.server.asking import asking, rank_body, scheduled

pytestmark = pytest.mark.usefixtures("one_compute_thread")


@contextlib.asynccontextmanager
async def held(engine: Engine) -> AsyncIterator[None]:
    """No pass begins inside."""
    turn = engine.alone()
    await asyncio.to_thread(turn.__enter__)
    try:
        yield
    finally:
        turn.__exit__(None, None, None)


async def until(engine: Engine, num_waiting: int) -> None:
    while engine.queue().num_waiting < num_waiting:
        await asyncio.sleep(0.001)


def test_one_bounded_queue_whose_parts_are_the_tenants(tiny_engine: Engine) -> None:
    """Two tenants may fill half of it each; what is refused is told at once, and what is taken in is answered."""
    engine = scheduled(max_waiting=4)

    async def ask(client: httpx.AsyncClient) -> tuple[list[httpx.Response], list[httpx.Response]]:
        def post(tenant: str) -> asyncio.Task[httpx.Response]:
            return asyncio.create_task(client.post("/v1/rank", json=rank_body(tenant=tenant)))

        async with held(engine):
            flood = [post("many") for _ in range(4)]
            await until(engine, 4)
            few = post("few")
            await until(engine, 5)
            refused = [await post("many") for _ in range(3)]
        return refused, [await each for each in (*flood, few)]

    refused, answered = asking(EngineBackend(engine, "tiny"), ask)
    assert {reply.status_code for reply in answered} == {200}
    for reply in refused:
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "overloaded")
        assert int(reply.headers["retry-after"]) >= 1
    assert engine.intake.counts().outcomes["overloaded"] == 3


def test_what_is_refused_costs_no_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood is refused before it is tokenised, also while the prompts of others are being made."""
    engine, opened = scheduled(max_waiting=2), Counter[str]()
    real = engine.rank_job.open

    def opening(request: Any) -> Any:
        opened["rank"] += 1
        return real(request)

    monkeypatch.setattr(engine.rank_job, "open", opening)

    async def ask(client: httpx.AsyncClient) -> list[int]:
        async with held(engine):
            flood = [asyncio.create_task(client.post("/v1/rank", json=rank_body())) for _ in range(20)]
            while sum(task.done() for task in flood) < 18:
                await asyncio.sleep(0.001)
        return [(await task).status_code for task in flood]

    assert Counter(asking(EngineBackend(engine, "tiny"), ask)) == {200: 2, 429: 18}
    assert opened["rank"] == 2


def test_a_tenant_with_one_request_does_not_wait_for_another_ones_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = scheduled()
    limits = engine.loop.scheduler.limits
    monkeypatch.setattr(engine.loop.scheduler, "limits", type(limits)(40, limits.kv_bytes))  # few prompts in a pass

    async def ask(client: httpx.AsyncClient) -> list[str]:
        done: list[str] = []

        async def post(tenant: str) -> None:
            await client.post("/v1/rank", json=rank_body(3, tenant=tenant))
            done.append(tenant)

        async with held(engine):
            tasks = [asyncio.create_task(post("many")) for _ in range(12)]
            await until(engine, 12)
            tasks.append(asyncio.create_task(post("few")))
            await until(engine, 13)
        await asyncio.gather(*tasks)
        return done

    done = asking(EngineBackend(engine, "tiny"), ask)
    assert done.index("few") < 6, done


def test_kinds_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that comes after many rankings is begun before the last of them, and they go on beside it."""
    engine = scheduled()
    limits = engine.loop.scheduler.limits
    monkeypatch.setattr(engine.loop.scheduler, "limits", type(limits)(40, limits.kv_bytes))

    async def ask(client: httpx.AsyncClient) -> list[str]:
        done: list[str] = []

        async def post(kind: str, path: str, body: dict[str, Any]) -> None:
            reply = await client.post(path, json=body)
            assert reply.status_code == 200, reply.text
            done.append(kind)

        async with held(engine):
            tasks = [asyncio.create_task(post("rank", "/v1/rank", rank_body(3))) for _ in range(12)]
            await until(engine, 12)
            text = {"prompt": "old lamp", "max_tokens": 1, "temperature": 0}
            tasks.append(asyncio.create_task(post("text", "/v1/completions", text)))
            await asyncio.sleep(0.1)
        await asyncio.gather(*tasks)
        return done

    done = asking(EngineBackend(engine, "tiny"), ask)
    assert done.index("text") < 8, done


class Slow(Fixed):
    def __init__(self) -> None:
        super().__init__()
        CostModel.__init__(self, Rates(1000.0, 100.0, 0.0, 0.0, 0.0))
        self.num_passes = 1


# ---- deadlines ------------------------------------------------------------------------------------------------------


@pytest.fixture
def timed() -> Engine:
    """Passes are estimated to take 1 s and .1 s for each row, so that no deadline passes on a busy machine; cheaper
    levels are as if calibrated."""
    engine = scheduled(Levels("causal"), min_candidates=3, last_scores=10)
    engine.loop.costs = engine.intake._costs = Slow()
    return engine


def asked_with(engine: Engine, *bodies: dict[str, Any], path: str = "/v1/rank") -> list[httpx.Response]:
    async def ask(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.post(path, json=body) for body in bodies]

    replies = asking(EngineBackend(engine, "tiny"), ask)
    assert_no_pins(engine)
    return replies


def cost_ms(engine: Engine, level: str, candidates: int) -> float:
    """The deadline that a request of these would just need."""
    body = rank_body(candidates, level=level, explain=True)
    (reply,) = asked_with(engine, body)
    return 1.25 * (1000 + 100 * int(reply.json()["tokens_fresh"]))


def test_the_ladder_is_named_in_answers(timed: Engine) -> None:
    """Candidates with the least prior are left out, whatever their place in the body."""
    enough = cost_ms(timed, "blocks", 12)
    prior = [float(n) for n in range(12)]
    body = rank_body(12, level="exact", prior=prior, deadline_ms=enough - 3000)
    told = asked_with(timed, body)[0].json()
    assert told["degraded"] == ["level", "candidates"]
    assert told["level"] == "blocks"
    assert 3 <= len(told["ranking"]) < 12
    assert set(told["ranking"]) == {f"i{n}" for n in range(12)[-len(told["ranking"]) :]}
    assert "candidates" in " ".join(told["notes"])
    assert timed.intake.counts().degraded == {"level": 1, "candidates": 1}


def test_reranking_leaves_out_documents_and_scores_the_right_ones(timed: Engine) -> None:
    documents = [f"red lamp {n}" for n in range(12)]
    plain = {"query": "lamp", "documents": documents, "level": "blocks", "return_documents": True}
    (whole,) = asked_with(timed, plain, path="/rerank")
    rows = whole.json()["meta"]["tokens"]["input_tokens"]
    (reply,) = asked_with(timed, {**plain, "deadline_ms": 1.25 * (1000 + 100 * rows) * 0.5}, path="/rerank")
    told, all_of_them = reply.json(), {each["index"]: each for each in whole.json()["results"]}
    assert told["meta"]["degraded"][-1] == "candidates"
    assert 3 <= len(told["results"]) < 12
    for each in told["results"]:
        assert each["document"]["text"] == documents[each["index"]]
        assert each["relevance_score"] == pytest.approx(all_of_them[each["index"]]["relevance_score"], abs=1e-5)


def test_no_time_at_all_is_last_scores_or_a_503(timed: Engine) -> None:
    known, unknown = rank_body(6, user_id="u"), rank_body(6, user_id="v")
    before, last, refused = asked_with(timed, known, {**known, "deadline_ms": 1000}, {**unknown, "deadline_ms": 1000})
    assert last.json()["degraded"] == ["last_scores"]
    assert last.json()["scores"] == before.json()["scores"]
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "deadline")
    assert int(refused.headers["retry-after"]) >= 1
    assert timed.intake.counts().outcomes["late"] == 1


def test_a_prior_is_one_number_for_each_candidate(timed: Engine) -> None:
    (reply,) = asked_with(timed, rank_body(3, prior=[1.0, 2.0]))
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prior")


def test_limits_of_a_server_where_nothing_is_said() -> None:
    served = for_serving(ScheduleConfig())
    assert (served.max_waiting, served.last_scores, served.other_rows) == (256, 10_000, 64)
    said = ScheduleConfig(max_waiting=0, last_scores=0, other_rows=0)
    assert for_serving(said) == said, "0 is no limit, and is meant"


def test_figures_of_the_schedule(timed: Engine) -> None:
    async def ask(client: httpx.AsyncClient) -> tuple[dict[str, Any], str]:
        for deadline in ({}, {}, {"deadline_ms": 1000}):
            await client.post("/v1/rank", json=rank_body(6, user_id="v" if deadline else "u", **deadline))
        return (await client.get("/v1/cache/stats")).json(), (await client.get("/metrics")).text

    stats, text = asking(EngineBackend(timed, "tiny"), ask, ServerConfig(warm=False))
    assert stats["door"]["outcomes"] == {"accepted": 2, "overloaded": 0, "late": 1, "expired": 0, "probed": 0}
    assert 'rcllm:door_total{model_name="tiny",outcome="late"} 1.0' in text
    assert 'vllm:num_requests_waiting{model_name="tiny"} 0.0' in text
    assert 'rcllm:cache_hits_total{model_name="tiny",tier="device"}' in text
