"""The page at `/`, its files, and what it asks for: one look at the server, and items of the catalogue.

Knows nothing of how answers come about. Invariant: only files that lie beside the page are given out, and the page
may run no script and ask no address but this server's own.
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files

from starlette.responses import Response

from rcllm.errors import NotServedError
from rcllm.plain_json import without_nan
from rcllm.server.finding import find, named, text_of
from rcllm.server.overview import overview
from rcllm.server.reply import JsonReply
from rcllm.server.served import Ask
from rcllm.wire.bodies import named as about_field

FILES = files("rcllm.server") / "page"
_NAME = re.compile(r"[a-z-]+(\.min)?\.(html|js|css|svg)")
_TYPES: Mapping[str, str] = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
MAX_FOUND = 100
_MAX_QUERY = 200
_LIMIT = 20


async def page(ask: Ask) -> Response:
    """The dashboard and the playground."""
    return _reply("index.html")


async def file(ask: Ask) -> Response:
    """A part of the page."""
    return _reply(ask.path("name"))


async def dashboard(ask: Ask) -> JsonReply:
    """What the page draws: counts since the start, and what there is at this moment."""
    return JsonReply(without_nan(overview(ask.served)))


async def viewers(ask: Ask) -> JsonReply:
    """Users of a published data set to try the playground with; none but for `--demo`."""
    return JsonReply({"viewers": [asdict(viewer) for viewer in ask.served.viewers]})


async def find_items(ask: Ask) -> JsonReply:
    """Items by words of their texts, or by their ids."""
    backend, asked = ask.served.backend, ask.http.query_params
    limit, query, item_ids = _limit(asked.get("limit")), asked.get("query", ""), asked.getlist("item_id")
    if len(query) > _MAX_QUERY:
        raise about_field(f"query: expected at most {_MAX_QUERY} characters, got {len(query)}", "query")
    ask.check_items(len(item_ids), "item_id")
    if item_ids:
        found = named(backend.items, item_ids)
    else:
        found = await asyncio.to_thread(find, backend.items, query, limit)
    names = (backend.about.text_field, *backend.about.shown)
    items = [{"item_id": item.item_id, "text": text_of(item, names)} for item in found.items]
    return JsonReply({"items": items, "num_read": found.num_read, "num_items": found.num_items})


def _limit(given: str | None) -> int:
    """Raises RequestError."""
    if given is None:
        return _LIMIT
    if not (given.isascii() and given.isdecimal() and len(given) < 9 and 1 <= int(given) <= MAX_FOUND):
        raise about_field(f"limit: expected a whole number from 1 to {MAX_FOUND}, got another text", "limit")
    return int(given)


def _reply(name: str) -> Response:
    if not _NAME.fullmatch(name):
        raise NotServedError("the page has no file of this name")
    headers = {"content-security-policy": _POLICY}
    return Response(_content(name), media_type=_TYPES[name.rpartition(".")[2]], headers=headers)


@functools.cache
def _content(name: str) -> bytes:
    """Raises NotServedError."""
    try:
        return (FILES / name).read_bytes()
    except OSError as error:
        raise NotServedError("the page has no file of this name") from error
