"""Engines of one process on one store: what one computes the others read, and nobody opens a file that is open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rcllm.config import StoreConfig
from rcllm.core.ranking import UserId
from rcllm.engine.engine import Engine
from rcllm.engine.tiers import folder_of, open_tiers
from rcllm.errors import StoreError
from rcllm.store.contract import Store
from rcllm.store.disk import DiskStore, SharedDisk
from rcllm.store.tiered import Tiered
from tests.engine import tiny
from tests.engine.test_restart import ASKED, MINE, Trusted, built, sources
from tests.store.disks import key, put, served

pytestmark = pytest.mark.usefixtures("one_compute_thread")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def flushed(engine: Engine) -> None:
    engine.tiers.store.flush()  # type: ignore[attr-defined]


def test_two_engines_share_a_folder(folder: Path) -> None:
    with built(folder) as first, built(folder) as second:
        assert first.tiers.disk is second.tiers.disk
        wanted = first.rank(ASKED).scores
        flushed(first)
        answer = second.rank(ASKED)
        assert answer.scores == wanted
        assert answer.receipt.num_computed == 0
        assert {block.source for block in answer.receipt.blocks if block.num_reused} == {"disk"}


def test_the_last_one_closes_it(folder: Path) -> None:
    first = built(folder)
    second = built(folder)
    first.rank(ASKED)
    first.close()
    assert second.rank(ASKED).receipt.num_computed == 0
    with pytest.raises(StoreError, match="already open in this process"):
        DiskStore.open(folder, 1 << 26)
    second.close()
    with DiskStore.open(folder, 1 << 26) as disk:
        assert disk.stats()[0].num_blocks > 0


def test_whom_one_engine_erases_the_other_does_not_read(folder: Path) -> None:
    with built(folder) as first, built(folder) as second:
        first.rank(MINE)
        flushed(first)
        assert "computed" not in sources(second, MINE)
        assert first.erase_user(UserId("ann")) > 0
        history = [b.source for b in second.rank(MINE).receipt.blocks if b.kind == "history"]
        assert set(history) == {"fresh"}


def history(engine: Engine) -> set[str]:
    """Where the blocks of ann's history come from."""
    return {block.source for block in engine.rank(MINE).receipt.blocks if block.kind == "history"}


def test_whom_another_process_erased_is_not_read_from_host_memory(folder: Path) -> None:
    store = StoreConfig(enabled=True, folder=str(folder), disk_mb=64, host_mb=64)
    with Engine.build(tiny.catalogue(), replace(tiny.config(), store=store)) as engine:
        engine.pool.rates.bytes_of["host"] = Trusted(1e15)
        engine.rank(MINE)
        engine.pool.clear()
        assert history(engine) == {"host"}
        engine.pool.clear()
        flushed(engine)
        assert engine.tiers.disk is not None
        assert engine.tiers.disk.delete_owner("user:ann") > 0
        assert history(engine) == {"fresh"}


@pytest.mark.parametrize("over", [lambda disk: disk, lambda disk: Tiered({"disk": disk}, queue_bytes=1 << 20)])
def test_an_engine_over_a_store_that_was_handed_on_heeds_erasures(
    folder: Path, over: Callable[[DiskStore], Store]
) -> None:
    with DiskStore.open(folder, 1 << 26) as disk:
        store = over(disk)
        with Engine.build(tiny.catalogue(), tiny.config(), store=store) as engine:
            engine.rank(MINE)
            assert history(engine) == {"device"}
            if isinstance(store, Tiered):
                store.flush()  # what is yet to be written is written after an erasure elsewhere, as the docs say
            disk.delete_owner("user:ann")
            assert history(engine) == {"fresh"}
        store.close()


def test_an_open_store_is_handed_on(folder: Path) -> None:
    """In Python, without a configuration: whoever opened it closes it."""
    with DiskStore.open(folder, 1 << 26) as disk:
        for _ in range(2):
            with Engine.build(tiny.catalogue(), tiny.config(), store=disk) as engine:
                engine.rank(ASKED)
        assert disk.stats()[0].num_blocks > 0


def test_what_to_do_is_said_where_a_folder_is_open(folder: Path) -> None:
    with DiskStore.open(folder, 1 << 26), pytest.raises(StoreError, match=r"Engine\.build\(…, store=…\)"):
        DiskStore.open(folder, 1 << 26)


def test_parts_of_one_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = SharedDisk.open(folder, 1 << 26)
    monkeypatch.chdir(folder)
    second = SharedDisk.open(Path("."), 1 << 25)
    assert first.disk is second.disk
    assert first.disk.budget_bytes == 1 << 25, "the last word"
    first.close()
    first.close()
    put(second.disk, range(3))
    assert served(second.disk, range(3)) == {0, 1, 2}
    second.close()
    third = SharedDisk.open(folder, 1 << 26)
    assert third.disk is not second.disk
    third.close()


def test_a_failed_opening_leaves_nothing_behind(folder: Path) -> None:
    folder.write_text("no folder")
    with pytest.raises(StoreError):
        SharedDisk.open(folder, 1 << 26)
    folder.unlink()
    SharedDisk.open(folder, 1 << 26).close()


def test_a_folder_may_be_named_from_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder_of(StoreConfig(folder="~/store")) == tmp_path / "store"
    assert open_tiers(StoreConfig(), "", {}).disk is None
    assert not (tmp_path / "store").exists()


def test_keys_are_removed_and_the_records_agree(folder: Path) -> None:
    with DiskStore.open(folder, 1 << 26) as disk:
        put(disk, range(20), "item:1")
        removed = disk.remove_many(map(key, [*range(5), 99]))
        assert removed.num_blocks == 5
        assert served(disk, range(20)) == set(range(5, 20))
        disk.check()
