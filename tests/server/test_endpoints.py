"""Each address against a backend that answers by rule: bodies in, bodies out, nothing computed."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from rcllm.core.ranking import Event, ItemId, RankRequest
from rcllm.core.texts import TextRequest
from rcllm.server.app import ENDPOINTS, make_app
from rcllm.server.fake import FakeBackend
from rcllm.version import __version__
from tests.server.asking import asking


def post(client: TestClient, path: str, **body: Any) -> dict[str, Any]:
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def asked(backend: FakeBackend) -> RankRequest:
    """The last request, which is a ranking."""
    request = backend.answered[-1]
    assert isinstance(request, RankRequest)
    return request


def events(text: str) -> list[Any]:
    """The data of each server-sent event."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


# ---- rank and recommend ---------------------------------------------------------------------------------------------


def test_rank_by_ids_and_inline_texts(client: TestClient, backend: FakeBackend) -> None:
    told = post(
        client,
        "/v1/rank",
        request_id="r1",
        candidates=["b", {"item_id": "x", "text": "red red"}, {"id": 7, "title": "lamp", "brand": "old"}],
        history=["a", {"text": "my own words"}],
        user_id="u",
    )
    assert told["ranking"] == ["b", "x", "7"]
    assert told["scores"] == {"b": 1.0, "x": 1.0, "7": 1.0}
    assert (told["request_id"], told["level"], told["readout"]) == ("r1", "exact", "pointwise")
    request = asked(backend)
    assert request.candidates == ("b", "x", "7")
    assert request.texts == {"x": {"title": "red red"}, "7": {"title": "lamp", "brand": "old"}}
    assert request.history == (Event(ItemId("a")), Event(text="my own words"))


def test_rank_says_how_it_wants_to_be_served(client: TestClient, backend: FakeBackend) -> None:
    told = post(client, "/v1/rank", candidates=["b"], level="tail(0.2)", deadline_ms=500, tenant="t", explain=True)
    assert [block["owner"] for block in told["receipt"]["blocks"]] == ["b"]
    options = asked(backend).options
    assert options is not None
    assert str(options.level) == "tail(0.2)"
    assert options.readout == "pointwise", "a level alone keeps the server's other options"


def test_a_request_without_an_id_gets_the_one_of_its_header(client: TestClient) -> None:
    reply = client.post("/v1/rank", json={"candidates": ["a"]}, headers={"x-request-id": "trace-7"})
    assert reply.headers["x-request-id"] == reply.json()["request_id"] == "trace-7"
    unfit = client.post("/v1/rank", json={"candidates": ["a"]}, headers={"x-request-id": "a b"})
    assert unfit.json()["request_id"] not in ("", "a b")


def test_what_was_given_up_for_a_deadline_is_named_and_counted() -> None:
    plain = FakeBackend({"a": "red", "b": "blue"})

    def hurried(request: Any) -> Any:
        answer = plain._rank(request)
        return replace(answer, receipt=replace(answer.receipt, degraded=("level", "candidates"), guard="watched"))

    with TestClient(make_app(FakeBackend({"a": "red", "b": "blue"}, rule=hurried))) as client:
        told = post(client, "/v1/rank", candidates=["a", "b"])
        assert (told["degraded"], told["guard"]) == (["level", "candidates"], "watched")
        assert 'rcllm:degraded_total{model_name="fake",step="level"} 1.0' in client.get("/metrics").text


def test_recommend(client: TestClient) -> None:
    told = post(client, "/v1/recommend", history=["a"], n=2, deny=["a"])
    assert told["items"] == ["b", "c"]
    assert told["scores"] == [-math.log(2), -math.log(3)], "scores are not rounded"


# ---- rerank ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank"])
def test_rerank_as_jina_and_vllm_have_it(client: TestClient, path: str) -> None:
    documents = ["blue", "red lamp", {"title": "red"}, "blue"]
    told = post(client, path, model="fake", query="red lamp", documents=documents, top_n=3)
    best = told["results"]
    assert [result["index"] for result in best] == [1, 2, 0]
    assert [result["document"] for result in best] == [{"text": "red lamp"}, {"title": "red"}, {"text": "blue"}]
    assert best[0]["relevance_score"] == pytest.approx(1 / (1 + math.exp(-3)))
    assert told["usage"]["total_tokens"] == told["usage"]["prompt_tokens"] > 0


