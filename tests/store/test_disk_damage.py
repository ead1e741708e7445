"""Files whose bits were flipped or whose end was lost: misses and errors of ours, never a wrong block nor a crash.

A child process opens each damaged copy, reads, writes and erases in it, for LMDB may end a process that it runs in.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from rcllm.errors import StoreError
from rcllm.store.disk import DiskStore, pages
from tests.store.disks import MB, put, run

NUM_BLOCKS = 250
TRY = f"""
import json, random, shutil, sys
from pathlib import Path
from rcllm.errors import RcllmError
from rcllm.store.disk import DiskStore
from rcllm.store.sealed import CorruptBlockError, open_sealed
from tests.store.disks import *

whole, folder, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
counts = dict(refused=0, all_served=0, some_served=0, failed_checksum=0, wrong=0, errors=0)
for seed in range(int(sys.argv[4]), int(sys.argv[5])):
    print(seed, file=sys.stderr, flush=True)  # names the culprit, should this process die
    rng = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    data = bytearray((whole / "data.mdb").read_bytes())
    if kind == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "flip in a tree":
        page = rng.choice(json.loads(sys.argv[6]))
        data[page * 4096 + rng.randrange(4096)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[rng.randrange(len(data)):]
    elif kind == "zeroed":
        at = rng.randrange(len(data)) // 4096 * 4096
        data[at : at + 4096] = bytes(4096)
    (folder / "data.mdb").write_bytes(data)
    try:
        store = DiskStore.open(folder, 100 * MB)
    except RcllmError:
        counts["refused"] += 1
        continue
    whole_blocks = 0
    for each, stored in store.get_many([key(n) for n in range({NUM_BLOCKS})]).items():
        try:
            open_sealed(stored.data)
        except CorruptBlockError:
            counts["failed_checksum"] += 1
            continue
        whole_blocks += 1
        counts["wrong"] += stored.data != block(int.from_bytes(each, "big"), 8_000).data
    counts["all_served" if whole_blocks == {NUM_BLOCKS} else "some_served"] += 1
    try:
        put(store, range(0, {NUM_BLOCKS} + 30, 7), "item:new", 8_000)
        store.delete_owner("item:3")
        erased = [n for n in range(3, {NUM_BLOCKS}, 10) if n % 7]
        counts["wrong"] += len(store.get_many(map(key, erased)))
        put(store, range({NUM_BLOCKS}), "item:new", 8_000)
    except RcllmError:
        counts["errors"] += 1
    store.close()
print(json.dumps(counts))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a history: pages that are free, and trees of two levels."""
    folder = tmp_path_factory.mktemp("whole")
    with DiskStore.open(folder, 100 * MB) as store:
        for first in range(0, NUM_BLOCKS, 25):
            for number in range(first, first + 25):
                put(store, [number], f"item:{number % 10}", 8_000)
        put(store, range(1_000, 1_050), "item:gone", 8_000)
        store.delete_owner("item:gone")
        put(store, range(0, NUM_BLOCKS, 5), "item:5", 8_000)
    return folder


def trees(folder: Path) -> list[int]:
    """The pages of trees, of the free list, and the first two."""
    with pages.PageFile(folder / "data.mdb") as file:
        newest = file.snapshots()[0]
        main = pages.walk(file, newest, newest.main)
        found = [0, 1]
        for tree in (newest.free, newest.main, *main.trees):
            walked = pages.walk(file, newest, tree)
            found += [int(page) for run in walked.first[: tree.depth] for page in run]
        return found


def _try(whole: Path, folder: Path, kind: str, first: int, last: int) -> dict[str, int]:
    ended = run(TRY, whole, folder, kind, first, last, json.dumps(trees(whole)))
    assert ended.returncode == 0, f"died of signal {-ended.returncode} at {ended.stderr[-2000:]}"
    counts: dict[str, int] = json.loads(ended.stdout)
    assert counts["wrong"] == 0
    return counts


@pytest.mark.parametrize("kind", ["flip", "flip in a tree", "cut", "zeroed"])
def test_a_damaged_file_serves_no_wrong_block(whole: Path, tmp_path: Path, kind: str) -> None:
    counts = _try(whole, tmp_path / "damaged", kind, 0, 40)
    assert counts["refused"] + counts["some_served"] > 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flip", "flip in a tree", "cut", "zeroed"])
def test_1000_damaged_files_serve_no_wrong_block(whole: Path, tmp_path: Path, kind: str) -> None:
    total: dict[str, int] = {}
    for first in range(1_000, 2_000, 100):
        for name, count in _try(whole, tmp_path / "damaged", kind, first, first + 100).items():
            total[name] = total.get(name, 0) + count
    print(kind, total)
    assert total["refused"] + total["all_served"] + total["some_served"] == 1_000


def test_a_whole_file_passes(whole: Path) -> None:
    pages.check(whole / "data.mdb")


def test_a_file_that_lost_its_end_is_refused_with_words(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes((whole / "data.mdb").read_bytes()[:-300_000])
    with pytest.raises(StoreError, match=r"the file is damaged .* rcllm cache verify --repair"):
        DiskStore.open(tmp_path, MB)


def test_a_file_that_is_cut_while_it_is_read_ends_the_process_and_the_next_one_says_so(tmp_path: Path) -> None:
    """Memory that is mapped from a file ends with the file: the system says so by a signal that nobody can handle."""
    folder = tmp_path / "store"
    ended = run(
        """
import os, sys
from pathlib import Path
from tests.store.disks import *
folder = Path(sys.argv[1])
with DiskStore.open(folder, 100 * MB) as store:
    put(store, range(50))
    found = store.get_many([key(n) for n in range(50)])
    os.truncate(folder / "data.mdb", 16384)
    print(sum(bytes(block.data)[-1] for block in found.values()))
""",
        folder,
    )
    assert ended.returncode == -signal.SIGBUS, ended.stderr
    assert ended.stdout == ""
    with pytest.raises(StoreError, match="verify --repair"):
        DiskStore.open(folder, 100 * MB)
