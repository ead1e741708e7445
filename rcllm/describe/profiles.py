"""What is to be described: rows of users with their history, or of items with their text, read from files.

Knows nothing of models; how an item's fields become text is the template's business. Invariant: every row of a file
comes out once, in order, as a profile or as a reject that says why, so that a reader can go on after any row.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from rcllm.core.ranking import Event, Item, ItemId
from rcllm.data.columns import history_of
from rcllm.data.files import iter_rows
from rcllm.data.raw import Fields, Problem, Row
from rcllm.data.rows import BadRowError, required_id
from rcllm.data.text import as_id, as_text, listed, shown
from rcllm.prompt.template import Parts, render


@dataclass(frozen=True, slots=True)
class Profile:
    """One user or item to describe."""

    row: int  # from 1, of the file (the line, where rows are lines)
    name: str  # user id or item id
    events: tuple[Event, ...]  # oldest first; an item's only event is its text
    num_unknown: int = 0  # events that name items which the catalogue lacks: left out


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that cannot be described."""

    row: int
    name: str | None  # None: the row does not even tell an id
    reason: str  # what was expected, what came


Parse = Callable[[int, Fields], Profile]  # raises BadRowError


def read_profiles(
    path: Path, parse: Parse, after: int = 0, note: Callable[[str], None] = lambda remark: None
) -> Iterator[Profile | Reject]:
    """The rows of `path` beyond row `after`. Raises DataError where the file cannot be read on.

    `note` is told, in words, what was guessed of the layout.
    """
    for row in iter_rows(path, note=note):
        if row.line > after:
            yield _profile(row, parse)


def _profile(row: Row | Problem, parse: Parse) -> Profile | Reject:
    if isinstance(row, Problem):
        return Reject(row.line, None, row.reason)
    try:
        return parse(row.line, {name: value for name, value in row.fields.items() if value is not None})
    except BadRowError as error:
        name = next((as_text(row.fields[key]) for key in ("user_id", "item_id") if row.fields.get(key)), None)
        return Reject(row.line, name, str(error))


def users(known: Container[ItemId] | None, max_events: int | None) -> Parse:
    """Rows of `user_id` and `history` (or `items`), oldest first, of which the last `max_events` are told; None: all.

    An event is an item id, `{"item_id": …}` or `{"text": …}`. In a CSV file the list is one cell: `["i1", "i2"]`, as
    JSON or as Python writes it, or events with | between them. `known`: the ids of the catalogue; None: there is none,
    and a plain text is an event in the user's own words.
    """

    def parse(number: int, fields: Fields) -> Profile:
        name = required_id(fields, "user_id")
        given = history_of(fields)
        given = _list_of(given) if isinstance(given, str) else given
        if not isinstance(given, list) or not given:
            raise BadRowError(f"expected a list of events in 'history', got {shown(given)}")
        events = [_event(each, known is not None) for each in given]
        found = [each for each in events if each.item_id is None or (known is not None and each.item_id in known)]
        if not found:
            raise BadRowError(
                f"none of the {len(events)} items of the history is in the catalogue: {shown(given[0])} …"
            )
        last = found if max_events is None else found[-max_events:]
        return Profile(number, name, tuple(last), len(events) - len(found))

    return parse


def items(event: Parts) -> Parse:
    """Rows of `item_id` and text fields, which `event`, the template's, writes as one text."""

    def parse(number: int, fields: Fields) -> Profile:
        name = required_id(fields, "item_id")
        texts = {key: as_text(value) for key, value in fields.items() if key != "item_id"}
        if not (text := render(event, texts).strip()):
            raise BadRowError(
                f"expected one of the fields that the template shows, got only {listed(texts) or 'an id'}"
            )
        return Profile(number, name, (Event(text=text),))

    return parse


def _list_of(cell: str) -> object:
    """The list that a cell of text holds; the cell itself where it is none."""
    if cell.lstrip().startswith("["):
        for read in (json.loads, ast.literal_eval):
            try:
                return read(cell.strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError):  # what literal_eval says of other text
                continue
        return cell
    return [part.strip() for part in cell.split("|") if part.strip()]


def _event(value: object, by_id: bool) -> Event:
    given = {key: each for key, each in value.items() if each is not None} if isinstance(value, dict) else value
    match given:
        case {"item_id": item_id, **rest} if not rest and (text := as_id(item_id)) is not None:
            return Event(item_id=ItemId(text))
        case {"text": str(text), **rest} if not rest and text.strip():
            return Event(text=as_text(text))
        case str() | int() | float() if by_id and (text := as_id(given)) is not None:
            return Event(item_id=ItemId(text))
        case str() if not by_id and given.strip():
            return Event(text=as_text(given))
    ids = "an item id" if by_id else "a text (item ids need a catalogue)"
    raise BadRowError(f'expected each event to be {ids}, {{"item_id": …}} or {{"text": …}}, got {shown(value)}')


def catalogue_digest(catalogue: Mapping[ItemId, Item]) -> str:
    """16 hex digits that change with any text of any item: a job goes on only with the catalogue it began with."""
    state = blake3()
    for item_id, item in catalogue.items():
        state.update(json.dumps([item_id, list(item.fields.items()), list(item.volatile.items())]).encode())
    return state.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Survey:
    """How many rows a file holds."""

    num_profiles: int
    num_rejects: int
    first_reject: Reject | None

    @property
    def num_rows(self) -> int:
        return self.num_profiles + self.num_rejects


def survey(rows: Iterable[Profile | Reject]) -> Survey:
    """Counts profiles and rejects, reading `rows` to their end."""
    num_profiles, num_rejects, first = 0, 0, None
    for row in rows:
        if isinstance(row, Reject):
            num_rejects += 1
            first = first or row
        else:
            num_profiles += 1
    return Survey(num_profiles, num_rejects, first)