def test_rerank_as_cohere_has_it(client: TestClient) -> None:
    told = post(client, "/v2/rerank", model="fake", query="red", documents=["blue", "red"], max_tokens_per_doc=None)
    assert told["results"][0] == {"index": 1, "relevance_score": pytest.approx(1 / (1 + math.exp(-1)))}
    assert told["meta"]["api_version"] == {"version": "2"}
    shown = post(client, "/v2/rerank", model="fake", query="red", documents=["blue"], return_documents=True)
    assert shown["results"][0]["document"] == {"text": "blue"}


def test_equal_documents_are_ranked_once_and_answered_each(client: TestClient, backend: FakeBackend) -> None:
    told = post(client, "/rerank", query="red", documents=["red", "blue", "red"])
    assert len(asked(backend).candidates) == 2
    scores = {result["index"]: result["relevance_score"] for result in told["results"]}
    assert scores[0] == scores[2] > scores[1]


def test_fields_that_the_template_does_not_show_are_written_out(client: TestClient, backend: FakeBackend) -> None:
    post(client, "/rerank", query="red", documents=[{"name": "x", "colour": "red"}], rank_fields=["colour"])
    assert list(asked(backend).texts.values()) == [{"title": "colour: red"}]


def test_the_query_is_the_users_own_words(client: TestClient, backend: FakeBackend) -> None:
    post(client, "/rerank", query="red", documents=["a"], user="u7")
    assert asked(backend).history == (Event(text="red"),)
    assert asked(backend).user_id == "u7"


# ---- score ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_score_as_sglang_has_it(client: TestClient, path: str) -> None:
    body = {"query": "Is this red? ", "items": ["a lamp", [1, 2, 3]], "label_token_ids": [5, 6], "model": "fake"}
    plain = post(client, path, **body)
    assert plain["object"] == "scoring"
    assert [len(row) for row in plain["scores"]] == [2, 2]
    assert all(0 < value < 1 for row in plain["scores"] for value in row)
    among = post(client, path, **body, apply_softmax=True)
    for row, whole in zip(among["scores"], plain["scores"], strict=True):
        assert sum(row) == pytest.approx(1.0)
        assert row == pytest.approx([value / sum(whole) for value in whole])


def test_score_joins_texts_in_the_order_that_is_asked_for(client: TestClient, backend: FakeBackend) -> None:
    post(client, "/v1/score", query="q", items="i", label_token_ids=[1], item_first=True)
    request = backend.answered[-1]
    assert getattr(request, "item_first") is True  # noqa: B009
    assert getattr(request, "items") == ((ord("i"),),)  # noqa: B009


@pytest.mark.parametrize("names", [("text_1", "text_2"), ("queries", "documents"), ("queries", "items")])
def test_score_as_vllm_has_it(client: TestClient, names: tuple[str, str]) -> None:
    one, other = names
    told = post(client, "/v1/score", **{one: "red lamp", other: ["blue", "red lamp"]})
    assert [(each["index"], each["object"]) for each in told["data"]] == [(0, "score"), (1, "score")]
    assert told["data"][0]["score"] < told["data"][1]["score"]
    assert told["object"] == "list"


def test_pairs_are_answered_in_their_order(client: TestClient, backend: FakeBackend) -> None:
    told = post(client, "/v1/score", text_1=["red", "blue", "red"], text_2=["blue", "blue", "red"])
    assert [each["score"] > 0.5 for each in told["data"]] == [False, True, True]
    assert len(backend.answered) == 2, "pairs with the same first text are one ranking"


# ---- texts ----------------------------------------------------------------------------------------------------------


