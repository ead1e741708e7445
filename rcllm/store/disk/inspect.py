"""Whether the records of a store agree with one another, and how they are made to.

    entries = blocks = order, key for key          totals = Σ entries          owners = those of entries

Knows nothing of processes. Invariant: after `rebuild`, `differences` finds none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from rcllm.core.ranking import ContentKey
from rcllm.store.disk.edit import NUMBER, Edit, Removed, read_space, space_of
from rcllm.store.disk.environment import Databases, Opened
from rcllm.store.disk.records import Entry, State, read_entry, read_state
from rcllm.store.owners import NOBODY


def differences(txn: Any, opened: Opened) -> list[str]:
    """What does not agree, in words; nothing where all does. Reads no block."""
    dbs = opened.dbs
    entries, unreadable = _entries(txn, dbs)
    found = [f"{unreadable} records cannot be read"] if unreadable else []
    sizes = {key: len(value) for key, value in _items(txn, dbs.blocks)}
    lost = sum(sizes.get(key) != max(opened.least_bytes, entry.num_bytes) for key, entry in entries.items())
    if lost or len(sizes) != len(entries):
        found.append(f"{len(entries)} records and {len(sizes)} blocks, of which {lost} do not match")
    if {rank for rank, _ in _items(txn, dbs.order)} != {entry.rank(key) for key, entry in entries.items()}:
        found.append("the order of eviction names other blocks than there are")
    owned = {entry.owner + key for key, entry in entries.items() if entry.owner != NOBODY}
    if {pair for pair, _ in _items(txn, dbs.owners)} != owned:
        found.append("the owners' lists name other blocks than there are")
    state, true = read_state(txn.get(b"state", db=dbs.facts)), totals(State(), entries.values())
    if state is None or (state.num_blocks, state.num_bytes) != (true.num_blocks, true.num_bytes):
        found.append(f"totals say {state}, and are {true.num_blocks} blocks of {true.num_bytes} bytes")
    said = {space_of(key): read_space(value) for key, value in _items(txn, dbs.spaces)}
    counted = {name: Removed(each["blocks"], each["bytes"]) for name, each in said.items() if each["blocks"]}
    if _held(entries.values()) != counted:
        found.append("the spaces' counts are others than those of their blocks")
    return found


def rebuild(txn: Any, opened: Opened, edit: Edit) -> int:
    """Makes all records follow from the entries that can be read; returns how many blocks went for want of one."""
    dbs = opened.dbs
    entries, _ = _entries(txn, dbs)
    sizes = {key: len(value) for key, value in _items(txn, dbs.blocks)}
    whole = {k: each for k, each in entries.items() if sizes.get(k) == max(opened.least_bytes, each.num_bytes)}
    gone = {key for database in (dbs.entries, dbs.blocks) for key, _ in _items(txn, database)} - whole.keys()
    for key in gone:
        edit.discard(ContentKey(key))
    for database in (dbs.order, dbs.owners):
        txn.drop(database, delete=False)
    for key, entry in whole.items():
        txn.put(entry.rank(key), b"", db=dbs.order)
        if entry.owner != NOBODY:
            txn.put(entry.owner + key, b"", db=dbs.owners)
    edit.state = totals(edit.state, whole.values())
    edit.recount_spaces(_held(whole.values()))
    return len(gone)


def recovered_state(txn: Any, dbs: Databases) -> State:
    """What the totals said; where they are damaged, what can be told of them without a count of the blocks."""
    if (state := read_state(txn.get(b"state", db=dbs.facts))) is not None:
        return state
    with txn.cursor(dbs.erasures) as cursor:
        last = NUMBER.unpack(bytes(cursor.key()))[0] if cursor.last() else 0
    entries, _ = _entries(txn, dbs)
    return State(clock=min((entry.priority for entry in entries.values()), default=0.0), erasures=last)


def totals(state: State, entries: Iterable[Entry]) -> State:
    """`state` with the counts of `entries`, and no use or priority of theirs before its own."""
    listed = list(entries)
    uses = max((entry.use for entry in listed), default=0)
    num_bytes = sum(entry.num_bytes for entry in listed)
    return replace(state, num_blocks=len(listed), num_bytes=num_bytes, uses=max(state.uses, uses))


def _held(entries: Iterable[Entry]) -> dict[str, Removed]:
    """Blocks and bytes of each space."""
    held: dict[str, Removed] = {}
    for entry in entries:
        held[entry.space] = held.get(entry.space, Removed()) + Removed(1, entry.num_bytes)
    return held


def _entries(txn: Any, dbs: Databases) -> tuple[dict[ContentKey, Entry], int]:
    """Those that can be read, and how many cannot."""
    read = {ContentKey(key): read_entry(ContentKey(key), bytes(value)) for key, value in _items(txn, dbs.entries)}
    whole = {key: entry for key, entry in read.items() if entry is not None}
    return whole, len(read) - len(whole)


def _items(txn: Any, database: Any) -> Iterator[tuple[bytes, memoryview]]:
    with txn.cursor(database) as cursor:
        for key, value in cursor:
            yield bytes(key), value
