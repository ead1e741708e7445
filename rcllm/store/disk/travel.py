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
from rcllm.store.disk import spaces
from rcllm.store.disk.access import Access
from rcllm.store.disk.edit import read_erasure
from rcllm.store.disk.environment import DATA, FORMAT_VERSION, open_copy, told
from rcllm.store.disk.records import rank_key
from rcllm.store.owners import OwnerDigest, alias
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
    erased = _erased_after(access, manifest.made)
    opened = open_copy(folder)
    try:
        source = Access(folder, opened, access.clock)
        imported = Imported()
        with source.reading() as txn:
            batch: dict[ContentKey, Stored] = {}
            for key in _cheapest_first(txn, opened.dbs):
                imported = _sort_in(access, source, txn, key, erased, batch, imported)
                if sum(block.num_bytes for block in batch.values()) > _BATCH_BYTES:
                    put_many(batch)
                    batch = {}
            put_many(batch)
    finally:
        opened.close()
    with access.telling(), access.writing() as edit:
        for space, about in manifest.spaces.items():
            edit.name_space(space, about)
    return imported


def _sort_in(
    access: Access,
    source: Access,
    txn: Any,
    key: ContentKey,
    erased: frozenset[OwnerDigest],
    batch: dict[ContentKey, Stored],
    imported: Imported,
) -> Imported:
    """Adds a block to `batch`, or says why not."""
    entry = source.entry(txn, key)
    if entry is None or (data := source.block(txn, key, entry)) is None:
        return replace(imported, num_damaged=imported.num_damaged + 1)
    if entry.owner in erased:
        return replace(imported, num_erased=imported.num_erased + 1)
    with access.telling(), access.reading() as here:
        if access.entry(here, key) is not None:
            return replace(imported, num_there=imported.num_there + 1)
    try:
        open_sealed(data)
    except CorruptBlockError:
        return replace(imported, num_damaged=imported.num_damaged + 1)
    batch[key] = Stored(data, entry.cost, alias(entry.owner), entry.space)
    return replace(imported, num_taken=imported.num_taken + 1)


def _cheapest_first(txn: Any, dbs: Any) -> Iterator[ContentKey]:
    """So that what costs most to compute again is put last, and stays longest."""
    with txn.cursor(dbs.order) as order:
        for rank in order.iternext(values=False):
            yield rank_key(bytes(rank))


def _erased_after(access: Access, when: float) -> frozenset[OwnerDigest]:
    with access.telling(), access.reading() as txn, txn.cursor(access.opened.dbs.erasures) as cursor:
        erasures = [read_erasure(bytes(value)) for value in cursor.iternext(keys=False)]
    return frozenset(each.owner for each in erasures if each.when >= when)
