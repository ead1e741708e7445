"""`rcllm pool build`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rcllm.core.ranking import UserId
from rcllm.data import split_of
from tests.cli.conftest import Run, Shop, read_lines, write_lines

FEW = ("--prototypes", "200", "--bits", "6")


def test_build_from_a_data_set(run: Run, shop: Shop, tmp_path: Path) -> None:
    out = tmp_path / "history.pool"
    shown = run("pool", "build", *shop.on_dataset, *FEW, "--out", out)
    assert shown.exit_code == 0, shown.stderr
    training = sum(split_of(UserId(f"u{n}")) == "train" for n in range(60))
    told = re.search(r"items of training users of dataset: ([\d,]+) texts", shown.stdout)
    assert told is not None
    assert int(told[1]) == training - int(training * 0.05)  # the others are held out
    assert re.search(r"prototypes +\d+; they stand for \d+\.\d% of the tokens", shown.stdout)
    assert re.search(r"bytes +\d+\.\d MB; K and V \d+\.\d\d MB a layer, 3 layers, fp16", shown.stdout)
    assert re.search(r"held out +\d+\.\d% of \d+ tokens of \d texts", shown.stdout)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_rank_reads_histories_from_the_pool(run: Run, shop: Shop, tmp_path: Path) -> None:
    out = tmp_path / "history.pool"
    assert run("pool", "build", *shop.on_dataset, *FEW, "--out", out).exit_code == 0
    words = ("rank", *shop.on_dataset, "--in", shop.requests, "--level", "blocks", "--allow-uncalibrated")
    shown = run(*words, "--semantic-pool", out, "--receipts")
    assert shown.exit_code == 0, shown.stderr
    receipts = [line["receipt"] for line in read_lines(shown.stdout)]
    assert all(receipt["history"] == "semantic" for receipt in receipts)
    assert any(block["source"] == "semantic" for receipt in receipts for block in receipt["blocks"])
    missing = run(*words, "--semantic-pool", tmp_path / "nothing")
    assert missing.exit_code == 2
    assert "there is no semantic pool" in missing.stderr


@pytest.mark.parametrize("member_context", ["history", "instruction"])
def test_build_from_reviews(run: Run, shop: Shop, tmp_path: Path, member_context: str) -> None:
    rows = [{"user_id": f"u{n % 3}", "text": f"the lamp is fine {'and bright' if n % 2 else ''}"} for n in range(6)]
    texts = write_lines(tmp_path / "reviews.jsonl", [*rows, {"user_id": "u9"}])
    words = ("--model", shop.model, "--memory-mb", "6000", "--texts", texts, "--member-context", member_context)
    shown = run("pool", "build", *words, *FEW, "--out", tmp_path / "pool")
    assert shown.exit_code == 0, shown.stderr
    assert f"texts of reviews.jsonl: {3 if member_context == 'history' else 6} texts" in shown.stdout
    assert "6 rows read, 1 skipped" in shown.stderr


def test_users_can_be_left_out(run: Run, shop: Shop, tmp_path: Path) -> None:
    texts = write_lines(
        tmp_path / "reviews.jsonl", [{"user_id": user, "text": text} for user, text in (("a", "lamp"), ("b", "chair"))]
    )
    (tmp_path / "gone").write_bytes(b"\xef\xbb\xbfa\r\nz\r\n")
    words = ("--model", shop.model, "--memory-mb", "6000", "--texts", texts, "--exclude-users", tmp_path / "gone")
    shown = run("pool", "build", *words, *FEW, "--out", tmp_path / "pool")
    assert shown.exit_code == 0, shown.stderr
    assert "1 texts" in shown.stdout
    assert "1 of 2 ids of the users to leave out is not in the data: 'z'" in shown.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--threshold", "1.5"), "--threshold"),
        (("--member-context", "nothing"), "history, instruction"),
        (("--fresh-pattern", "("), "--fresh-pattern: '(' is no regular expression"),
        (("--texts", "words.txt", "--reviews"), "--reviews are of a --dataset"),
        (("--bits", "49"), "--bits must be at most 48, got 49"),
        (("--threshold", "0"), "--threshold must be above 0, got 0"),
    ],
)
def test_options_that_cannot_work(run: Run, shop: Shop, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    shown = run("pool", "build", *shop.on_dataset, *words, "--out", tmp_path / "pool")
    assert shown.exit_code == 2
    assert message in shown.stderr
    assert not (tmp_path / "pool").exists()


def test_texts_are_needed(run: Run, shop: Shop, tmp_path: Path) -> None:
    shown = run("pool", "build", *shop.on_items, "--out", tmp_path / "pool")
    assert shown.exit_code == 2
    assert "there are no texts" in shown.stderr


def test_a_user_to_exclude_whom_nobody_knows_is_told(run: Run, shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "gone").write_text("u1\nU1\n", encoding="utf-8")
    words = ("pool", "build", *shop.on_dataset, *FEW, "--exclude-users", tmp_path / "gone")
    shown = run(*words, "--out", tmp_path / "pool")
    assert shown.exit_code == 0, shown.stderr
    assert shown.stderr.count("1 of 2 ids of the users to leave out is not in the data: 'U1'") == 1


def test_a_file_that_is_in_the_way_is_said_before_the_model_is_loaded(run: Run, shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "pool").write_text("mine", encoding="utf-8")
    words = ("--model", tmp_path / "nowhere", "--dataset", shop.dataset, *FEW)
    shown = run("pool", "build", *words, "--out", tmp_path / "pool")
    assert shown.exit_code == 2
    assert "exists and is no pool" in shown.stderr
    assert (tmp_path / "pool").read_text(encoding="utf-8") == "mine"
