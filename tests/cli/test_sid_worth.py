"""`rcllm sid`: what it says of codes and models that are no good."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from rcllm.codes.sid_files import read_codes
from tests.cli.conftest import Run, Shop, write_lines

NUM_ITEMS = 200
QUICK = ("--hidden-size", "32", "--layers", "1", "--history", "6")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users who walk through the catalogue: item-kNN finds the next one, popularity does not."""
    folder = tmp_path_factory.mktemp("walks")
    write_lines(folder / "items.jsonl", [{"item_id": f"i{n}", "title": f"thing {n}"} for n in range(NUM_ITEMS)])
    users = [
        {"user_id": f"ü{user}", "items": [f"i{(user * 7 + step) % NUM_ITEMS}" for step in range(6)]}
        for user in range(150)
    ]
    write_lines(folder / "users.jsonl", users)
    angle = 2 * np.pi * np.arange(NUM_ITEMS) / NUM_ITEMS
    np.save(folder / "circle.npy", np.stack([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32))
    return folder


def _build(run: Run, source: Path, out: Path, *more: object) -> tuple[str, str]:
    words = ("sid", "build", "--items", source / "items.jsonl", "--embeddings", source / "circle.npy", "--out", out)
    shown = run(*words, *more)
    assert shown.exit_code == 0, shown.stderr
    return shown.stdout, shown.stderr


def test_a_small_catalogue_gets_small_codes_that_items_share(run: Run, source: Path, tmp_path: Path) -> None:
    told, warned = _build(run, source, tmp_path / "codes.parquet")
    assert not warned
    found = read_codes(tmp_path / "codes.parquet")
    assert found.codes.max() < 32
    used = len(np.unique(found.codes[:, 0]))
    assert re.search(rf"a +{used} / 32 +{NUM_ITEMS / used:.1f} ", told)
    alike = re.search(r"same first code have cosine (\S+), two items at random (\S+); (\S+) items share one", told)
    assert alike is not None
    assert float(alike[1]) > 0.95 > 0.05 > abs(float(alike[2]))
    assert float(alike[3]) == pytest.approx(NUM_ITEMS / used, abs=0.05)


def test_a_size_that_shares_nothing_is_told(run: Run, source: Path, tmp_path: Path) -> None:
    told, warned = _build(run, source, tmp_path / "codes.parquet", "--size", "256")
    assert "256 codes at the first level for 200 items: hardly two items share one (1.0 on average)" in warned
    assert "Leave out --size" in warned
    assert "no two items share their first code" in told


def test_a_model_is_held_against_what_costs_nothing(run: Run, source: Path, tmp_path: Path) -> None:
    users = ("--interactions", source / "users.jsonl")
    _build(run, source, tmp_path / "codes.parquet", *users)
    words = ("--items", source / "items.jsonl", *users, "--codes", tmp_path / "codes.parquet")
    shown = run("sid", "train", *words, "--out", tmp_path / "model", *QUICK, "--epochs", "1")
    assert shown.exit_code == 0, shown.stderr
    rows = {
        name: float(ndcg)
        for name, ndcg in re.findall(
            r"(the model|its decoder alone|item-kNN|popularity|a guess) +\d\.\d+ +(\d\.\d+)", shown.stdout
        )
    }
    assert list(rows) == ["the model", "its decoder alone", "item-kNN", "popularity", "a guess"]
    assert rows["item-kNN"] > 0.3 > rows["popularity"]
    assert rows["its decoder alone"] < rows["item-kNN"] <= rows["the model"]  # of one epoch
    assert re.search(r"item-kNN has [1-9]0% of the scores, by validation users", shown.stderr)


def test_a_model_that_loses_is_told_what_to_try(run: Run, source: Path, tmp_path: Path) -> None:
    """Where users choose at random, nothing is to be learnt."""
    rng, users = np.random.default_rng(0), tmp_path / "users.jsonl"
    rows = [{"user_id": f"u{n}", "items": [f"i{i}" for i in rng.permutation(NUM_ITEMS)[:6]]} for n in range(120)]
    write_lines(users, rows)
    _build(run, source, tmp_path / "codes.parquet", "--interactions", users)
    words = ("--items", source / "items.jsonl", "--interactions", users, "--codes", tmp_path / "codes.parquet")
    shown = run("sid", "train", *words, "--out", tmp_path / "model", *QUICK, "--epochs", "1")
    assert shown.exit_code == 0, shown.stderr
    assert re.search(
        r"warning: the model is no better than (a guess|popularity|item-kNN) on held-out users", shown.stderr
    )
    assert "Try more users (it learnt from " in shown.stderr
    assert "more --epochs" in shown.stderr


def test_folders_and_files_that_are_in_the_way(run: Run, shop: Shop, source: Path, tmp_path: Path) -> None:
    codes = tmp_path / "codes.index.json"
    codes.write_text(json.dumps({f"i{n}": [f"<a_{n % 8}>", f"<b_{n // 8}>"] for n in range(40)}), encoding="utf-8")
    words = ("sid", "train", "--dataset", shop.dataset, "--codes", codes, *QUICK, "--epochs", "1", "--out")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    shown = run(*words, tmp_path / "file")
    assert (shown.exit_code, "is a file: expected the name of a folder" in shown.stderr) == (2, True)
    other = run(*words, shop.model)
    assert (other.exit_code, "of something else, which training would replace" in other.stderr) == (2, True)
    words = ("sid", "build", "--items", source / "items.jsonl", "--embeddings", source / "circle.npy", "--out")
    (tmp_path / "folder.parquet").mkdir()
    shown = run(*words, tmp_path / "folder.parquet")
    assert (shown.exit_code, "is a folder: expected the name of a file" in shown.stderr) == (2, True)
    shown = run(*words, tmp_path / "file" / "codes.parquet")
    assert (shown.exit_code, "cannot be written" in shown.stderr) == (1, True)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"item_id": "i1", "codes": [0, 1]}, {"item_id": "i1", "codes": [0, 2]}], "got item 'i1' twice"),
        ([{"item_id": "i1", "codes": [0, -1]}], "expected codes from 0"),
        ([{"item_id": "i1", "codes": [0, 99_999_999]}], "expected codes from 0"),
        ([{"item_id": "i1", "codes": [0, 1]}, {"item_id": "i2", "codes": [0]}], "2 codes as the first item has"),
        ([{"item_id": "i1", "codes": [0.5, 1]}], "expected a whole number as a code"),
        ([{"item_id": "i1", "codes": "<b_1><a_0>"}], "a token for each level in order"),
        ([{"title": "no id"}], "expected a column item_id"),
    ],
)
def test_codes_that_cannot_be_are_named(
    run: Run, shop: Shop, tmp_path: Path, rows: list[dict[str, object]], message: str
) -> None:
    codes = write_lines(tmp_path / "codes.jsonl", rows)
    shown = run("sid", "train", "--dataset", shop.dataset, "--codes", codes, "--out", tmp_path / "model", *QUICK)
    assert shown.exit_code == 1
    assert message in shown.stderr.replace("\n", " ")
