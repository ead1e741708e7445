"""The check of pages that LMDB trusts, against files of LMDB's own making and against hand-made harm."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import lmdb
import pytest
from lmdb import verify

from rcllm.store.disk import pages


@pytest.fixture(params=[0, 1, 40, 5_000])
def file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A file with two trees, some of whose values lie in pages of their own, after changes and removals."""
    rng = random.Random(request.param)
    with lmdb.open(str(tmp_path), max_dbs=4, map_size=1 << 28, sync=False) as env:
        trees = [env.open_db(name) for name in (b"one", b"two")]
        for round_ in range(3):
            with env.begin(write=True) as txn:
                for number in range(request.param):
                    if rng.random() < 0.7:
                        txn.put(
                            number.to_bytes(32, "big"), rng.randbytes(rng.choice([9, 100, 3_000])), db=trees[round_ % 2]
                        )
                    else:
                        txn.delete(number.to_bytes(32, "big"), db=trees[round_ % 2])
    return tmp_path / "data.mdb"


def test_what_lmdb_writes_passes_as_its_own_verifier_finds(file: Path) -> None:
    assert verify.verify(str(file)) == []
    pages.check(file)


def test_the_unused_pages_are_those_of_the_free_list(file: Path) -> None:
    with pages.PageFile(file) as opened:
        newest = opened.snapshots()[0]
        listed = {int(page) for run in pages.walk(opened, newest, newest.free).free for page in run}
        unused = set(pages.unused(opened).tolist())
    assert unused <= listed, "what neither transaction reads is free"


HARM = {
    "the number of a page": (0, "<Q", 99),
    "the kind of a page": (10, "<H", 4),
    "a page that is being changed": (10, "<H", 0x12),
    "where free room begins": (12, "<H", 15),
    "where free room ends": (14, "<H", 4_095),
    "where a node is": (16, "<H", 4_094),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_page_that_lmdb_would_trip_over_is_found(tmp_path: Path, harm: str) -> None:
    with lmdb.open(str(tmp_path), max_dbs=4) as env:
        tree = env.open_db(b"one")
        with env.begin(write=True) as txn:
            for number in range(10):
                txn.put(bytes([number]) * 32, b"value", db=tree)
    file = tmp_path / "data.mdb"
    with pages.PageFile(file) as opened:
        newest = opened.snapshots()[0]
        page = pages.walk(opened, newest, newest.main).trees[0].root
    place, form, value = HARM[harm]
    data = bytearray(file.read_bytes())
    struct.pack_into(form, data, page * 4096 + place, value)
    file.write_bytes(data)
    with pytest.raises(pages.DamagedFileError, match="the file is damaged"):
        pages.check(file)


def test_two_keys_in_the_wrong_order_are_found(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path), max_dbs=4) as env:
        tree = env.open_db(b"one")
        with env.begin(write=True) as txn:
            for number in range(10):
                txn.put(bytes([number + 65]) * 32, b"value", db=tree)
    file = tmp_path / "data.mdb"
    file.write_bytes(file.read_bytes().replace(b"C" * 32, b"Z" * 32))
    with pytest.raises(pages.DamagedFileError, match="keys that do not rise"):
        pages.check(file)
