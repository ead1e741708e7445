"""What one replica of a cluster may take of a machine that it shares."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from rcllm.config import MIB, CacheConfig, ClusterConfig, Config, StoreConfig
from rcllm.engine.build import this_machine
from rcllm.on_ray.recipe import for_node


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """With a store on a disk of which 400 MB are free or hold blocks, in whichever replica's folder they lie."""
    taken = tmp_path / "node-1" / "data.mdb"
    taken.parent.mkdir()
    taken.write_bytes(bytes(MIB))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=399 * MIB))
    return Config(store=StoreConfig(enabled=True, folder=str(tmp_path)))


def test_replicas_of_one_machine_share_its_memory_and_its_disk(stored: Config, tmp_path: Path) -> None:
    cluster = ClusterConfig(replicas=2, max_replicas=4)
    one, other = (for_node(stored, cluster, node) for node in (0, 1))
    assert one.cache.memory_mb == other.cache.memory_mb == int(this_machine().memory_bytes * 0.6 / 4) // MIB
    assert one.store.disk_mb == other.store.disk_mb == 25
    assert (one.store.folder, other.store.folder) == (str(tmp_path / "node-0"), str(tmp_path / "node-1"))


def test_replicas_that_ray_spreads_take_what_one_process_takes(stored: Config) -> None:
    found = for_node(stored, ClusterConfig(replicas=4, address="auto"), 0)
    assert found.cache.memory_mb == int(this_machine().memory_bytes * 0.6) // MIB
    assert found.store.disk_mb == 100


def test_what_is_configured_is_that_of_each_replica() -> None:
    config = Config(cache=CacheConfig(memory_mb=700), store=StoreConfig(enabled=True, disk_mb=50))
    found = for_node(config, ClusterConfig(replicas=4), 0)
    assert (found.cache.memory_mb, found.store.disk_mb) == (700, 50)
