"""Folders that are full, read-only, not a store, or of another version: one clear error, or a store that goes on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from rcllm.errors import StoreError, StoreWarning
from rcllm.store.disk import DiskStore
from tests.store.disks import MB, put, run, served


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_drops_blocks_counts_them_and_goes_on(small_disk: Path) -> None:
    with DiskStore.open(small_disk / "store", 100 * MB) as store:
        with pytest.warns(StoreWarning, match="the disk is full"):
            _put_one_by_one(store, 60)
        stats = store.stats()[0]
        assert stats.dropped > 0
        assert 3 * MB < stats.num_bytes <= stats.budget_bytes < 8 * MB
        assert len(served(store, range(60), 400_000)) == stats.num_blocks > 5
        assert 59 in served(store, range(60), 400_000), "new blocks find room, for older ones made way"
        store.check()
    with DiskStore.open(small_disk / "store", 100 * MB) as store:
        assert len(served(store, range(60), 400_000)) > 5
        store.check()


def test_an_owner_is_erased_on_a_full_disk(small_disk: Path) -> None:
    with DiskStore.open(small_disk / "store", 100 * MB) as store:
        with pytest.warns(StoreWarning, match="the disk is full"):
            _put_one_by_one(store, 40)
        _fill(small_disk / "filler")
        held = served(store, range(40), 400_000)
        for user in range(5):
            store.delete_owner(f"user:{user}")
            held -= set(range(user, 40, 5))
            assert served(store, range(40), 400_000) == held
        assert len((small_disk / "store" / "audit.jsonl").read_text().splitlines()) == 5


def _put_one_by_one(store: DiskStore, count: int) -> None:
    """24 times 400 kB are more than the small disk has. Each of five users owns every fifth."""
    for number in range(count):
        put(store, [number], f"user:{number % 5}", 400_000)


def _fill(file: Path) -> None:
    """To the last byte."""
    with file.open("wb", buffering=0) as out:
        for size in (65_536, 4_096, 1):
            try:
                while out.write(b"x" * size):
                    pass
            except OSError:
                continue


READ_ONLY = """
import os, sys, warnings
from rcllm.store.disk import DiskStore
from rcllm.errors import StoreError, StoreWarning
from tests.store.disks import *
os.setuid(65534)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    store = DiskStore.open(sys.argv[1], MB)
assert [each.category for each in said] == [StoreWarning], said
assert served(store, range(5)) == {1, 2}
assert not store.use().writable
for change in (lambda: put(store, [3]), lambda: store.delete_owner("item:a")):
    try:
        change()
    except StoreError as error:
        assert "cannot be written" in str(error)
    else:
        raise AssertionError("it was written")
assert served(store, range(5)) == {1, 2}
store.close()
print("read", store.use().in_place)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who may not write")
@pytest.mark.parametrize("with_lock_file", [True, False])
def test_a_folder_that_cannot_be_written_is_read_with_a_warning(with_lock_file: bool) -> None:
    folder = Path("/tmp") / f"rcllm-read-only-{os.getpid()}-{with_lock_file}"  # pytest's own folders are root's alone
    try:
        with DiskStore.open(folder, MB) as store:
            put(store, [1, 2])
        if not with_lock_file:
            for name in ("lock.mdb", "open.lock"):
                (folder / name).unlink()
        ended = run(READ_ONLY, folder)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.split()[0] == "read"
    finally:
        subprocess.run(["rm", "-r", str(folder)], check=True)


def test_a_folder_that_is_mounted_read_only_is_read(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path / "store", MB) as store:
        put(store, [1, 2])
    place = tmp_path / "mounted"
    place.mkdir()
    if subprocess.run(["mount", "--bind", str(tmp_path / "store"), str(place)], check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True)
        with pytest.warns(StoreWarning, match="cannot be written"):
            store = DiskStore.open(place, MB)
        with store:
            assert served(store, range(5)) == {1, 2}
            with pytest.raises(StoreError, match="cannot be written"):
                put(store, [3])
            assert not store.use().in_place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="there is no store of blocks, and none can be made"):
        DiskStore.open(tmp_path / "file" / "store", MB)


def test_another_version_is_refused(tmp_path: Path) -> None:
    DiskStore.open(tmp_path, MB).close()
    with lmdb.open(str(tmp_path), max_dbs=8) as env, env.begin(write=True) as txn:
        txn.put(b"format", b"7", db=env.open_db(b"facts", txn=txn))
    with pytest.raises(StoreError, match="expected a store of format 1, got '7'"):
        DiskStore.open(tmp_path, MB)


def test_an_lmdb_file_that_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path), max_dbs=8) as env, env.begin(write=True) as txn:
        txn.put(b"name", b"value")
    before = (tmp_path / "data.mdb").read_bytes()
    with pytest.raises(StoreError, match="is no store of rcllm"):
        DiskStore.open(tmp_path, MB)
    assert (tmp_path / "data.mdb").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"x", b"hello" * 5_000, bytes(8_192), bytes(100_000)])
def test_a_file_that_is_no_lmdb_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.mdb").write_bytes(content)
    with pytest.raises(StoreError, match="the file is damaged"):
        DiskStore.open(tmp_path, MB)


def test_a_budget_below_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="expected a budget"):
        DiskStore.open(tmp_path, -1)


LITTLE_SPACE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
from rcllm.store.disk import DiskStore
from tests.store.disks import *
with DiskStore.open(sys.argv[1], MB) as store:
    put(store, range(5))
    assert served(store, range(5)) == set(range(5))
    print(store.use().map_bytes)
"""


def test_a_process_with_little_address_space_gets_a_smaller_map(tmp_path: Path) -> None:
    ended = run(LITTLE_SPACE, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert 1 << 30 <= int(ended.stdout) < 6 << 30


FORK = """
import os, sys, warnings
warnings.simplefilter("ignore")
from rcllm.errors import StoreError, StoreWarning
from rcllm.store.disk import DiskStore
from tests.store.disks import *
store = DiskStore.open(sys.argv[1], MB)
put(store, range(3))
lent = store.get_many([key(1)])
if not (child := os.fork()):
    try:
        store.get_many([key(1)])
    except StoreError as error:
        assert "opens the store for itself" in str(error)
        assert number_of(key(1), lent[key(1)]) == 1
        del lent
        store.close()
        os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert store.use().num_leases == 1
for n in range(30):
    put(store, range(n * 3, n * 3 + 3))
assert number_of(key(1), lent[key(1)]) == 1
store.check()
"""


def test_a_fork_is_refused_and_does_not_end_the_leases_of_its_parent(tmp_path: Path) -> None:
    ended = run(FORK, tmp_path)
    assert ended.returncode == 0, ended.stderr


def test_the_map_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rcllm.store.disk.environment._MAX_MAP_BYTES", 4 * MB)
    with DiskStore.open(tmp_path, 100 * MB) as store:
        with pytest.warns(StoreWarning, match="is full"):
            _put_one_by_one(store, 20)
        assert store.stats()[0].dropped > 0
        assert served(store, range(20), 400_000)
        store.check()
