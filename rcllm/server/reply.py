"""Replies: JSON, errors, and streams of events that end when their client goes, or when their time is over.

Knows nothing of endpoints. Invariant: a client that goes away ends the work that was done for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeVar

from starlette.responses import Response

from rcllm.plain_json import to_json
from rcllm.server.failures import error_body, headers_of

T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
CLIENT_GONE = 499  # as nginx logs it; nobody reads it


class ClientGoneError(Exception):
    """The client closed its connection before it was answered."""


class JsonReply(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content).encode("utf-8")


def failure_reply(error: BaseException) -> Response:
    """What a client is told of an error."""
    if isinstance(error, ClientGoneError):
        return Response(status_code=CLIENT_GONE)
    failure, body = error_body(error)
    return JsonReply(body, failure.status, headers_of(failure, error))


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; it is cancelled where the client goes first. The body must have been read."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for each in (task, gone):
            each.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. `first` was made already, so that what is wrong with a request is told by its status.

    `end_s`: by the event loop's clock, when the others are waited for no more; an event then says so, the last one.
    """

    media_type = "text/event-stream"

    def __init__(self, first: str, events: AsyncGenerator[str, None], end_s: float) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first, self._events, self._end_s = first, events, end_s

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        with contextlib.suppress(ClientGoneError, OSError):
            await unless_gone(receive, self._send_all(send))

    async def _send_all(self, send: Any) -> None:
        try:
            async with contextlib.aclosing(self._events), asyncio.timeout_at(self._end_s):
                await send(_part(self._first))
                async for each in self._events:
                    await send(_part(each))
        except TimeoutError as error:
            await send(_part(to_json(error_body(error)[1])))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _part(data: str) -> dict[str, object]:
    """One event, in ASGI's words."""
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}
