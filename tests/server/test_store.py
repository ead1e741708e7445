"""A server over a real store on disk: it is kept over a restart, warmed into, and heeds what other processes erase."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from rcllm.engine.engine import Engine
from rcllm.server.on_engine import EngineBackend
from tests.cli.conftest import Run, Shop, run, shop  # noqa: F401  (fixtures)
from tests.cli.test_serve import serving
from tests.engine.test_restart import built
from tests.server.asking import asking, rank_body

pytestmark = pytest.mark.usefixtures("one_compute_thread")
WORDS = ("my own words", "and more of them")


def sources(told: dict[str, Any], kind: str) -> set[str]:
    """Where the blocks of a kind came from, those that were reused."""
    blocks = [block for block in told["receipt"]["blocks"] if block["kind"] == kind]
    return {block["source"] for block in blocks if block["num_reused"] or block["source"] == "computed"}


def served(engine: Engine, *bodies: dict[str, Any]) -> list[dict[str, Any]]:
    async def ask(client: httpx.AsyncClient) -> list[dict[str, Any]]:
        return [(await client.post("/v1/rank", json={**body, "explain": True})).json() for body in bodies]

    return asking(EngineBackend(engine, "tiny"), ask)


def test_what_a_server_computed_the_next_one_reads(tmp_path: Path) -> None:
    with built(tmp_path) as engine:
        (first,) = served(engine, rank_body(4, *WORDS, user_id="ann"))
    with built(tmp_path) as engine:
        (again,) = served(engine, rank_body(4, *WORDS, user_id="ann"))
    assert again["scores"] == first["scores"]
    assert again["tokens_computed"] == 0
    assert sources(again, "item") == {"disk"}


def test_warming_over_http_fills_the_store(tmp_path: Path) -> None:
    async def warm(client: httpx.AsyncClient) -> dict[str, Any]:
        assert (await client.post("/v1/cache/warm", json={"item_ids": ["i0", "i1", "i2", "i3"]})).status_code == 202
        while (await client.get("/v1/cache/stats")).json()["warmth"]["running"]:
            await asyncio.sleep(0.005)
        stats: dict[str, Any] = (await client.get("/v1/cache/stats")).json()
        return stats

    with built(tmp_path) as engine:
        stats = asking(EngineBackend(engine, "tiny"), warm)
        (tier,) = stats["tiers"]
        assert (tier["tier"], stats["warmth"]["error"]) == ("disk", "")
    with built(tmp_path) as engine:
        (told,) = served(engine, rank_body(4))
        assert sources(told, "item") == {"disk"}
        (tier,) = engine.stats().tiers
        assert tier.num_blocks >= 8, "as candidates and as events"


def test_items_and_users_go_from_the_disk_as_well(tmp_path: Path) -> None:
    async def change(client: httpx.AsyncClient) -> tuple[int, int]:
        await client.post("/v1/rank", json=rank_body(4, *WORDS, user_id="ann", tenant="shop"))
        put = await client.put("/v1/items/i1", json={"fields": {"title": "something else"}})
        wrong = await client.delete("/v1/users/ann")
        erased = await client.delete("/v1/users/ann", params={"tenant": "shop"})
        assert wrong.json()["num_blocks"] == 0, "a user of another tenant"
        return put.json()["num_blocks"], erased.json()["num_blocks"]

    with built(tmp_path) as engine:
        item_blocks, user_blocks = asking(EngineBackend(engine, "tiny"), change)
    assert item_blocks >= 1
    assert user_blocks >= 2
    with built(tmp_path) as engine:
        (told,) = served(engine, rank_body(4, *WORDS, user_id="ann", tenant="shop"))
    own = [block["source"] for block in told["receipt"]["blocks"] if block["kind"] == "history" and block["owner"]]
    assert "disk" not in own[:2]
    assert {block["source"] for block in told["receipt"]["blocks"] if block["owner"] == "i1"} >= {"computed"}


def test_figures_of_every_tier(tmp_path: Path) -> None:
    async def ask(client: httpx.AsyncClient) -> str:
        await client.post("/v1/rank", json=rank_body(4))
        return (await client.get("/metrics")).text

    with built(tmp_path):
        pass
    with built(tmp_path) as engine:
        served(engine, rank_body(4))
    with built(tmp_path) as engine:
        text = asking(EngineBackend(engine, "tiny"), ask)
    assert 'rcllm:cache_hits_total{model_name="tiny",tier="disk"}' in text
    for name in (
        "blocks",
        "bytes",
        "budget_bytes",
        "waiting_bytes",
        "evictions_total",
        "dropped_total",
        "errors_total",
    ):
        assert f'rcllm:tier_{name}{{model_name="tiny",tier="disk"}}' in text
    assert 'rcllm:rate{model_name="tiny",of="flops_per_s"}' in text


@pytest.mark.slow
def test_another_process_erases_a_user_and_the_running_server_heeds_it(shop: Shop, run: Run, tmp_path: Path) -> None:  # noqa: F811
    """`rcllm serve` opens a store by itself, `rcllm cache erase` works beside it, and the end leaves it whole."""
    folder = tmp_path / "store"
    words = ("--store-folder", str(folder), "--readout", "pointwise", "--allow-uncalibrated")
    body = {"candidates": ["i1", "i2"], "history": [{"text": "words of ann"}], "user_id": "ann", "level": "blocks"}

    def rank(address: str, name: str) -> dict[str, Any]:
        asked = {**body, "request_id": name, "explain": True}
        told: dict[str, Any] = httpx.post(f"{address}/v1/rank", json=asked, timeout=60).json()
        return told

    with serving(shop, *words) as (address, process):
        rank(address, "r1")
        assert "computed" not in sources(rank(address, "r2"), "history")
        erased = run("cache", "erase", "--user", "ann", "--store-folder", folder)
        assert erased.exit_code == 0, erased.output
        assert "ann: 0 blocks" not in erased.output
        assert "computed" in sources(rank(address, "r3"), "history"), "it read what was erased"
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 0
    whole = run("cache", "verify", "--store-folder", folder)
    assert "all whole" in whole.output
    assert not whole.output.startswith("0 blocks"), "it was handed down at the end"
