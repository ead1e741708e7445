"""The decoder of semantic IDs that comes with the repository, beside a ranker, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from rcllm.config import CacheConfig, Config, ModelConfig
from rcllm.core.ranking import Item, ItemId
from rcllm.server.app import make_app
from rcllm.server.on_engine import EngineBackend
from rcllm.sid.load import load_recommender
from tests.engine import tiny

FOLDER = Path(__file__).resolve().parents[2] / "decoders" / "movielens"
STAR_WARS = ["50", "172", "181"]  # and its two sequels


@pytest.fixture
def client(one_compute_thread: None) -> Iterator[TestClient]:
    recommender = load_recommender(Config(ModelConfig(path=str(FOLDER)), cache=CacheConfig(pool_mb=50)))
    films = {ItemId(film): Item(ItemId(film), {"title": "red lamp"}) for film in STAR_WARS}
    engine = tiny.fresh(items=tiny.catalogue() | films)
    with TestClient(make_app(EngineBackend(engine, "tiny", recommender))) as made:
        yield made


def test_it_is_small_and_says_how_it_was_trained() -> None:
    told = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
    assert told["items"] == 1682
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 5_000_000


def test_it_recommends_beside_a_ranker_and_leaves_out_what_was_seen(client: TestClient) -> None:
    told = client.post("/v1/recommend", json={"history": STAR_WARS, "n": 10}).json()
    assert len(told["items"]) == 10
    assert told["scores"] == sorted(told["scores"], reverse=True)
    assert set(STAR_WARS) & set(told["items"]), "a film that was seen is likely, too"
    unseen = client.post("/v1/recommend", json={"history": STAR_WARS, "n": 10, "unseen": True, "deny": ["1"]}).json()
    assert len(unseen["items"]) == 10
    assert not {*STAR_WARS, "1"} & set(unseen["items"])
    other = client.post("/v1/recommend", json={"history": ["94", "63", "143"], "n": 10, "unseen": True}).json()
    assert other["items"] != unseen["items"]
    assert client.post("/v1/rank", json={"candidates": ["i1", "i2"]}).status_code == 200


def test_what_the_server_knows_of_a_user_counts_as_seen(client: TestClient) -> None:
    for item_id in STAR_WARS:
        client.post("/v1/users/ann/events", json={"item_id": item_id})
    told = client.post("/v1/recommend", json={"user_id": "ann", "n": 20, "unseen": True}).json()
    assert told["known_events"] == 3
    assert not set(STAR_WARS) & set(told["items"])


@pytest.mark.parametrize("codes", [[1], [0, 0, 100_000], [-1, 0, 0], [1 << 70, 0, 0]])
def test_codes_that_do_not_fit_change_nothing(client: TestClient, codes: list[int]) -> None:
    body = {"fields": {"title": "another title"}, "codes": codes}
    for item_id in ("50", "new"):
        reply = client.put(f"/v1/items/{item_id}", json=body)
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["param"]) == (400, "invalid_request", "codes")
        assert error["message"].startswith("codes: ")
    assert client.get("/v1/items", params={"query": "another"}).json()["items"] == []


def test_the_document_says_what_only_a_server_is_told(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]

    def properties(path: str) -> set[str]:
        return set(paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"])

    assert {"candidates", "prior", "level", "deadline_ms", "explain"} <= properties("/v1/rank")
    assert {"history", "unseen", "deadline_ms"} <= properties("/v1/recommend")
