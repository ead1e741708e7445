"""`rcllm warm` and `rcllm cache` on a tiny model: what one command keeps the next one reads, and its care."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rcllm.cache import rates
from rcllm.config import Config, StoreConfig
from rcllm.drafts.folder import DraftPools
from rcllm.drafts.groups import GroupOptions, Member, Router
from rcllm.drafts.suffix_index import owner_key
from rcllm.engine.tiers import folder_of
from rcllm.store.disk import DiskStore
from tests.cli.conftest import TITLES, Run, Shop, read_lines, write_lines

_ROOT = Path(__file__).resolve().parents[2]
SAID = pytest.mark.filterwarnings("default::rcllm.errors.StoreWarning")
LEVEL = ("--level", "blocks", "--allow-uncalibrated")  # which reads items
NUM_BLOCKS = 2 * len(TITLES) + 1  # each as a candidate and as an event, and the instruction


@pytest.fixture(autouse=True)
def _disk_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of so small a model are sooner computed than read; that decision has tests of its own."""
    monkeypatch.setitem(rates._FIRST_BYTES_PER_S, "disk", 1e15)
    monkeypatch.setattr(rates.Rate, "saw", lambda rate, amount, seconds: None)


@dataclass(frozen=True)
class Kept:
    """A shop whose store is known."""

    run: Run
    shop: Shop
    folder: Path

    def on(self, items: Path | None = None) -> list[object]:
        return ["--model", self.shop.model, "--items", items or self.shop.items, "--memory-mb", 6000]

    def warm(self, *words: object, items: Path | None = None) -> str:
        shown = self.run("warm", *self.on(items), *words)
        assert shown.exit_code == 0, shown.output
        return shown.stdout

    def rank(self, *words: object, items: Path | None = None) -> list[dict[str, Any]]:
        shown = self.run("rank", *self.on(items), "--in", self.shop.requests, "--no-warm", "--receipts", *LEVEL, *words)
        assert shown.exit_code == 0, shown.output
        return read_lines(shown.stdout)

    def cache(self, *words: object, code: int = 0) -> str:
        shown = self.run("cache", *words)
        assert shown.exit_code == code, shown.output
        return shown.output

    def stats(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.run("cache", "stats", "--model", self.shop.model, "--json").stdout)
        return told

    @property
    def num_blocks(self) -> int:
        with DiskStore.open(self.folder, 1 << 30) as disk:
            disk.check()
            return disk.stats()[0].num_blocks


