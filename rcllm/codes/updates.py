"""Changes of a catalogue of semantic IDs, as values, and a log that keeps them across a crash.

Knows nothing of tries or threads. Invariant: one update that `merged` makes of several does what they do one after
another. What `UpdateLog.append` has returned from is on disk, and reading it again over any later state is harmless.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rcllm.core.ranking import ItemId
from rcllm.errors import DataError
from rcllm.plain_json import to_json

_CHUNK = 1 << 16  # bytes read at once, from the end


@dataclass(frozen=True, slots=True)
class Update:
    """One change, seen as a whole or not at all: first removes, then adds, then enables and disables."""

    remove: frozenset[ItemId] = frozenset()
    add: Mapping[ItemId, tuple[int, ...]] = field(default_factory=dict)  # codes of the new items, which are enabled
    enabled: Mapping[ItemId, bool] = field(default_factory=dict)  # whether an item is on offer from now on


def merged(updates: Iterable[Update]) -> Update:
    """One update for several, in their order."""
    remove: set[ItemId] = set()
    add: dict[ItemId, tuple[int, ...]] = {}
    enabled: dict[ItemId, bool] = {}
    for update in updates:
        for item_id in update.remove:
            add.pop(item_id, None)
            enabled.pop(item_id, None)
        remove |= update.remove
        add |= update.add
        enabled |= update.enabled
    return Update(frozenset(remove), add, enabled)


class UpdateLog:
    """Updates in a file, a line of JSON each. Not thread-safe.

    What follows the last line's end was broken off by a crash, before anyone was told that it is safe: it is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, update: Update) -> None:
        """Returns when the update is on disk."""
        content = {"remove": sorted(update.remove), "add": dict(update.add), "enabled": dict(update.enabled)}
        line = to_json(content).encode() + b"\n"
        with self.path.open("ab") as file:
            file.truncate(self._whole_bytes())
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> Update:
        """All of them in one, made to fit a catalogue that has some of them already. Raises DataError."""
        updates = []
        if self.path.exists():
            for number, line in enumerate(self.path.read_bytes()[: self._whole_bytes()].splitlines(), 1):
                try:
                    updates.append(_parse(line))
                except (ValueError, TypeError, AttributeError, KeyError) as error:
                    raise DataError(
                        f"{self.path}, line {number}: expected an update of a catalogue, got {line[:80]!r} ({error}); "
                        "restore the file, or delete the line to go on without it"
                    ) from error
        update = merged(updates)
        return Update(update.remove | update.add.keys(), update.add, update.enabled)

    def clear(self) -> None:
        """Forgets everything: call it after the catalogue itself was written to disk."""
        self.path.unlink(missing_ok=True)

    def _whole_bytes(self) -> int:
        """Up to the end of the last whole line."""
        with self.path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            while end:
                start = max(0, end - _CHUNK)
                file.seek(start)
                if (at := file.read(end - start).rfind(b"\n")) >= 0:
                    return start + at + 1
                end = start
        return 0


def _parse(line: bytes) -> Update:
    content = json.loads(line)
    add = {ItemId(item_id): tuple(int(code) for code in codes) for item_id, codes in content["add"].items()}
    enabled = {ItemId(item_id): bool(on) for item_id, on in content["enabled"].items()}
    return Update(frozenset(ItemId(item_id) for item_id in content["remove"]), add, enabled)
