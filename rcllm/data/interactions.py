"""Reads interaction logs, and groups them into the history of each user.

Knows nothing of item text. Invariant: a history is sorted by time; rows of equal time keep the order of the file. Where
the order of rows stands for time, it is one order for all rows of a user, and never compared with a clock.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path

from rcllm.core.ranking import Interaction, ItemId, UserId
from rcllm.data.columns import (
    HISTORY_NAMES,
    NO_CLOCK,
    InteractionColumns,
    has_item,
    history_of,
    item_column,
    time_column,
    user_column,
)
from rcllm.data.raw import Fields, Notes, Table
from rcllm.data.rows import (
    BadRowError,
    ReadReport,
    RowReader,
    optional_number,
    optional_text,
    required_id,
    required_time,
)
from rcllm.data.text import as_id, as_whole_numbers, other_spelling, shown

ParseInteractions = Callable[[Fields], Iterable[Interaction]]  # one row may hold a whole history


def read_interactions(
    path: str | Path,
    columns: InteractionColumns | None = None,
    *,
    items: Container[ItemId] | None = None,
    strict: bool = False,
    table: Table | None = None,
) -> tuple[list[Interaction], ReadReport]:
    """Reads JSONL, JSON, delimited text (`table` says how, where it is not to be guessed) or parquet.

    A row is one interaction, or a user with the list `history` (or `items`), oldest first; the first row settles
    which. Where `items` is given, a row that names another item is malformed.
    """
    notes = Notes()
    return read_log(path, log_rows(columns, notes), items=items, strict=strict, table=table, notes=notes)


def read_users(
    path: str | Path, *, items: Container[ItemId] | None = None, strict: bool = False
) -> tuple[list[Interaction], ReadReport]:
    """Reads the common form, a user per row: `user_id`, and `history` (or `items`) from oldest to newest.

    Timestamps are ranks. A user's rows follow one another; a row that repeats the user's history so far extends it.
    """
    notes = Notes()
    return read_log(path, user_rows(InteractionColumns(), notes), items=items, strict=strict, notes=notes)


def read_log(
    path: str | Path,
    parse: ParseInteractions,
    *,
    items: Container[ItemId] | None = None,
    strict: bool = False,
    table: Table | None = None,
    notes: Notes | None = None,
) -> tuple[list[Interaction], ReadReport]:
    """Reads interactions as `parse` understands a row, in the order of the file. `notes`: those of `parse`."""
    notes = Notes() if notes is None else notes

    def parse_known(fields: Fields) -> tuple[Interaction, ...]:
        parsed = tuple(parse(fields))
        return parsed if items is None else tuple(_known(each, items, notes) for each in parsed)

    reader = RowReader(path, strict=strict, table=table, notes=notes)
    interactions = _whole(list(chain.from_iterable(reader.parsed(parse_known))), items is None, notes)
    return interactions, reader.report


def _whole(rows: list[Interaction], free: bool, notes: Notes) -> list[Interaction]:
    """The rows with 1 for 1.0 where every user is written so; `free`: no catalogue says how items are, so they too."""
    users = as_whole_numbers(row.user_id for row in rows)
    items = as_whole_numbers(row.item_id for row in rows) if free else None
    if users:
        notes.say("every user id is a whole number written as a float (1.0), and was read as the number (1)")
        rows = [replace(row, user_id=UserId(users[row.user_id])) for row in rows]
    if items:
        notes.say("every item id is a whole number written as a float (1.0), and was read as the number (1)")
        rows = [replace(row, item_id=ItemId(items[row.item_id])) for row in rows]
    return rows


def _known(interaction: Interaction, items: Container[ItemId], notes: Notes) -> Interaction:
    """The interaction with an item of the catalogue, also where pandas wrote the number 10 as 10.0."""
    if interaction.item_id in items:
        return interaction
    other = ItemId(other_spelling(interaction.item_id))
    if other not in items:
        raise BadRowError(f"expected an item of the catalogue, got {shown(interaction.item_id)}")
    notes.count("item ids look like whole numbers written as floats (10.0), and were read as the catalogue spells them")
    return replace(interaction, item_id=other)


def log_rows(columns: InteractionColumns | None, notes: Notes) -> ParseInteractions:
    """A parser for rows of one interaction each, or for rows of whole users; the first row settles which."""
    chosen = columns or InteractionColumns()
    parse: ParseInteractions | None = None

    def parse_settled(fields: Fields) -> Iterable[Interaction]:
        nonlocal parse
        if parse is not None:
            return parse(fields)
        whole = isinstance(history_of(fields), list)
        if whole and has_item(chosen.item_id, fields):
            raise BadRowError("expected one item or a user's whole list in a row, got both; leave one of them out")
        first = user_rows(chosen, notes) if whole else generic_interactions(chosen, notes)
        parsed = tuple(first(fields))
        parse = first
        return parsed

    return parse_settled


@dataclass(frozen=True, slots=True)
class _Settled:
    user: str
    item: str
    time: str | None  # None: there is no clock


def generic_interactions(columns: InteractionColumns, notes: Notes | None = None) -> ParseInteractions:
    """A parser for rows of one interaction each. The first good row settles the columns for the whole log."""
    notes = Notes() if notes is None else notes
    ranks = count()
    settled: _Settled | None = None

    def settle(fields: Fields) -> _Settled:
        user = user_column(columns.user_id, fields, notes)
        item = item_column(columns.item_id, fields, notes)
        return _Settled(user, item, time_column(columns.timestamp, fields, notes))

    def parse(fields: Fields) -> tuple[Interaction]:
        nonlocal settled
        names = settle(fields) if settled is None else settled
        user_id, item_id = required_id(fields, names.user), required_id(fields, names.item)
        if names.time is not None:
            timestamp = required_time(fields, names.time, columns.units_per_second)
        elif columns.timestamp != NO_CLOCK and time_column(None, fields, Notes()) is not None:
            raise BadRowError("expected no time, as in the first row, got one; a time and the order of rows do not mix")
        else:
            timestamp = float(next(ranks))
        text, rating = optional_text(fields, columns.text), optional_number(fields, columns.rating)
        settled = names
        return (Interaction(UserId(user_id), ItemId(item_id), timestamp, text, rating),)

    return parse


def user_rows(columns: InteractionColumns, notes: Notes) -> ParseInteractions:
    """A parser for rows of whole users. Ranks go on where a user comes again, so that rows follow one another."""
    read: dict[UserId, list[ItemId]] = {}  # by user, the history so far

    def parse(fields: Fields) -> Iterable[Interaction]:
        user_id = UserId(required_id(fields, user_column(columns.user_id, fields, notes)))
        added = _items(history_of(fields))
        before = read.setdefault(user_id, [])
        start = len(before)
        if before and added[:start] == before:
            notes.count("rows repeat a user's history so far and go on: what they repeat counts once")
            added = added[start:]
        elif before:
            notes.count("rows belong to a user who came before: read one after another, in the order of the file")
        before += added
        return tuple(Interaction(user_id, item, float(rank)) for rank, item in enumerate(added, start))

    return parse


def _items(given: object) -> list[ItemId]:
    items = [as_id(each) for each in given] if isinstance(given, list) else [None]
    if any(item is None for item in items):
        raise BadRowError(f"expected a list of item ids in {HISTORY_NAMES[0]!r} (or 'items'), got {shown(given)}")
    return [ItemId(item) for item in items if item is not None]


def histories(interactions: Iterable[Interaction]) -> dict[UserId, tuple[Interaction, ...]]:
    """Each user's interactions, oldest first; users in order of appearance.

    Rows that repeat another in every field count once: published logs hold the same action several times.
    """
    grouped: dict[UserId, dict[Interaction, None]] = {}
    for interaction in interactions:
        grouped.setdefault(interaction.user_id, {})[interaction] = None
    return {user: tuple(sorted(rows, key=lambda row: row.timestamp)) for user, rows in grouped.items()}