@pytest.fixture
def kept(run: Run, shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    folder = tmp_path / "kept"
    monkeypatch.setenv("RCLLM_STORE_FOLDER", str(folder))
    return Kept(run, shop, folder)


@pytest.fixture
def warmed(kept: Kept) -> Kept:
    kept.warm()
    return kept


def sources(answer: dict[str, Any]) -> set[str]:
    return {block["source"] for block in answer["receipt"]["blocks"] if block["num_reused"]}


def scores(answers: list[dict[str, Any]]) -> list[Any]:
    """Equal where blocks were computed in other company as well."""
    return [pytest.approx(answer["scores"], abs=1e-5) for answer in answers]


def plain(answers: list[dict[str, Any]]) -> list[Any]:
    return [answer["scores"] for answer in answers]


def fact(shown: str, name: str) -> str:
    [line] = re.findall(rf"^{name} {{2,}}(.*?) *$", shown, flags=re.MULTILINE)
    return str(line)


# ---- warm ----


def test_what_was_warmed_is_read_by_the_next_command(warmed: Kept) -> None:
    first, *others = warmed.rank()
    assert first["receipt"]["num_computed"] == 0
    assert sources(first) == {"disk"}
    assert [answer["receipt"]["num_computed"] for answer in others] == [0, 0]
    [without, *_] = warmed.rank("--no-store")
    assert without["receipt"]["num_computed"] > 0
    assert without["scores"] == first["scores"]


def test_warming_again_computes_nothing(warmed: Kept) -> None:
    assert warmed.num_blocks == NUM_BLOCKS
    shown = warmed.warm()
    assert fact(shown, "computed now").startswith("0 tokens")
    assert "80 of 80 blocks of 40 items" in fact(shown, "there now")
    assert str(warmed.folder) in shown


def test_rank_keeps_what_it_computed(kept: Kept) -> None:
    [first, *_] = kept.rank()
    assert first["receipt"]["num_computed"] > 0
    assert kept.rank()[0]["receipt"]["num_computed"] == 0


def test_a_dry_run_keeps_nothing(kept: Kept) -> None:
    shown = kept.warm("--dry-run", "--limit", 3)
    assert "nothing is kept" in shown
    assert not kept.folder.exists()


def test_without_a_store_there_is_nothing_to_warm(kept: Kept) -> None:
    shown = kept.run("warm", *kept.on(), "--no-store")
    assert shown.exit_code == 2
    assert "--dry-run" in shown.stderr


def test_the_most_popular_items_come_first(kept: Kept) -> None:
    shown = kept.run("warm", *kept.shop.on_dataset, "--limit", 5)
    assert shown.exit_code == 0, shown.output
    assert "10 of 10 blocks of 5 items" in fact(shown.stdout, "there now")
    assert kept.num_blocks == 11


def test_a_store_that_is_full_says_what_to_do(kept: Kept) -> None:
    shown = kept.run("warm", *kept.on(), "--disk-mb", 1, "--kv-dtype", "fp32")
    assert shown.exit_code == 0, shown.output
    assert "in disk" in fact(shown.stdout, "room")


def test_an_interrupted_run_goes_on(kept: Kept, tmp_path: Path) -> None:
    """Ctrl-C while it computes: what was computed is there, and the next run computes the rest alone."""
    items = many(tmp_path, 600)
    started = started_on(kept, "warm", *kept.on(items))
    wait_for(lambda: (kept.folder / "data.mdb").exists() and (kept.folder / "data.mdb").stat().st_size > 1 << 20)
    started.send_signal(signal.SIGINT)
    _, error = started.communicate(timeout=60)
    assert started.returncode == 130, error
    num_there = kept.num_blocks
    assert 0 < num_there < 1201
    shown = kept.warm(items=items)
    assert "1,200 of 1,200 blocks" in fact(shown, "there now")
    assert kept.num_blocks == 1201
    whole = number(fact(shown, "tokens"))
    assert 0 < number(fact(shown, "computed now")) < whole


def test_after_a_change_only_what_changed_is_computed_and_what_is_stale_goes(kept: Kept, tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    rows = changed_after(kept, items)
    shown = kept.warm(items=items)
    changed = [row for row in rows if row["item_id"] in ("i3", "new")]
    assert "80 of 80 blocks of 40 items" in fact(shown, "there now")
    assert number(fact(shown, "computed now")) == tokens_of(kept, write_lines(tmp_path / "changed.jsonl", changed))
    assert fact(shown, "removed").startswith("4 blocks"), "of the text that changed, and of the item that is gone"
    assert kept.num_blocks == NUM_BLOCKS
    again = kept.warm(items=items)
    assert "removed" not in again
    assert fact(again, "computed now").startswith("0 tokens")
    assert kept.rank(items=items)[0]["receipt"]["num_computed"] == 0


def test_what_another_catalogue_still_needs_stays(warmed: Kept, tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    changed_after(warmed, items)
    shown = warmed.warm(items=items)
    assert "removed" not in shown, "the file that was warmed first has the old texts"
    assert warmed.num_blocks == NUM_BLOCKS + 4
    assert fact(warmed.warm(), "computed now").startswith("0 tokens")


def test_the_rest_of_a_catalogue_is_not_stale(kept: Kept) -> None:
    kept.warm()
    assert "removed" not in kept.warm("--limit", 2)
    assert kept.num_blocks == NUM_BLOCKS


# ---- where it is, and by whom it is said ----


def test_flags_go_before_variables_and_variables_before_the_file(
    kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "rcllm.toml"
    config.write_text(f'[store]\nfolder = "{tmp_path / "of the file"}"\ndisk_mb = 7\n', encoding="utf-8")
    few = ("--limit", 1, "--config", config)
    assert "7.3 MB in disk" in kept.warm(*few, "--store-folder", tmp_path / "of the flag")
    assert (tmp_path / "of the flag" / "data.mdb").exists()
    assert not kept.folder.exists()
    kept.warm(*few)
    assert kept.folder.exists()
    monkeypatch.delenv("RCLLM_STORE_FOLDER")
    monkeypatch.setenv("RCLLM_STORE_DISK_MB", "9")
    assert "9.4 MB in disk" in kept.warm(*few)
    assert (tmp_path / "of the file" / "data.mdb").exists()
    assert "11.5 MB in disk" in kept.warm(*few, "--disk-mb", 11)


@pytest.mark.parametrize("where", ["file", "variable"])
def test_it_can_be_switched_off_for_good(
    kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    config = tmp_path / "rcllm.toml"
    config.write_text("[store]\nenabled = false\n" if where == "file" else "", encoding="utf-8")
    if where == "variable":
        monkeypatch.setenv("RCLLM_STORE_ENABLED", "false")
    kept.rank("--config", config)
    assert not kept.folder.exists()
    assert kept.run("warm", *kept.on(), "--config", config).exit_code == 2


def test_by_default_it_lies_in_the_home_of_rcllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RCLLM_HOME", str(tmp_path))
    assert folder_of(StoreConfig()) == tmp_path / "store"


def test_no_test_writes_to_the_store_of_whoever_runs_it() -> None:
    monkey = Config.load(None, os.environ).store
    assert Path.home() not in folder_of(monkey).parents


def test_a_key_that_is_unknown_is_refused(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RCLLM_STORE_DISK", "9")
    shown = kept.run("warm", *kept.on())
    assert shown.exit_code == 2
    assert "RCLLM_STORE_DISK_MB" in shown.stderr


# ---- what may be wrong with it ----


@pytest.mark.parametrize(
    "words",
    [["stats"], ["verify"], ["verify", "--repair"], ["compact"], ["erase", "--user", "ann"], ["prune"], ["export"]],
    ids=" ".join,
)
def test_where_there_is_no_store_none_is_made(kept: Kept, tmp_path: Path, words: list[str]) -> None:
    more = ["--to", tmp_path / "out"] if words == ["export"] else []
    shown = kept.cache(*words, *more, code=2)
    assert f"there is no store at {kept.folder}" in shown
    assert not kept.folder.exists()


@SAID
def test_a_file_in_the_place_of_the_folder(kept: Kept) -> None:
    kept.folder.write_text("no folder", encoding="utf-8")
    shown = kept.run("rank", *kept.on(), "--in", kept.shop.requests)
    assert shown.exit_code == 0, shown.output
    [line] = [line for line in shown.stderr.splitlines() if line.startswith("warning: ")]
    assert str(kept.folder) in line
    assert line.endswith("Nothing is kept on disk meanwhile")
    assert kept.folder.read_text(encoding="utf-8") == "no folder"
    assert "there is no store" in kept.cache("stats", code=2)


@SAID
def test_a_folder_that_cannot_be_written_is_read(warmed: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rcllm.store.disk.environment._can_write", lambda file: False)
    shown = warmed.run("rank", *warmed.on(), "--in", warmed.shop.requests, "--no-warm", "--receipts", *LEVEL)
    assert shown.exit_code == 0, shown.output
    assert sources(read_lines(shown.stdout)[0]) == {"disk"}
    assert shown.stderr.count("warning: ") == 1
    assert "its blocks are read" in shown.stderr
    assert "cannot be written" in warmed.cache("erase", "--user", "ann", code=1)
    assert "cannot be written" in warmed.cache("prune", "--unused-days", "0", code=1)
    again = warmed.run("warm", *warmed.on())
    assert again.exit_code == 0, again.output
    assert "all whole" in warmed.cache("verify")


def damage(kept: Kept) -> None:
    """Flips a bit in a block's KV, behind its header."""
    file = kept.folder / "data.mdb"
    data = bytearray(file.read_bytes())
    data[data.rindex(b"rKVb") + 100] ^= 1
    file.write_bytes(data)


def test_a_damaged_block_is_found_repaired_and_computed_again(warmed: Kept) -> None:
    whole = warmed.rank("--no-store")
    damage(warmed)
    shown = warmed.cache("verify", code=1)
    assert f"{NUM_BLOCKS} blocks, 1 of them damaged: damaged: run it with --repair" in shown
    assert scores(warmed.rank()) == plain(whole)
    assert "1 of them damaged: repaired" in warmed.cache("verify", "--repair")
    assert "all whole" in warmed.cache("verify")
    assert "80 of 80" in warmed.warm()
    assert warmed.num_blocks == NUM_BLOCKS


@SAID
@pytest.mark.parametrize("harm", ["cut", "junk", "empty"])
def test_a_file_that_is_no_store_any_more(warmed: Kept, harm: str) -> None:
    """Told once; answers come without it, and `verify --repair` saves what is left."""
    file = warmed.folder / "data.mdb"
    content = file.read_bytes()
    file.write_bytes({"cut": content[: len(content) // 2], "junk": b"junk" * 5000, "empty": b""}[harm])
    shown = warmed.run("rank", *warmed.on(), "--in", warmed.shop.requests)
    assert shown.exit_code == 0, shown.output
    assert "verify --repair" in shown.stderr
    assert "the file is damaged" in warmed.cache("verify", code=1)
    saved = number(warmed.cache("verify", "--repair").split("; ")[1])
    assert (saved > 0) == (harm == "cut")
    assert "all whole" in warmed.cache("verify")
    warmed.warm()
    assert warmed.rank()[0]["receipt"]["num_computed"] == 0


# ---- erase ----


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def rank_as(kept: Kept, tmp_path: Path, user: str, tenant: str = "") -> dict[str, Any]:
    """A ranking whose history is in the user's own words."""
    words = [{"text": f"words that {user} alone has said, number {n}"} for n in range(3)]
    row = {"request_id": "r", "user_id": user, "tenant": tenant, "history": words, "candidates": ["i1", "i2"]}
    asked = write_lines(tmp_path / "asked.jsonl", [{key: value for key, value in row.items() if value}])
    shown = kept.run("rank", *kept.on(), "--in", asked, "--level", "exact", "--receipts")
    assert shown.exit_code == 0, shown.output
    [answer] = read_lines(shown.stdout)
    return answer


def history_sources(answer: dict[str, Any]) -> set[str]:
    return {block["source"] for block in answer["receipt"]["blocks"] if block["kind"] == "history"}


def blocks_in(folder: Path) -> dict[bytes, bytes]:
    """The bytes of each block's KV."""
    with (
        DiskStore.open(folder, 1 << 30) as disk,
        disk._access.reading() as txn,
        txn.cursor(disk._access.opened.dbs.blocks) as cursor,
    ):
        return {bytes(key): bytes(value)[48:] for key, value in cursor}


def test_an_erased_user_is_in_no_file(warmed: Kept, tmp_path: Path) -> None:
    before = blocks_in(warmed.folder)
    rank_as(warmed, tmp_path, "ann-smith")
    rank_as(warmed, tmp_path, "bob-jones")
    theirs = {key: kv for key, kv in blocks_in(warmed.folder).items() if key not in before}
    assert history_sources(rank_as(warmed, tmp_path, "ann-smith")) == {"disk"}
    shown = warmed.cache("erase", "--user", "ann-smith", "--scrub")
    erased = number(re.sub("ann-smith: ", "", shown))
    assert erased >= 3
    assert "MB of the file overwritten" in shown
    left = blocks_in(warmed.folder)
    gone = [kv for key, kv in theirs.items() if key not in left]
    assert len(gone) == erased
    content = everything(warmed.folder)
    parts = {kv[at : at + 64] for kv in gone for at in range(0, len(kv), 64)}
    others = b"".join(left.values())  # blocks that begin with the same words begin with the same KV
    assert not [part for part in parts if part in content and part not in others], "erased bytes are in a file"
    assert b"ann-smith" not in content
    assert b"said" not in content
    assert history_sources(rank_as(warmed, tmp_path, "bob-jones")) == {"disk"}
    assert history_sources(rank_as(warmed, tmp_path, "ann-smith")) == {"fresh"}
    lines = read_lines((warmed.folder / "audit.jsonl").read_text(encoding="utf-8"))
    assert [line["scrubbed"] for line in lines] == [False, True]
    assert "all whole" in warmed.cache("verify")


def test_users_of_tenants_are_erased_apart(warmed: Kept, tmp_path: Path) -> None:
    for tenant in ("east", "west"):
        assert history_sources(rank_as(warmed, tmp_path, "ann", tenant)) == {"fresh"}
    assert "ann: 0 blocks" in warmed.cache("erase", "--user", "ann"), "of no tenant"
    assert "ann: 0 blocks" not in warmed.cache("erase", "--user", "ann", "--tenant", "east")
    assert history_sources(rank_as(warmed, tmp_path, "ann", "east")) == {"fresh"}
    assert history_sources(rank_as(warmed, tmp_path, "ann", "west")) == {"disk"}


def test_a_user_and_an_item_of_one_name_are_both_erased(warmed: Kept) -> None:
    shown = warmed.cache("erase", "--user", "i5", "--item", "i5")
    assert shown.splitlines() == ["user i5: 0 blocks removed", "item i5: 2 blocks removed"]


@pytest.mark.parametrize("off", ["variable", "option"])
def test_what_is_erased_lies_where_it_is_said_though_stores_are_off(
    warmed: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off: str
) -> None:
    (tmp_path / "another").mkdir()
    monkeypatch.setenv("RCLLM_STORE_FOLDER", str(tmp_path / "another"))
    if off == "variable":
        monkeypatch.setenv("RCLLM_STORE_ENABLED", "false")
    words = ["--no-store"] if off == "option" else []
    assert "i5: 2 blocks removed" in warmed.cache("erase", "--item", "i5", "--store-folder", warmed.folder, *words)


def test_an_erased_item_is_computed_again(warmed: Kept) -> None:
    assert "i5: 2 blocks removed" in warmed.cache("erase", "--item", "i5", "--item", "nobody")
    assert warmed.num_blocks == NUM_BLOCKS - 2
    computed = [block["owner"] for block in warmed.rank()[0]["receipt"]["blocks"] if block["source"] == "computed"]
    assert computed == ["i5"]


def test_users_are_taken_out_of_draft_pools(warmed: Kept, tmp_path: Path) -> None:
    folder = tmp_path / "drafts"
    pools = DraftPools.create(Router(GroupOptions()), "tiny")
    for user, tokens in (("ann", [7, 8, 9, 10]), ("bob", [11, 12, 13, 14])):
        pools.learn(Member("user", user), tokens)
    pools.save(folder)
    assert f"{folder}: written again" in warmed.cache("erase", "--user", "ann", "--drafts", folder)
    pools = DraftPools.open(folder, "tiny")
    assert {answer.owner for answer in pools.pool("user-0").answers()} == {owner_key("bob")}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --user ID or --item ID"),
        (["--item", "i1", "--tenant", "east"], "items belong to nobody"),
        (["--user", "ann", "--drafts", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_erased(warmed: Kept, words: list[str], said: str) -> None:
    shown = warmed.run("cache", "erase", *words)
    assert shown.exit_code != 0
    assert said in shown.output
    assert warmed.num_blocks == NUM_BLOCKS


# ---- stats and prune ----


def test_stats_tell_what_is_there_and_what_belongs_to_nobody(warmed: Kept) -> None:
    told = warmed.stats()
    assert told["folder"] == str(warmed.folder)
    assert told["tier"]["num_blocks"] == NUM_BLOCKS
    assert told["spaces"][told["current"]]["num_blocks"] == NUM_BLOCKS
    assert "disk" in told["rates"]
    shown = warmed.cache("stats", "--model", warmed.shop.model, "--kv-dtype", "int8")
    assert re.search(rf"of no current model +{NUM_BLOCKS} blocks", shown)
    assert "(current)" not in shown
    assert "(current)" in warmed.cache("stats", "--model", warmed.shop.model)


def test_prune_keeps_the_configuration_that_it_is_given(warmed: Kept) -> None:
    warmed.warm("--kv-dtype", "fp32")
    assert warmed.num_blocks == 2 * NUM_BLOCKS
    assert f"{NUM_BLOCKS} blocks" in warmed.cache("prune", "--model", warmed.shop.model)
    assert warmed.num_blocks == NUM_BLOCKS
    assert warmed.rank()[0]["receipt"]["num_computed"] == 0


def test_prune_refuses_to_remove_everything(warmed: Kept) -> None:
    shown = warmed.cache("prune", "--model", warmed.shop.model, "--template", "titles", code=2)
    assert "all would go" in shown.replace("\n", " ")
    assert warmed.num_blocks == NUM_BLOCKS


def test_prune_by_age(warmed: Kept) -> None:
    assert "0 blocks" in warmed.cache("prune", "--unused-days", "1")
    assert f"{NUM_BLOCKS} blocks" in warmed.cache("prune", "--unused-days", "0")
    assert warmed.num_blocks == 0
    before = (warmed.folder / "data.mdb").stat().st_size
    assert "MB before" in warmed.cache("compact")
    assert (warmed.folder / "data.mdb").stat().st_size < before


def test_compact_waits_for_nobody(warmed: Kept) -> None:
    with DiskStore.open(warmed.folder, 1 << 30):
        assert "a process has this store open; stop it first" in warmed.cache("compact", code=1)


# ---- export and import ----


def test_a_warmed_store_is_taken_to_another_machine(warmed: Kept, tmp_path: Path) -> None:
    export = tmp_path / "export"
    assert f"{NUM_BLOCKS} blocks" in warmed.cache("export", "--to", export)
    assert json.loads((export / "manifest.json").read_text(encoding="utf-8"))["blocks"] == NUM_BLOCKS
    there = tmp_path / "there"
    shown = warmed.cache("import", "--from", export, "--store-folder", there)
    assert shown.startswith(f"{NUM_BLOCKS} blocks taken, 0 were there")
    assert warmed.rank("--store-folder", there)[0]["receipt"]["num_computed"] == 0
    again = warmed.cache("import", "--from", export, "--store-folder", there)
    assert again.startswith(f"0 blocks taken, {NUM_BLOCKS} were there")


def test_an_export_never_overwrites(warmed: Kept, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert "is there already" in warmed.cache("export", "--to", tmp_path / "mine", code=2)
    assert not list((tmp_path / "mine").iterdir())


@pytest.mark.parametrize("junk", ["nothing", "a folder", "a store", "another file"])
def test_junk_is_not_imported(warmed: Kept, tmp_path: Path, junk: str) -> None:
    source = tmp_path / "junk"
    if junk == "a folder":
        source.mkdir()
    elif junk == "a store":
        source = warmed.folder
    elif junk == "another file":
        warmed.cache("export", "--to", source)
        (source / "data.mdb").write_bytes((source / "data.mdb").read_bytes()[:-4096])
    target = tmp_path / "target"
    shown = warmed.cache("import", "--from", source, "--store-folder", target, code=1)
    assert "copy it again" in shown if junk == "another file" else "expected an export of a store" in shown


def test_who_was_erased_here_does_not_come_back(warmed: Kept, tmp_path: Path) -> None:
    rank_as(warmed, tmp_path, "ann")
    export = tmp_path / "export"
    warmed.cache("export", "--to", export)
    warmed.cache("erase", "--user", "ann")
    assert ", 0 left out" not in warmed.cache("import", "--from", export).split("since their")[0]
    assert history_sources(rank_as(warmed, tmp_path, "ann")) == {"fresh"}


# ---- several processes ----


def test_rank_while_another_process_warms(kept: Kept, tmp_path: Path) -> None:
    items = many(tmp_path, 400)
    asked = write_lines(
        tmp_path / "asked.jsonl", [{"request_id": f"r{n}", "candidates": [f"m{n}", f"m{399 - n}"]} for n in range(20)]
    )
    words = ["rank", *kept.on(items), "--in", asked, *LEVEL]
    without = read_lines(kept.run(*words, "--no-store").stdout)
    warming = started_on(kept, "warm", *kept.on(items))
    wait_for(lambda: (kept.folder / "data.mdb").exists())
    shown = kept.run(*words)
    assert shown.exit_code == 0, shown.output
    assert scores(read_lines(shown.stdout)) == plain(without)
    _, error = warming.communicate(timeout=60)
    assert warming.returncode == 0, error
    assert fact(kept.warm(items=items), "computed now").startswith("0 tokens")
    assert kept.num_blocks >= 801


# ---- what they share ----


def many(tmp_path: Path, count: int) -> Path:
    return write_lines(
        tmp_path / "many.jsonl", [{"item_id": f"m{n}", "title": f"{TITLES[n % 40]} {n}"} for n in range(count)]
    )


def changed_after(kept: Kept, items: Path) -> list[dict[str, Any]]:
    """Warms a copy of the catalogue at `items`, then changes a text and a hidden field, drops an item and adds one."""
    rows = read_lines(kept.shop.items.read_text(encoding="utf-8"))
    kept.warm(items=write_lines(items, rows))
    rows[3]["title"] = "a rug of quite another colour"
    rows[9]["price"] = 77
    del rows[7]
    rows.append({"item_id": "new", "title": "a new thing"})
    write_lines(items, rows)
    return rows


def tokens_of(kept: Kept, items: Path) -> int:
    """Of all blocks of a catalogue."""
    return number(fact(kept.warm("--dry-run", items=items), "tokens"))


def started_on(kept: Kept, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "rcllm.cli.app", *map(str, words)],
        cwd=_ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )


def wait_for(condition: Any) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def number(text: str) -> int:
    [first, *_] = re.findall(r"[\d,]+", text)
    return int(first.replace(",", ""))
