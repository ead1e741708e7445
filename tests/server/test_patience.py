"""Clients that send little and slowly: their connections end, and others are answered meanwhile."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from rcllm.config import ServerConfig
from rcllm.server.backend import Asked
from rcllm.server.fake import FakeBackend
from rcllm.server.patience import Patience
from tests.server.live import living

HEAD = b"POST /v1/rank HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"


@pytest.fixture(autouse=True)
def little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Patience, "head_s", 0.3)


def connected(address: str) -> socket.socket:
    where = urlsplit(address)
    assert where.hostname is not None
    return socket.create_connection((where.hostname, where.port or 0), timeout=10)


@pytest.mark.parametrize("sent", [b"", b"POST", HEAD])
def test_a_head_that_does_not_end_ends_its_connection(sent: bytes) -> None:
    with living(FakeBackend({"a": "red lamp"})) as address, connected(address) as client:
        start = time.monotonic()
        client.sendall(sent)
        assert client.recv(100) == b""
        assert time.monotonic() - start < 5
        assert httpx.get(f"{address}/health").status_code == 200


def test_a_second_head_is_waited_for_as_long_as_the_first_and_a_rest_between_them_is_not_counted() -> None:
    with living(FakeBackend({"a": "red lamp"})) as address, connected(address) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n")
        assert client.recv(10_000).startswith(b"HTTP/1.1 200")
        time.sleep(0.6)
        client.sendall(b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n")
        assert client.recv(10_000).startswith(b"HTTP/1.1 200")
        client.sendall(b"GET /health")
        assert client.recv(100) == b""


def test_a_body_that_does_not_end_is_answered_when_its_time_is_over() -> None:
    config = ServerConfig(timeout_s=0.5)
    with living(FakeBackend({"a": "red lamp"}), config) as address, connected(address) as client:
        client.sendall(HEAD + b'Content-Length: 100\r\n\r\n{"candidates": [')
        assert client.recv(10_000).startswith(b"HTTP/1.1 504")


def test_an_answer_that_takes_long_is_not_cut_off() -> None:
    class Slow(FakeBackend):
        async def answer(self, asked: Asked) -> Any:
            await asyncio.sleep(0.8)
            return await super().answer(asked)

    with living(Slow({"a": "red lamp"})) as address:
        assert httpx.post(f"{address}/v1/rank", json={"candidates": ["a"]}, timeout=10).status_code == 200
