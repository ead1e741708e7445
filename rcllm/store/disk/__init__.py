"""Disk as a tier of the store: `DiskStore`, what it says of itself, and the care of its folder."""

from rcllm.store.disk.edit import Removed
from rcllm.store.disk.store import DiskStore, DiskUse, Erased, StoreWarning

__all__ = ["DiskStore", "DiskUse", "Erased", "Removed", "StoreWarning"]
