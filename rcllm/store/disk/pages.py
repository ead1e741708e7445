"""The pages of an LMDB file, read without LMDB, which trusts its file: a damaged page would end the process.

Format of LMDB 0.9 on 64 bits, little-endian. Knows nothing of blocks. Invariant: a file that `check` lets pass has
sound trees: every page and value in its place, none used twice, nodes packed, keys in order, counts right. It reads the
pages of trees, not the values.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rcllm.errors import StoreError

Numbers = npt.NDArray[np.int64]
PAGE_HEADER = struct.Struct("<Q2xHHH")  # number, flags, then for trees lower and upper
OVERFLOW_HEADER = struct.Struct("<Q2xHI")  # number, flags, how many pages
BRANCH, LEAF, OVERFLOW, META, DIRTY = 1, 2, 4, 8, 16
_BIG, _TREE = 1, 2  # flags of a node: its value lies in overflow pages; it is a named tree
_META = struct.Struct("<II8xQ48s48sQQ")  # magic, version, map size, free list, main tree, last page, transaction
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_DB = struct.Struct("<IHHQQQQQ")  # page size, flags, depth, branches, leaves, overflow pages, entries, root
_NOWHERE = (1 << 64) - 1  # the root of an empty tree
_MAX_DEPTH = 32
_CHUNK = 2048  # pages that are read together


class DamagedFileError(StoreError):
    """The file is not as LMDB wrote it."""


@dataclass(frozen=True, slots=True)
class Tree:
    name: str
    depth: int
    branches: int
    leaves: int
    overflow: int
    entries: int
    root: int

    @classmethod
    def read(cls, name: str, record: bytes) -> Tree:
        return cls(name, *_DB.unpack(record)[2:])


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one of the two first pages says: the file as one transaction left it."""

    txnid: int
    num_pages: int
    free: Tree
    main: Tree


@dataclass(slots=True)
class Walked:
    """What was found in a tree."""

    first: list[Numbers] = field(default_factory=list)  # of runs of pages that it uses
    count: list[Numbers] = field(default_factory=list)
    values: list[tuple[Numbers, Numbers]] = field(default_factory=list)  # those runs of them that hold one value each
    trees: list[Tree] = field(default_factory=list)  # named in it
    free: list[Numbers] = field(default_factory=list)  # pages that it lists as free, where it is the free list

    def use(self, first: Numbers, count: Numbers) -> None:
        self.first.append(first)
        self.count.append(count)


