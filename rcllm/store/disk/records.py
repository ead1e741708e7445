"""The records beside the blocks, as bytes: each with a checksum that covers its key, so that a damaged one is known.

Knows nothing of LMDB. Invariant: `read` gives the very record that `write` was given, or None.

A block's `mark` binds its record to its bytes: it hashes the header that they begin with, which holds their checksum.
So a record never vouches for another block than its own.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from rcllm.core.ranking import ContentKey
from rcllm.store.owners import DIGEST_BYTES, OwnerDigest

MARKED_BYTES = 48  # of a block, the header of store/sealed.py
_ENTRY = struct.Struct(f"<QddQQ{DIGEST_BYTES}s")
_STATE = struct.Struct("<QQdQQ")
_RANK = struct.Struct(">dQ")  # big-endian: numbers that are not negative sort as their bytes do
_CHECK = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of one block."""

    num_bytes: int
    cost: float  # of computing it again, in FLOPs
    priority: float  # see store/evict.py
    use: int  # number of its last use
    mark: int
    owner: OwnerDigest
    space: str

    @property
    def cost_per_byte(self) -> float:
        return self.cost / max(1, self.num_bytes)

    def rank(self, key: ContentKey) -> bytes:
        """Its place in the order of eviction: the lowest goes first."""
        return _RANK.pack(self.priority, self.use) + key


@dataclass(frozen=True, slots=True)
class State:
    """What is known of all blocks together."""

    num_blocks: int = 0
    num_bytes: int = 0
    clock: float = 0.0  # the priority of the last victim
    uses: int = 0
    erasures: int = 0  # how many owners were ever erased


def mark(data: memoryview) -> int:
    return xxhash.xxh3_64_intdigest(data[:MARKED_BYTES])


def write_entry(key: ContentKey, entry: Entry) -> bytes:
    fixed = _ENTRY.pack(entry.num_bytes, entry.cost, entry.priority, entry.use, entry.mark, entry.owner)
    return _checked(key, fixed + entry.space.encode("utf-8", "surrogatepass"))


def read_entry(key: ContentKey, record: bytes) -> Entry | None:
    """None: damaged."""
    if (content := _content(key, record)) is None or len(content) < _ENTRY.size:
        return None
    num_bytes, cost, priority, use, marked, owner = _ENTRY.unpack_from(content)
    return Entry(
        num_bytes,
        cost,
        priority,
        use,
        marked,
        OwnerDigest(owner),
        content[_ENTRY.size :].decode("utf-8", "surrogatepass"),
    )


def rank_key(rank: bytes) -> ContentKey:
    """Whose place in the order of eviction it is."""
    return ContentKey(rank[_RANK.size :])


def write_state(state: State) -> bytes:
    fields = (state.num_blocks, state.num_bytes, state.clock, state.uses, state.erasures)
    return _checked(b"state", _STATE.pack(*fields))


def read_state(record: bytes | None) -> State | None:
    """None: damaged, or not there."""
    content = None if record is None else _content(b"state", record)
    return None if content is None or len(content) != _STATE.size else State(*_STATE.unpack(content))


def _checked(key: bytes, content: bytes) -> bytes:
    return content + _CHECK.pack(xxhash.xxh3_64_intdigest(key + content))


def _content(key: bytes, record: bytes) -> bytes | None:
    content, check = record[: -_CHECK.size], record[-_CHECK.size :]
    return content if check == _CHECK.pack(xxhash.xxh3_64_intdigest(key + content)) else None
