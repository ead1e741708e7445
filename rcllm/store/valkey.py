"""A tier that many machines share: a Valkey or Redis server.

Knows nothing of other tiers. Invariants: a block and its place in its owner's set are written together; erasing an
owner finds each of its blocks, since every block names its owner as well.

    <prefix>b:<content key>   hash: d, the block as it was sealed; o, its owner; c, its cost; s, its space
    <prefix>o:<owner>         set of the content keys of an owner's blocks, some of which may be gone by now

The server bounds its memory by its own `maxmemory`. Its policy says what goes then: with `allkeys-lru` blocks, and with
them sets of owners, for which reason erasing then looks at every block. With `volatile-lru` and a `ttl_s` only blocks
can go, and erasing reads one set. With `noeviction` a full server takes nothing more. What the server writes to its own
disk (RDB, AOF) is erased when it next rewrites those files.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from rcllm.core.ranking import ContentKey
from rcllm.errors import ConfigError
from rcllm.store.contract import Found, Stored, TierStats

if TYPE_CHECKING:
    from types import ModuleType

PASSWORD_VARIABLE = "RCLLM_VALKEY_PASSWORD"
MAX_BLOCK_BYTES = 512 << 20  # the longest string that a server takes
_BLOCKS_AT_ONCE = 16
_KEYS_AT_ONCE = 1000
_Command = tuple[Any, ...]
T = TypeVar("T")


class ValkeyStore:
    """Blocks on the server at `url`: valkey://, valkeys:// (TLS), redis://, rediss:// or unix://.

    A password stands in the URL or in $RCLLM_VALKEY_PASSWORD. Blocks of several services may share a server under
    different `prefix`es. `ttl_s`: how long the server keeps a block after it was written; for ever where there is none.
    Nothing is sent before the first call. Every call may raise what the client raises, after at most `connect_s` and
    then `read_s` without an answer; nothing is tried twice.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "rcllm:",
        ttl_s: int | None = None,
        connect_s: float = 0.25,
        read_s: float = 1.0,
    ) -> None:
        if not re.fullmatch(r"[\w.:-]*", prefix):
            raise ConfigError(f"a prefix of shared blocks has letters, digits and . : _ - alone, not {prefix!r}")
        self._valkey = _client_package()
        self._prefix = prefix.encode()
        self._ttl_s = ttl_s
        self._lock = threading.Lock()  # of the counts
        self._dropped = 0
        try:
            self._client = self._valkey.Valkey.from_url(
                url,
                password=os.environ.get(PASSWORD_VARIABLE),
                socket_connect_timeout=connect_s,
                socket_timeout=read_s,
                socket_read_size=1 << 20,
            )
        except ValueError:
            # it is not repeated, nor what the client says of it: both may hold a password
            raise ConfigError(
                "the address of the shared tier is none: expected valkey://host:port/db, or valkeys://, redis://, "
                "rediss://, unix://, with a password as in valkey://:password@host:port/db, its signs %-encoded"
            ) from None

    def lookup_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Found]:
        wanted = list(dict.fromkeys(keys))
        sizes = self._ask([("HSTRLEN", self._block(key), "d") for key in wanted])
        return {key: Found("shared", size) for key, size in zip(wanted, sizes, strict=True) if size}

    def get_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Stored]:
        found = {}
        for some in _parts(list(dict.fromkeys(keys)), _BLOCKS_AT_ONCE):
            answers = self._ask([("HMGET", self._block(key), "d", "c", "o", "s") for key in some])
            for key, (data, cost, owner, space) in zip(some, answers, strict=True):
                if data is not None:
                    found[key] = Stored(memoryview(data), float(cost), _owner_of(owner), space.decode())
        return found

    def put_many(self, blocks: Mapping[ContentKey, Stored]) -> None:
        fitting = {key: block for key, block in blocks.items() if block.num_bytes <= MAX_BLOCK_BYTES}
        self._count_dropped(len(blocks) - len(fitting))
        for some in _parts(list(fitting.items()), _BLOCKS_AT_ONCE):
            try:
                self._ask([command for key, block in some for command in self._writing(key, block)], together=True)
            except self._valkey.OutOfMemoryError:
                self._count_dropped(len(some))

    def delete_owner(self, owner: str) -> int:
        """Reads the owner's set; looks at every block where there is none, or where the server may evict sets."""
        (members,) = self._ask([("SMEMBERS", self._owned(owner))])
        deleted = self._delete(owner, list(members))
        if not members or self._may_lose_sets():
            deleted += sum(self._delete(owner, keys) for keys in self._all_keys())
        return deleted

    def stats(self) -> Sequence[TierStats]:
        """Counts the blocks under its prefix one by one; evictions and the budget are those of the whole server."""
        num_blocks = num_bytes = 0
        for keys in self._all_keys():
            sizes = self._ask([("HSTRLEN", self._block(key), "d") for key in keys])
            num_blocks += sum(size > 0 for size in sizes)
            num_bytes += sum(sizes)
        (info,) = self._ask([("INFO",)])
        budget = info["maxmemory"] or info["total_system_memory"]
        return (TierStats("shared", num_blocks, num_bytes, budget, info["evicted_keys"], self._dropped),)

    def close(self) -> None:
        self._client.close()

    # ---- what is sent ----

    def _block(self, key: bytes) -> bytes:
        return self._prefix + b"b:" + key

    def _owned(self, owner: str) -> bytes:
        return self._prefix + b"o:" + owner.encode("utf-8", "surrogatepass")

    def _writing(self, key: ContentKey, block: Stored) -> Iterator[_Command]:
        """The commands that put a block in place of what is there."""
        fields = ("d", block.data, "c", repr(block.cost), "o", _owner_field(block.owner), "s", block.space)
        yield "HSET", self._block(key), *fields
        if self._ttl_s is not None:
            yield "EXPIRE", self._block(key), self._ttl_s
        if block.owner is not None:
            yield "SADD", self._owned(block.owner), key

    def _delete(self, owner: str, keys: Sequence[bytes]) -> int:
        """Deletes those blocks that are the owner's, and takes all of `keys` from the owner's set."""
        if not keys:
            return 0
        fields = self._ask([("HGET", self._block(key), "o") for key in keys])
        whose = _owner_field(owner)
        blocks = [self._block(key) for key, field in zip(keys, fields, strict=True) if field == whose]
        deleting = [("DEL", *blocks)] if blocks else []
        return sum(self._ask([("SREM", self._owned(owner), *keys), *deleting], together=True)[1:])

    def _may_lose_sets(self) -> bool:
        (info,) = self._ask([("INFO", "memory")])
        return str(info["maxmemory_policy"]).startswith("allkeys")

    def _all_keys(self) -> Iterator[list[bytes]]:
        """The content keys of all blocks under the prefix, some at a time; one that stays is found, maybe twice."""
        start, cursor = self._block(b""), 0
        while True:
            ((cursor, keys),) = self._ask([("SCAN", cursor, "MATCH", start + b"*", "COUNT", _KEYS_AT_ONCE)])
            yield [key[len(start) :] for key in keys]
            if not cursor:
                return

    def _ask(self, commands: Iterable[_Command], *, together: bool = False) -> list[Any]:
        """Sends all commands at once, and returns the answers; `together`: nobody else's come between."""
        with self._client.pipeline(transaction=together) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = pipeline.execute()
            return answers

    def _count_dropped(self, count: int) -> None:
        with self._lock:
            self._dropped += count


def _parts(items: list[T], size: int) -> Iterator[list[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _owner_field(owner: str | None) -> bytes:
    """Nobody and the empty name differ."""
    return b"" if owner is None else b"=" + owner.encode("utf-8", "surrogatepass")


def _owner_of(field: bytes) -> str | None:
    return field[1:].decode("utf-8", "surrogatepass") if field else None


def _client_package() -> ModuleType:
    try:
        import valkey  # noqa: PLC0415 - optional: only those who share blocks between machines need it
    except ImportError as error:
        raise ConfigError(
            "a tier that machines share needs the Valkey client: install rcllm with the extra `shared`, "
            "pip install 'rcllm[shared]'"
        ) from error
    return valkey
