"""The bodies of `/v1/rank` and `/v1/recommend`: requests as in files, with what only a server is told.

Knows nothing of HTTP or of models. Invariant: a candidate that brings its text is ranked as an item of the catalogue
with that text would be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from rcllm.core.decoding import RecommendRequest
from rcllm.core.ranking import ItemId, RankOptions, RankRequest, RankResponse
from rcllm.data.text import as_text
from rcllm.wire.bodies import Extras, Object, named, read, split
from rcllm.wire.lines import response_to_json
from rcllm.wire.requests import parse_recommend_request, parse_request, read_id
from rcllm.words import shape

R = TypeVar("R", RankRequest, RecommendRequest)
_ID_NAMES = ("item_id", "id")


@dataclass(frozen=True, slots=True)
class RankExtras(Extras):
    prior: tuple[float, ...] = ()  # of each candidate: where time is short, those with the least are left out first


@dataclass(frozen=True, slots=True)
class RecommendExtras(Extras):
    unseen: bool = False  # none of the items in the user's history


@dataclass(frozen=True, slots=True)
class Body(Generic[R]):
    request: R
    extras: Extras
    has_history: bool  # whether the body says what the user did
    prior: tuple[float, ...] = ()
    unseen: bool = False


def parse_rank_body(value: Object, request_id: str, defaults: RankOptions, text_field: str) -> Body[RankRequest]:
    """A request as `parse_request` reads it, whose candidates may be objects with an id and their fields.

    `text_field`: the field that a candidate's `text` stands for. Raises RequestError.
    """
    own, rest = split(value, RankExtras)
    extras = read(RankExtras, own)
    candidates, texts = _candidates(rest.get("candidates"), text_field)
    if texts:
        rest = {**rest, "candidates": candidates, "texts": {**_texts(rest.get("texts")), **texts}}
    request = parse_request({"request_id": request_id, **rest}, defaults, shape)
    if extras.level is not None:
        request = replace(request, options=replace(request.options or defaults, level=extras.level))
    if extras.prior and len(extras.prior) != len(request.candidates):
        raise named(f"prior: expected a number for each of {len(request.candidates)} candidates", "prior")
    return Body(request, extras, bool(request.history) or "history" in rest or "items" in rest, extras.prior)


def parse_recommend_body(value: Object, request_id: str) -> Body[RecommendRequest]:
    """Raises RequestError."""
    own, rest = split(value, RecommendExtras)
    extras = read(RecommendExtras, own)
    request = parse_recommend_request({"request_id": request_id, **rest}, RecommendRequest(""), shape)
    if extras.level is not None:
        request = replace(request, level=extras.level)
    has_history = bool(request.history) or "history" in rest or "items" in rest
    return Body(request, extras, has_history, unseen=extras.unseen)


def _candidates(value: object, text_field: str) -> tuple[list[object], dict[ItemId, dict[str, str]]]:
    """Ids in the order given, and the fields of those that bring some."""
    if not isinstance(value, list):
        return [], {}
    ids: list[object] = []
    texts: dict[ItemId, dict[str, str]] = {}
    for index, each in enumerate(value):
        if not isinstance(each, Mapping):
            ids.append(each)
            continue
        item_id = ItemId(_id_of(each, index))
        ids.append(item_id)
        fields = fields_of({name: inner for name, inner in each.items() if name not in _ID_NAMES}, text_field)
        if fields:
            texts[item_id] = fields
    return ids, texts


def _id_of(candidate: Object, index: int) -> str:
    for name in _ID_NAMES:
        if candidate.get(name) is not None:
            return read_id(candidate[name])
    field = f"candidates[{index}]"
    raise named(f"{field}: expected an object with item_id and its text or fields, got {shape(candidate)}", field)


def fields_of(values: Object, text_field: str) -> dict[str, str]:
    """Texts by field, without those that are empty; `text` is the field that the template shows first."""
    texts = {name: as_text(value) for name, value in values.items()}
    if text_field not in texts and "text" in texts:
        texts[text_field] = texts.pop("text")
    return {name: text for name, text in texts.items() if text}


def _texts(value: object) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def rank_to_json(response: RankResponse, body: Body[RankRequest]) -> dict[str, object]:
    """What `rcllm rank` writes, and why each step was taken. Raises ModelError where a score is no number."""
    answer = dict(response_to_json(response, receipts=body.extras.explain))
    for name in ("notes", "degraded"):  # what was cut or guessed, and what was given up for the deadline
        if said := getattr(response.receipt, name):
            answer[name] = list(said)
    if response.receipt.guard:
        answer["guard"] = response.receipt.guard
    return answer
