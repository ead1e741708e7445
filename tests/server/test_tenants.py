"""Tenants: whose user a request is for, and that nobody reads what belongs to another tenant's users."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from rcllm.config import ServerConfig
from rcllm.core.decoding import GenerateOptions
from rcllm.core.ranking import RankRequest
from rcllm.core.texts import TextRequest
from rcllm.engine.engine import Engine
from rcllm.server.app import make_app
from rcllm.server.fake import FakeBackend
from rcllm.server.on_engine import EngineBackend
from rcllm.server.pools import DraftPoolsByName
from tests.server.asking import asking, rank_body

A, B, SHOP, ADMIN = "key-of-tenant-a", "key-of-tenant-b", "key-of-the-shop", "key-of-the-admin"
CONFIG = ServerConfig(api_keys=(SHOP,), tenant_keys={"a": (A,), "b": (B,)}, admin_key=ADMIN, warm=False)


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(make_app(FakeBackend({"i1": "red"}), CONFIG)) as made:
        yield made


def rank(client: TestClient, key: str, header: str = "", **body: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} | ({"x-tenant": header} if header else {})
    return client.post("/v1/rank", json={"candidates": ["i1"], **body}, headers=headers)


def asked_for(client: TestClient) -> str:
    """The tenant of the last request that came to the backend."""
    last = client.app.state.served.backend.answered[-1]  # type: ignore[attr-defined]
    assert isinstance(last, RankRequest)
    return last.tenant


@pytest.mark.parametrize(
    ("key", "said", "tenant"),
    [
        (A, {}, "a"),
        (A, {"tenant": "a"}, "a"),
        (A, {"header": "a"}, "a"),
        (SHOP, {}, ""),
        (SHOP, {"tenant": "open"}, "open"),
        (SHOP, {"header": "open"}, "open"),
        (SHOP, {"tenant": "open", "header": "other"}, "open"),
        (ADMIN, {"tenant": "b"}, "b"),
    ],
)
def test_the_tenant_of_a_request(client: TestClient, key: str, said: dict[str, str], tenant: str) -> None:
    assert rank(client, key, **said).status_code == 200
    assert asked_for(client) == tenant


@pytest.mark.parametrize(
    ("key", "said"), [(A, {"tenant": "b"}), (A, {"header": "b"}), (A, {"tenant": "open"}), (SHOP, {"tenant": "a"})]
)
def test_a_tenant_that_the_key_may_not_name(client: TestClient, key: str, said: dict[str, str]) -> None:
    reply = rank(client, key, **said)
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "other_tenant")


def test_every_kind_of_request_is_held_to_it(client: TestClient) -> None:
    for path, body in (
        ("/v1/recommend", {}),
        ("/rerank", {"query": "q", "documents": ["d"]}),
        ("/v1/score", {"query": "q", "items": ["d"], "label_token_ids": [1]}),
        ("/v1/score", {"text_1": "q", "text_2": "d"}),
        ("/v1/completions", {"prompt": "q"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "q"}], "stream": True}),
    ):
        headers = {"authorization": f"Bearer {A}"}
        assert client.post(path, json={**body, "tenant": "b"}, headers=headers).status_code == 403, path
        assert client.post(path, json=body, headers=headers).status_code == 200, path
        assert client.app.state.served.backend.answered[-1].tenant == "a", path  # type: ignore[attr-defined]


def test_a_tenants_key_is_a_key_and_no_admins(client: TestClient) -> None:
    assert client.put("/v1/items/x", json={"fields": {"t": "x"}}, headers={"x-api-key": A}).status_code == 403
    assert client.get("/v1/models").status_code == 401
    assert client.get("/v1/models", headers={"x-api-key": B}).status_code == 200


def test_names_of_tenants_are_short(client: TestClient) -> None:
    assert rank(client, SHOP, header="x" * 65).status_code == 413


def test_events_receipts_and_erasure_are_a_tenants_own(client: TestClient) -> None:
    admin = {"authorization": f"Bearer {ADMIN}"}
    for tenant, number in (("a", 1), ("b", 2)):
        for _ in range(number):
            client.post("/v1/users/u/events", params={"tenant": tenant}, json={"item_id": "i1"}, headers=admin)
    assert rank(client, A, user_id="u", request_id="mine").json()["known_events"] == 1
    assert rank(client, B, user_id="u").json()["known_events"] == 2
    assert "known_events" not in rank(client, SHOP, user_id="u").json()
    assert client.get("/v1/receipts/mine", headers={"x-api-key": B}).status_code == 404
    assert client.post("/v1/replay/mine", headers={"x-api-key": B}).status_code == 404
    erased = client.delete("/v1/users/u", params={"tenant": "a"}, headers=admin).json()
    assert (erased["num_events"], erased["num_receipts"]) == (1, 1)
    assert "known_events" not in rank(client, A, user_id="u").json()
    assert rank(client, B, user_id="u").json()["known_events"] == 2


def test_blocks_of_users_are_a_tenants_own_and_items_are_shared(tiny_engine: Engine) -> None:
    """Two tenants' users have one name and used the same words: the second reads nothing of the first."""
    body = rank_body(3, "my own words", user_id="u", explain=True)

    async def ask(client: httpx.AsyncClient) -> list[dict[str, Any]]:
        keys = (A, A, B)
        replies = [await client.post("/v1/rank", json=body, headers={"x-api-key": key}) for key in keys]
        return [reply.json()["receipt"] for reply in replies]

    def sources(receipt: dict[str, Any]) -> dict[str, set[str]]:
        kinds = {block["kind"] for block in receipt["blocks"]}
        return {kind: {b["source"] for b in receipt["blocks"] if b["kind"] == kind} for kind in kinds}

    first, again, other = map(sources, asking(EngineBackend(tiny_engine, "tiny"), ask, CONFIG))
    assert "computed" in first["history"]
    assert "computed" not in again["history"]
    assert "computed" in other["history"]
    assert first["item"] == {"computed"}
    assert other["item"] == {"device"}


def test_pools_of_drafts_are_a_tenants_own(tiny_engine: Engine) -> None:
    """Also where names are made so that tenant and pool would run into each other."""
    pools = DraftPoolsByName(tiny_engine)

    def asked(tenant: str, pool: str) -> TextRequest:
        return TextRequest("t", options=GenerateOptions(), tenant=tenant, pool=pool, parts=((1,),))

    for request in (asked("", "a/p"), asked("a", "p"), asked("a/p", ""), asked("", "p"), asked("b", "p")):
        pools.drafter_of(request, (1,))
    assert list(pools._pools) == [("", "a/p"), ("a", "p"), ("", "p"), ("b", "p")]
