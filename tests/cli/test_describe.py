"""`rcllm describe`, from the command line: files in and out, kills, refusals, the dry run."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.cli.conftest import Run, Shop, read_lines, write_lines

_ROOT = Path(__file__).resolve().parents[2]
FEW = ("--max-tokens", "12", "--batch", "4", "--threads", "1")


@pytest.fixture
def users(tmp_path: Path) -> Path:
    rows = [
        {"user_id": f"u{n}", "history": [f"i{(n * 7 + step) % 40}" for step in range(1 + n % 5)]} for n in range(24)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "users.parquet")
    return tmp_path / "users.parquet"


def _words(shop: Shop, rows: Path, out: Path, *more: Any) -> list[str]:
    return [str(word) for word in ("describe", rows, "--out", out, *shop.on_items, *FEW, *more)]


def _rows(path: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(path).drop(["described_at"]).to_pylist())


def _texts(path: Path) -> list[tuple[Any, ...]]:
    """What does not depend on how much was drafted."""
    return [(row["row"], row["user_id"], row["text"], row["num_tokens"], row["seed"]) for row in _rows(path)]


def test_users_in_parquet(run: Run, shop: Shop, users: Path, tmp_path: Path) -> None:
    out = tmp_path / "knowledge.parquet"
    shown = run(*_words(shop, users, out, "--price-per-hour", "2"))
    assert shown.exit_code == 0, shown.stderr
    rows = _rows(out)
    assert [row["user_id"] for row in rows] == [f"u{n}" for n in range(24)]
    assert {row["template"][:17] for row in rows} == {"describe_user v1 "}
    assert all(0 < row["num_tokens"] <= 12 for row in rows)
    assert re.search(r"users +24 *\n", shown.stdout)
    assert re.search(r"a million rows +\d+ hours of this machine, [\d,.]+ at 2.0 an hour", shown.stdout)


def test_speculation_changes_no_text(run: Run, shop: Shop, users: Path, tmp_path: Path) -> None:
    modes = {"a": ("--speculate", "none"), "b": ("--groups", "2"), "c": ("--no-share-text",)}
    for name, mode in modes.items():
        shown = run(*_words(shop, users, tmp_path / f"{name}.parquet", *mode))
        assert shown.exit_code == 0, shown.stderr
    first, second, third = (_texts(tmp_path / f"{name}.parquet") for name in modes)
    assert first == second == third


@pytest.mark.slow  # tests/describe/test_job.py dies at every step, but in one process
def test_a_job_killed_again_and_again_ends_as_one_that_never_was(
    run: Run, shop: Shop, users: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole.parquet", tmp_path / "out.parquet"
    often = ("--checkpoint-every", "2")
    assert run(*_words(shop, users, whole, *often)).exit_code == 0
    done: list[int] = []
    for parts in (1, 4, 7):
        words = _words(shop, users, out, *often)
        process = subprocess.Popen(
            [sys.executable, "-m", "rcllm.cli.app", *words],
            cwd=_ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        work = out.with_name("out.parquet.work")
        until = time.monotonic() + 120
        while len(list(work.glob("part-*.parquet"))) < parts and process.poll() is None and time.monotonic() < until:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        _, error = process.communicate()
        assert process.returncode == -signal.SIGKILL, error.decode()
        done.append(len(list(work.glob("part-*.parquet"))))
        assert not out.exists()
    assert 1 <= done[0] <= done[1] <= done[2] < 12
    shown = run(*_words(shop, users, out, *often))
    assert shown.exit_code == 0, shown.stderr
    assert re.search(rf"users +24, {2 * done[2]} of them in earlier runs", shown.stdout)
    assert _texts(out) == _texts(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "users.parquet", "whole.parquet"]


def test_other_settings_are_refused(run: Run, shop: Shop, users: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    assert run(*_words(shop, users, out)).exit_code == 0
    again = run(*_words(shop, users, out))
    assert again.exit_code == 0, again.stderr
    other = run(*_words(shop, users, out, "--seed", "3"))
    assert other.exit_code == 2
    assert "seed was 0, is 3" in other.stderr


def test_items_relaxed_with_pools(run: Run, shop: Shop, tmp_path: Path) -> None:
    out, pools = tmp_path / "out.parquet", tmp_path / "pools"
    words = ("describe", shop.items, "--out", out, "--kind", "item", "--model", shop.model, "--memory-mb", "6000", *FEW)
    shown = run(*words, "--speculate", "relaxed", "--k", "2", "--p", "0", "--pools", pools, "--limit", "9")
    assert shown.exit_code == 0, shown.stderr
    rows = _rows(out)
    assert [row["item_id"] for row in rows] == [f"i{n}" for n in range(9)]
    assert {row["speculation"] for row in rows} == {"relaxed(2, 0.0)"}
    assert f"{sum(row['num_divergences'] for row in rows)} accepted tokens that plain decoding" in shown.stdout
    assert (pools / "manifest.json").exists()


def test_bad_rows_are_kept_apart(run: Run, shop: Shop, tmp_path: Path) -> None:
    rows = [{"user_id": "u1", "history": ["i1", "gone"]}, {"user_id": "u2", "history": ["gone"]}, {"history": ["i1"]}]
    users, out = write_lines(tmp_path / "users.jsonl", rows), tmp_path / "out.parquet"
    shown = run(*_words(shop, users, out))
    assert shown.exit_code == 0, shown.stderr
    assert "2 rows could not be described" in shown.stderr
    assert [(row["user_id"], row["num_unknown"]) for row in _rows(out)] == [("u1", 1)]
    rejects = read_lines((tmp_path / "out.rejects.jsonl").read_text(encoding="utf-8"))
    assert [(each["row"], each["name"]) for each in rejects] == [(2, "u2"), (3, None)]
    strict = run(*_words(shop, users, tmp_path / "strict.parquet", "--strict"))
    assert strict.exit_code == 1
    assert "row 2: none of the 1 items" in strict.stderr


def test_users_in_csv_are_those_of_jsonl(run: Run, shop: Shop, tmp_path: Path) -> None:
    rows = [{"user_id": f"ü{n}", "history": [f"i{n}", f"i{n + 3}"]} for n in range(4)]
    write_lines(tmp_path / "users.jsonl", rows)
    cells = ['["i0", "i3"]', "['i1', 'i4']", "i2|i5", "i3 | i6"]
    with (tmp_path / "users.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["user_id", "history"], *([f"ü{n}", cell] for n, cell in enumerate(cells))])
    for name in ("jsonl", "csv"):
        shown = run(*_words(shop, tmp_path / f"users.{name}", tmp_path / f"{name}.parquet"))
        assert shown.exit_code == 0, shown.stderr
    ours, theirs = ([row[1:] for row in _texts(tmp_path / f"{name}.parquet")] for name in ("csv", "jsonl"))
    assert len(ours) == 4
    assert ours == theirs


def test_a_user_in_several_rows_is_described_once_and_told_of(run: Run, shop: Shop, tmp_path: Path) -> None:
    rows = [{"user_id": f"u{n % 3}", "history": [f"i{n}"]} for n in range(7)]
    whole = [{"user_id": f"u{n}", "history": [f"i{at}" for at in range(n, 7, 3)]} for n in range(3)]
    for name, users in (("parts", rows), ("whole", whole)):
        write_lines(tmp_path / f"{name}.jsonl", users)
        shown = run(*_words(shop, tmp_path / f"{name}.jsonl", tmp_path / f"{name}.parquet"))
        assert shown.exit_code == 0, shown.stderr
        assert (
            ("3 users stand in several rows" in shown.stderr)
            == ("(4 rows joined)" in shown.stderr)
            == (name == "parts")
        )
    ours, theirs = (_texts(tmp_path / f"{name}.parquet") for name in ("parts", "whole"))
    assert [row[1:] for row in ours] == [row[1:] for row in theirs]


def test_rejects_are_told_with_reasons_and_how_many_more(run: Run, shop: Shop, tmp_path: Path) -> None:
    rows = [{"user_id": f"u{n}", "history": ["i1" if n == 5 else "gone"]} for n in range(13)]
    users = write_lines(tmp_path / "users.jsonl", rows)
    for again in (False, True):
        shown = run(*_words(shop, users, tmp_path / "out.parquet"))
        assert shown.exit_code == 0, shown.stderr
        assert "12 rows could not be described; all of them are in" in shown.stderr
        assert "row 3: none of the 1 items of the history is in the catalogue" in shown.stderr
        assert "row 4:" not in shown.stderr
        assert "… and 9 more" in shown.stderr, again
    dry = run(*_words(shop, users, tmp_path / "other.parquet", "--dry-run"))
    assert re.search(r"first bad row +1: none of .* … and 11 more", dry.stdout)


def test_a_catalogue_that_changed_is_another_job(run: Run, shop: Shop, users: Path, tmp_path: Path) -> None:
    data = tmp_path / "shop"
    shutil.copytree(shop.dataset, data)
    words = ("describe", users, "--out", tmp_path / "out.parquet", "--model", shop.model, "--memory-mb", "6000", *FEW)
    assert run(*words, "--dataset", data).exit_code == 0
    items = (data / "items.jsonl").read_text(encoding="utf-8")
    (data / "items.jsonl").write_text(items.replace("lamp number 3", "lamp number 33"), encoding="utf-8")
    shown = run(*words, "--dataset", data)
    assert shown.exit_code == 2
    assert "was begun with other settings: catalogue was" in shown.stderr


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl", "out"])
def test_what_is_written_is_parquet_and_is_named_so(
    run: Run, shop: Shop, users: Path, tmp_path: Path, name: str
) -> None:
    shown = run(*_words(shop, users, tmp_path / name))
    assert shown.exit_code == 2
    assert "expected --out to be named .parquet" in shown.stderr
    (tmp_path / "folder.parquet").mkdir()
    shown = run(*_words(shop, users, tmp_path / "folder.parquet"))
    assert shown.exit_code == 2
    assert "is a folder: expected the name of a file" in shown.stderr


def test_rows_that_are_no_parquet(run: Run, shop: Shop, users: Path, tmp_path: Path) -> None:
    content = users.read_bytes()
    for broken in (b"", b"junk", content[: len(content) // 2], content[:-9]):
        (tmp_path / "broken.parquet").write_bytes(broken)
        shown = run(*_words(shop, tmp_path / "broken.parquet", tmp_path / "out.parquet"))
        assert shown.exit_code == 1, broken
        assert "broken.parquet" in shown.stderr
        assert isinstance(shown.exception, SystemExit)


def test_a_dry_run_writes_nothing(run: Run, shop: Shop, users: Path, tmp_path: Path) -> None:
    shown = run(*_words(shop, users, tmp_path / "new" / "out.parquet", "--dry-run", "--price-per-hour", "1"))
    assert shown.exit_code == 0, shown.stderr
    assert re.search(r"rows +24 to describe, 0 that cannot be used", shown.stdout)
    assert re.search(r"prompt tokens +[\d,]+ *\n", shown.stdout)
    assert re.search(r"measured +8 answers", shown.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["users.parquet"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--kind", "shop"), "--kind must be one of user, item, got 'shop'"),
        (("--speculate", "wild"), "--speculate must be one of strict, relaxed, none, got 'wild'"),
        (("--template", "shopping"), "is for rankings"),
        (("--kind", "item"), "leave out --items"),
        (("--speculate", "relaxed", "--temperature", "1"), "is for greedy decoding"),
        (("--k", "5"), "--k and --p are for --speculate relaxed, got --speculate strict"),
        (("--speculate", "none", "--p", "0.5"), "--k and --p are for --speculate relaxed, got --speculate none"),
        (("--speculate", "none", "--groups", "3"), "leave them out with --speculate none"),
        (("--kind", "item", "--groups", "3"), "--groups puts users together"),
        (("--max-tokens", "0"), "--max-tokens must be at least 1, got 0"),
        (("--limit", "0"), "--limit must be at least 1, got 0"),
        (("--stop", ""), "--stop must be a text of at least 1 characters"),
    ],
)
def test_what_cannot_be_is_said(
    run: Run, shop: Shop, users: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    shown = run(*_words(shop, users, tmp_path / "out.parquet", *words))
    assert shown.exit_code == 2
    assert message in shown.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["users.parquet"]


def test_files_that_are_not_there(run: Run, shop: Shop, users: Path, tmp_path: Path) -> None:
    shown = run(*_words(shop, users, users / "out.parquet"))
    assert shown.exit_code == 1
    assert "cannot be written" in shown.stderr
    missing = run(*_words(shop, tmp_path / "nobody.parquet", tmp_path / "out.parquet"))
    assert missing.exit_code == 1
    assert "no such file" in missing.stderr


def test_a_limit_is_raised_and_the_job_goes_on(run: Run, shop: Shop, users: Path, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.parquet", tmp_path / "part.parquet"
    assert run(*_words(shop, users, whole)).exit_code == 0
    assert run(*_words(shop, users, part, "--limit", "5")).exit_code == 0
    assert [row["user_id"] for row in _rows(part)] == [f"u{n}" for n in range(5)]
    other = run(*_words(shop, users, part))
    assert other.exit_code == 2, "a finished file of another job is not replaced"
    assert "limit" in other.stderr
    assert _texts(part) == _texts(whole)[:5]


def test_the_dry_run_names_the_first_row_that_cannot_be_used(run: Run, shop: Shop, tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", [{"user_id": "a", "history": ["i1"]}, {"history": ["i1"]}, {"x": 1}])
    shown = run(*_words(shop, rows, tmp_path / "out.parquet", "--dry-run"))
    assert shown.exit_code == 0, shown.stderr
    assert re.search(r"rows +1 to describe, 2 that cannot be used", shown.stdout)
    assert re.search(r"first bad row +\d: .*… and 1 more", shown.stdout)


@pytest.mark.filterwarnings("ignore")
def test_several_processes_write_what_one_writes(run: Run, shop: Shop, users: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'rcllm[cluster]'")
    one, several = tmp_path / "one.parquet", tmp_path / "several.parquet"
    assert run(*_words(shop, users, one)).exit_code == 0
    shown = run(*_words(shop, users, several, "--cluster", "local:2", "--checkpoint-every", "5"))
    assert shown.exit_code == 0, shown.stderr
    assert _texts(several) == _texts(one)


@pytest.mark.parametrize(
    ("words", "told"),
    [(("--pools", "drafts"), "each of a cluster drafts from its own answers"), (("--dry-run",), "leave out --cluster")],
)
def test_what_several_processes_cannot_do(
    run: Run, shop: Shop, users: Path, tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'rcllm[cluster]'")
    shown = run(*_words(shop, users, tmp_path / "out.parquet", "--cluster", "local:2", *words))
    assert shown.exit_code == 2
    assert told in shown.stderr
