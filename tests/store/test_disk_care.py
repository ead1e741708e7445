"""The care of a folder: spaces, checks and repairs, erased bytes, packing, and journeys to another machine."""

from __future__ import annotations

import json
import random
from pathlib import Path

import lmdb
import pytest

from rcllm.errors import StoreError
from rcllm.store.disk import (
    DiskStore,
    Imported,
    check_export,
    compact,
    repair,
)
from rcllm.store.disk.audit import NAME, erased_owners
from rcllm.store.disk.pages import OVERFLOW, PAGE_HEADER, DamagedFileError
from rcllm.store.owners import digest
from tests.killed import run_killed
from tests.store.disks import MB, block, key, put, served, start


def everything(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file())


# ---- spaces ----


def test_spaces_tell_what_they_are_and_what_they_have(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path, MB, clock=lambda: 50.0) as store:
        store.name_space("m1", {"model": "smol"})
        store.put_many({key(n): block(n, space="m1" if n < 3 else "m2") for n in range(5)})
        spaces = store.spaces()
        assert spaces["m1"].about == {"model": "smol"}
        assert {name: (space.num_blocks, space.num_bytes) for name, space in spaces.items()} == {
            "m1": (3, 3 * 20_048),
            "m2": (2, 2 * 20_048),
        }
        assert spaces["m2"].used == 50.0


def test_prune_removes_the_blocks_of_other_spaces(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path, MB) as store:
        store.put_many({key(n): block(n, space=f"m{n % 3}") for n in range(12)})
        removed = store.prune(["m1", "never seen"])
        assert (removed.num_blocks, removed.num_bytes) == (8, 8 * 20_048)
        assert served(store, range(12)) == set(range(1, 12, 3))
        assert set(store.spaces()) == {"m1"}
        store.check()


# ---- verify ----


def damage(folder: Path, number: int, at: int, value: bytes = b"!") -> None:
    """Within the bytes of a block."""
    data = bytearray((folder / "data.mdb").read_bytes())
    where = data.index(bytes(block(number).data))
    data[where + at : where + at + len(value)] = value
    (folder / "data.mdb").write_bytes(data)


def test_a_whole_store_is_whole(tmp_path: Path) -> None:
    told = []
    with DiskStore.open(tmp_path, 100 * MB) as store:
        put(store, range(300), "item:1")
        verified = store.verify(repair=True, on_progress=lambda done, of: told.append((done, of)))
    assert verified.is_whole
    assert not verified.repaired
    assert (verified.num_blocks, verified.num_bytes) == (300, 300 * 20_048)
    assert told == [(200, 300), (300, 300)]


@pytest.mark.parametrize("at", [0, 30, 60, 15_000])
def test_a_damaged_block_is_found_and_dropped(tmp_path: Path, at: int) -> None:
    with DiskStore.open(tmp_path, MB) as store:
        put(store, range(9), "item:1")
    damage(tmp_path, 4, at)
    with DiskStore.open(tmp_path, MB) as store:
        assert store.verify(repair=False).num_damaged == 1
        assert store.verify(repair=True).repaired
        assert store.verify(repair=False).is_whole
        assert served(store, range(9)) == set(range(9)) - {4}
        assert store.stats()[0].num_blocks == 8
        assert store.spaces()[""].num_blocks == 8
        store.check()


def test_the_first_page_of_a_block_is_put_right_where_lmdb_would_trust_it(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path, MB) as store:
        put(store, range(9))
    damage(tmp_path, 4, -4, (200).to_bytes(4, "little"))  # how many pages it has, behind which its bytes begin
    with DiskStore.open(tmp_path, MB) as store:
        with pytest.raises(StoreError, match="a page of a block is damaged"):
            put(store, [4])
        store.verify(repair=True)
        put(store, range(9))
        assert served(store, range(9)) == set(range(9))
        store.check()


