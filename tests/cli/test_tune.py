"""`rcllm tune`: it learns, goes on, refuses what cannot be, and `rank` uses what it made."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Run, Shop, read_lines, write_lines

FEW = ("--losses", "32", "--evaluate-every", "16", "--rank", "2", "--candidates", "4", "--history", "3")


@pytest.mark.parametrize("mask", ["causal", "blocks"])
def test_tune_then_rank(run: Run, shop: Shop, tmp_path: Path, mask: str) -> None:
    words = ("tune", "--model", shop.model, "--dataset", shop.dataset, "--out", tmp_path, "--mask", mask, *FEW)
    shown = run(*words, "--validation-requests", "3")
    assert shown.exit_code == 0, shown.stderr
    assert f"{tmp_path}/best" in shown.stdout.replace("\n", "")
    record = json.loads((tmp_path / "best" / "rcllm.json").read_text(encoding="utf-8"))
    template = {"causal": "titles", "blocks": "echo"}[mask]
    assert (record["mask"], record["template"], record["datasets"]) == (mask, template, ["dataset"])
    again = run(*words, "--validation-requests", "3")  # nothing is left to do
    assert again.exit_code == 0, again.stderr
    ranking = ("rank", *shop.on_dataset, "--adapter", tmp_path / "best", "--template", template)
    answered = run(*ranking, "--readout", "pointwise", "--in", shop.requests, "--receipts")
    assert answered.exit_code == 0, answered.stderr
    levels = {line["receipt"]["level"] for line in read_lines(answered.stdout)}
    assert levels == {"exact" if mask == "causal" else "blocks"}, "auto is what is exact under the adapter's mask"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mask", "sideways"), "mask must be one of causal, blocks"),
        (("--readout", "likelihood"), "likelihood needs no tuning"),
        (("--negatives", "nice"), "--negatives must be one of uniform, popularity, retrieved, got 'nice'"),
        (("--minutes", "0"), "above 0"),
        (("--validation-requests", "0"), "--validation-requests must be at least 1, got 0"),
        (("--start", "nowhere"), "nowhere"),
        (("--candidates", "1"), "--candidates must be at least 2, got 1"),
        (("--rank", "0"), "--rank must be at least 1, got 0"),
        (("--format", "tape"), "tape"),
        (("--template", "describe_user"), "describe_user"),
        (("--dataset", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_tuned_is_said(
    run: Run, shop: Shop, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    shown = run("tune", "--model", shop.model, "--dataset", shop.dataset, "--out", tmp_path, *words)
    assert shown.exit_code in (1, 2)
    assert message in shown.stderr
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_is_not_there_is_said(run: Run, shop: Shop, tmp_path: Path) -> None:
    shown = run("rank", *shop.on_items, "--adapter", tmp_path, "--in", shop.requests)
    assert shown.exit_code == 1
    assert "expected the folder of a LoRA adapter" in shown.stderr


def test_it_goes_on_with_the_same_options_and_with_no_others(run: Run, shop: Shop, tmp_path: Path) -> None:
    words = ("tune", "--model", shop.model, "--dataset", shop.dataset, "--out", tmp_path, *FEW)
    words = (*words, "--validation-requests", "3")
    assert run(*words).exit_code == 0
    before = (tmp_path / "best" / "adapter_model.safetensors").read_bytes()
    for other in (("--seed", "1"), ("--learning-rate", "0.01"), ("--mask", "blocks"), ("--template", "echo")):
        shown = run(*words, *other)
        assert shown.exit_code == 2
        assert "made with other settings" in shown.stderr
        assert "Traceback" not in shown.stderr
    assert (tmp_path / "best" / "adapter_model.safetensors").read_bytes() == before


def test_two_data_sets_are_learnt_from_together(run: Run, shop: Shop, tmp_path: Path) -> None:
    other = tmp_path / "films"
    shutil.copytree(shop.dataset, other)
    words = ("tune", "--model", shop.model, "--dataset", shop.dataset, "--dataset", other, "--out", tmp_path / "out")
    shown = run(*words, *FEW, "--validation-requests", "3")
    assert shown.exit_code == 0, shown.stderr
    record = json.loads((tmp_path / "out" / "best" / "rcllm.json").read_text(encoding="utf-8"))
    assert record["datasets"] == ["dataset", "films"]
    assert re.search(r"trained +32 losses", shown.stdout)
    assert shown.stderr.count("validation loss") >= 2, "each validation is told as it is done"


def test_a_log_of_requests_tells_what_it_leaves_out(run: Run, shop: Shop, tmp_path: Path) -> None:
    asked = [
        {"request_id": f"r{n}", "user_id": f"u{n}", "history": ["i1"], "candidates": ["i5", "i30"], "positive": "i5"}
        for n in range(60)
    ]
    for row in asked[::2]:
        row["positive"] = "i7"
    log = write_lines(tmp_path / "log.jsonl", asked)
    words = ("tune", "--model", shop.model, "--dataset", shop.dataset, "--out", tmp_path / "out", "--requests", log)
    shown = run(*words, *FEW, "--validation-requests", "3")
    assert shown.exit_code == 0, shown.stderr
    told = " ".join(shown.stderr.split())
    assert "note: dataset: 30 of 60 requests name a positive that is none of their candidates" in told
    assert "30 of 60 requests do not say which candidate was chosen, and are left out" in told


def test_columns_of_other_names(run: Run, shop: Shop, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    shutil.copy(shop.items, folder / "items.jsonl")
    rows = [{"who": f"u{n}", "what": f"i{(n * 7 + k) % 40}", "timestamp": k} for n in range(60) for k in range(5)]
    write_lines(folder / "interactions.jsonl", rows)
    words = ("tune", "--model", shop.model, "--dataset", folder, "--out", tmp_path / "out", *FEW)
    refused = run(*words, "--validation-requests", "3")
    assert refused.exit_code == 1
    assert "--user-field" in refused.stderr
    shown = run(*words, "--validation-requests", "3", "--user-field", "who", "--item-field", "what")
    assert shown.exit_code == 0, shown.stderr


def test_what_stands_in_the_way_stays(run: Run, shop: Shop, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine", encoding="utf-8")
    words = ("tune", "--model", shop.model, "--dataset", shop.dataset, *FEW)
    shown = run(*words, "--out", file)
    assert (shown.exit_code, "is a file: expected the name of a folder" in shown.stderr) == (2, True)
    empty = tmp_path / "empty"
    empty.mkdir()
    shown = run("tune", "--model", shop.model, "--dataset", empty, "--out", tmp_path / "out", *FEW)
    assert shown.exit_code == 1
    assert str(empty) in shown.stderr
    assert file.read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "out").exists()
