"""Users and items that stand in several rows of a file: each is described once.

The rows of a user are one history, read one after another in the order of the file. A row that repeats the history so
far and goes on counts once, as in `rcllm.data`. An item's second row is a reject. Knows nothing of models. Invariant:
no name comes out twice, and every row that does not come out by itself is counted.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rcllm.describe.options import Kind
from rcllm.describe.profiles import Parse, Profile, Reject, read_profiles


@dataclass(frozen=True, slots=True)
class Repeats:
    """What a file says more than once."""

    joined: Mapping[str, Profile]  # by name, those in several rows; `row` is the first of them
    num_rows: int = 0  # usable rows beyond the first one of their name


def find_repeats(path: Path, parse: Parse, max_events: int | None = None) -> Repeats:
    """Reads `path`, twice where a name comes again. `parse`: rows with all of their events. Raises DataError.

    Memory: 8 bytes per row, and the profiles of the names that come again.
    """
    hashes = np.array(array("q", (hash(each.name) for each in _profiles(path, parse))), dtype=np.int64)
    values, counts = np.unique(hashes, return_counts=True)
    again = set(values[counts > 1].tolist())
    joined: dict[str, Profile] = {}
    times: Counter[str] = Counter()
    for profile in _profiles(path, parse) if again else ():
        if hash(profile.name) in again:
            before = joined.get(profile.name)
            joined[profile.name] = _joined(before, profile) if before else profile
            times[profile.name] += 1
    several = {name: _cut(each, max_events) for name, each in joined.items() if times[name] > 1}
    return Repeats(several, sum(times[name] - 1 for name in several))


def read_once(
    path: Path,
    kind: Kind,
    parse: Parse,
    repeats: Repeats,
    after: int = 0,
    note: Callable[[str], None] = lambda remark: None,
) -> Iterator[Profile | Reject]:
    """The rows of `path` beyond row `after`, each name once, where it stands first. Raises DataError.

    `note` is told, in words, what was guessed of the layout.
    """
    for row in read_profiles(path, parse, after, note):
        whole = repeats.joined.get(row.name) if isinstance(row, Profile) else None
        if whole is None:
            yield row
        elif whole.row == row.row:
            yield whole if kind == "user" else row
        elif kind == "item":
            yield Reject(row.row, row.name, f"expected each item once, got {row.name!r} as in row {whole.row:,}")


def _profiles(path: Path, parse: Parse) -> Iterator[Profile]:
    return (row for row in read_profiles(path, parse) if isinstance(row, Profile))


def _joined(before: Profile, later: Profile) -> Profile:
    """Makes one history of the history so far and a later row."""
    if later.events[: len(before.events)] == before.events:
        return replace(before, events=later.events, num_unknown=max(before.num_unknown, later.num_unknown))
    return replace(before, events=before.events + later.events, num_unknown=before.num_unknown + later.num_unknown)


def _cut(profile: Profile, max_events: int | None) -> Profile:
    return profile if max_events is None else replace(profile, events=profile.events[-max_events:])
