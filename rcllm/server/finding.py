"""Finds items of the catalogue by words of their texts, for a person who types.

Knows nothing of HTTP. Invariant: a search reads a bounded number of items, and says how many it read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from rcllm.core.ranking import Item, ItemId

MAX_READ = 50_000  # items of one search: some hundredths of a second


@dataclass(frozen=True, slots=True)
class FoundItems:
    """What a search found, in the order of the catalogue; an item with the id that was typed comes first."""

    items: tuple[Item, ...]
    num_read: int  # of the catalogue
    num_items: int  # in it


def find(catalogue: Mapping[ItemId, Item], query: str, limit: int) -> FoundItems:
    """At most `limit` items that hold every word of `query`; an empty query finds the first ones."""
    words = query.casefold().split()
    exact = catalogue.get(ItemId(query.strip()))
    found, num_read = ([] if exact is None else [exact]), 0
    for item_id in islice(catalogue, MAX_READ):
        if len(found) >= limit:
            break
        num_read += 1
        item = catalogue.get(item_id)  # it may have gone since
        if item is not None and item is not exact and _holds(item, words):
            found.append(item)
    return FoundItems(tuple(found), num_read, len(catalogue))


def named(catalogue: Mapping[ItemId, Item], item_ids: Iterable[str]) -> FoundItems:
    """Those of some ids that are there."""
    found = [item for item_id in item_ids if (item := catalogue.get(ItemId(item_id))) is not None]
    return FoundItems(tuple(found), len(found), len(catalogue))


def text_of(item: Item, names: Sequence[str]) -> str:
    """What a person reads of an item: the first of the named fields that it has, else any, else its id."""
    found = next((name for name in (*names, *item.fields) if name in item.fields), None)
    return item.item_id if found is None else item.fields[found]


def _holds(item: Item, words: Sequence[str]) -> bool:
    text = " ".join(item.fields.values()).casefold()
    return all(word in text for word in words)