@pytest.mark.parametrize("broken", ["state", "order", "owners", "entries", "spaces"])
def test_records_that_do_not_agree_are_rebuilt(tmp_path: Path, broken: str) -> None:
    with DiskStore.open(tmp_path, MB) as store:
        put(store, range(9), "user:ann")
        store.delete_owner("user:bob")
    with lmdb.open(str(tmp_path), max_dbs=8) as env, env.begin(write=True) as txn:
        facts, database = (env.open_db(name.encode(), txn=txn) for name in ("facts", broken.replace("state", "facts")))
        if broken == "state":
            txn.put(b"state", b"nonsense", db=facts)
        elif broken == "spaces":
            txn.put(b"/", b"{nonsense", db=database)
        else:
            with txn.cursor(database) as cursor:
                for _ in range(3):
                    cursor.first()
                    cursor.delete()
    with DiskStore.open(tmp_path, MB) as store:
        expected = 6 if broken in ("owners", "entries") else 9
        assert len(served(store, range(9))) == expected, "an owner must find whatever is served"
        if broken == "state":
            with pytest.raises(StoreError, match="totals are damaged"):
                store.stats()
        store.verify(repair=True)
        store.check()
        assert store.spaces()[""].num_blocks == store.stats()[0].num_blocks
        assert len(served(store, range(9))) == (6 if broken == "entries" else 9)
        assert store.erased_since(0).now == 1
        assert store.delete_owner("user:ann") == (6 if broken == "entries" else 9)


# ---- a file that LMDB could not read ----


def break_trees(folder: Path) -> None:
    """Zeroes the pages of the branches and a third of the leaves."""
    data = bytearray((folder / "data.mdb").read_bytes())
    rng = random.Random(1)
    for place in range(2 * 4096, len(data), 4096):
        flags = PAGE_HEADER.unpack_from(data, place)[1]
        if flags & ~OVERFLOW in (1, 2) and (flags == 1 or rng.random() < 0.33):
            data[place : place + 4096] = bytes(4096)
    (folder / "data.mdb").write_bytes(data)


def test_blocks_are_saved_from_a_file_whose_trees_are_broken(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path, 100 * MB) as store:
        put(store, range(300), "item:1", 2_400)
        put(store, range(300, 330), "user:ann", 2_400)
        store.delete_owner("user:ann")
    break_trees(tmp_path)
    with pytest.raises(DamagedFileError, match="the file is damaged"):
        DiskStore.open(tmp_path, MB)
    repaired = repair(tmp_path)
    assert repaired.num_saved is not None
    assert repaired.verified.is_whole
    with DiskStore.open(tmp_path, 100 * MB) as store:
        found = served(store, range(330), 2_400)
        assert len(found) == repaired.num_saved > 100
        assert not found & set(range(300, 330)), "what was erased does not come back from a free page"
        assert store.delete_owner("item:1") == len(found)
    assert not list(tmp_path.glob(".*"))


def test_a_file_with_nothing_to_save_becomes_an_empty_store(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(random.Random(1).randbytes(100_000))
    assert repair(tmp_path).num_saved == 0
    with DiskStore.open(tmp_path, MB) as store:
        assert store.stats()[0].num_blocks == 0


# ---- scrub ----


@pytest.mark.parametrize("num_bytes", [100, 2_400, 50_000])
def test_no_byte_of_an_erased_block_is_left_after_a_scrub(tmp_path: Path, num_bytes: int) -> None:
    with DiskStore.open(tmp_path, 100 * MB) as store:
        put(store, range(100), "user:ann", num_bytes)
        put(store, range(100, 120), "user:bob", num_bytes)
        put(store, range(0, 100, 2), "user:ann", num_bytes)  # once more: an older copy lies in free pages
        pieces = [bytes(block(n, num_bytes).data[-64:]) for n in range(100)]
        assert all(piece in everything(tmp_path) for piece in pieces)
        store.delete_owner("user:ann")
        assert any(piece in everything(tmp_path) for piece in pieces), "LMDB leaves them in free pages"
        scrubbed = store.scrub()
        assert scrubbed.num_pages > 100
        left = everything(tmp_path)
        assert not any(piece in left for piece in pieces)
        assert served(store, range(120), num_bytes) == set(range(100, 120))
        put(store, range(200, 300), "user:cy", num_bytes)
        left = everything(tmp_path)
        assert not any(piece in left for piece in pieces), "and none comes back from memory"
        store.check()
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(line["number"], line["scrubbed"]) for line in lines] == [(1, False), (1, True)]
    with DiskStore.open(tmp_path, 100 * MB) as store:
        assert served(store, range(300), num_bytes) == set(range(100, 120)) | set(range(200, 300))


