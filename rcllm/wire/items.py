"""The bodies that change what is served: items, events of users, what to warm; and texts to tokenise.

Knows nothing of HTTP or of catalogues.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from rcllm.annotated import Ge, MinLen
from rcllm.core.ranking import Event, Item, ItemId, TokenIds
from rcllm.errors import RequestError
from rcllm.wire.bodies import Object, named, read, read_text
from rcllm.wire.requests import read_event


@dataclass(frozen=True, slots=True)
class ItemBody:
    """An item's texts; its id stands in the address, or beside them in a list."""

    fields: Mapping[str, str]  # what may be cached
    volatile: Mapping[str, str] = field(default_factory=dict)  # what changes at any time: price, stock
    codes: tuple[int, ...] = ()  # its semantic ID, where a decoder is served
    item_id: ItemId | None = None


@dataclass(frozen=True, slots=True)
class ItemsBody:
    items: Annotated[tuple[ItemBody, ...], MinLen(1)]


@dataclass(frozen=True, slots=True)
class IdsBody:
    item_ids: Annotated[tuple[ItemId, ...], MinLen(1)]


@dataclass(frozen=True, slots=True)
class WarmBody:
    item_ids: tuple[ItemId, ...] | None = None  # None: the whole catalogue


@dataclass(frozen=True, slots=True)
class PlacementBody:
    """A new placement, for a cluster."""

    file: str  # that the server can read, by `rcllm place build`
    max_moves: Annotated[int, Ge(1)] | None = None  # copies, at most; None: all


@dataclass(frozen=True, slots=True)
class TokenizeBody:
    prompt: str
    model: str = ""
    add_special_tokens: bool = True  # those that begin every text


@dataclass(frozen=True, slots=True)
class DetokenizeBody:
    tokens: TokenIds
    model: str = ""


def parse_tokenize(value: Object) -> TokenizeBody:
    """Raises RequestError."""
    return read(TokenizeBody, value, {str: read_text})


def parse_detokenize(value: Object) -> DetokenizeBody:
    """Raises RequestError."""
    return read(DetokenizeBody, value, {str: read_text})


def item_of(body: ItemBody, item_id: str | None = None) -> Item:
    """Raises RequestError where the id is missing, or two differ, or nothing is said of the item."""
    given = body.item_id if item_id is None else item_id
    if not given:
        raise named("missing item_id", "item_id")
    if item_id is not None and body.item_id not in (None, item_id):
        raise named("item_id: expected the id that stands in the address, got another", "item_id")
    texts = [{name: text for name, text in fields.items() if text} for fields in (body.fields, body.volatile)]
    if not texts[0]:
        raise named("fields: expected at least one text, got none", "fields")
    return Item(ItemId(given), *texts)


def parse_event(value: Object) -> Event:
    """`{"item_id": …}` or `{"text": …}`. Raises RequestError."""
    return read_event(dict(value))


def parse_items(value: Object) -> tuple[list[Item], dict[ItemId, tuple[int, ...]]]:
    """Items and the codes of those that bring some. Raises RequestError."""
    bodies = read(ItemsBody, value).items
    items = [item_of(body) for body in bodies]
    if len({item.item_id for item in items}) < len(items):
        raise RequestError("items: expected each item_id once, got one again")
    codes = {item.item_id: body.codes for item, body in zip(items, bodies, strict=True) if body.codes}
    return items, codes
