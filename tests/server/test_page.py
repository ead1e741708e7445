"""The page at `/`: its files, its limits, and what it asks for, against a backend that answers by rule."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from rcllm.config import ServerConfig
from rcllm.core.ranking import Item, ItemId, RankRequest
from rcllm.errors import DeadlineError, OverloadedError
from rcllm.fidelity.monitor import GuardEvent
from rcllm.fidelity.shadow import GuardCounts, GuardStats, GuardStatus, KindStats
from rcllm.server.app import make_app
from rcllm.server.backend import Door, Stats
from rcllm.server.endpoints.page import FILES
from rcllm.server.fake import FakeBackend
from rcllm.server.finding import MAX_READ, find, text_of
from rcllm.server.on_engine import EngineBackend
from rcllm.store.contract import TierStats

KEYED = ServerConfig(api_keys=("a-key-of-eight",), admin_key="an-admin-key")
NAMES = sorted(each.name for each in FILES.iterdir())


def dashboard(client: TestClient) -> dict[str, Any]:
    reply = client.get("/v1/dashboard")
    assert reply.status_code == 200, reply.text
    told: dict[str, Any] = reply.json()
    return told


# ---- files ----------------------------------------------------------------------------------------------------------


def test_the_page_runs_nothing_that_is_not_the_servers(client: TestClient) -> None:
    reply = client.get("/")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert (reply.headers["x-content-type-options"], reply.headers["x-frame-options"]) == ("nosniff", "DENY")
    assert re.findall(r"<script(?![^>]* src=)", reply.text) == []
    assert re.findall(r"\son\w+=|style=", reply.text) == []


def test_everything_that_the_page_names_is_there(client: TestClient) -> None:
    named = set(re.findall(r"(?:src|href)=\"(/page/[^\"]+)\"", client.get("/").text))
    for script in (name for name in NAMES if name.endswith(".js")):
        named |= {f"/page/{each}" for each in re.findall(r"from \"\./([^\"]+)\"", (FILES / script).read_text("utf-8"))}
    assert len(named) > 10
    for path in named:
        reply = client.get(path)
        assert reply.status_code == 200, path
        assert reply.headers["content-type"].split(";")[0] in ("text/css", "text/javascript", "image/svg+xml")


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("uplot")])
def test_our_files_ask_no_other_address_and_make_no_markup(name: str) -> None:
    text = (FILES / name).read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
    assert "://" not in text
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|localStorage|sessionStorage", text
    )


@pytest.mark.parametrize(
    "name", ["nothing.js", "..%2fapp.py", "uplot-LICENSE.txt", "index.html.js", "%2e%2e", "main.py"]
)
def test_nothing_else_is_given_out(client: TestClient, name: str) -> None:
    reply = client.get(f"/page/{name}")
    assert reply.status_code == 404
    assert "script-src" not in reply.headers["content-security-policy"]


def test_the_chart_library_comes_with_its_licence() -> None:
    assert "MIT License" in (FILES / "uplot-LICENSE.txt").read_text("utf-8")
    assert (FILES / "uplot.min.js").read_text("utf-8").startswith("/*! https://github.com/leeoniya/uPlot")


def test_the_page_needs_no_key_and_its_figures_do() -> None:
    with TestClient(make_app(FakeBackend({"a": "red"}), KEYED)) as client:
        assert client.get("/").status_code == client.get("/page/main.js").status_code == 200
        for path in ("/v1/dashboard", "/v1/items", "/page"):
            assert client.get(path).status_code == 401, path
        key = {"authorization": "Bearer a-key-of-eight"}
        assert client.get("/v1/dashboard", headers=key).status_code == 200
        assert client.get("/v1/items", headers=key).json()["items"] == [{"item_id": "a", "text": "red"}]


# ---- the dashboard --------------------------------------------------------------------------------------------------


def test_requests_are_counted_by_level_and_outcome() -> None:
    plain = FakeBackend({"a": "red", "b": "blue"})
    errors = {"busy": OverloadedError("too much waits", 1.0), "late": DeadlineError("no time")}

    def rule(request: Any) -> Any:
        if request.request_id in errors:
            return errors[request.request_id]
        answer = plain._rank(request)
        given_up = ("candidates",) if request.request_id == "cut" else ()
        return replace(answer, receipt=replace(answer.receipt, level="tail(0.3)", degraded=given_up))

    with TestClient(make_app(FakeBackend({"a": "red", "b": "blue"}, rule=rule))) as client:
        for name in ("one", "cut", "busy", "late"):
            client.post("/v1/rank", json={"candidates": ["a", "b"], "request_id": name})
        told = dashboard(client)["requests"]
        assert (told["answered"], told["degraded"]) == ({"rank": 2}, {"candidates": 1})
        assert told["failed"] == {"overloaded": 1, "deadline": 1}
        (times,) = told["ttft"]
        assert (times["kind"], times["level"]) == ("rank", "tail")
        assert len(times["counts"]) == len(told["bounds_s"]) + 1
        assert sum(times["counts"]) == 2
        assert min(times["counts"]) >= 0
        assert told["tokens"]["device"] == told["tokens"]["computed"] == len("redblue"), "once missing, once there"
        assert (
            'rcllm:time_to_first_token_seconds_count{kind="rank",level="tail",model_name="fake"} 2.0'
            in client.get("/metrics").text
        )


def test_what_is_held_and_guarded_is_told_and_bounded() -> None:
    step = GuardEvent(1.0, "pointwise", "trip", "blocks", "exact", 1200.0, 40, 0.1, 0.2)
    kinds = (KindStats("pointwise", "exact", 1.5, 3, math.nan),)
    guard = GuardStatus(
        ("blocks", "exact"), 0.05, 0.1, GuardStats(GuardCounts(num_shadowed=3), kinds), (step,) * 50, 0, 0
    )
    held = Stats(
        num_items=2,
        num_blocks=5,
        num_bytes=1 << 20,
        budget_bytes=1 << 30,
        hits={"device": 3, "disk": 1},
        misses=4,
        tiers=(TierStats("disk", 7, 8, 9, evictions=10),),
        door=Door(2, 30.0, {"accepted": 6}),
        guard=guard,
    )
    backend = FakeBackend({"a": "red"})
    backend.stats = lambda: held  # type: ignore[method-assign]
    with TestClient(make_app(backend)) as client:
        told = dashboard(client)
    assert [tier["tier"] for tier in told["cache"]["tiers"]] == ["device", "disk"]
    assert told["cache"]["tiers"][1] == {
        "tier": "disk",
        "num_blocks": 7,
        "num_bytes": 8,
        "budget_bytes": 9,
        "evictions": 10,
    }
    assert (told["cache"]["hits"], told["cache"]["misses"]) == ({"device": 3, "disk": 1}, 4)
    assert (told["queue"]["num_waiting"], told["queue"]["outcomes"]) == (2, {"accepted": 6})
    assert told["guard"]["kinds"][0]["mean_loss"] is None, "NaN is no JSON"
    assert len(told["guard"]["steps"]) == 20


def test_an_engines_figures_are_json_once_it_has_answered(computing: EngineBackend) -> None:
    """What is counted at the door came as a Counter, which `asdict` turns into keys that are pairs."""
    with TestClient(make_app(computing, ServerConfig(warm=False))) as client:
        ids = [item["item_id"] for item in client.get("/v1/items?limit=3").json()["items"]]
        assert client.post("/v1/rank", json={"candidates": ids}).status_code == 200
        assert client.get("/v1/cache/stats").json()["door"]["outcomes"]["accepted"] == 1
        assert dashboard(client)["requests"]["answered"] == {"rank": 1}


def test_nothing_that_a_user_wrote_is_told(client: TestClient) -> None:
    client.post("/v1/rank", json={"candidates": ["a"], "history": [{"text": "my secret"}], "user_id": "me-myself"})
    text = client.get("/v1/dashboard").text
    assert "secret" not in text
    assert "me-myself" not in text


# ---- items ----------------------------------------------------------------------------------------------------------


def found(client: TestClient, **asked: Any) -> list[str]:
    reply = client.get("/v1/items", params=asked)
    assert reply.status_code == 200, reply.text
    return [item["item_id"] for item in reply.json()["items"]]


def test_items_are_found_by_all_of_their_words(client: TestClient) -> None:
    assert found(client, query="LAMP") == ["a", "b"]
    assert found(client, query="chair red") == ["c"]
    assert found(client, query="nothing") == []
    assert found(client) == ["a", "b", "c", "d"]
    assert found(client, limit=2) == ["a", "b"]


def test_an_id_that_is_typed_comes_first_and_once(client: TestClient) -> None:
    assert found(client, query="d") == ["d", "a", "c"], "the others hold the letter"
    assert found(client, item_id=["c", "gone", "a"]) == ["c", "a"]


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "101"}, "limit"),
        ({"limit": "²"}, "limit"),
        ({"query": "x" * 201}, "query"),
    ],
)
def test_a_search_is_held_to_its_limits(client: TestClient, asked: dict[str, str], field: str) -> None:
    reply = client.get("/v1/items", params=asked)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)


def test_a_search_reads_a_bounded_part_and_says_so() -> None:
    items = {ItemId(str(number)): Item(ItemId(str(number)), {"title": "x"}) for number in range(MAX_READ + 10)}
    searched = find(items, "nowhere", 5)
    assert (searched.items, searched.num_read, searched.num_items) == ((), MAX_READ, MAX_READ + 10)
    assert find(items, "x", 5).num_read == 5


def test_an_item_is_called_by_the_field_that_people_read() -> None:
    item = Item(ItemId("i"), {"genre": "drama", "title": "Heat"})
    assert text_of(item, ("title", "genre")) == "Heat"
    assert text_of(item, ("name",)) == "drama"
    assert text_of(Item(ItemId("i"), {}), ("title",)) == "i"


def test_items_change_while_they_are_looked_for(backend: FakeBackend, client: TestClient) -> None:
    client.put("/v1/items/a", json={"fields": {"title": "green door"}})
    client.delete("/v1/items/b")
    assert found(client, query="lamp") == []
    assert found(client, query="green") == ["a"]
    assert backend.items.get(ItemId("b")) is None


def test_the_page_can_rank_what_it_found(client: TestClient, backend: FakeBackend) -> None:
    ids = found(client, query="lamp")
    told = client.post("/v1/rank", json={"candidates": ids, "history": [], "level": "exact", "explain": True}).json()
    assert [block["owner"] for block in told["receipt"]["blocks"]] == ids
    assert isinstance(backend.answered[-1], RankRequest)
