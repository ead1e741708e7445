"""Opens the tiers that a configuration names, and ends them.

Knows nothing of requests or of what is in a block. Invariant: a tier that cannot be used is told of, and the others go
on; what was learned of the tiers' speed is kept with them.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from rcllm.cache.pinned import page_locked
from rcllm.cache.pool import Pool
from rcllm.cache.rates import Rates
from rcllm.config import MIB, StoreConfig
from rcllm.core.receipts import Source
from rcllm.errors import StoreError, StoreWarning
from rcllm.fetch import cache_dir
from rcllm.store.arena import Arena
from rcllm.store.contract import Store
from rcllm.store.disk import DiskStore, SharedDisk
from rcllm.store.null import NullStore
from rcllm.store.tiered import Tiered
from rcllm.store.valkey import ValkeyStore

RATES = "rates.json"  # in the folder of the store
_SHARE = 4  # of the free disk, what a store takes that was told no size


@dataclass(slots=True)
class Tiers:
    """The tiers below one pool."""

    store: Store = field(default_factory=NullStore)
    disk: DiskStore | None = None
    folder: Path | None = None
    erasures: int = 0  # of other processes, that the pool has heeded

    @classmethod
    def heeding(cls, store: Store) -> Tiers:
        """For a pool over a store that was opened elsewhere, and is closed there."""
        disk = _disk_of(store)
        return cls(disk=disk, erasures=_erasures_of(disk))

    def heed_erasures(self, pool: Pool) -> None:
        """Lets the pool forget what other processes erased since the last time; a disk that fails says nothing."""
        if self.disk is None:
            return
        try:
            erased = self.disk.erased_since(self.erasures)
        except StoreError:
            return
        if erased.now != self.erasures:
            pool.heed(erased)
            self.erasures = erased.now

    def load_rates(self, rates: Rates) -> None:
        if self.folder is not None:
            rates.load(self.folder / RATES)

    def close(self, rates: Rates) -> None:
        """Ends the tiers, and leaves what was learned of them. A folder that cannot be written keeps what it had."""
        with ExitStack() as ends:
            ends.callback(self.store.close)
            if self.folder is not None and self.disk is not None and self.disk.use().writable:
                try:
                    rates.save(self.folder / RATES)
                except OSError as error:
                    warnings.warn(f"{self.folder}: {error}", StoreWarning, stacklevel=2)


def open_tiers(
    config: StoreConfig,
    space: str,
    made_by: Mapping[str, str],
    peers: Store | None = None,
    *,
    on_gpu: bool = False,
) -> Tiers:
    """A disk that cannot be used is told of, and the others go on; `made_by`: what is said of the space.

    `peers`: what other machines have, which is asked after the disk, and kept in memory or on disk where there is room.
    `on_gpu`: what is in host memory is copied to a GPU, so that it is page-locked.

    Raises ConfigError for an address that means nothing.
    """
    lasting = dict[Source, Store]()
    disk, folder = None, folder_of(config)
    if config.enabled:
        try:
            lasting["disk"] = part = SharedDisk.open(folder, budget_of(config, folder))
            disk = part.disk
            if space and disk.use().writable:
                disk.name_space(space, made_by)
        except StoreError as error:
            warnings.warn(f"{error}. Nothing is kept on disk meanwhile", StoreWarning, stacklevel=2)
    if peers is not None:
        lasting["peer"] = peers
    if config.enabled and config.shared:
        lasting["shared"] = ValkeyStore(config.shared)
    if not lasting and not (config.enabled and config.host_mb):
        return Tiers()
    host_bytes = config.host_mb * MIB if config.enabled else 0
    arena = Arena(page_locked(host_bytes)) if on_gpu and host_bytes else None
    store = Tiered(lasting, memory_bytes=host_bytes, arena=arena, queue_bytes=config.queue_mb * MIB)
    return Tiers(store, disk, folder if disk is not None else None, _erasures_of(disk))


def _disk_of(store: Store) -> DiskStore | None:
    """The disk that a store is, or has a part in."""
    match store:
        case DiskStore():
            return store
        case SharedDisk():
            return store.disk
        case Tiered():
            return next((disk for tier in store.lasting if (disk := _disk_of(tier)) is not None), None)
        case _:
            return None


def _erasures_of(disk: DiskStore | None) -> int:
    return 0 if disk is None else disk.erased_since(0).now


def unfilled_bytes(store: Store | None) -> int:
    """Of the memory of this process, what blocks in the tiers of a store may yet take."""
    return store.unfilled_bytes if isinstance(store, Tiered) else 0


def folder_of(config: StoreConfig) -> Path:
    return Path(config.folder).expanduser() if config.folder else cache_dir() / "store"


def budget_of(config: StoreConfig, folder: Path) -> int:
    """Bytes that blocks on disk may take: as configured, else a share of what is free and of what they take now.

    What stores in folders below take counts as taken.
    """
    if config.disk_mb:
        return config.disk_mb * MIB
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    taken = sum(path.stat().st_size for path in folder.rglob("*.mdb")) if folder.is_dir() else 0
    return (shutil.disk_usage(there).free + taken) // _SHARE
