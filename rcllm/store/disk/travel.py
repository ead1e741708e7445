"""A store taken to another machine: a folder with a copy of the file, and a manifest that says what is in it.

    manifest.json      format, time, blocks, bytes, spaces, size and blake3 of data.mdb
    data.mdb           a store of its own, packed

Knows nothing of tensors. Invariants: an export has its name when it is whole; an import takes whole blocks, each
checked by its own checksum, so one that is cut short has taken some of them, and the next goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from rcllm.core.ranking import ContentKey
from rcllm.durable import renamed
from rcllm.errors import StoreError
from rcllm.store.contract import Stored
from rcllm.store.disk import audit, spaces
from rcllm.store.disk.access import Access
from rcllm.store.disk.edit import read_erasure
from rcllm.store.disk.environment import DATA, FORMAT_VERSION, open_copy, told
from rcllm.store.disk.records import rank_key
from rcllm.store.owners import OwnerDigest, alias, digest
from rcllm.store.sealed import CorruptBlockError, open_sealed

MANIFEST = "manifest.json"
_BATCH_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an export says of itself."""

    format: int
    made: float  # seconds since 1970
    blocks: int
    bytes: int
    spaces: Mapping[str, Mapping[str, str]]  # what each is made by
    file_bytes: int
    blake3: str  # of the file


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of the blocks of an export."""

    num_taken: int = 0
    num_there: int = 0  # before
    num_erased: int = 0  # left out: their owners were erased here since the export was made
    num_damaged: int = 0  # left out: they fail their checksum


def export_to(access: Access, folder: Path) -> Manifest:
    made = access.clock()
    with access.telling(), renamed(folder) as partial:
        partial.mkdir()
        access.opened.env.copy(str(partial), compact=True)
        copied = open_copy(partial)
        try:
            source = Access(partial, copied, access.clock)
            with source.reading() as txn:
                state = source.state(txn)
                held = spaces.read_all(txn, copied.dbs)
        finally:
            copied.close()
        file = partial / DATA
        about = {name: dict(space.about) for name, space in held.items()}
        size, checksum = file.stat().st_size, blake3(max_threads=blake3.AUTO).update_mmap(file).hexdigest()
        manifest = Manifest(FORMAT_VERSION, made, state.num_blocks, state.num_bytes, about, size, checksum)
        (partial / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Raises StoreError."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        manifest = Manifest(**content)
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"{folder}: expected an export of a store, with its {MANIFEST}: {error}") from error
    if manifest.format != FORMAT_VERSION:
        raise StoreError(
            f"{folder}: expected an export of format {FORMAT_VERSION}, got {manifest.format}; export again"
        )
    return manifest


def check_export(folder: Path) -> Manifest:
    """Reads the whole file. Raises StoreError where it is not the one that was exported."""
    manifest, file = read_manifest(folder), folder / DATA
    with told(folder):
        size, checksum = file.stat().st_size, blake3(max_threads=blake3.AUTO).update_mmap(file).hexdigest()
    if (size, checksum) != (manifest.file_bytes, manifest.blake3):
        raise StoreError(f"{folder}: {DATA} is not the file that was exported; copy it again")
    return manifest


def import_from(access: Access, folder: Path, put_many: Callable[[Mapping[ContentKey, Stored]], None]) -> Imported:
    manifest = check_export(folder)
    opened = open_copy(folder)
    try:
        source = Access(folder, opened, access.clock)
        with source.reading() as txn:
            taking = _Taking(access, source, txn, _erased_after(access, manifest.made))
            for key in _cheapest_first(txn, opened.dbs):
                taking.take(key)
                if taking.num_bytes > _BATCH_BYTES:
                    put_many(taking.batch())
            put_many(taking.batch())
    finally:
        opened.close()
    with access.telling(), access.writing() as edit:
        for space, about in manifest.spaces.items():
            edit.name_space(space, about)
    return taking.imported


class _Taking:
    """Blocks of an export, sorted into those that are taken and those that are not."""

    def __init__(self, here: Access, source: Access, txn: Any, erased: frozenset[OwnerDigest]) -> None:
        self._here, self._source, self._txn, self._erased = here, source, txn, erased
        self._batch: dict[ContentKey, Stored] = {}
        self.num_bytes = 0  # of the batch
        self.imported = Imported()

    def batch(self) -> Mapping[ContentKey, Stored]:
        """What was taken since the last call. Its bytes lie in the export."""
        batch, self._batch, self.num_bytes = self._batch, {}, 0
        return batch

    def take(self, key: ContentKey) -> None:
        so_far = self.imported
        block = self._block(key)
        if block is None:
            self.imported = replace(so_far, num_damaged=so_far.num_damaged + 1)
        elif digest(block.owner) in self._erased:
            self.imported = replace(so_far, num_erased=so_far.num_erased + 1)
        elif self._is_here(key):
            self.imported = replace(so_far, num_there=so_far.num_there + 1)
        else:
            self.imported = replace(so_far, num_taken=so_far.num_taken + 1)
            self._batch[key] = block
            self.num_bytes += block.num_bytes

    def _block(self, key: ContentKey) -> Stored | None:
        """None: it is damaged."""
        entry = self._source.entry(self._txn, key)
        data = None if entry is None else self._source.block(self._txn, key, entry)
        if entry is None or data is None:
            return None
        try:
            open_sealed(data)
        except CorruptBlockError:
            return None
        return Stored(data, entry.cost, alias(entry.owner), entry.space)

    def _is_here(self, key: ContentKey) -> bool:
        with self._here.telling(), self._here.reading() as txn:
            return self._here.entry(txn, key) is not None


def _cheapest_first(txn: Any, dbs: Any) -> Iterator[ContentKey]:
    """So that what costs most to compute again is put last, and stays longest."""
    with txn.cursor(dbs.order) as order:
        for rank in order.iternext(values=False):
            yield rank_key(bytes(rank))


def _erased_after(access: Access, when: float) -> frozenset[OwnerDigest]:
    with access.telling(), access.reading() as txn, txn.cursor(access.opened.dbs.erasures) as cursor:
        erasures = [read_erasure(bytes(value)) for value in cursor.iternext(keys=False)]
        erasures += audit.erased_owners(access.folder)  # the file remembers the last ones, and none once it was saved
    return frozenset(each.owner for each in erasures if each.when >= when)