def test_a_scrub_reaches_what_a_killed_process_wrote_behind_the_last_page(tmp_path: Path) -> None:
    """A regression: pages that no transaction counts, for the one that wrote them did not end, were passed over."""
    with DiskStore.open(tmp_path, 100 * MB) as store:
        put(store, range(3), "user:ann")
    with (tmp_path / "data.mdb").open("ab") as file:
        file.write(b"my own words" * 10_000)
    with DiskStore.open(tmp_path, 100 * MB) as store:
        store.scrub()
        assert b"my own words" not in everything(tmp_path)
        assert served(store, range(3)) == {0, 1, 2}
        put(store, range(3, 20))
        store.check()


def test_a_scrub_waits_for_those_who_read_what_was_erased(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path, 100 * MB) as store:
        put(store, range(3), "user:ann")
        lent = store.get_many([key(1)])
        store.delete_owner("user:ann")
        with pytest.raises(StoreError, match="are in use"):
            store.scrub()
        assert lent[key(1)].data == block(1).data
        del lent
        store.scrub()


# ---- compact ----


def test_a_packed_file_is_smaller_and_has_the_same_blocks(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path, 100 * MB) as store:
        put(store, range(200), "user:ann")
        put(store, range(200, 210), "user:bob")
        store.delete_owner("user:ann")
    packed = compact(tmp_path)
    assert packed.bytes_after < 1 * MB < 3 * MB < packed.bytes_before
    assert bytes(block(5).data) not in everything(tmp_path)
    with DiskStore.open(tmp_path, 100 * MB) as store:
        assert served(store, range(210)) == set(range(200, 210))
        assert store.erased_since(0).owners == {digest("user:ann")}
        store.check()