def test_completion(client: TestClient, backend: FakeBackend) -> None:
    told = post(client, "/v1/completions", model="fake", prompt="one two", max_tokens=50, seed=3, temperature=0.5)
    assert told["object"] == "text_completion"
    assert told["choices"] == [{"index": 0, "logprobs": None, "finish_reason": "stop", "text": "two one"}]
    usage = told["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (7, 7, 14)
    request = backend.answered[-1]
    assert isinstance(request, TextRequest)
    assert (request.options.seed, request.options.temperature, request.options.max_tokens) == (3, 0.5, 50)


def test_prompts_and_choices_are_answered_in_order(client: TestClient, backend: FakeBackend) -> None:
    told = post(client, "/v1/completions", prompt=[[97, 32, 98], [99, 32, 100]], n=2, seed=5)
    assert [choice["text"] for choice in told["choices"]] == ["b a", "b a", "d c", "d c"]
    assert [choice["index"] for choice in told["choices"]] == [0, 1, 2, 3]
    assert told["usage"]["prompt_tokens"] == 6, "a prompt with two choices counts once"
    seeds = {getattr(request, "options").seed for request in backend.answered}  # noqa: B009
    assert seeds == {5, 6}


def test_an_unseeded_answer_is_drawn_by_its_id(client: TestClient, backend: FakeBackend) -> None:
    for name in ("one", "one", "other"):
        client.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-id": name})
    first, again, other = [getattr(request, "options").seed for request in backend.answered]  # noqa: B009
    assert first == again != other


def test_cached_tokens_are_counted_as_openai_counts_them(client: TestClient) -> None:
    body: dict[str, Any] = {"prompt": "x" * 200, "user": "u", "max_tokens": 4}
    first, second = (post(client, "/v1/completions", **body)["usage"] for _ in range(2))
    assert first["prompt_tokens_details"] == {"cached_tokens": 0}
    assert second["prompt_tokens_details"] == {"cached_tokens": 192}


def test_a_stream_joins_to_the_whole_answer(client: TestClient) -> None:
    body = {"prompt": "zwei Äpfel STOP eins", "max_tokens": 50, "stop": ["STOP"]}
    whole = post(client, "/v1/completions", **body)["choices"][0]
    reply = client.post("/v1/completions", json={**body, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *pieces, done = events(reply.text)
    assert done == "[DONE]"
    texts = [piece["choices"][0]["text"] for piece in pieces]
    assert "".join(texts) == whole["text"] == "eins "
    assert "\ufffd" not in "".join(texts)
    assert [piece["choices"][0]["finish_reason"] for piece in pieces][-1] == whole["finish_reason"] == "stop"
    assert len(texts) > 2


def test_chat(client: TestClient, backend: FakeBackend) -> None:
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "hello "}, {"type": "text", "text": "you"}]},
    ]
    told = post(client, "/v1/chat/completions", messages=messages, max_completion_tokens=6)
    assert told["object"] == "chat.completion"
    (choice,) = told["choices"]
    assert choice["message"] == {"role": "assistant", "content": "assist", "refusal": None}
    assert choice["finish_reason"] == "length"
    request = backend.answered[-1]
    assert isinstance(request, TextRequest)
    assert request.shares_first
    assert bytes(request.parts[1]) == b"user: hello you\n"


def test_chat_as_a_stream_counts_where_it_is_asked_to(client: TestClient) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "stream_options": {"include_usage": True}}
    *pieces, usage, done = events(client.post("/v1/chat/completions", json=body).text)
    assert pieces[0]["choices"][0]["delta"]["role"] == "assistant"
    assert all(piece["object"] == "chat.completion.chunk" for piece in pieces)
    assert "role" not in pieces[1]["choices"][0]["delta"]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] > 0
    assert done == "[DONE]"


