"""`rcllm sid build` and `rcllm sid train`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rcllm.sid.model_folder import load_codes
from tests.cli.conftest import Run, Shop, write_lines

NUM_ITEMS = 40
SMALL = ("--hidden-size", "32", "--layers", "1", "--epochs", "2", "--history", "4")


@pytest.fixture(scope="session")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embeddings") / "items.npy"
    np.save(path, np.random.default_rng(0).standard_normal((NUM_ITEMS, 12)).astype(np.float32))
    return path


@pytest.mark.parametrize("name", ["codes.parquet", "shop.index.json"])
def test_build_then_train(run: Run, shop: Shop, embeddings: Path, tmp_path: Path, name: str) -> None:
    words = ("sid", "build", "--dataset", shop.dataset, "--embeddings", embeddings, "--levels", "2", "--size", "8")
    shown = run(*words, "--out", tmp_path / name)
    assert shown.exit_code == 0, shown.stderr
    assert "40 items, such as i0 <a_" in shown.stdout
    assert "none does now" in shown.stdout
    words = ("sid", "train", "--dataset", shop.dataset, "--codes", tmp_path / name, "--out", tmp_path / "model", *SMALL)
    shown = run(*words)
    assert shown.exit_code == 0, shown.stderr
    assert "2 epochs" in shown.stdout
    assert "epoch 1: validation loss" in shown.stderr
    code_index = load_codes(tmp_path / "model")
    assert code_index.num_items == NUM_ITEMS
    assert len(np.unique(code_index.codes, axis=0)) == NUM_ITEMS
    again = run(*words)  # done: nothing is left to train
    assert again.exit_code == 0, again.stderr
    other = run(*words, "--seed", "1")
    assert other.exit_code == 2
    assert "made with other settings" in other.stderr


def test_the_same_options_give_the_same_codes(run: Run, shop: Shop, embeddings: Path, tmp_path: Path) -> None:
    users = shop.dataset / "users.jsonl"
    words = ("sid", "build", "--items", shop.items, "--embeddings", embeddings, "--size", "8")
    for name, more in (("a", ()), ("b", ()), ("c", ("--seed", "1")), ("d", ("--interactions", users))):
        shown = run(*words, *more, "--out", tmp_path / f"{name}.index.json")
        assert shown.exit_code == 0, shown.stderr
        assert ("embeddings alone" in shown.stdout) == (name != "d")
    found = {name: (tmp_path / f"{name}.index.json").read_text(encoding="utf-8") for name in "abcd"}
    assert found["a"] == found["b"]
    assert len(set(found.values())) == 3


def test_interactions_of_one_row_each(run: Run, shop: Shop, embeddings: Path, tmp_path: Path) -> None:
    rows = [
        {"user_id": f"u{n}", "item_id": f"i{(n + step) % NUM_ITEMS}", "timestamp": step}
        for n in range(40)
        for step in range(4)
    ]
    log = write_lines(tmp_path / "log.jsonl", [*rows, {"user_id": "u1", "item_id": "gone", "timestamp": 9}])
    source = ("--items", shop.items, "--interactions", log)
    words = ("--embeddings", embeddings, "--levels", "2", "--size", "8", "--out", tmp_path / "codes.parquet")
    shown = run("sid", "build", *source, *words)
    assert shown.exit_code == 0, shown.stderr
    assert "160 rows read, 1 skipped" in shown.stderr
    words = ("--codes", tmp_path / "codes.parquet", "--out", tmp_path / "model", *SMALL)
    assert run("sid", "train", *source, *words).exit_code == 0


def test_interactions_with_columns_of_other_names(run: Run, shop: Shop, embeddings: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("who;what\n" + "".join(f"u{n % 40};i{n % NUM_ITEMS}\n" for n in range(160)), encoding="utf-8")
    words = ("sid", "build", "--items", shop.items, "--interactions", log, "--embeddings", embeddings, "--levels", "2")
    words = (*words, "--size", "8", "--out", tmp_path / "codes.parquet")
    shown = run(*words)
    assert shown.exit_code == 1
    assert "--user-field" in shown.stderr
    shown = run(*words, "--user-field", "who", "--item-field", "what")
    assert shown.exit_code == 0, shown.stderr
    assert "separated by a semicolon" in shown.stderr
    assert "the order of the rows stands for it" in shown.stderr


def test_what_cannot_be_built(run: Run, shop: Shop, embeddings: Path, tmp_path: Path) -> None:
    def told(*words: object) -> str:
        shown = run("sid", "build", "--levels", "2", "--out", tmp_path / "codes.parquet", *words)
        assert shown.exit_code in (1, 2)
        assert "Traceback" not in shown.stderr
        return shown.stderr

    assert "there are no items" in told()
    assert "said by --id-field: give --items FILE" in told("--dataset", shop.dataset, "--id-field", "code")
    assert "tell 16 items apart, the catalogue has 40" in told("--items", shop.items, "--size", "4")
    np.save(tmp_path / "short.npy", np.zeros((3, 2), np.float32))
    assert "expected floats [40 items, dimensions]" in told(
        "--items", shop.items, "--embeddings", tmp_path / "short.npy"
    )
    (tmp_path / "broken.npy").write_text("no", encoding="utf-8")
    assert "is not a .npy file" in told("--items", shop.items, "--embeddings", tmp_path / "broken.npy")
    assert "no item has text" in told("--items", shop.items, "--field", "colour")
    assert "expected a folder with a sentence encoder" in told("--items", shop.items, "--encoder", tmp_path)
    for words in (("--field", "title"), ("--encoder", tmp_path), ("--max-tokens", "9")):
        assert "read as they are" in told("--items", shop.items, "--embeddings", embeddings, *words)
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    assert "archive of arrays" in told("--items", shop.items, "--embeddings", tmp_path / "two.npz")
    np.save(tmp_path / "whole.npy", np.zeros((NUM_ITEMS, 3), np.int64))
    assert "got int64 [40, 3]" in told("--items", shop.items, "--embeddings", tmp_path / "whole.npy")
    bad = np.zeros((NUM_ITEMS, 3), np.float32)
    bad[3, 1] = np.nan
    np.save(tmp_path / "nan.npy", bad)
    assert "not finite" in told("--items", shop.items, "--embeddings", tmp_path / "nan.npy")
    assert not (tmp_path / "codes.parquet").exists()
    assert "codes.txt" in told("--items", shop.items, "--embeddings", embeddings, "--out", tmp_path / "codes.txt")


def test_what_cannot_be_trained(run: Run, shop: Shop, tmp_path: Path) -> None:
    codes = tmp_path / "few.index.json"
    codes.write_text(json.dumps({f"i{n}": [f"<a_{n % 4}>", f"<b_{n // 4}>"] for n in range(12)}), encoding="utf-8")

    def told(*words: object) -> str:
        shown = run("sid", "train", "--out", tmp_path / "model", *words)
        assert shown.exit_code in (1, 2)
        assert "Traceback" not in shown.stderr
        return shown.stderr

    assert "nothing to learn from" in told("--items", shop.items, "--codes", codes)
    assert "multiple of 32" in told("--dataset", shop.dataset, "--codes", codes, "--hidden-size", "40")
    assert "missing.parquet" in told("--dataset", shop.dataset, "--codes", tmp_path / "missing.parquet")


def test_items_without_codes_are_told_of(run: Run, shop: Shop, tmp_path: Path) -> None:
    codes = tmp_path / "few.index.json"
    codes.write_text(json.dumps({f"i{n}": [f"<a_{n % 6}>", f"<b_{n // 6}>"] for n in range(36)}), encoding="utf-8")
    shown = run("sid", "train", "--dataset", shop.dataset, "--codes", codes, "--out", tmp_path / "model", *SMALL)
    assert shown.exit_code == 0, shown.stderr
    assert "4 of 40 items have no codes, such as 'i36'" in shown.stderr
    assert load_codes(tmp_path / "model").num_items == 36
