"""Keys, limits, headers, logs; clients that go away and answers that take too long."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from rcllm.config import ServerConfig
from rcllm.errors import AccessError, ConfigError, OverloadedError
from rcllm.fields import parse
from rcllm.server.app import ENDPOINTS, make_app
from rcllm.server.fake import FakeBackend
from rcllm.server.gate import OPEN
from rcllm.server.keys import Keys, check_address
from rcllm.server.logs import JsonLines, configure

KEY, OTHER, ADMIN = "key-of-a-client", "key-of-another", "key-of-the-admin"
CLOSED = ServerConfig(api_keys=(KEY, OTHER), admin_key=ADMIN)
RANK = {"candidates": ["a"], "request_id": "mine"}


@pytest.fixture
def closed() -> Iterator[TestClient]:
    with TestClient(make_app(FakeBackend({"a": "red"}), CLOSED)) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# ---- keys -----------------------------------------------------------------------------------------------------------


def test_without_a_key_nothing_is_reached_but_whether_it_lives_and_an_empty_page(closed: TestClient) -> None:
    for endpoint in ENDPOINTS:
        reply = closed.request(endpoint.method, endpoint.path, json={})
        expected = {"/page/{name}": 404}.get(endpoint.path, 200 if endpoint.path in OPEN else 401)
        assert reply.status_code == expected, endpoint.path
    assert closed.get("/openapi.json").status_code == 401
    reply = closed.post("/v1/rank", json=RANK, headers=bearer("key-of-nobody"))
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("headers", [bearer(KEY), {"x-api-key": KEY}, {"authorization": f"bearer {OTHER}"}])
def test_a_key_may_ask_and_not_change(closed: TestClient, headers: dict[str, str]) -> None:
    assert closed.post("/v1/rank", json=RANK, headers=headers).status_code == 200
    for endpoint in ENDPOINTS:
        if endpoint.is_admin:
            reply = closed.request(endpoint.method, endpoint.path, json={}, headers=headers)
            assert (reply.status_code, reply.json()["error"]["code"]) == (403, "admin_key_needed"), endpoint.path


def test_the_admin_key_does_both(closed: TestClient) -> None:
    assert closed.post("/v1/rank", json=RANK, headers=bearer(ADMIN)).status_code == 200
    assert closed.put("/v1/items/x", json={"fields": {"title": "x"}}, headers=bearer(ADMIN)).status_code == 200


def test_everything_that_changes_needs_the_admin_key() -> None:
    for endpoint in ENDPOINTS:
        changes = endpoint.method in ("PUT", "DELETE") or (
            endpoint.method == "POST" and any(word in endpoint.path for word in ("/items", "/users", "/warm"))
        )
        assert endpoint.is_admin == changes, endpoint.path


def test_an_admin_key_alone_lets_everybody_ask() -> None:
    with TestClient(make_app(FakeBackend({"a": "red"}), ServerConfig(admin_key=ADMIN))) as client:
        assert client.post("/v1/rank", json=RANK).status_code == 200
        assert client.delete("/v1/items/a").status_code == 403
        assert client.delete("/v1/items/a", headers=bearer(ADMIN)).status_code == 200


def test_an_answer_is_found_by_the_key_that_it_was_given_to(closed: TestClient) -> None:
    closed.post("/v1/rank", json=RANK, headers=bearer(KEY))
    assert closed.get("/v1/receipts/mine", headers=bearer(KEY)).status_code == 200
    assert closed.get("/v1/receipts/mine", headers=bearer(OTHER)).status_code == 404


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org"])
def test_others_reach_it_with_keys_or_by_choice_alone(host: str) -> None:
    with pytest.raises(ConfigError, match="--insecure"):
        check_address(ServerConfig(host=host, admin_key=ADMIN))
    check_address(ServerConfig(host=host, api_keys=(KEY,)))
    check_address(ServerConfig(host=host, insecure=True))


def test_a_tenant_without_a_key_opens_the_server_to_nobody() -> None:
    nobody = ServerConfig(tenant_keys={"shop-a": ()})
    with pytest.raises(AccessError):
        Keys(nobody).caller({})
    with pytest.raises(ConfigError, match=r"tenant_keys\.shop-a must be a list of at least 1"):
        parse(ServerConfig, {"tenant_keys": {"shop-a": []}})


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.3.2.1"])
def test_this_machine_needs_no_key(host: str) -> None:
    check_address(ServerConfig(host=host))


def test_keys_are_not_shown() -> None:
    assert KEY not in repr(CLOSED)
    assert ADMIN not in repr(CLOSED)


# ---- limits ---------------------------------------------------------------------------------------------------------


def limited(**limits: Any) -> TestClient:
    return TestClient(make_app(FakeBackend({"a": "red", "b": "blue"}), ServerConfig(**limits)))


def test_bytes_of_a_body() -> None:
    with limited(max_body_mb=0.001) as client:
        big = {"candidates": ["a"], "history": [{"text": "x" * 2000}]}
        reply = client.post("/v1/rank", json=big)
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "too_large")
        unsaid = client.post("/v1/rank", content=iter([b'{"candidates":', b"x" * 2000]))
        assert unsaid.status_code == 413
        assert client.post("/v1/rank", json=RANK).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/rerank", {"query": "q", "documents": ["a", "b", "c"]}),
        ("/v1/score", {"query": "q", "items": ["a", "b", "c"], "label_token_ids": [1]}),
        ("/v1/score", {"text_1": "q", "text_2": ["a", "b", "c"]}),
        ("/v1/completions", {"prompt": "q", "n": 3}),
        ("/v1/items", {"items": [{"item_id": n, "fields": {"title": "x"}} for n in range(3)]}),
        ("/v1/items/delete", {"item_ids": ["a", "b", "c"]}),
    ],
)
def test_entries_of_a_list(path: str, body: dict[str, Any]) -> None:
    with limited(max_items=2) as client:
        reply = client.post(path, json=body)
        assert reply.status_code == 413, reply.text
        assert "at most 2" in reply.json()["error"]["message"]


def test_tokens_and_events() -> None:
    with limited(max_request_tokens=10, max_history=2, max_tokens=3) as client:
        assert client.post("/v1/completions", json={"prompt": "x" * 11}).status_code == 413
        score = {"query": "q" * 8, "items": ["ab", "c"], "label_token_ids": [1]}
        assert client.post("/v1/score", json=score).status_code == 413
        long = {"candidates": ["a"], "history": ["a", "b", "a"]}
        assert client.post("/v1/rank", json=long).status_code == 413
        told = client.post("/v1/completions", json={"prompt": "a b c", "max_tokens": 50}).json()
        assert told["usage"]["completion_tokens"] == 3


def test_more_requests_than_may_wait_are_told_to_come_back() -> None:
    async def ask() -> list[int]:
        app = make_app(FakeBackend({"a": "red"}, delay_s=0.05, max_waiting=2))
        replies = await asyncio.gather(*(_post(app, "/v1/rank", RANK) for _ in range(4)))
        return sorted(status for status, _, _ in replies)

    assert asyncio.run(ask()) == [200, 200, 429, 429]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["a"] * 40}),
        ("/v1/completions", {"prompt": ["a"] * 40, "stream": True}),
        ("/v1/score", {"text_1": [f"q{n}" for n in range(40)], "text_2": ["a"] * 40}),
    ],
)
def test_one_body_does_not_fill_the_queue(path: str, body: dict[str, Any]) -> None:
    backend = FakeBackend({}, delay_s=0.001, max_waiting=16)
    with TestClient(make_app(backend)) as client:
        reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    assert "error" not in reply.text
    assert len(backend.answered) == 40


def test_a_deadline_goes_on_while_others_of_the_body_are_answered() -> None:
    with TestClient(make_app(FakeBackend({}, delay_s=0.1))) as client:
        reply = client.post("/v1/completions", json={"prompt": ["a"] * 17, "deadline_ms": 50})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "deadline")


def test_a_refusal_says_when_to_come_back() -> None:
    refusing = FakeBackend({"a": "red"}, rule=lambda request: OverloadedError("too much waits", 0.7))
    with TestClient(make_app(refusing)) as client:
        reply = client.post("/v1/rank", json=RANK)
    assert reply.headers["retry-after"] == "1"
    assert reply.json()["error"]["code"] == "overloaded"


def test_an_answer_that_takes_too_long_is_ended() -> None:
    backend = FakeBackend({"a": "red"}, delay_s=5.0)
    with TestClient(make_app(backend, ServerConfig(timeout_s=0.05))) as client:
        reply = client.post("/v1/rank", json=RANK)
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
        late = client.post("/v1/rank", json={**RANK, "deadline_ms": 5})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "deadline")
        counted = 'rcllm:request_failures_total{code="timeout",kind="rank",model_name="fake"} 1.0'
        assert counted in client.get("/metrics").text
    assert len(backend.cancelled) == 2


class Trickling(FakeBackend):
    """Writes one token, and then takes its time."""

    async def answer(self, asked: Any) -> Any:
        assert asked.on_tokens is not None
        asked.on_tokens((97,))
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            self.cancelled.append(asked.request)
            raise


def test_a_stream_that_takes_too_long_is_ended_and_says_so() -> None:
    backend = Trickling({})
    with TestClient(make_app(backend, ServerConfig(timeout_s=0.2))) as client:
        content = client.post("/v1/completions", json={"prompt": "a", "stream": True}).text
        first, last = content.removesuffix("\n\n").split("\n\n")
        assert '"text": "a"' in first
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        assert 'failures_total{code="timeout",kind="generate",model_name="fake"} 1.0' in client.get("/metrics").text
    assert len(backend.cancelled) == 1


# ---- clients that go away -------------------------------------------------------------------------------------------


async def _post(app: Any, path: str, body: dict[str, Any], gone_after: float | None = None) -> tuple[int, bytes, bool]:
    """By hand, so that the client can go away: the status, the body, and whether the application returned."""
    status, content, sent = 0, b"", False
    ended = asyncio.Event()

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        if gone_after is None:
            await ended.wait()
        else:
            await asyncio.sleep(gone_after)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status, content
        status = message.get("status", status)
        content += message.get("body", b"")
        if message["type"] == "http.response.body" and not message.get("more_body"):
            ended.set()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
        "state": {},
    }
    await asyncio.wait_for(app(scope, receive, send), 5)
    return status, content, True


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/rank", RANK),
        ("/rerank", {"query": "q", "documents": ["a"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "n": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "stream": True}),
    ],
)
def test_what_a_client_does_not_wait_for_is_withdrawn(path: str, body: dict[str, Any]) -> None:
    backend = FakeBackend({"a": "red"}, delay_s=5.0)

    async def ask() -> int:
        status, _, _ = await _post(make_app(backend), path, body, gone_after=0.02)
        await asyncio.sleep(0)
        return status

    assert asyncio.run(ask()) == 499
    assert len(backend.cancelled) == body.get("n", 1)
    assert not backend.answered


def test_a_stream_that_nobody_reads_is_withdrawn() -> None:
    backend = Trickling({})

    async def ask() -> bytes:
        _, content, _ = await _post(
            make_app(backend), "/v1/completions", {"prompt": "a", "stream": True}, gone_after=0.05
        )
        await asyncio.sleep(0.01)
        return content

    content = asyncio.run(ask())
    assert b'"text": "a"' in content
    assert b"[DONE]" not in content
    assert len(backend.cancelled) == 1


# ---- headers and logs -----------------------------------------------------------------------------------------------


def test_headers_of_every_reply(closed: TestClient) -> None:
    for reply in (closed.get("/health"), closed.get("/nothing"), closed.post("/v1/rank", headers=bearer(KEY))):
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["x-frame-options"] == "DENY"
        assert reply.headers["cache-control"] == "no-store"
        assert reply.headers["content-security-policy"].startswith("default-src 'none'")
        assert reply.headers["x-request-id"]
        assert "access-control-allow-origin" not in reply.headers


def test_pages_of_other_origins_ask_by_choice_alone() -> None:
    with TestClient(make_app(FakeBackend({}), ServerConfig(cors_origins=("https://shop.example",)))) as client:
        asked = {"origin": "https://shop.example", "access-control-request-method": "POST"}
        reply = client.options("/v1/rank", headers=asked)
        assert reply.headers["access-control-allow-origin"] == "https://shop.example"
        other = client.get("/health", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_a_line_for_each_request_holds_no_word_of_a_user(closed: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    secret = "secretwords"
    with caplog.at_level(logging.INFO, "rcllm"):
        closed.post(
            f"/v1/users/{secret}/events", json={"text": secret}, headers={**bearer(ADMIN), "x-request-id": "t1"}
        )
        closed.post("/v1/rank", json={"candidates": ["a"], "history": [{"text": secret}]}, headers=bearer(KEY))
        closed.get(f"/v1/{secret}", headers=bearer(KEY))
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records if record.name == "rcllm.access"]
    first, second, third = lines
    assert (first["request_id"], first["method"], first["status"]) == ("t1", "POST", 200)
    assert first["path"] == "/v1/users/{user_id}/events"
    assert second["path"] == "/v1/rank"
    assert len(second["caller"]) == 8
    assert third["status"] == 404
    assert secret not in json.dumps(lines)
    assert KEY not in json.dumps(lines)


def test_logs_are_lines_of_json() -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    stream = io.StringIO()
    try:
        configure(stream)
        logging.getLogger("uvicorn.error").info("two\nlines")
        try:
            raise ValueError("x")
        except ValueError:
            logging.getLogger("rcllm").exception("broke")
    finally:
        root.handlers[:], root.level = before, level
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first["message"] == "two\nlines"
    assert (second["level"], second["logger"]) == ("error", "rcllm")
    assert "ValueError" in second["error"]
