"""The texts that a semantic pool is built from, as token runs written exactly as prompts write histories.

Knows nothing of prototypes. Invariant: no text of an excluded user, and of a data set none of a user that is held out
for validation or test.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from pathlib import Path

from rcllm.core.ranking import Event, TokenIds, UserId
from rcllm.data import BadRowError, Dataset, ReadReport, RowReader, histories, split_of
from rcllm.data.files import Fields
from rcllm.data.text import as_text
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
        return [(Event(text=line),) for line in _lines(path)], None
    reader = RowReader(path)
    by_user: dict[str, list[Event]] = {}
    for number, (user, text) in enumerate(reader.parsed(_parse)):
        if user not in excluded:
            by_user.setdefault(f"user {user}" if user else f"row {number}", []).append(Event(text=text))
    return [tuple(events[-num_events:]) for events in by_user.values()], reader.report


def read_users_file(path: Path) -> frozenset[UserId]:
    """User ids, one a line. Raises DataError."""
    return frozenset(UserId(line) for line in _lines(path))


def token_runs(prompter: Prompter, texts: Iterable[Sequence[Event]], member_context: MemberContext) -> list[TokenIds]:
    """What stands after the instruction: each whole history, or each of its events."""
    written = ([prompter.event_ids(event)[0] for event in history] for history in texts)
    if member_context == "instruction":
        return list(chain.from_iterable(written))
    return [tuple(chain.from_iterable(events)) for events in written]


def _parse(fields: Fields) -> tuple[UserId, str]:
    if not (text := as_text(fields.get("text"))):
        raise BadRowError("expected words in 'text', got none")
    return UserId(as_text(fields.get("user_id"))), text


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as lines of text: {error}") from error
    return [line.strip() for line in lines if line.strip()]
