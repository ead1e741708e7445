"""Spaces: what the blocks of a store are made by, how many there are of each, and which ones nobody reads any more.

Knows nothing of models: a space is a name, and what is told about it is for people.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rcllm.core.ranking import ContentKey
from rcllm.store.disk.access import Access
from rcllm.store.disk.edit import Removed, read_space, space_of
from rcllm.store.disk.environment import Databases
from rcllm.store.disk.records import read_entry

_BATCH = 1000  # blocks that are removed in one transaction


@dataclass(frozen=True, slots=True)
class Space:
    """What was made by one model, adapter, tokenizer, template and dtype."""

    about: Mapping[str, str]  # as it was told by whoever opened the store for it
    num_blocks: int
    num_bytes: int
    used: float  # when one of its blocks was last put or used, or it was opened for; seconds since 1970


def read_all(txn: Any, dbs: Databases) -> dict[str, Space]:
    found = {}
    with txn.cursor(dbs.spaces) as cursor:
        for key, value in cursor:
            record = read_space(value)
            held = Space(record["about"], record["blocks"], record["bytes"], record["used"])
            found[space_of(bytes(key))] = held
    return found


def prune(access: Access, keep: Collection[str]) -> Removed:
    """In several transactions, so that nobody waits long: cut short, some blocks are left for the next time."""
    with access.telling(), access.reading() as txn, txn.cursor(access.opened.dbs.entries) as cursor:
        entries = ((ContentKey(bytes(key)), bytes(value)) for key, value in cursor)
        read = ((key, read_entry(key, value)) for key, value in entries)
        others = [key for key, entry in read if entry is not None and entry.space not in keep]
    removed = remove_all(access, others, keep)
    with access.telling(), access.writing() as edit:
        edit.forget_spaces(set(edit.empty_spaces()) - set(keep))
    return removed


def remove_all(access: Access, keys: Iterable[ContentKey], keep: Collection[str] = ()) -> Removed:
    """Removes those of `keys` that are there and in none of the spaces `keep`, some in each transaction."""
    removed, rest = Removed(), iter(keys)
    while batch := list(itertools.islice(rest, _BATCH)):
        with access.telling(), access.writing() as edit:
            for key in batch:
                entry = edit.entry(key)
                if entry is not None and entry.space not in keep:
                    removed += edit.remove(key)
    return removed