def test_choices_of_one_stream_are_told_apart(client: TestClient) -> None:
    reply = client.post("/v1/completions", json={"prompt": "a b c", "n": 3, "stream": True, "max_tokens": 9})
    texts: dict[int, str] = {}
    for piece in events(reply.text)[:-1]:
        (choice,) = piece["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == {0: "c b a", 1: "c b a", 2: "c b a"}


def test_what_is_wrong_with_a_stream_is_told_by_its_status(client: TestClient) -> None:
    reply = client.post("/v1/completions", json={"prompt": "", "stream": True})
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_tokens(client: TestClient) -> None:
    assert post(client, "/tokenize", prompt="ab", model="fake") == {
        "count": 2,
        "max_model_len": 65536,
        "tokens": [97, 98],
    }
    assert post(client, "/detokenize", tokens=[97, 98]) == {"prompt": "ab"}
    assert post(client, "/tokenize", prompt="")["count"] == 0


# ---- changes --------------------------------------------------------------------------------------------------------


def test_items_come_and_go(client: TestClient, backend: FakeBackend) -> None:
    assert client.put("/v1/items/z", json={"fields": {"title": "red"}}).json() == {
        "num_items": 1,
        "num_new": 1,
        "num_blocks": 0,
        "acknowledged": [],  # there are no replicas
    }
    assert post(client, "/v1/rank", candidates=["z"])["ranking"] == ["z"]
    assert client.put("/v1/items/z", json={"fields": {"title": "blue"}}).json()["num_blocks"] == 1
    bulk = post(client, "/v1/items", items=[{"item_id": 8, "fields": {"title": "x"}, "volatile": {"price": "3"}}])
    assert bulk["num_new"] == 1
    assert backend.catalogue[ItemId("8")].volatile == {"price": "3"}
    assert client.delete("/v1/items/z").status_code == 200
    assert client.delete("/v1/items/z").status_code == 404
    assert post(client, "/v1/items/delete", item_ids=["8", "a"])["num_items"] == 2


def test_an_id_may_hold_a_slash(client: TestClient, backend: FakeBackend) -> None:
    assert client.put("/v1/items/shop%2F7", json={"fields": {"title": "red"}}).status_code == 200
    assert "shop/7" in backend.catalogue


def test_events_of_a_user_are_the_history_that_a_request_leaves_out(client: TestClient, backend: FakeBackend) -> None:
    post(client, "/v1/users/u1/events", item_id="a")
    assert post(client, "/v1/users/u1/events", text="my own words") == {"known_events": 2}
    told = post(client, "/v1/rank", candidates=["b", "c"], user_id="u1")
    assert told["known_events"] == 2
    assert asked(backend).history == (Event(ItemId("a")), Event(text="my own words"))
    post(client, "/v1/rank", candidates=["b", "c"], user_id="u1", history=[])
    assert asked(backend).history == ()
    assert "known_events" not in post(client, "/v1/rank", candidates=["b"], user_id="u2")
    assert post(client, "/v1/recommend", user_id="u1")["known_events"] == 2


def test_events_of_items_that_have_gone_are_left_out_and_told(client: TestClient, backend: FakeBackend) -> None:
    for item_id in ("a", "d", "b"):
        post(client, "/v1/users/u1/events", item_id=item_id)
    client.delete("/v1/items/d")
    told = post(client, "/v1/rank", candidates=["c"], user_id="u1")
    assert asked(backend).history == (Event(ItemId("a")), Event(ItemId("b")))
    note = "1 known events are left out, since the catalogue no longer has their items"
    assert (told["known_events"], told["notes"]) == (2, [note])
    assert post(client, "/v1/recommend", user_id="u1")["notes"] == [note]
    client.put("/v1/items/d", json={"fields": {"title": "old table"}})
    assert "notes" not in post(client, "/v1/rank", candidates=["c"], user_id="u1")


def test_nothing_is_left_of_a_user_who_is_erased(client: TestClient, backend: FakeBackend) -> None:
    post(client, "/v1/users/u1/events", item_id="a")
    post(client, "/v1/rank", candidates=["b"], user_id="u1", request_id="mine")
    told = client.delete("/v1/users/u1").json()
    assert (told["num_events"], told["num_receipts"]) == (1, 1)
    assert client.get("/v1/receipts/mine").status_code == 404
    assert "known_events" not in post(client, "/v1/rank", candidates=["b"], user_id="u1")


def test_an_answer_that_ends_after_its_user_was_erased_is_not_kept() -> None:
    body = {"candidates": ["b"], "user_id": "u1", "request_id": "mine"}

    async def ask(client: httpx.AsyncClient) -> list[int]:
        under_way = asyncio.create_task(client.post("/v1/rank", json=body))
        await asyncio.sleep(0.02)
        erased = await client.delete("/v1/users/u1")
        replies = [erased, await under_way, await client.get("/v1/receipts/mine"), await client.post("/v1/replay/mine")]
        await client.post("/v1/rank", json=body)
        return [reply.status_code for reply in (*replies, await client.get("/v1/receipts/mine"))]

    assert asking(FakeBackend({"b": "blue"}, delay_s=0.1), ask) == [200, 200, 404, 404, 200]


def test_what_waits_for_its_turn_is_not_begun_once_its_user_is_erased() -> None:
    backend = FakeBackend(delay_s=0.1)

    async def ask(client: httpx.AsyncClient) -> int:
        body = {"prompt": ["a b"] * 40, "user": "u1"}
        under_way = asyncio.create_task(client.post("/v1/completions", json=body))
        await asyncio.sleep(0.05)
        await client.delete("/v1/users/u1")
        return (await under_way).status_code

    assert asking(backend, ask) == 503
    assert len(backend.answered) <= 16


# ---- sight ----------------------------------------------------------------------------------------------------------


def test_receipts_and_replay(client: TestClient, backend: FakeBackend) -> None:
    post(client, "/v1/rank", candidates=["b", "c"], history=["a"], request_id="r9")
    assert client.get("/v1/receipts/r9").json()["receipt"]["num_tokens"] == 18
    assert post(client, "/v1/replay/r9")["same"] is True
    client.put("/v1/items/c", json={"fields": {"title": "red lamp"}})
    told = post(client, "/v1/replay/r9")
    assert told["same"] is False
    assert told["first_difference"] == {"where": "num_tokens", "before": "18", "after": "17"}
    assert client.post("/v1/replay/never").json()["error"]["code"] == "not_served"


def test_health_and_what_is_served(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/version").json() == {"version": __version__}
    assert client.get("/ready").json()["ready"] is True
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("fake", "model")
    assert "rank" in model["kinds"]


def test_cache(client: TestClient) -> None:
    assert client.post("/v1/cache/warm", json={"item_ids": ["a"]}).status_code == 202
    assert client.post("/v1/cache/warm", json={"item_ids": ["nothing"]}).status_code == 404
    assert client.get("/v1/cache/stats").json()["num_items"] == 4


def test_metrics_count_what_was_answered(client: TestClient) -> None:
    post(client, "/v1/rank", candidates=["b", "c"])
    post(client, "/v1/completions", prompt="a b")
    client.post("/v1/rank", json={"candidates": ["none"]})
    text = client.get("/metrics").text
    assert 'vllm:request_success_total{finished_reason="stop",kind="rank",model_name="fake"} 1.0' in text
    assert 'vllm:generation_tokens_total{model_name="fake"} 3.0' in text
    assert 'rcllm:request_failures_total{code="unknown_item",kind="rank",model_name="fake"} 1.0' in text
    assert 'vllm:time_to_first_token_seconds_bucket{kind="rank",le="0.05",model_name="fake"}' in text
    assert 'rcllm:tokens_total{block="item",model_name="fake",source="device"}' in text
    assert "process_resident_memory_bytes" in text


def test_no_request_can_make_a_new_series(client: TestClient) -> None:
    def series() -> set[str]:
        lines = client.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}

    def ask(number: int) -> None:
        post(client, "/v1/rank", candidates=["b"], user_id=f"u{number}", level=f"tail(0.{number})", tenant=f"t{number}")

    ask(1)
    before = series()
    for number in range(2, 8):
        ask(number)
    assert series() == before


def test_every_address_is_described_with_its_body(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    for endpoint in ENDPOINTS:
        described = document["paths"][endpoint.shown_path][endpoint.method.lower()]
        assert ("requestBody" in described) == (endpoint.body is not None), endpoint.path
        assert "default" in described["responses"]
    assert "$ref" not in json.dumps(document["paths"])


# ---- errors ---------------------------------------------------------------------------------------------------------

WRONG: Mapping[str, tuple[str, str, dict[str, Any], int, str | None]] = {
    "no candidates": ("POST", "/v1/rank", {}, 400, "candidates"),
    "an unknown item": ("POST", "/v1/rank", {"candidates": ["no"]}, 404, None),
    "an unknown key": ("POST", "/v1/rank", {"candidates": ["a"], "levl": "exact"}, 400, "levl"),
    "a level that is none": ("POST", "/v1/rank", {"candidates": ["a"], "level": "fast"}, 400, "level"),
    "a deadline of 0": ("POST", "/v1/rank", {"candidates": ["a"], "deadline_ms": 0}, 400, "deadline_ms"),
    "a candidate without id": ("POST", "/v1/rank", {"candidates": [{"text": "x"}]}, 400, "candidates[0]"),
    "no documents": ("POST", "/rerank", {"query": "q", "documents": []}, 400, "documents"),
    "another model": ("POST", "/rerank", {"query": "q", "documents": ["a"], "model": "gpt-4o"}, 404, "model"),
    "a document that is a number": ("POST", "/rerank", {"query": "q", "documents": [5]}, 400, "documents[0]"),
    "no shape of a score": ("POST", "/v1/score", {"text": "q"}, 400, None),
    "pairs that do not fit": ("POST", "/v1/score", {"text_1": ["a", "b"], "text_2": ["a"] * 3}, 400, "text_2"),
    "logprobs": ("POST", "/v1/completions", {"prompt": "a", "logprobs": 2}, 400, "logprobs"),
    "tools": ("POST", "/v1/chat/completions", {"messages": [], "tools": [{"type": "function"}]}, 400, "tools"),
    "no messages": ("POST", "/v1/chat/completions", {"messages": []}, 400, "messages"),
    "a picture": (
        "POST",
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages[0]",
    ),
    "tokens that are none": ("POST", "/detokenize", {"tokens": [1 << 40]}, 400, None),
    "an item without text": ("PUT", "/v1/items/x", {"fields": {}}, 400, "fields"),
    "an event that is none": ("POST", "/v1/users/u/events", {"what": "x"}, 400, None),
    "an event of no item": ("POST", "/v1/users/u/events", {"item_id": "no"}, 404, "item_id"),
    "a prompt that is a number": ("POST", "/tokenize", {"prompt": 5}, 400, "prompt"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_in_one_shape_that_names_the_field(client: TestClient, name: str) -> None:
    method, path, body, status, field = WRONG[name]
    reply = client.request(method, path, json=body)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == field
    assert error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff\xfe", b'"text"', b"null", b"{" * 100_000])
@pytest.mark.parametrize("path", ["/v1/rank", "/v1/chat/completions", "/v1/items"])
def test_a_body_that_is_no_object_is_refused(client: TestClient, path: str, body: bytes) -> None:
    reply = client.post(path, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "invalid_request"


def test_no_error_repeats_what_a_user_wrote(client: TestClient) -> None:
    secret = "my secret words"
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/rank", {"candidates": ["a"], "history": [{"text": secret, "more": secret}]}),
        ("/v1/rank", {"candidates": "a", "history": secret}),
        ("/v1/completions", {"prompt": "x", "max_tokens": secret}),
        ("/v1/completions", {"prompt": {"text": secret}}),
        ("/v1/chat/completions", {"messages": [{"role": secret, "content": secret}]}),
        ("/rerank", {"query": {"text": secret}, "documents": [secret]}),
        ("/v1/score", {"query": secret, "items": [secret], "label_token_ids": secret}),
        ("/tokenize", {"prompt": [secret]}),
    ]
    for path, body in bodies:
        reply = client.post(path, json=body)
        assert reply.status_code == 400, (path, reply.text)
        assert secret not in reply.text, path


def test_a_mistake_of_ours_is_told_without_its_words(caplog: pytest.LogCaptureFixture) -> None:
    def broken(request: object) -> Any:
        raise ZeroDivisionError(" ".join(["my", "secret", "words"]))

    with TestClient(make_app(FakeBackend({"a": "x"}, rule=broken))) as client:
        reply = client.post("/v1/rank", json={"candidates": ["a"]})
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "internal_error"
    assert "secret words" not in reply.text + caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_addresses_that_are_none(client: TestClient) -> None:
    assert client.get("/v1/nothing").json()["error"]["code"] == "no_such_address"
    wrong = client.get("/v1/rank")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["message"] == "this address takes POST, not GET"
    assert client.patch("/v1/items/a").headers["allow"] == "DELETE, PUT"
    assert "got nothing" in client.post("/v1/rank").json()["error"]["message"]
    empty = client.post("/v1/rerank", json={"query": "", "documents": ["a"]}).json()["error"]["message"]
    assert empty == "query must be a text of at least 1 characters, got a text of 0 characters"
    assert client.get("/docs").status_code == 404, "its page would fetch scripts from elsewhere"


def test_a_placement_that_cannot_be_read_is_the_fault_of_the_file(client: TestClient, tmp_path: Path) -> None:
    (tmp_path / "junk.json").write_text("{]")
    for name in ("junk.json", "missing.json", "", "\0"):
        reply = client.put("/v1/placement", json={"file": str(tmp_path / name) if name else "/"})
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["code"] == "invalid_file"
