"""The catalogue: items by id, with their text.

Knows nothing of prompts: which fields are shown, and in which order, is the template's business. Invariant: ids are
unique, iteration follows the order of the file, and no field is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar, overload

from rcllm.core.ranking import Item, ItemId
from rcllm.data.files import Fields, Table
from rcllm.data.rows import BadRowError, ReadReport, RowReader, required_id
from rcllm.data.text import as_text, did_you_mean
from rcllm.errors import DataError, UnknownItemError

_Default = TypeVar("_Default")


class Catalogue(Mapping[ItemId, Item]):
    """Items by id. Looking up an unknown id raises UnknownItemError with the nearest ids."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items: dict[ItemId, Item] = {}
        for item in items:
            if item.item_id in self._items:
                raise DataError(f"expected each item once, got {item.item_id!r} twice; remove one of them")
            self._items[item.item_id] = item

    @classmethod
    def read(
        cls,
        path: str | Path,
        id_field: str = "item_id",
        volatile_fields: Collection[str] = (),
        *,
        strict: bool = False,
        table: Table | None = None,
    ) -> tuple[Catalogue, ReadReport]:
        """Reads JSONL, JSON, CSV (`table` for other layouts) or parquet: an item per row, other columns its fields."""
        return read_items(path, generic_item(id_field, volatile_fields), strict=strict, table=table)

    def __getitem__(self, item_id: ItemId) -> Item:
        try:
            return self._items[item_id]
        except KeyError:
            raise UnknownItemError(
                f"the catalogue of {len(self):,} items has no item {item_id!r}.{did_you_mean(item_id, self._items)}"
            ) from None

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[ItemId]:
        return iter(self._items)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._items

    # Mapping derives `get` from KeyError, which UnknownItemError is not.
    @overload
    def get(self, item_id: ItemId, /) -> Item | None: ...
    @overload
    def get(self, item_id: ItemId, default: Item | _Default, /) -> Item | _Default: ...
    def get(self, item_id: ItemId, default: object = None, /) -> object:
        return self._items.get(item_id, default)

    def __repr__(self) -> str:
        return f"Catalogue({len(self):,} items)"


def read_items(
    path: str | Path,
    parse: Callable[[Fields], Item],
    *,
    known: Container[ItemId] = (),
    strict: bool = False,
    table: Table | None = None,
) -> tuple[Catalogue, ReadReport]:
    """Reads one item per row as `parse` understands it. An id that came before, or is `known` from another file, is a
    malformed row: the first one stays.
    """
    seen: set[ItemId] = set()

    def parse_new(fields: Fields) -> Item:
        item = parse(fields)
        if item.item_id in seen or item.item_id in known:
            raise BadRowError(f"expected a new item id, got {item.item_id!r} again")
        seen.add(item.item_id)
        return item

    reader = RowReader(path, strict=strict, table=table)
    catalogue = Catalogue(reader.parsed(parse_new))
    if not catalogue:
        raise DataError(f"{path}: expected items, got an empty file; check that it was written or downloaded whole")
    return catalogue, reader.report


def generic_item(id_field: str = "item_id", volatile_fields: Collection[str] = ()) -> Callable[[Fields], Item]:
    """A parser for rows in which every column but the id is a field under its own name."""

    def parse(fields: Fields) -> Item:
        item_id = required_id(fields, id_field)
        texts = {name: as_text(value) for name, value in fields.items() if name != id_field}
        return make_item(item_id, texts, volatile_fields)

    return parse


def make_item(item_id: str, texts: Mapping[str, str], volatile_fields: Collection[str] = ()) -> Item:
    """An item of the texts that are not empty, apart by whether they are volatile."""
    given = {name: text for name, text in texts.items() if text}
    stable = {name: text for name, text in given.items() if name not in volatile_fields}
    volatile = {name: text for name, text in given.items() if name in volatile_fields}
    return Item(ItemId(item_id), stable, volatile)
