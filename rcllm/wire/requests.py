"""Requests as JSON: one object per line in a file, or one at a time for a server.

Knows nothing of catalogues or models, so ids are not looked up. Invariant: what `write_requests` writes,
`read_requests` reads back equal; keys that are not known are refused, never ignored.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any, get_args, get_type_hints

from rcllm.config import from_mapping
from rcllm.core.decoding import BeamRule, RecommendRequest
from rcllm.core.ranking import Event, ItemId, Level, RankOptions, RankRequest, Selection, UserId
from rcllm.data.files import Fields
from rcllm.data.rows import BadRowError, ReadReport, RowReader
from rcllm.data.text import as_text, did_you_mean, shown
from rcllm.durable import renamed, writing
from rcllm.errors import RcllmError, RequestError
from rcllm.plain_json import to_json

DEFAULTS = RankOptions()
_OPTION_TYPES = get_type_hints(RankOptions)
_CHOICES = {**_OPTION_TYPES, "rule": BeamRule}  # what `_option` reads


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


def parse_request(value: Mapping[str, object], defaults: RankOptions = DEFAULTS) -> RankRequest:
    """The request that a JSON object describes; raises RequestError or ConfigError.

    `request_id` and `candidates` are needed. An event of `history` is an item id, `{"item_id": …}` or `{"text": …}`;
    `options` holds fields of RankOptions, `volatile` texts by item id and name.
    """
    _refuse_unknown("request", value, [field.name for field in fields_of(RankRequest)])
    candidates = _ids("candidates", value.get("candidates"))
    if not candidates:
        raise RequestError("expected one or more item ids in 'candidates', got none")
    _refuse_twice(candidates)
    volatile = {
        ItemId(item_id): {name: as_text(text) for name, text in _object("volatile", texts).items()}
        for item_id, texts in _object("volatile", value.get("volatile")).items()
    }
    options, user_id, positive = value.get("options"), value.get("user_id"), value.get("positive")
    return RankRequest(
        request_id=_id("request_id", value.get("request_id")),
        candidates=candidates,
        history=tuple(map(_event, _list("history", value.get("history")))),
        user_id=None if user_id is None else UserId(_id("user_id", user_id)),
        volatile=volatile,
        options=None if options is None else parse_options(_object("options", options), defaults),
        positive=None if positive is None else ItemId(_id("positive", positive)),
    )


def parse_recommend_request(value: Mapping[str, object], defaults: RecommendRequest) -> RecommendRequest:
    """The request that a JSON object describes; raises RequestError or ConfigError.

    `request_id` is needed. `history` as in `parse_request`; `allow` and `deny` are lists of item ids; what is denied by
    `defaults` stays so.
    """
    _refuse_unknown("request", value, [field.name for field in fields_of(RecommendRequest)])
    chosen: dict[str, Any] = {name: _count(name, value[name]) for name in ("n", "beam") if name in value}
    if "allow" in value:
        chosen["allow"] = _ids("allow", value["allow"])
    for name in ("rule", "level"):
        if name in value:
            chosen[name] = _option(name, value[name])
    user_id = value.get("user_id")
    return replace(
        defaults,
        request_id=_id("request_id", value.get("request_id")),
        history=tuple(map(_event, _list("history", value.get("history")))),
        user_id=None if user_id is None else UserId(_id("user_id", user_id)),
        deny=defaults.deny + _ids("deny", value.get("deny")),
        **chosen,
    )


def parse_options(value: Mapping[str, object], defaults: RankOptions = DEFAULTS) -> RankOptions:
    """`defaults` with the fields of a JSON object over them.

    Raises RequestError, and ConfigError for a level or a selection that does not exist.
    """
    _refuse_unknown("option", value, _OPTION_TYPES)
    chosen = {name: _option(name, given) for name, given in value.items() if name != "selection"}
    if "selection" in value:
        chosen["selection"] = _selection(_object("selection", value["selection"]), defaults.selection)
    return replace(defaults, **chosen)


def request_to_json(request: RankRequest) -> dict[str, object]:
    """A JSON object that `parse_request` reads; what is at its default is left out."""
    history = [each.item_id if each.item_id is not None else {"text": each.text} for each in request.history]
    whole: dict[str, object] = {
        "request_id": request.request_id,
        "user_id": request.user_id,
        "history": history,
        "candidates": list(request.candidates),
        "volatile": {item_id: dict(texts) for item_id, texts in request.volatile.items()} or None,
        "positive": request.positive,
        "options": None if request.options is None else _options_to_json(request.options),
    }
    return {name: value for name, value in whole.items() if value is not None}


def _options_to_json(options: RankOptions) -> dict[str, object]:
    values = {field.name: getattr(options, field.name) for field in fields_of(options)}
    return values | {"level": str(options.level), "selection": asdict(options.selection)}


def _option(name: str, given: object) -> Any:
    kind = _CHOICES[name]
    if kind is Level and isinstance(given, str):
        return Level.parse(given)
    if (kind is bool and isinstance(given, bool)) or given in get_args(kind):
        return given
    wanted = ", ".join(map(repr, get_args(kind))) or (
        "true or false" if kind is bool else "a text such as 'linked(16)'"
    )
    raise RequestError(f"expected option {name!r} to be one of {wanted}, got {shown(given)}")


def _selection(given: Mapping[str, object], default: Selection) -> Selection:
    parsed = from_mapping(Selection, given, "option selection")
    return replace(default, **{name: getattr(parsed, name) for name in given})


def _event(value: object) -> Event:
    match value:
        case {"item_id": item_id, **rest} if not rest:
            return Event(item_id=ItemId(_id("history", item_id)))
        case {"text": str(text), **rest} if not rest and text:
            return Event(text=text)
        case str() | int():
            return Event(item_id=ItemId(_id("history", value)))
    wanted = 'an item id, {"item_id": …} or {"text": …}'
    raise RequestError(f"expected each event in 'history' to be {wanted}, got {json.dumps(value)[:80]}")


def _id(name: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise RequestError(f"expected an id (a text or a whole number) in {name!r}, got {shown(value)}")
    return str(value)


def _ids(name: str, value: object) -> tuple[ItemId, ...]:
    return tuple(ItemId(_id(name, each)) for each in _list(name, value))


def _refuse_twice(candidates: Sequence[ItemId]) -> None:
    """One candidate in two places would have two scores and two ranks."""
    places: dict[ItemId, int] = {}
    for place, item_id in enumerate(candidates, 1):
        if (first := places.setdefault(item_id, place)) != place:
            raise RequestError(
                f"candidate {item_id!r} is there twice, at places {first} and {place}: name each candidate once"
            )


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RequestError(f"expected a whole number of at least 1 in {name!r}, got {shown(value)}")
    return value


def _list(name: str, value: object) -> list[object]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise RequestError(f"expected a list in {name!r}, got {shown(value)}")
    return value


def _object(name: str, value: object) -> Mapping[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError(f"expected an object in {name!r}, got {shown(value)}")
    return value


def _refuse_unknown(what: str, given: Mapping[str, object], known: Iterable[str]) -> None:
    names = list(known)
    for name in given:
        if name not in names:
            raise RequestError(
                f"unknown {what} field {name!r}: expected {', '.join(names)}.{did_you_mean(name, names)}"
            )
