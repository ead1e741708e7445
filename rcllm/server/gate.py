"""What every request passes on its way in and out: an id, a key, the limit of bytes, headers, and a line in the log.

ASGI, beneath the framework. Knows nothing of endpoints. Invariant: a request without a key that fits reaches no
endpoint but those that say whether the server lives; no more bytes of a body are read than are allowed.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response

from rcllm.config import MIB, ServerConfig
from rcllm.errors import RcllmError, TooLargeError
from rcllm.server.keys import Keys
from rcllm.server.logs import tell
from rcllm.server.reply import failure_reply

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = frozenset({"/", "/health", "/ready", "/version"})
_PAGE = "/page/"  # its files hold nothing of what is served
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}


class Gate:
    """Wraps an application."""

    def __init__(self, app: App, config: ServerConfig) -> None:
        self._app, self._keys = app, Keys(config)
        self._max_bytes = int(config.max_body_mb * MIB)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, headers = time.perf_counter(), Headers(scope=scope)
        request_id = _request_id(headers)
        status = 0

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["x-request-id"] = request_id
                for name, value in _HEADERS.items():
                    out.setdefault(name, value)
            await send(message)

        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        caller = ""
        try:
            refusal = self._refusal(scope, headers)
            if isinstance(refusal, Response):
                await refusal(scope, receive, sending)
            else:
                caller = state["caller"].name if "caller" in state else ""
                await self._app(scope, self._limited(receive), sending)
        finally:
            fields = {"request_id": request_id, "method": scope["method"], "path": _route(scope), "status": status}
            tell({**fields, "ms": round((time.perf_counter() - start) * 1e3, 2), "caller": caller})

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        try:
            if not _is_open(scope["path"]) and scope["method"] != "OPTIONS":
                scope["state"]["caller"] = self._keys.caller(headers)
            length = headers.get("content-length", "0")
            if not length.isdecimal() or int(length) > self._max_bytes:
                raise self._too_large()
        except RcllmError as error:
            return failure_reply(error)
        return None

    def _limited(self, receive: Receive) -> Receive:
        """Bodies that do not say how long they are."""
        read = 0

        async def receiving() -> MutableMapping[str, Any]:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_bytes:
                raise self._too_large()
            return message

        return receiving

    def _too_large(self) -> TooLargeError:
        return TooLargeError(f"expected a body of at most {self._max_bytes:,} bytes (server.max_body_mb), got more")


def _is_open(path: str) -> bool:
    """Whether an address needs no key."""
    return path in OPEN or path.startswith(_PAGE)


def _request_id(headers: Headers) -> str:
    """The client's own, where it is one that a log and an address can hold."""
    given = headers.get("x-request-id", "")
    return given if _ID.fullmatch(given) else uuid.uuid4().hex


def _route(scope: Scope) -> str:
    """The address as it is declared: a real one may hold a user's name."""
    route = scope.get("route")
    return str(getattr(route, "path_format", "")) or (scope["path"] if scope["path"] in OPEN else "unknown")
