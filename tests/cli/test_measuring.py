"""`rcllm pull`, `warm`, `bench ttft`, `doctor` and `demo`."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from rcllm.cli.demo import QUICK_RUN
from rcllm.cli.doctor import _about_machine
from rcllm.model.ceilings import describe_hardware
from tests.cli.conftest import Run, Shop, write_lines


def test_pull_a_folder_prints_it(run: Run, shop: Shop) -> None:
    shown = run("pull", shop.model)
    assert shown.exit_code == 0
    assert shown.stdout.strip() == str(shop.model)


def test_pull_an_unknown_name(run: Run) -> None:
    shown = run("pull", "smollm")
    assert shown.exit_code == 2
    assert "did you mean 'smollm2-135m-instruct'?" in shown.stderr


def test_warm_tells_what_a_catalogue_needs(run: Run, shop: Shop) -> None:
    shown = run("warm", *shop.on_items, "--limit", "5")
    assert shown.exit_code == 0, shown.stderr
    assert "40 items, 80 distinct blocks" in shown.stdout
    assert "10 of 10 blocks of 5 items" in shown.stdout
    assert re.search(r"fits +yes", shown.stdout)
    assert re.search(r"time for all +about 0:00:\d\d", shown.stdout)
    assert re.search(r"texts +all whole", shown.stdout)
    assert re.search(r"fields +title 100%, brand \d+%, categories \d+%, description \d+%", shown.stdout)
    cut = run("warm", *shop.on_items, "--limit", "5", "--max-item-tokens", "2")
    assert re.search(r"texts +of 40 items: 40 cut to 2 tokens as candidates", cut.stdout)


def test_warm_tells_that_a_catalogue_does_not_fit(run: Run, shop: Shop, tmp_path: Path) -> None:
    config = tmp_path / "rcllm.toml"
    config.write_text("[cache]\npool_mb = 1\n[store]\ndisk_mb = 1\n", encoding="utf-8")
    titles = [{"item_id": n, "title": f"{n} {n * 7919} {n * 104729}"} for n in range(400)]
    items = write_lines(tmp_path / "items.jsonl", titles)
    shown = run("warm", "--model", shop.model, "--items", items, "--config", config)
    assert shown.exit_code == 0, shown.stderr
    assert re.search(r"fits +no, about \d+% of it", shown.stdout)
    assert "(full)" in shown.stdout


@pytest.mark.parametrize("command", [("bench", "ttft"), ("probe", "position"), ("calibrate",)])
def test_what_shapes_made_requests_is_refused_beside_a_file_of_requests(
    run: Run, shop: Shop, command: tuple[str, ...]
) -> None:
    shown = run(*command, *shop.on_dataset, "--in", shop.requests, "--history", "3")
    assert shown.exit_code == 2
    assert "--in gives the requests as they are, and --history would shape others" in shown.stderr


@pytest.mark.parametrize("source", ["requests", "dataset"])
def test_bench_ttft(run: Run, shop: Shop, tmp_path: Path, source: str) -> None:
    out = tmp_path / "bench.json"
    made = ["--in", str(shop.requests)] if source == "requests" else ["--candidates", "6", "--history", "3"]
    words = ("bench", "ttft", *shop.on_dataset, *made, "--count", "3", "--levels", "blocks tail(0.2)", "--out", out)
    shown = run(*words)
    assert shown.exit_code == 0, shown.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["level"] for row in rows] == ["full", "exact", "blocks", "tail(0.2)"]
    assert all(row["num_requests"] == 3 and row["ttft_p50_ms"] > 0 and row["tokens_computed"] == 0 for row in rows)
    assert rows[0]["speedup_full"] == 1.0
    assert rows[0]["tau"] == rows[1]["tau"] == pytest.approx(1.0)
    assert rows[2]["fresh_tokens"] < rows[3]["fresh_tokens"] < rows[1]["fresh_tokens"] < rows[0]["fresh_tokens"]
    assert "prefix caching" in shown.stdout


def test_what_cannot_be_measured_is_null(run: Run, shop: Shop, tmp_path: Path) -> None:
    """Without what the users chose next there is no NDCG; NaN is not JSON."""
    requests = write_lines(tmp_path / "requests.jsonl", [{"request_id": "r", "candidates": ["i5", "i6"]}])
    out = tmp_path / "bench.json"
    shown = run("bench", "ttft", *shop.on_items, "--in", requests, "--levels", "blocks", "--out", out)
    assert shown.exit_code == 0, shown.stderr
    assert "NaN" not in out.read_text(encoding="utf-8")
    assert [row["ndcg"] for row in json.loads(out.read_text(encoding="utf-8"))["rows"]] == [None] * 3


def test_bench_needs_requests(run: Run, shop: Shop) -> None:
    shown = run("bench", "ttft", *shop.on_items)
    assert shown.exit_code == 2
    assert "--in FILE" in shown.stderr


def test_doctor_on_a_tiny_model(run: Run, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rcllm.model.ceilings._SECONDS", 0.0)
    shown = run("doctor", "--model", shop.model)
    assert shown.exit_code == 0, shown.stdout
    for words in ("instruction set", "bytes per token", "items of 100 tokens", "GFLOP/s", "GB/s", "do not fit"):
        assert words in shown.stdout


def test_doctor_tells_that_memory_is_short() -> None:
    machine = describe_hardware()
    assert not any("memory" in each.text for each in _about_machine(replace(machine, memory_bytes=4 * 10**9), 0.0))
    (found,) = _about_machine(replace(machine, memory_bytes=2 * 10**9), 0.0)
    assert "2.0 GB of memory; the bundled model needs 3 GB" in found.text


def test_doctor_misses_a_model(run: Run) -> None:
    shown = run("doctor", "--model", "nobody/nothing")
    assert shown.exit_code == 1
    assert "rcllm pull nobody/nothing" in shown.stdout


def test_doctor_finds_too_little_memory(run: Run, shop: Shop) -> None:
    shown = run("doctor", "--model", shop.model, "--memory-mb", "1")
    assert shown.exit_code == 1
    assert "Raise cache.memory_mb" in shown.stdout


@pytest.mark.slow
def test_demo_quick_on_the_real_model(run: Run) -> None:
    shown = run("demo", "--quick")
    assert shown.exit_code == 0, shown.stderr
    assert f"{QUICK_RUN.num_requests} requests" in shown.stdout
    introduction = shown.stdout.splitlines()[:8]
    assert any("under a minute" in line and "GB of memory" in line for line in introduction)
    for words in ("label", "likelihood", "blocks", "Kendall", "watched", "what the user chose next", "rcllm explain"):
        assert words in shown.stdout
