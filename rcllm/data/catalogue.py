"""The catalogue: items by id, with their text.

Knows nothing of prompts: which fields are shown, and in which order, is the template's business. Invariant: ids are
unique, iteration follows the order of the file, and no field is empty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar, overload

from rcllm.core.ranking import Interaction, Item, ItemId
from rcllm.data.columns import InteractionColumns, id_column
from rcllm.data.raw import Fields, Notes, Table
from rcllm.data.rows import BadRowError, ReadReport, RowReader, required_id
from rcllm.data.text import as_text, as_whole_numbers, did_you_mean, listed, shown
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
        id_field: str | None = None,
        volatile_fields: Collection[str] = (),
        *,
        names: Mapping[str, str] = _NO_NAMES,
        strict: bool = False,
        table: Table | None = None,
    ) -> tuple[Catalogue, ReadReport]:
        """Reads JSONL, JSON, delimited text (`table` says how, where it is not to be guessed) or parquet.

        A row is an item, and its columns other than the id are its fields. `id_field`: None tries the usual names.
        `names`: a field's column, where the column has another name, such as {"title": "Book-Title"}. Raises DataError
        for a file that cannot be read, and for columns of `names` and `volatile_fields` that no row has.
        """
        notes = Notes()
        rows = ItemRows(id_field, volatile_fields, notes, names)
        catalogue, report = read_items(path, rows, strict=strict, table=table, notes=notes)
        if absent := rows.absent():
            raise DataError(f"{path}: {absent}")
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
                f"the catalogue of {len(self):,} items has no item {shown(item_id)}."
                f"{did_you_mean(item_id, self._items)}"
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
    notes: Notes | None = None,
) -> tuple[Catalogue, ReadReport]:
    """Reads one item per row as `parse` understands it. An id that came before, or is `known` from another file, is a
    malformed row: the first one stays. `notes`: those of `parse`.
    """
    seen: set[ItemId] = set()

    def parse_new(fields: Fields) -> Item:
        item = parse(fields)
        if item.item_id in seen or item.item_id in known:
            raise BadRowError(f"expected a new item id, got {shown(item.item_id)} again")
        seen.add(item.item_id)
        return item

    notes = Notes() if notes is None else notes
    reader = RowReader(path, strict=strict, table=table, notes=notes)
    catalogue = Catalogue(reader.parsed(parse_new))
    if plain := as_whole_numbers(catalogue):
        notes.say("every id is a whole number written as a float (1.0), and was read as the number (1)")
        catalogue = Catalogue(replace(item, item_id=ItemId(plain[item_id])) for item_id, item in catalogue.items())
    if not catalogue:
        raise DataError(f"{path}: expected items, got an empty file; check that it was written or downloaded whole")
    return catalogue, reader.report


class ItemRows:
    """A parser for rows in which every column but the id is a field, under the name that is given to it or its own."""

    def __init__(
        self,
        id_field: str | None,
        volatile_fields: Collection[str],
        notes: Notes,
        names: Mapping[str, str] = _NO_NAMES,
        log: InteractionColumns | None = None,
    ) -> None:
        """`names`: a field's column, where the column has another name. `log`: see `id_column`."""
        self._id_field, self._log = id_field, log
        self._volatile = frozenset(volatile_fields)
        self._notes = notes
        self._columns, self._renamed = names, frozenset(names.values())
        asked = [*names.values(), *(name for name in volatile_fields if name not in names)]
        self._absent = dict.fromkeys(asked)  # columns that were asked for by name, and that no row had so far
        self._names: dict[str, None] = {}  # the columns of the first row

    def __call__(self, fields: Fields) -> Item:
        id_field = id_column(self._id_field, fields, self._notes, self._log)
        item_id = required_id(fields, id_field)
        self._id_field = id_field  # the first good row settles it
        self._names = self._names or dict.fromkeys(fields)
        for name in [name for name in self._absent if name in fields]:
            del self._absent[name]
        own = (name for name in fields if name != id_field and name not in self._renamed)
        texts = {name: as_text(fields[name]) for name in own}
        texts |= {name: as_text(fields[column]) for name, column in self._columns.items() if column in fields}
        return make_item(item_id, texts, self._volatile)

    def absent(self) -> str | None:
        """What to say of columns that were asked for by name, and that no row had."""
        if not self._absent:
            return None
        first = next(iter(self._absent))
        return (
            f"no row has a column {first!r}, which was asked for by name; the columns are {listed(self._names)}."
            f"{did_you_mean(first, self._names)}"
        )


def make_item(item_id: str, texts: Mapping[str, str], volatile_fields: Collection[str] = ()) -> Item:
    """An item of the texts that are not empty, apart by whether they are volatile."""
    given = {name: text for name, text in texts.items() if text}
    stable = {name: text for name, text in given.items() if name not in volatile_fields}
    volatile = {name: text for name, text in given.items() if name in volatile_fields}
    return Item(ItemId(item_id), stable, volatile)
