"""The LMDB environment of a store: opened once, with every reason why it may not open said in one error of ours.

Knows nothing of blocks. Invariants: nothing is handed to LMDB that `pages.check` has not found whole, unless another
process has it open and found it so; the map has its full size from the start, for growing it would move blocks that are
read in place.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb

from rcllm.errors import StoreError
from rcllm.store.disk import pages
from rcllm.store.disk.records import State, write_state

FORMAT_VERSION = 1
DATA = "data.mdb"  # the name that LMDB gives its file
_READERS = "lock.mdb"
_USERS = "open.lock"  # shared by those who have the store open, held alone by who checks or replaces its file
_NAMES = ("blocks", "entries", "owners", "order", "spaces", "erasures", "facts")
_MAX_MAP_BYTES = 1 << 40
_MAX_READERS = 1024  # leases and look-ups at one moment, of all processes
_OPENED_TWICE = (
    "it is already open in this process, which can open it once. Engines whose configuration names one folder share "
    "it; otherwise hand the open store on, as Engine.build(…, store=…), or close it first"
)


@dataclass(frozen=True, slots=True)
class Databases:
    """The named databases, each a tree of its own."""

    blocks: Any  # content key → sealed bytes
    entries: Any  # content key → records.Entry
    owners: Any  # owner digest, content key → nothing
    order: Any  # records.Entry.rank: priority, use, content key → nothing
    spaces: Any  # space → JSON
    erasures: Any  # number → owner digest, time
    facts: Any  # "format", "state"


@dataclass(frozen=True, slots=True)
class Opened:
    env: lmdb.Environment
    dbs: Databases
    users: int | None  # file descriptor that holds the lock of those who use it
    writable: bool
    in_place: bool  # False: nothing tells writers that this process reads, so blocks are copied
    map_bytes: int
    page_bytes: int

    @property
    def least_bytes(self) -> int:
        """To which smaller values are filled up. Less than half a page would lie among keys, out of line with 64 bytes;
        and LMDB uses the memory of a single page again without clearing it, so that erased bytes could come back."""
        return self.page_bytes

    def close(self) -> None:
        self.env.close()
        if self.users is not None:
            os.close(self.users)


@contextlib.contextmanager
def told(folder: Path) -> Iterator[None]:
    """Turns what LMDB and the system say into StoreError."""
    try:
        yield
    except (lmdb.Error, OSError, MemoryError) as error:
        why = _OPENED_TWICE if "already open in this process" in str(error) else error
        raise StoreError(f"{folder}: the store of blocks cannot be used: {why}") from error


def open_environment(folder: Path, *, write: bool = True) -> Opened:
    """Makes the folder and an empty store where there is none. Raises StoreError. Without `write`: to read it alone."""
    with told(folder):
        if write:
            with contextlib.suppress(OSError):  # a folder that is there and cannot be written is read
                folder.mkdir(parents=True, exist_ok=True)
        write = write and os.access(folder, os.W_OK) and _can_write(folder / DATA)
        if not write and not (folder / DATA).is_file():
            raise StoreError(f"{folder}: there is no store of blocks, and none can be made: name a folder to write in")
        users, alone = _join(folder)
        try:
            if alone and (folder / DATA).exists():
                pages.check(folder / DATA)
            opened = _open(folder, write, write or os.access(folder / _READERS, os.W_OK), users)
            if alone and users is not None:
                fcntl.flock(users, fcntl.LOCK_SH)
            return opened
        except BaseException:
            if users is not None:
                os.close(users)
            raise


def open_copy(folder: Path) -> Opened:
    """A store that nobody writes, to read it; leaves nothing beside it. Raises StoreError."""
    with told(folder):
        pages.check(folder / DATA)
        return _open(folder, write=False, lock=False, users=None)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A scope in which no process opens the store. Raises StoreError where one has it open."""
    with told(folder):
        users, is_alone = _join(folder, wait=False)
    if not is_alone:
        if users is not None:
            os.close(users)
        raise StoreError(f"{folder}: a process has this store open; stop it first, then run this again")
    try:
        yield
    finally:
        assert users is not None
        os.close(users)


def _can_write(file: Path) -> bool:
    return not file.exists() or os.access(file, os.W_OK)


def _join(folder: Path, wait: bool = True) -> tuple[int | None, bool]:
    """A descriptor that locks the store against replacement, and whether nobody else has it open."""
    try:
        users = os.open(folder / _USERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        try:
            users = os.open(folder / _USERS, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None, True  # a copy that was never opened, in a folder that cannot be written
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return users, True
    except BlockingIOError:
        if wait:
            fcntl.flock(users, fcntl.LOCK_SH)
        return users, False


def _open(folder: Path, write: bool, lock: bool, users: int | None) -> Opened:
    """`lock`: whether writers are told of what is read here."""
    env, map_bytes = _map(folder, write, lock)
    try:
        env.reader_check()  # readers that were killed hold no pages
        return Opened(env, _databases(env, folder, write), users, write, lock, map_bytes, env.stat()["psize"])
    except BaseException:
        env.close()
        raise


def _map(folder: Path, write: bool, lock: bool) -> tuple[lmdb.Environment, int]:
    """The environment, and the address space that it got."""
    size = _MAX_MAP_BYTES
    least = (folder / DATA).stat().st_size if (folder / DATA).exists() else 1 << 20
    while True:
        try:
            env = lmdb.open(
                os.fspath(folder),
                map_size=size,
                max_dbs=len(_NAMES),
                max_readers=_MAX_READERS,
                max_spare_txns=8,
                readonly=not write,
                lock=lock,
                metasync=False,  # a crash of the machine may lose the last write; never more, and nothing half
                create=write,
                mode=0o644,
            )
            return env, size
        except (lmdb.MemoryError, MemoryError):
            if size // 2 < least:
                raise
            size //= 2


def _databases(env: lmdb.Environment, folder: Path, write: bool) -> Databases:
    with env.begin() as txn:
        names = {bytes(name) for name, _ in txn.cursor()}
    if names - {name.encode() for name in _NAMES}:
        raise StoreError(f"{folder}: this LMDB file is no store of rcllm; name another folder")
    if not write:
        if not names:
            raise StoreError(f"{folder}: the store of blocks is empty, and cannot be written")
        dbs = Databases(*(env.open_db(name.encode(), create=False) for name in _NAMES))
        with env.begin() as txn:
            _check_facts(txn, dbs, folder)
        return dbs
    with env.begin(write=True) as txn:  # whole, or not there
        dbs = Databases(*(env.open_db(name.encode(), txn=txn) for name in _NAMES))
        if not txn.stat(dbs.facts)["entries"]:
            txn.put(b"format", str(FORMAT_VERSION).encode(), db=dbs.facts)
            txn.put(b"state", write_state(State()), db=dbs.facts)
        _check_facts(txn, dbs, folder)
    return dbs


def _check_facts(txn: Any, dbs: Databases, folder: Path) -> None:
    found = (txn.get(b"format", db=dbs.facts) or b"none").decode(errors="replace")
    if found != str(FORMAT_VERSION):
        raise StoreError(
            f"{folder}: expected a store of format {FORMAT_VERSION}, got {found!r}; name another folder, or "
            "delete this one: its blocks are computed again"
        )
