"""The texts that a semantic pool is built from, as token runs written exactly as prompts write histories.

Knows nothing of prototypes. Invariant: no text of an excluded user, and of a data set none of a user that is held out
for validation or test.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from rcllm.core.ranking import Event, TokenIds, UserId
from rcllm.data import BadRowError, Dataset, ReadReport, RowReader, histories, split_of
from rcllm.data.content import text_lines
from rcllm.data.ids import read_ids, tell_unknown
from rcllm.data.raw import Fields
from rcllm.data.rows import required_id
from rcllm.data.text import as_id, as_text
from rcllm.errors import ConfigError, DataError
from rcllm.prompt.blocks import Prompter
from rcllm.prototypes.config import MemberContext

History = tuple[Event, ...]  # oldest first


def dataset_histories(
    dataset: Dataset, num_events: int, excluded: Collection[UserId] = (), *, reviews: bool = False
) -> list[History]:
    """The last `num_events` events of each training user; `reviews`: as the user's own words, where there are any.

    Raises DataError where reviews are wanted and there are none.
    """
    if reviews and not any(row.text for row in dataset.interactions):
        raise DataError(f"{dataset.name}: there are no review texts; leave out --reviews to use items' titles")
    return [
        tuple(Event(text=row.text) if reviews and row.text else Event(row.item_id) for row in rows[-num_events:])
        for user, rows in histories(dataset.interactions).items()
        if split_of(user) == "train" and user not in excluded
    ]


def file_histories(
    path: Path, num_events: int, excluded: Collection[UserId] = ()
) -> tuple[list[History], ReadReport | None]:
    """Texts of a file: .txt, one text a line, each a history; else rows with `text` and, optionally, `user_id`.

    Rows of one user form one history, in the order of the file, of which the last `num_events` are used. The report
    tells which rows had no text; a .txt has none. Raises DataError, ConfigError.
    """
    if path.suffix == ".txt":
        if excluded:
            raise ConfigError(f"{path} names no users, so that none can be excluded; give rows with user_id and text")
        return [(Event(text=line),) for line in text_lines(path)], None
    reader = RowReader(path)
    by_user: dict[str, list[Event]] = {}
    seen: set[UserId] = set()
    for number, (user, text) in enumerate(reader.parsed(_named if excluded else _parse)):
        seen.add(user)
        if user not in excluded:
            by_user.setdefault(f"user {user}" if user else f"row {number}", []).append(Event(text=text))
    absent = tell_absent(excluded, seen)
    report = replace(reader.report, notes=(*reader.report.notes, *([absent] if absent else [])))
    return [tuple(events[-num_events:]) for events in by_user.values()], report


def tell_absent(excluded: Collection[UserId], users: Collection[UserId]) -> str | None:
    """Which users are to be left out and are not there at all, in words: perhaps they go by another name."""
    return tell_unknown("the users to leave out", sorted(excluded), users, "the data")


def read_users_file(path: Path) -> frozenset[UserId]:
    """User ids, one a line, see `read_ids`. Raises DataError."""
    return frozenset(map(UserId, read_ids(path)))


def token_runs(prompter: Prompter, texts: Iterable[Sequence[Event]], member_context: MemberContext) -> list[TokenIds]:
    """What stands after the instruction: each whole history, or each of its events."""
    written = ([prompter.event(event).ids for event in history] for history in texts)
    if member_context == "instruction":
        return list(chain.from_iterable(written))
    return [tuple(chain.from_iterable(events)) for events in written]


def _parse(fields: Fields) -> tuple[UserId, str]:
    if not (text := as_text(fields.get("text"))):
        raise BadRowError("expected words in 'text', got none")
    return UserId(as_id(fields.get("user_id")) or ""), text


def _named(fields: Fields) -> tuple[UserId, str]:
    """As `_parse`, where users are to be left out, so that a text without a user may be one of theirs."""
    required_id(fields, "user_id")
    return _parse(fields)
