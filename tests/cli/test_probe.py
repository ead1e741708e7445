"""`rcllm probe position`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run, Shop, write_lines


@pytest.mark.parametrize("source", ["requests", "dataset"])
def test_position_shows_tables_and_ends_with_json(run: Run, shop: Shop, source: str) -> None:
    made = ["--in", str(shop.requests)] if source == "requests" else ["--candidates", "6", "--history", "3"]
    shown = run(
        "probe",
        "position",
        *shop.on_dataset,
        *made,
        "--count",
        "3",
        "--permutations",
        "2",
        "--seed",
        "4",
        "--level",
        "blocks",
    )
    assert shown.exit_code == 0, shown.stderr
    figures = json.loads(shown.stdout.splitlines()[-1])
    assert (figures["name"], figures["level"], figures["readout"], figures["seed"]) == (
        "position",
        "blocks",
        "label",
        4,
    )
    assert (figures["num_requests"], figures["num_orders"]) == (3, 3)
    assert len(figures["slots"]) == (3 if source == "requests" else 6)
    assert 0 < figures["fresh_tokens"] < figures["full_tokens"]
    for words in ("3 requests in 3 orders", "share of order", f"{figures['order_share']:.1%}", "95 % interval"):
        assert words in shown.stdout


def test_position_of_isolated_candidates(run: Run, shop: Shop, tmp_path: Path) -> None:
    out = tmp_path / "bias.json"
    words = ("probe", "position", *shop.on_items, "--in", shop.requests, "--readout", "likelihood", "--out", out)
    shown = run(*words)
    assert shown.exit_code == 0, shown.stderr
    figures = json.loads(out.read_text(encoding="utf-8"))
    assert figures["order_share"] < 1e-4
    assert figures["tau"] == pytest.approx(1.0)
    assert "{" not in shown.stdout


def test_one_request_has_no_interval(run: Run, shop: Shop) -> None:
    shown = run("probe", "position", *shop.on_items, "--in", shop.requests, "--count", "1")
    assert shown.exit_code == 0, shown.stderr
    figures = json.loads(shown.stdout.splitlines()[-1], parse_constant=pytest.fail)
    assert all(slot["low"] is None for slot in figures["slots"])


def test_a_single_candidate_has_no_place(run: Run, shop: Shop, tmp_path: Path) -> None:
    requests = write_lines(tmp_path / "requests.jsonl", [{"request_id": "r", "candidates": ["i1"]}])
    shown = run("probe", "position", *shop.on_items, "--in", requests)
    assert shown.exit_code == 1
    assert "two or more candidates" in shown.stderr


def test_probe_needs_requests(run: Run, shop: Shop) -> None:
    shown = run("probe", "position", *shop.on_items)
    assert shown.exit_code == 2
    assert "--in FILE" in shown.stderr


def test_help_teaches(run: Run) -> None:
    shown = run("probe", "position", "--help")
    assert shown.exit_code == 0
    for words in ("share of order", "--permutations", "rcllm probe position --items"):
        assert words in shown.stdout