def test_a_store_that_is_open_is_not_packed(tmp_path: Path) -> None:
    hold = "import sys\nfrom tests.store.disks import *\nstore = DiskStore.open(sys.argv[1], MB)\n"
    holder = start(hold + "print('holds', flush=True)\ninput()", tmp_path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "holds\n"
    with pytest.raises(StoreError, match="a process has this store open"):
        compact(tmp_path)
    holder.kill()
    holder.communicate()
    compact(tmp_path)


# ---- to another machine ----


def test_an_export_is_imported_elsewhere(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path / "a", 100 * MB) as store:
        store.name_space("m1", {"model": "smol"})
        store.put_many({key(n): block(n, owner=f"item:{n}", cost=1.0 + n, space="m1") for n in range(30)})
        store.delete_owner("item:7")
        manifest = store.export_to(tmp_path / "out")
    assert (manifest.blocks, manifest.bytes, manifest.spaces) == (29, 29 * 20_048, {"m1": {"model": "smol"}})
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["data.mdb", "manifest.json"]
    with DiskStore.open(tmp_path / "b", 100 * MB) as store:
        put(store, [3])
        assert store.import_from(tmp_path / "out") == Imported(num_taken=28, num_there=1)
        assert served(store, range(30)) == set(range(30)) - {7}
        assert store.spaces()["m1"].about == {"model": "smol"}
        assert store.get_many([key(5)])[key(5)].cost == 6.0
        assert store.delete_owner("item:5") == 1
        assert store.import_from(tmp_path / "out") == Imported(num_there=28, num_erased=1)
        store.check()


def test_what_was_erased_here_since_does_not_come_back_with_an_import(tmp_path: Path) -> None:
    now = [100.0]
    with DiskStore.open(tmp_path / "a", MB, clock=lambda: now[0]) as store:
        put(store, range(5), "user:ann")
        store.export_to(tmp_path / "out")
        now[0] = 200.0
        store.delete_owner("user:ann")
        assert store.import_from(tmp_path / "out") == Imported(num_erased=5)
        assert served(store, range(5)) == set()


@pytest.mark.parametrize("lost", ["too long ago", "saved from a broken file"])
def test_whom_the_file_no_longer_remembers_an_import_leaves_out_as_well(
    tmp_path: Path, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A regression: the erasures that a file remembers were all that an import looked at."""
    monkeypatch.setattr("rcllm.store.disk.edit.MAX_ERASURES", 2)
    now = [100.0]
    with DiskStore.open(tmp_path / "a", 100 * MB, clock=lambda: now[0]) as store:
        put(store, range(300), "item:1", 2_400)
        put(store, range(300, 305), "user:ann", 2_400)
        now[0] = 200.0001
        store.export_to(tmp_path / "out")
        now[0] = 200.0002  # which is 200.000 in the audit
        store.delete_owner("user:ann")
        for number in range(3 if lost == "too long ago" else 0):
            store.delete_owner(f"user:{number}")
    if lost != "too long ago":
        break_trees(tmp_path / "a")
        repair(tmp_path / "a")
    with DiskStore.open(tmp_path / "a", 100 * MB) as store:
        assert digest("user:ann") not in store.erased_since(0).owners
        assert store.import_from(tmp_path / "out").num_erased == 5
        assert served(store, range(300, 305), 2_400) == set()


def test_a_line_of_the_audit_that_was_cut_short_hides_no_other(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path, MB) as store:
        store.delete_owner("user:ann")
        lines = (tmp_path / NAME).read_text()
        (tmp_path / NAME).write_text(lines + lines[:30])
        store.delete_owner("user:bob")
    with (tmp_path / NAME).open("a") as file:
        file.write(lines[:40])
    assert [each.owner for each in erased_owners(tmp_path)] == [digest("user:ann"), digest("user:bob")]


def test_an_export_opens_as_a_store(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path / "a", 100 * MB) as store:
        put(store, range(30))
        store.export_to(tmp_path / "out")
    with DiskStore.open(tmp_path / "out", 100 * MB) as store:
        assert served(store, range(30)) == set(range(30))


def test_an_import_into_a_smaller_budget_keeps_what_costs_most(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path / "a", 100 * MB) as store:
        store.put_many({key(n): block(n, cost=float(1 + n * 7 % 30)) for n in range(30)})
        store.export_to(tmp_path / "out")
    with DiskStore.open(tmp_path / "b", 10 * 20_048) as store:
        store.import_from(tmp_path / "out")
        assert served(store, range(30)) == {n for n in range(30) if 1 + n * 7 % 30 > 20}


@pytest.mark.parametrize("harm", ["cut", "flip", "no manifest", "another format"])
def test_an_export_that_is_not_whole_is_refused(tmp_path: Path, harm: str) -> None:
    with DiskStore.open(tmp_path / "a", 100 * MB) as store:
        put(store, range(30))
        store.export_to(tmp_path / "out")
    file, manifest = tmp_path / "out" / "data.mdb", tmp_path / "out" / "manifest.json"
    data = bytearray(file.read_bytes())
    if harm == "cut":
        file.write_bytes(data[:-1])
    elif harm == "flip":
        data[200_000] ^= 1
        file.write_bytes(data)
    elif harm == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 9'))
    with DiskStore.open(tmp_path / "b", 100 * MB) as store:
        with pytest.raises(StoreError, match="export"):
            store.import_from(tmp_path / "out")
        assert store.stats()[0].num_blocks == 0
    with pytest.raises(StoreError, match="export"):
        check_export(tmp_path / "out")


def test_an_import_that_is_killed_leaves_whole_blocks_and_goes_on(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path / "a", 100 * MB) as store:
        put(store, range(30))
        store.export_to(tmp_path / "out")
    run_killed(f"""
from pathlib import Path
from rcllm.store.disk import DiskStore, travel
travel._BATCH_BYTES = 100_000
store = DiskStore.open({str(tmp_path / "b")!r}, 1 << 30)
store.put_many = die_at(3, store.put_many)
store.import_from(Path({str(tmp_path / "out")!r}))
""")
    with DiskStore.open(tmp_path / "b", 100 * MB) as store:
        first = served(store, range(30))
        assert 0 < len(first) < 30
        store.check()
        assert store.import_from(tmp_path / "out") == Imported(num_taken=30 - len(first), num_there=len(first))
        assert served(store, range(30)) == set(range(30))


def test_an_export_that_is_killed_has_no_name(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path / "a", 100 * MB) as store:
        put(store, range(30))
    run_killed(f"""
from pathlib import Path
from rcllm.store.disk import DiskStore, travel
travel.json.dumps = die_at(1, travel.json.dumps)
DiskStore.open({str(tmp_path / "a")!r}, 1 << 30).export_to(Path({str(tmp_path / "out")!r}))
""")
    assert not (tmp_path / "out").exists()
    with DiskStore.open(tmp_path / "a", 100 * MB) as store:
        assert store.export_to(tmp_path / "out").blocks == 30
    check_export(tmp_path / "out")
