"""HTTP in one event loop with the backend, without a socket: what is under way can be held and looked at."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

import httpx

from rcllm.config import ScheduleConfig, ServerConfig
from rcllm.engine.engine import Engine
from rcllm.schedule.admission import Admission
from rcllm.server.app import make_app
from rcllm.server.backend import Backend
from tests.engine import tiny

T = TypeVar("T")


def scheduled(admission: Admission | None = None, **schedule: Any) -> Engine:
    """A tiny engine with a catalogue of its own and these limits."""
    plain = tiny.fresh(items=tiny.catalogue())
    config = replace(plain.config, schedule=ScheduleConfig(**schedule))
    return Engine(config, plain.decoder, plain.prompter, plain.pool, plain.model_id, admission)


@asynccontextmanager
async def _serving(backend: Backend, config: ServerConfig) -> AsyncIterator[httpx.AsyncClient]:
    await backend.start()
    try:
        transport = httpx.ASGITransport(make_app(backend, config))
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
            yield client
    finally:
        await backend.stop(10.0)


def asking(
    backend: Backend, body: Callable[[httpx.AsyncClient], Awaitable[T]], config: ServerConfig | None = None
) -> T:
    """What `body` gives, while the backend is served."""

    async def whole() -> T:
        async with _serving(backend, config or ServerConfig(warm=False)) as client:
            return await body(client)

    return asyncio.run(whole())


def rank_body(candidates: int = 3, *words: str, **more: Any) -> dict[str, Any]:
    """`words`: of the user's own, in the history."""
    ids = [f"i{n}" for n in range(candidates)]
    return {"candidates": ids, "history": [*({"text": text} for text in words), "i30"], "level": "blocks", **more}
