"""Disk as a tier of the store: `DiskStore`, what it says of itself, and the care of its folder."""

from rcllm.store.disk.care import OnProgress, Scrubbed, Verified
from rcllm.store.disk.closed import Compacted, Repaired, compact, repair, salvage
from rcllm.store.disk.edit import Removed
from rcllm.store.disk.shared import SharedDisk
from rcllm.store.disk.spaces import Space
from rcllm.store.disk.store import DiskStore, DiskUse, Erased
from rcllm.store.disk.travel import Imported, Manifest, check_export, read_manifest

__all__ = [
    "Compacted",
    "DiskStore",
    "DiskUse",
    "Erased",
    "Imported",
    "Manifest",
    "OnProgress",
    "Removed",
    "Repaired",
    "Scrubbed",
    "SharedDisk",
    "Space",
    "Verified",
    "check_export",
    "compact",
    "read_manifest",
    "repair",
    "salvage",
]