class PageFile:
    """An LMDB file, read by page. A context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.num_bytes = os.fstat(self._fd).st_size
        self.page_bytes = 0

    def __enter__(self) -> PageFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def damaged(self, what: str) -> DamagedFileError:
        return DamagedFileError(
            f"{self.path}: the file is damaged ({what}). Save what can be read of it: rcllm cache verify --repair; or "
            "delete the folder, and its blocks are computed again"
        )

    def read(self, first: int, count: int = 1) -> bytes:
        found = os.pread(self._fd, count * self.page_bytes, first * self.page_bytes)
        if len(found) != count * self.page_bytes:
            raise self.damaged(f"it ends before page {first + count - 1}")
        return found

    def snapshots(self) -> list[Snapshot]:
        """Of its last two transactions, the newest first. Raises DamagedFileError unless both can be read."""
        first = os.pread(self._fd, PAGE_HEADER.size + _META.size, 0)
        if len(first) < PAGE_HEADER.size + _META.size:
            raise self.damaged(f"it has {self.num_bytes} bytes")
        self.page_bytes = _DB.unpack(_META.unpack_from(first, PAGE_HEADER.size)[3])[0]
        if self.page_bytes not in (1 << n for n in range(9, 17)):
            raise self.damaged(f"a page size of {self.page_bytes} bytes")
        return sorted((self._snapshot(place) for place in (0, 1)), key=lambda each: -each.txnid)

    def _snapshot(self, place: int) -> Snapshot:
        page = self.read(place)
        number, flags, _, _ = PAGE_HEADER.unpack_from(page)
        magic, version, _, free, main, last, txnid = _META.unpack_from(page, PAGE_HEADER.size)
        if (number, flags, magic, version) != (place, META, _MAGIC, _VERSION) or (txnid and txnid % 2 != place):
            raise self.damaged(f"page {place} is none of LMDB 0.9")
        if not 1 <= last < 1 << 48 or _DB.unpack(main)[1] or _DB.unpack(free)[1] & ~0x08:
            raise self.damaged(f"page {place} says what no store says")
        return Snapshot(txnid, last + 1, Tree.read("free list", free), Tree.read("main", main))


def check(path: Path) -> None:
    """Raises DamagedFileError for what LMDB had better not see."""
    with PageFile(path) as file:
        newest = file.snapshots()[0]
        free = walk(file, newest, newest.free)
        first, count = live(file, newest, free)
        listed = np.concatenate([*free.free, np.zeros(0, np.int64)])
        _check_apart(file, newest, np.concatenate([first, listed]), np.concatenate([count, np.ones_like(listed)]))
        if (first + count).max(initial=0) * file.page_bytes > file.num_bytes:
            raise file.damaged("it ends before its last page")


def live(file: PageFile, snapshot: Snapshot, free: Walked | None = None) -> tuple[Numbers, Numbers]:
    """First page and length of every run of pages that a snapshot reads, in no order."""
    main = walk(file, snapshot, snapshot.main)
    walked = [free or walk(file, snapshot, snapshot.free), main]
    walked += [walk(file, snapshot, tree) for tree in main.trees]
    nothing = np.zeros(0, np.int64)
    first = np.concatenate([nothing, *(run for each in walked for run in each.first)])
    return first, np.concatenate([nothing, *(run for each in walked for run in each.count)])


def unused(file: PageFile) -> Numbers:
    """Pages that neither of the last two transactions reads: whatever lies in them, nobody will see it through LMDB.

    Some may lie behind the last page of both, where a process was killed before what it wrote counted.
    """
    newest, before = file.snapshots()
    num_pages = -(-file.num_bytes // file.page_bytes)
    # of each page, how many runs begin less those that end
    used = np.zeros(max(newest.num_pages, before.num_pages, num_pages) + 1, np.int32)
    for snapshot in (newest, before):
        first, count = live(file, snapshot)
        np.add.at(used, first, 1)
        np.add.at(used, first + count, -1)
    free = np.flatnonzero(np.cumsum(used)[:num_pages] == 0)
    return free[free >= 2]


def walk(file: PageFile, snapshot: Snapshot, tree: Tree) -> Walked:
    """One tree, level by level, checked."""
    found = Walked()
    level = np.array([] if tree.root == _NOWHERE else [tree.root], np.uint64)
    counted = {BRANCH: 0, LEAF: 0, OVERFLOW: 0}
    depth = entries = 0
    while level.size:
        depth += 1
        _require(file, tree, depth <= _MAX_DEPTH, "is too deep")
        _require(
            file, tree, bool(((level >= 2) & (level < snapshot.num_pages)).all()), "names a page that is not there"
        )
        numbers = level.astype(np.int64)
        found.use(numbers, np.ones_like(numbers))
        children = []
        last_key: bytes | None = None
        for chunk in np.split(numbers, range(_CHUNK, len(numbers), _CHUNK)):
            nodes = _Nodes(file, tree, chunk)
            counted[nodes.kind] += len(chunk)
            if nodes.kind == BRANCH:
                children.append(nodes.children())
                continue
            last_key = nodes.check_order(last_key)
            entries += len(nodes.at)
            counted[OVERFLOW] += nodes.values(
                snapshot, found, is_main=tree is snapshot.main, is_free=tree is snapshot.free
            )
        level = np.concatenate([*children, np.zeros(0, np.uint64)])
        _require(file, tree, not (children and last_key), "has branches and leaves at one height")
    seen = (depth, counted[BRANCH], counted[LEAF], counted[OVERFLOW], entries)
    said = (tree.depth, tree.branches, tree.leaves, tree.overflow, tree.entries)
    _require(file, tree, seen == said, f"counts {said}, and has {seen}")
    return found


class _Nodes:
    """The nodes of some pages of one height."""

    def __init__(self, file: PageFile, tree: Tree, numbers: Numbers) -> None:
        self._file, self._tree = file, tree
        self._bytes = np.frombuffer(b"".join(file.read(int(number)) for number in numbers), np.uint8)
        self._words = self._bytes.view("<u2")
        heads = self._words.reshape(len(numbers), -1)
        flags, lower, upper = (heads[:, word].astype(np.int64) for word in (5, 6, 7))
        self.kind = int(flags[0])
        own = self._bytes.reshape(len(numbers), -1)[:, :8].copy().view("<u8")[:, 0]
        self._need(bool((own == numbers).all()), "has a page out of its place")
        self._need(self.kind in (BRANCH, LEAF) and bool((flags == self.kind).all()), "has a page of another kind")
        least = 1 if self.kind == LEAF or tree.name == "free list" else 2
        counts = (lower - PAGE_HEADER.size) // 2
        inside = (counts >= least) & (lower % 2 == 0) & (lower <= upper) & (upper <= file.page_bytes)
        self._need(bool(inside.all()), "has a page with wrong bounds")
        row, slot = np.nonzero(np.arange(counts.max()) < counts[:, None])
        at = heads[row, 8 + slot].astype(np.int64)
        self._need(bool(((at % 2 == 0) & (at >= upper[row]) & (at + 8 <= file.page_bytes)).all()), "has a lost node")
        self.at = row * file.page_bytes + at  # of each node, in order, in `_bytes`
        word = self.at // 2
        self._low, self._high, self._flags, self._key_len = (self._words[word + n].astype(np.int64) for n in range(4))
        self._check_packed(row, upper)

    def _need(self, holds: bool, what: str) -> None:
        _require(self._file, self._tree, holds, what)

    def _check_packed(self, row: Numbers, upper: Numbers) -> None:
        """Nodes fill a page from `upper` to its end, without gap or overlap."""
        size = 8 + self._key_len
        if self.kind == LEAF:
            size = size + np.where(self._flags & _BIG, 8, self._low | self._high << 16)
        order = np.argsort(self.at)
        ends = (self.at + size + size % 2)[order]
        page = row[order]
        starts = np.append(self.at[order][1:], 0)
        is_last = np.append(page[1:] != page[:-1], True)
        starts[is_last] = (page[is_last] + 1) * self._file.page_bytes
        firsts = self.at[order][np.append(True, is_last[:-1])]
        packed = bool((ends == starts).all()) and bool((firsts % self._file.page_bytes == upper).all())
        self._need(packed, "has a page whose nodes overlap")

    def children(self) -> npt.NDArray[np.uint64]:
        low = (self._low | self._high << 16).astype(np.uint64)
        children: npt.NDArray[np.uint64] = low | self._flags.astype(np.uint64) << np.uint64(32)
        return children

    def check_order(self, before: bytes | None) -> bytes:
        """Keys of one length, as ours are within each tree, rise; returns the last. Others are not compared."""
        key_len = int(self._key_len[0])
        keys = self._gather(self.at + 8, key_len)
        last: bytes = keys[-1].tobytes()
        if self._tree.name != "free list" and bool((self._key_len == key_len).all()):
            texts = keys.view(f"S{key_len}")[:, 0]  # of one length, so that they compare as their bytes do
            follows = before is None or len(before) != key_len or before < keys[0].tobytes()
            self._need(follows and bool((texts[:-1] < texts[1:]).all()), "has keys that do not rise")
        return last

    def _gather(self, start: Numbers, length: int) -> npt.NDArray[np.uint8]:
        gathered: npt.NDArray[np.uint8] = self._bytes[start[:, None] + np.arange(length)]
        return gathered

    def values(self, snapshot: Snapshot, found: Walked, *, is_main: bool, is_free: bool) -> int:
        """Adds what the values of leaves use to `found`; returns how many overflow pages they have."""
        big, named = self._flags == _BIG, self._flags == _TREE
        self._need(bool((big | (self._flags == 0) | (named & is_main)).all()), "has a value of no known kind")
        start, size = self.at + 8 + self._key_len, self._low | self._high << 16
        first = self._gather(start[big], 8).view("<u8")[:, 0] if big.any() else np.zeros(0, np.uint64)
        count = (size[big] + PAGE_HEADER.size - 1) // self._file.page_bytes + 1
        inside = (first >= 2) & (first < snapshot.num_pages) & (first.astype(np.int64) + count <= snapshot.num_pages)
        self._need(bool(inside.all()), "names a value that is not there")
        found.use(first.astype(np.int64), count)
        found.values.append((first.astype(np.int64), count))
        for node in np.flatnonzero(named):
            self._need(size[node] == _DB.size, "names no tree")
            name = self._bytes[self.at[node] + 8 : start[node]].tobytes().decode(errors="replace")
            record = self._bytes[start[node] : start[node] + _DB.size].tobytes()
            self._need(_DB.unpack(record)[1] == 0, f"names a tree of another kind, {name!r}")
            found.trees.append(Tree.read(name, record))
        if is_free:
            found.free += list(self._free_lists(start, size, big, first.astype(np.int64), count))
        return int(count.sum())

    def _free_lists(self, start: Numbers, size: Numbers, big: Any, first: Numbers, count: Numbers) -> Iterator[Numbers]:
        extents = iter(zip(first, count, strict=True))
        for node in range(len(start)):
            data = self._bytes[start[node] : start[node] + size[node]].tobytes()
            if big[node]:
                page, pages = next(extents)
                data = self._file.read(int(page), int(pages))[PAGE_HEADER.size :][: size[node]]
            self._need(len(data) >= 8 and len(data) % 8 == 0, "has a list of odd size")
            listed = np.frombuffer(data, "<u8")
            self._need(int(listed[0]) == len(listed) - 1, "has a list of another length")
            yield listed[1:].astype(np.int64)


def _check_apart(file: PageFile, snapshot: Snapshot, first: Numbers, count: Numbers) -> None:
    order = np.argsort(first)
    first, count = first[order], count[order]
    if bool((first < 2).any()) or bool((first + count > snapshot.num_pages).any()):
        raise file.damaged("it uses pages that it does not have")
    if bool((first[:-1] + count[:-1] > first[1:]).any()):
        raise file.damaged("it uses a page twice")


def _require(file: PageFile, tree: Tree, holds: bool, what: str) -> None:
    if not holds:
        raise file.damaged(f"its tree {tree.name!r} {what}")
