"""Reads interaction logs, and groups them into the history of each user.

Knows nothing of item text. Invariant: a history is sorted by time; rows of equal time keep the order of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

from rcllm.core.ranking import Interaction, ItemId, UserId
from rcllm.data.files import Fields, Table
from rcllm.data.rows import (
    BadRowError,
    ReadReport,
    RowReader,
    optional_number,
    optional_text,
    required_id,
    required_time,
)
from rcllm.data.text import as_text, shown

ParseInteractions = Callable[[Fields], Iterable[Interaction]]  # one row may hold a whole history


@dataclass(frozen=True, slots=True)
class InteractionColumns:
    """Which column holds what."""

    user_id: str = "user_id"
    item_id: str = "item_id"
    timestamp: str | None = "timestamp"  # number, datetime or ISO text; None: no clock, the row's rank stands for it
    units_per_second: float = 1.0  # of numeric timestamps: 1000 for milliseconds
    text: str = "text"  # may be absent
    rating: str = "rating"  # may be absent


def read_interactions(
    path: str | Path,
    columns: InteractionColumns | None = None,
    *,
    items: Container[ItemId] | None = None,
    strict: bool = False,
    table: Table | None = None,
) -> tuple[list[Interaction], ReadReport]:
    """Reads JSONL, JSON, CSV (`table` for other layouts) or parquet with one interaction per row.

    Where `items` is given, a row that names another item is malformed.
    """
    return read_log(
        path, generic_interactions(columns or InteractionColumns()), items=items, strict=strict, table=table
    )


def read_users(
    path: str | Path, *, items: Container[ItemId] | None = None, strict: bool = False
) -> tuple[list[Interaction], ReadReport]:
    """Reads the common form, one user per row: `user_id`, and `items` from oldest to newest. Timestamps are ranks."""
    return read_log(path, parse_user, items=items, strict=strict)


def read_log(
    path: str | Path,
    parse: ParseInteractions,
    *,
    items: Container[ItemId] | None = None,
    strict: bool = False,
    table: Table | None = None,
) -> tuple[list[Interaction], ReadReport]:
    """Reads interactions as `parse` understands a row, in the order of the file."""

    def parse_known(fields: Fields) -> tuple[Interaction, ...]:
        parsed = tuple(parse(fields))
        for interaction in parsed:
            if items is not None and interaction.item_id not in items:
                raise BadRowError(f"expected an item of the catalogue, got {interaction.item_id!r}")
        return parsed

    reader = RowReader(path, strict=strict, table=table)
    interactions = list(chain.from_iterable(reader.parsed(parse_known)))
    return interactions, reader.report


def generic_interactions(columns: InteractionColumns) -> ParseInteractions:
    """A parser for rows of one interaction each."""
    ranks = count()

    def parse(fields: Fields) -> tuple[Interaction]:
        user_id, item_id = required_id(fields, columns.user_id), required_id(fields, columns.item_id)
        if columns.timestamp is None:
            timestamp = float(next(ranks))
        else:
            timestamp = required_time(fields, columns.timestamp, columns.units_per_second)
        text, rating = optional_text(fields, columns.text), optional_number(fields, columns.rating)
        return (Interaction(UserId(user_id), ItemId(item_id), timestamp, text, rating),)

    return parse


def parse_user(fields: Fields) -> Iterable[Interaction]:
    """A row of the common form."""
    user_id, items = UserId(required_id(fields, "user_id")), fields.get("items")
    if not isinstance(items, list) or not all(isinstance(item, str | int) and as_text(item) for item in items):
        raise BadRowError(f"expected a list of item ids in 'items', got {shown(items)}")
    return (Interaction(user_id, ItemId(as_text(item)), float(rank)) for rank, item in enumerate(items))


def histories(interactions: Iterable[Interaction]) -> dict[UserId, tuple[Interaction, ...]]:
    """Each user's interactions, oldest first; users in order of appearance.

    Rows that repeat another in every field count once: published logs hold the same action several times.
    """
    grouped: dict[UserId, dict[Interaction, None]] = {}
    for interaction in interactions:
        grouped.setdefault(interaction.user_id, {})[interaction] = None
    return {user: tuple(sorted(rows, key=lambda row: row.timestamp)) for user, rows in grouped.items()}
