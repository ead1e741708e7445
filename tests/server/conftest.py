"""Two servers: one that answers by rule in milliseconds, and one that computes with a tiny model."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from rcllm.config import ServerConfig
from rcllm.engine.engine import Engine
from rcllm.server.app import make_app
from rcllm.server.fake import FakeBackend
from rcllm.server.on_engine import EngineBackend
from tests.engine import tiny
from tests.server.live import living

ITEMS = {"a": "red lamp", "b": "blue lamp", "c": "red chair", "d": "old table"}


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend(ITEMS)


@pytest.fixture
def client(backend: FakeBackend) -> Iterator[TestClient]:
    """In this process, without a socket."""
    with TestClient(make_app(backend)) as made:
        yield made


@pytest.fixture
def tiny_engine(one_compute_thread: None) -> Engine:
    """With a catalogue of its own, which tests may change."""
    return tiny.fresh(items=tiny.catalogue())


@pytest.fixture
def computing(tiny_engine: Engine) -> EngineBackend:
    return EngineBackend(tiny_engine, "tiny")


@pytest.fixture
def address(computing: EngineBackend) -> Iterator[str]:
    """Of a real server that computes; nothing is warm."""
    with living(computing, ServerConfig(warm=False)) as where:
        yield where
    gc.unfreeze()  # what the server froze is garbage to the tests that follow
