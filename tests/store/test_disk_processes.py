"""The disk tier among processes: killed at any point, two that write, many that read beside one that writes."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from rcllm.errors import StoreError, StoreWarning
from rcllm.store.disk import DiskStore
from rcllm.store.owners import digest
from tests.store.disks import MB, key, number_of, put, run, served, start

NUM_KEYS = 60
BUDGET = 40 * 20_048
CHURN = f"""
import random, sys
from rcllm.store.disk import DiskStore
from tests.store.disks import *
rng = random.Random(int(sys.argv[2]))
store = DiskStore.open(sys.argv[1], {BUDGET})
print("begins", flush=True)
while True:
    numbers = [rng.randrange({NUM_KEYS}) for _ in range(rng.randrange(1, 8))]
    put(store, numbers, f"user:{{rng.randrange(5)}}")
    served(store, [rng.randrange({NUM_KEYS}) for _ in range(5)])
    if rng.random() < 0.1:
        store.delete_owner(f"user:{{rng.randrange(5)}}")
    if rng.random() < 0.02:
        store.close()
        store = DiskStore.open(sys.argv[1], {BUDGET})
"""


def _kill_at_a_random_point(folder: Path, seed: int) -> int:
    """How many blocks are served afterwards, each of them whole."""
    churn = start(CHURN, folder, seed)
    assert churn.stdout is not None
    assert churn.stdout.readline() == "begins\n", churn.communicate()
    time.sleep(random.Random(seed).uniform(0.0, 0.25))
    churn.send_signal(signal.SIGKILL)
    _, said = churn.communicate()
    assert churn.returncode == -signal.SIGKILL, said
    with DiskStore.open(folder, BUDGET) as store:
        store.check()
        found = served(store, range(NUM_KEYS))
        assert len(found) == store.stats()[0].num_blocks
        assert store.stats()[0].num_bytes <= BUDGET
        assert store.stats()[0].errors == 0
    return len(found)


@pytest.mark.parametrize("seed", range(8))
def test_a_process_that_is_killed_leaves_whole_blocks(tmp_path: Path, seed: int) -> None:
    _kill_at_a_random_point(tmp_path, seed)


@pytest.mark.slow
def test_200_processes_that_are_killed_in_one_folder_leave_whole_blocks(tmp_path: Path) -> None:
    """0 wrong blocks of all that are served; the file stays within a few times its content."""
    counts = [_kill_at_a_random_point(tmp_path, 1_000 + seed) for seed in range(200)]
    assert sum(count > 0 for count in counts) > 150
    assert (tmp_path / "data.mdb").stat().st_size < 5 * BUDGET


WRITE = """
import sys
from rcllm.store.disk import DiskStore
from tests.store.disks import *
first = int(sys.argv[2])
with DiskStore.open(sys.argv[1], 100 * MB) as store:
    for n in range(first, 2000, 2):
        put(store, [n], f"item:{n}", 4_000)
    assert served(store, range(first, 2000, 2), 4_000) == set(range(first, 2000, 2))
