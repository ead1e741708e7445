"""The application: which address is answered by what, and how its document describes that.

Knows nothing of bodies or backends. Invariant: making an application starts nothing; the backend lives from the
beginning of its lifespan to its end; every reply to an error has the one shape of `failures.py`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path

from rcllm.config import ServerConfig
from rcllm.core.decoding import RecommendRequest
from rcllm.core.ranking import Event, RankRequest
from rcllm.fields import schema
from rcllm.server.backend import Backend, WarmItems
from rcllm.server.endpoints import changes, page, rank, sight, texts
from rcllm.server.gate import Gate
from rcllm.server.kept import Answers, Histories
from rcllm.server.keys import Caller, check_admin
from rcllm.server.metrics import Metrics
from rcllm.server.reply import JsonReply, failure_reply, unless_gone
from rcllm.server.served import Ask, Served
from rcllm.server.spans import NoSpans, Spans
from rcllm.server.viewers import Viewer
from rcllm.version import __version__
from rcllm.wire.items import DetokenizeBody, IdsBody, ItemBody, ItemsBody, PlacementBody, TokenizeBody, WarmBody
from rcllm.wire.openai import ChatBody, CompletionBody
from rcllm.wire.rank import RankExtras, RecommendExtras
from rcllm.wire.rerank import RerankBody
from rcllm.wire.score import SglangBody

Handler = Callable[[Ask], Awaitable[Response]]
_NAME = re.compile(r"{(\w+)(?::\w+)?}")
_DEFAULTS = ServerConfig()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address."""

    method: str
    path: str
    handler: Handler
    body: type[Any] | None = None
    extras: type[Any] | None = None  # what else the body may hold, beside the fields of `body`
    is_admin: bool = False
    queries: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # schemas of what may follow the `?`

    @property
    def shown_path(self) -> str:
        """As documents and logs have it."""
        return self.path.replace(":path", "")


_SEARCH: Mapping[str, dict[str, Any]] = {
    "query": {"type": "string", "maxLength": 200},
    "limit": {"type": "integer", "minimum": 1, "maximum": page.MAX_FOUND},
    "item_id": {"type": "array", "items": {"type": "string"}},
}
ENDPOINTS = (
    Endpoint("GET", "/", page.page),
    Endpoint("GET", "/page/{name}", page.file),
    Endpoint("GET", "/v1/dashboard", page.dashboard),
    Endpoint("GET", "/v1/viewers", page.viewers),
    Endpoint("GET", "/v1/items", page.find_items, queries=_SEARCH),
    Endpoint("GET", "/health", sight.health),
    Endpoint("GET", "/ready", sight.ready),
    Endpoint("GET", "/version", sight.version),
    Endpoint("GET", "/metrics", sight.metrics),
    Endpoint("GET", "/v1/models", sight.models),
    Endpoint("GET", "/v1/cache/stats", sight.cache_stats),
    Endpoint("GET", "/v1/guard", sight.guard),
    Endpoint("GET", "/v1/receipts/{request_id}", sight.receipt),
    Endpoint("POST", "/v1/replay/{request_id}", sight.replay),
    Endpoint("POST", "/v1/rank", rank.rank, RankRequest, RankExtras),
    Endpoint("POST", "/v1/recommend", rank.recommend, RecommendRequest, RecommendExtras),
    Endpoint("POST", "/rerank", rank.rerank, RerankBody),
    Endpoint("POST", "/v1/rerank", rank.rerank, RerankBody),
    Endpoint("POST", "/v2/rerank", rank.rerank_v2, RerankBody),
    Endpoint("POST", "/score", rank.score, SglangBody),
    Endpoint("POST", "/v1/score", rank.score, SglangBody),
    Endpoint("POST", "/v1/completions", texts.completions, CompletionBody),
    Endpoint("POST", "/v1/chat/completions", texts.chat, ChatBody),
    Endpoint("POST", "/tokenize", texts.tokenize, TokenizeBody),
    Endpoint("POST", "/detokenize", texts.detokenize, DetokenizeBody),
    Endpoint("POST", "/v1/items", changes.put_items, ItemsBody, is_admin=True),
    Endpoint("POST", "/v1/items/delete", changes.delete_items, IdsBody, is_admin=True),
    Endpoint("PUT", "/v1/items/{item_id:path}", changes.put_item, ItemBody, is_admin=True),
    Endpoint("DELETE", "/v1/items/{item_id:path}", changes.delete_item, is_admin=True),
    Endpoint("POST", "/v1/users/{user_id:path}/events", changes.append_event, Event, is_admin=True),
    Endpoint("DELETE", "/v1/users/{user_id:path}", changes.erase_user, is_admin=True),
    Endpoint("POST", "/v1/cache/warm", changes.warm, WarmBody, is_admin=True),
    Endpoint("PUT", "/v1/placement", changes.place, PlacementBody, is_admin=True),
)


