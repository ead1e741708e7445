"""What a catalogue needed when it was last warmed, so that blocks whose texts changed or went are removed from disk.

A file of content keys lies beside the store for each catalogue and way of reading it. Never imports torch; knows
nothing of items. Invariant: a block goes only if the last warming of this catalogue needed it, this one does not, and
no other catalogue that was warmed in the same store does.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path

from blake3 import blake3

from rcllm.core.ranking import ContentKey
from rcllm.durable import write
from rcllm.errors import StoreError, StoreWarning
from rcllm.store.disk import DiskStore, Removed

FOLDER = "warmed"  # in the folder of the store
_KEY_BYTES = 32


def remove_stale(disk: DiskStore, catalogue: str, keys: Collection[ContentKey]) -> Removed:
    """Removes what `catalogue`, any name for it, needed the last time beside `keys`, and remembers `keys`.

    A store that cannot be written keeps what it has, with a warning.
    """
    mine = disk.folder / FOLDER / f"{blake3(catalogue.encode('utf-8', 'surrogatepass')).hexdigest(16)}.keys"
    try:
        before = _read(mine)
        stale = before.difference(keys)
        for other in mine.parent.glob("*.keys"):
            if stale and other != mine:
                stale -= _read(other)
        removed = disk.remove_many(stale)
        if before != set(keys):
            write(mine, b"".join(keys))
    except (StoreError, OSError) as error:
        warnings.warn(f"{error}. Blocks of old texts stay until they make way", StoreWarning, stacklevel=2)
        return Removed()
    return removed


def _read(path: Path) -> set[ContentKey]:
    """Nothing where there is none, or it is torn."""
    content = path.read_bytes() if path.exists() else b""
    if len(content) % _KEY_BYTES:
        return set()
    return {ContentKey(content[at : at + _KEY_BYTES]) for at in range(0, len(content), _KEY_BYTES)}