"""


def test_two_processes_write_at_once_and_neither_loses_a_block(tmp_path: Path) -> None:
    writers = [start(WRITE, tmp_path, first) for first in (0, 1)]
    for writer in writers:
        _, said = writer.communicate(timeout=120)
        assert writer.returncode == 0, said
    with DiskStore.open(tmp_path, 100 * MB) as store:
        assert store.stats()[0].num_blocks == 2_000
        assert served(store, range(2_000), 4_000) == set(range(2_000))
        store.check()


READ = f"""
import sys, time
from rcllm.store.disk import DiskStore
from tests.store.disks import *
seen = 0
with DiskStore.open(sys.argv[1], {BUDGET}) as store:
    print("begins", flush=True)
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        seen += len(served(store, range({NUM_KEYS})))
print(seen)
"""


def test_many_processes_read_while_one_writes(tmp_path: Path) -> None:
    """Each read compares every byte, and blocks are replaced, evicted and erased all the while."""
    with DiskStore.open(tmp_path, BUDGET) as store:
        put(store, range(NUM_KEYS))
    readers = [start(READ, tmp_path) for _ in range(3)]
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "begins\n"
    churn = start(CHURN, tmp_path, 1)
    for reader in readers:
        told, said = reader.communicate(timeout=60)
        assert reader.returncode == 0, said
        assert int(told) > 100
    assert churn.poll() is None, churn.communicate()
    churn.kill()
    churn.communicate()


def test_an_erasure_by_one_process_is_known_to_the_others(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path, MB) as store:
        put(store, range(4), "user:ann")
        before = store.erased_since(0).now
        erase = "import sys; from rcllm.store.disk import *\nDiskStore.open(sys.argv[1], 10).delete_owner('user:ann')"
        ended = run(erase, tmp_path)
        assert ended.returncode == 0, ended.stderr
        assert store.erased_since(before).owners == {digest("user:ann")}
        assert served(store, range(4)) == set()


def test_one_process_opens_a_store_once(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path, MB), pytest.raises(StoreError, match="already open"):
        DiskStore.open(tmp_path, MB)


def test_a_reader_that_was_killed_holds_no_pages(tmp_path: Path) -> None:
    """Its transaction stays in the lock file. Left there, nothing that is freed could be used again."""
    hold = "import sys\nfrom tests.store.disks import *\nstore = DiskStore.open(sys.argv[1], 100 * MB)\n"
    hold += "lent = store.get_many([key(1)])\nprint('holds', flush=True)\ninput()"
    with DiskStore.open(tmp_path, 2 * MB) as store:
        put(store, [1], num_bytes=200_000)
        reader = start(hold, tmp_path)
        assert reader.stdout is not None
        assert reader.stdout.readline() == "holds\n"
        reader.kill()
        reader.communicate()
        for number in range(100):
            put(store, [number], num_bytes=200_000)
        assert store.use().file_bytes < 8 * MB


@pytest.mark.parametrize("mode", ["one", "random"])
def test_the_file_stays_bounded_under_churn(tmp_path: Path, mode: str) -> None:
    rng = random.Random(3)
    with DiskStore.open(tmp_path, 4 * MB) as store:
        for number in range(400):
            put(store, [number], num_bytes=200_000 if mode == "one" else 4 * rng.randrange(1_000, 100_000))
        assert store.stats()[0].num_bytes > 3 * MB
        assert store.use().file_bytes < 12 * MB


def test_a_lease_does_not_let_the_file_grow_without_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are dropped, with a warning, until whoever holds an old one lets it go."""
    monkeypatch.setattr("rcllm.store.disk.store._GROWTH_BYTES", 4 * MB)
    with DiskStore.open(tmp_path, 4 * MB) as store:
        put(store, [0], num_bytes=200_000)
        lent = store.get_many([key(0)])
        with pytest.warns(StoreWarning, match="outgrown its budget"):
            _put_one_by_one(store, 1, 150)
        held = store.use().file_bytes
        assert held < 13 * MB
        assert store.stats()[0].dropped > 50
        assert number_of(key(0), lent[key(0)], 200_000) == 0
        del lent
        _put_one_by_one(store, 150, 170)
        assert store.use().file_bytes <= held
        assert 169 in served(store, range(150, 170), 200_000)
        store.check()


def _put_one_by_one(store: DiskStore, first: int, last: int) -> None:
    for number in range(first, last):
        put(store, [number], num_bytes=200_000)


def test_a_lease_lets_the_file_grow_and_its_end_lets_pages_be_used_again(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path, 4 * MB) as store:
        for number in range(40):
            put(store, [number], num_bytes=200_000)
        before = store.use().file_bytes
        lent = store.get_many([key(39)])
        for number in range(40, 100):
            put(store, [number], num_bytes=200_000)
        held = store.use().file_bytes
        assert held > before + 10 * MB, "every page that was freed under the lease is kept for it"
        del lent
        for number in range(100, 160):
            put(store, [number], num_bytes=200_000)
        assert store.use().file_bytes == held