def make_app(
    backend: Backend,
    config: ServerConfig = _DEFAULTS,
    viewers: tuple[Viewer, ...] = (),
    spans: Spans | None = None,
) -> FastAPI:
    """An application that answers with `backend`. Starts nothing. `viewers`: for the page's playground.

    `spans`: where requests are traced, which ends with the application; None: nowhere.
    """
    served = Served(
        backend,
        config,
        Metrics(config.served_name or backend.about.model, backend.stats),
        Answers(config.kept_answers),
        Histories(config.kept_users, config.kept_events),
        viewers,
        spans or NoSpans(),
    )

    @asynccontextmanager
    async def living(app: FastAPI) -> AsyncIterator[None]:
        served.is_closing = False
        await backend.start()
        if config.warm and "rank" in backend.about.kinds:
            await backend.change(WarmItems())
        try:
            yield
        finally:
            served.is_closing = True
            await backend.stop(config.drain_s)
            await asyncio.to_thread(served.spans.end)

    app = FastAPI(title="rcllm", version=__version__, lifespan=living, docs_url=None, redoc_url=None)
    app.state.served = served
    for endpoint in ENDPOINTS:
        app.add_api_route(
            endpoint.path,
            _answering(served, endpoint),
            methods=[endpoint.method],
            name=f"{endpoint.method.lower()} {endpoint.shown_path}",
            operation_id=f"{endpoint.method.lower()}{re.sub(r'[^a-z0-9]+', '_', endpoint.shown_path)}",
            summary=(endpoint.handler.__doc__ or endpoint.handler.__name__.replace("_", " ")).strip(),
            openapi_extra=_described(endpoint),
            response_class=Response,
        )
    app.add_exception_handler(HTTPException, _no_such_address)
    app.add_middleware(Gate, config=config)
    if config.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"])
    return app


def _answering(served: Served, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """Reads the body, and turns whatever happens into a reply."""

    async def answer(request: Request) -> Response:
        state, end_s = request.scope["state"], asyncio.get_running_loop().time() + served.config.timeout_s
        ask = Ask(served, request, state.get("caller", Caller("", is_admin=False)), state["request_id"], end_s)
        try:
            if endpoint.is_admin:
                check_admin(ask.caller)
            async with asyncio.timeout_at(end_s):
                if endpoint.body is not None:
                    await ask.read()
                return await unless_gone(request.receive, _run(endpoint.handler, ask))
        except ExceptionGroup as errors:  # of choices that were computed beside each other
            return failure_reply(errors.exceptions[0])
        except Exception as error:
            return failure_reply(error)

    return answer


async def _run(handler: Handler, ask: Ask) -> Response:
    return await handler(ask)


def _no_such_address(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    message, headers = "there is nothing at this address", getattr(error, "headers", None)
    if status == 405:
        methods = ", ".join(sorted(_methods_at(request.url.path)))
        message, headers = f"this address takes {methods}, not {request.method}", {"allow": methods}
    body = {"message": message, "type": "not_found_error", "param": None, "code": "no_such_address"}
    return JsonReply({"error": body}, status, headers)


def _methods_at(path: str) -> set[str]:
    """Of all endpoints at an address."""
    return {each.method for each in ENDPOINTS if compile_path(each.path)[0].match(path)}


# ---- the document ---------------------------------------------------------------------------------------------------


def _described(endpoint: Endpoint) -> dict[str, Any]:
    """What FastAPI cannot see: parts of the address, the body, and the shape of errors."""
    names = _NAME.findall(endpoint.path)
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
    ]
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in endpoint.queries.items()]
    told: dict[str, Any] = {"parameters": parameters} if parameters else {}
    if endpoint.body is not None:
        described = _inlined(schema(endpoint.body))
        if endpoint.extras is not None:
            described["properties"] |= _inlined(schema(endpoint.extras))["properties"]
        content = {"application/json": {"schema": described}}
        told["requestBody"] = {"required": True, "content": content}
    error = {"description": "OpenAI's shape of an error", "content": {"application/json": {"schema": _ERROR}}}
    return told | {"responses": {"default": error}}


def _inlined(described: Any, definitions: dict[str, Any] | None = None) -> Any:
    """A schema without references, which would point to another place of the document."""
    if isinstance(described, list):
        return [_inlined(each, definitions) for each in described]
    if not isinstance(described, dict):
        return described
    definitions = {**(definitions or {}), **described.get("$defs", {})}
    if "$ref" in described:
        return _inlined(definitions[described["$ref"].rpartition("/")[2]], definitions)
    return {name: _inlined(inner, definitions) for name, inner in described.items() if name != "$defs"}


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
