"""The catalogue: items by id, with their text.

Knows nothing of prompts: which fields are shown, and in which order, is the template's business. Invariant: ids are
unique, iteration follows the order of the file, and no field is empty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar, overload

from rcllm.core.ranking import Interaction, Item, ItemId
from rcllm.data.files import Fields, Table
from rcllm.data.rows import BadRowError, ReadReport, RowReader, required_id
from rcllm.data.text import as_text, did_you_mean
from rcllm.errors import DataError, UnknownItemError

_Default = TypeVar("_Default")
_NO_NAMES: Mapping[str, str] = MappingProxyType({})


class Catalogue(Mapping[ItemId, Item]):
    """Items by id. Looking up an unknown id raises UnknownItemError with the nearest ids."""

    interactions: Sequence[Interaction] = ()  # with these items, where they are known

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
        names: Mapping[str, str] = _NO_NAMES,
        strict: bool = False,
        table: Table | None = None,
    ) -> tuple[Catalogue, ReadReport]:
        """Reads JSONL, JSON, CSV (`table` for other layouts) or parquet: an item per row, other columns its fields.

        `names`: a field's column, where the column has another name, such as {"title": "Book-Title"}. Raises DataError
        for a file that cannot be read, and for columns of `names` and `volatile_fields` that no row has.
        """
        parse = generic_item(id_field, volatile_fields, names)
        seen: set[str] = set()

        def parse_seeing(fields: Fields) -> Item:
            seen.update(fields)
            return parse(fields)

        catalogue, report = read_items(path, parse_seeing, strict=strict, table=table)
        _check_columns(path, [*names.values(), *(set(volatile_fields) - names.keys())], seen)
        return catalogue, report

    def knowing(self, interactions: Sequence[Interaction]) -> Catalogue:
        """The same items, of which fields can be made that need interactions (`data/popularity.py`)."""
        catalogue = Catalogue(())
        catalogue._items, catalogue.interactions = self._items, interactions
        return catalogue

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


def field_shares(catalogue: Mapping[ItemId, Item], names: Sequence[str]) -> dict[str, float]:
    """Of the items, how many have each field; there must be at least one item."""
    counts = Counter(name for item in catalogue.values() for name in names if item.fields.get(name))
    return {name: counts[name] / len(catalogue) for name in names}


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


def _check_columns(path: str | Path, asked: Iterable[str], seen: Collection[str]) -> None:
    """Raises DataError for a column that was asked for by name and that no row has."""
    for name in asked:
        if name not in seen:
            raise DataError(
                f"{path}: no row has a column {name!r}, which was asked for by name; there are "
                f"{', '.join(sorted(seen))}.{did_you_mean(name, seen)}"
            )


def generic_item(
    id_field: str = "item_id", volatile_fields: Collection[str] = (), names: Mapping[str, str] = _NO_NAMES
) -> Callable[[Fields], Item]:
    """A parser for rows in which every column but the id is a field, under the name that `names` gives or its own."""
    renamed = set(names.values())

    def parse(fields: Fields) -> Item:
        item_id = required_id(fields, id_field)
        texts = {name: as_text(value) for name, value in fields.items() if name != id_field and name not in renamed}
        texts |= {name: as_text(fields[column]) for name, column in names.items() if column in fields}
        return make_item(item_id, texts, volatile_fields)

    return parse


def make_item(item_id: str, texts: Mapping[str, str], volatile_fields: Collection[str] = ()) -> Item:
    """An item of the texts that are not empty, apart by whether they are volatile."""
    given = {name: text for name, text in texts.items() if text}
    stable = {name: text for name, text in given.items() if name not in volatile_fields}
    volatile = {name: text for name, text in given.items() if name in volatile_fields}
    return Item(ItemId(item_id), stable, volatile)
