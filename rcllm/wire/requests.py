"""Requests as JSON: one object per line in a file, or one at a time for a server.

Knows nothing of catalogues or models, so ids are not looked up. Invariant: what `write_requests` writes,
`read_requests` reads back equal; keys that are not known are refused, never ignored.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any, TypeVar

from rcllm.core.decoding import RecommendRequest
from rcllm.core.ranking import Event, ItemId, RankOptions, RankRequest, UserId
from rcllm.data.columns import HISTORY_NAMES
from rcllm.data.raw import Fields
from rcllm.data.rows import BadRowError, ReadReport, RowReader
from rcllm.data.text import as_id, as_text, well_formed
from rcllm.durable import renamed, writing
from rcllm.errors import RcllmError, RequestError
from rcllm.fields import parse
from rcllm.plain_json import to_json
from rcllm.words import brief

DEFAULTS = RankOptions()
_Request = TypeVar("_Request", RankRequest, RecommendRequest, RankOptions)


def read_requests(path: str | Path, strict: bool = False) -> tuple[list[RankRequest], ReadReport]:
    """Reads one request per row, see `parse_request`. A malformed row is skipped and reported with its line."""

    def parse(fields: Fields) -> RankRequest:
        try:
            return parse_request(fields)
        except RcllmError as error:
            raise BadRowError(str(error)) from error

    reader = RowReader(path, strict=strict)
    return list(reader.parsed(parse)), reader.report


def write_requests(path: str | Path, requests: Iterable[RankRequest]) -> None:
    """Writes JSON lines, gzipped where the name ends in .gz; the file is whole or not there. Raises DataError."""
    target = Path(path)
    opened = gzip.open if target.suffix == ".gz" else open
    with writing(target), renamed(target) as partial, opened(partial, "wb") as file:
        for request in requests:
            file.write(to_json(request_to_json(request)).encode("utf-8") + b"\n")


def parse_request(
    value: Mapping[str, object], defaults: RankOptions = DEFAULTS, show: Callable[[object], str] = brief
) -> RankRequest:
    """The request that a JSON object describes; null is as good as left out. Raises RequestError.

    `request_id` and `candidates` are needed. An event of `history` (or `items`) is an item id, `{"item_id": …}` or
    `{"text": …}`; `options` holds fields of RankOptions over `defaults`, `volatile` texts by item id and name, `texts`
    the fields of items that come with the request. `show` says a wrong value in messages.
    """
    given = without_nulls(_with_history(value))
    return _read(RankRequest, given, RankRequest("", (), options=defaults if "options" in given else None), show)


def parse_recommend_request(
    value: Mapping[str, object], defaults: RecommendRequest, show: Callable[[object], str] = brief
) -> RecommendRequest:
    """The request that a JSON object describes; null is as good as left out. Raises RequestError.

    `request_id` is needed. `history` as in `parse_request`; `allow` and `deny` are lists of item ids; what is denied by
    `defaults` stays so.
    """
    request = _read(RecommendRequest, without_nulls(_with_history(value)), replace(defaults, deny=()), show)
    return replace(request, deny=defaults.deny + request.deny)


def _with_history(value: Mapping[str, object]) -> Mapping[str, object]:
    """The object with the user's list under its first name. Raises RequestError where it stands under two."""
    usual, *others = HISTORY_NAMES
    given = [name for name in others if name in value]
    if given and usual in value:
        raise RequestError(f"expected the user's list under one name, got both {usual!r} and {given[0]!r}")
    return {usual if name in others else name: each for name, each in value.items()} if given else value


def parse_options(value: Mapping[str, object], defaults: RankOptions = DEFAULTS) -> RankOptions:
    """`defaults` with the fields of a JSON object over them. Raises RequestError."""
    return _read(RankOptions, value, defaults)


def request_to_json(request: RankRequest) -> dict[str, object]:
    """A JSON object that `parse_request` reads; what is at its default is left out."""
    history = [each.item_id if each.item_id is not None else {"text": each.text} for each in request.history]
    whole: dict[str, object] = {
        "request_id": request.request_id,
        "user_id": request.user_id,
        "tenant": request.tenant or None,
        "history": history,
        "candidates": list(request.candidates),
        "volatile": {item_id: dict(texts) for item_id, texts in request.volatile.items()} or None,
        "texts": {item_id: dict(texts) for item_id, texts in request.texts.items()} or None,
        "positive": request.positive,
        "options": None if request.options is None else _options_to_json(request.options),
    }
    return {name: value for name, value in whole.items() if value is not None}


def _options_to_json(options: RankOptions) -> dict[str, object]:
    values = {field.name: getattr(options, field.name) for field in fields_of(options)}
    return values | {"level": str(options.level), "selection": asdict(options.selection)}


def _read(
    kind: type[_Request], given: Mapping[str, object], base: _Request, show: Callable[[object], str] = brief
) -> _Request:
    return parse(kind, given, base=base, error=RequestError, readers=READERS, show=show)


def without_nulls(value: Mapping[str, object]) -> dict[str, object]:
    return {name: inner for name, inner in value.items() if inner is not None}


def read_event(value: object) -> Event:
    """Tells of a wrong one without its words, which are a user's."""
    match value:
        case {"item_id": item_id, **rest} if not rest:
            return Event(item_id=ItemId(read_id(item_id)))
        case {"text": str(text), **rest} if not rest and text:
            return Event(text=well_formed(text))
        case str() | int() | float():
            return Event(item_id=ItemId(read_id(value)))
    wanted = 'an item id, {"item_id": …} or {"text": …}'
    raise RequestError(f"expected an event to be {wanted}, got {brief(value)}")


def read_id(value: object) -> str:
    text = well_formed(value) if isinstance(value, str) else as_id(value)
    if not text:
        raise RequestError(f"expected an id (a text or a whole number), got {brief(value)}")
    return text


def read_texts(value: object, show: Callable[[object], str] = brief) -> dict[str, str]:
    if not isinstance(value, dict):
        raise RequestError(f"expected an object of texts by name, got {show(value)}")
    return {str(name): as_text(text) for name, text in value.items()}


# what JSON may write in more than one way: ids as numbers, prices as numbers
READERS: Mapping[Any, Callable[[Any], Any]] = {
    str: read_id,
    ItemId: read_id,
    UserId: read_id,
    Event: read_event,
    Mapping[str, str]: read_texts,
}
