"""What a catalogue needed when it was last warmed: blocks of old texts go, those that somebody needs stay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rcllm.engine.warmed import FOLDER, remove_stale
from rcllm.errors import StoreWarning
from rcllm.store.disk import DiskStore
from tests.store.disks import key, put, served


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskStore]:
    with DiskStore.open(tmp_path / "store", 1 << 26) as disk:
        put(disk, range(10))
        yield disk
        disk.check()


def needs(disk: DiskStore, catalogue: str, *numbers: int) -> int:
    return remove_stale(disk, catalogue, [key(number) for number in numbers]).num_blocks


def test_what_was_needed_and_is_not_any_more_goes(disk: DiskStore) -> None:
    assert needs(disk, "items", 0, 1, 2, 3) == 0, "of what lies there, nobody knows whose it is"
    assert needs(disk, "items", 0, 1, 7) == 2
    assert served(disk, range(10)) == {0, 1, 4, 5, 6, 7, 8, 9}
    assert needs(disk, "items", 0, 1, 7) == 0
    assert needs(disk, "items") == 3


def test_catalogues_do_not_know_of_each_other(disk: DiskStore) -> None:
    needs(disk, "films", 0, 1, 2)
    needs(disk, "books", 2, 3)
    assert needs(disk, "films", 0) == 1, "books needs block 2 as well"
    assert served(disk, range(4)) == {0, 2, 3}
    assert needs(disk, "books", 3) == 1, "now nobody needs it"


def test_a_torn_memory_removes_nothing(disk: DiskStore) -> None:
    needs(disk, "items", 0, 1)
    [file] = (disk.folder / FOLDER).iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert needs(disk, "items", 5) == 0
    assert needs(disk, "items", 6) == 1


def test_a_store_that_cannot_be_written_keeps_what_it_has(disk: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(disk, "items", 0, 1)

    def refuse(*given: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr("rcllm.engine.warmed.write", refuse)
    with pytest.warns(StoreWarning, match="stay until they make way"):
        assert needs(disk, "items", 0, 1, 2) == 0


def test_its_files_hold_no_names(disk: DiskStore) -> None:
    needs(disk, "/home/ann/items.jsonl", 0)
    [file] = (disk.folder / FOLDER).iterdir()
    assert file.read_bytes() == key(0)
    assert "ann" not in file.name
