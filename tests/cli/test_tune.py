"""`rcllm tune`: it learns, goes on, refuses what cannot be, and `rank` uses what it made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run, Shop, read_lines

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
        (("--validation-requests", "500"), "expected 500 validation users"),
        (("--start", "nowhere"), "nowhere"),
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
