"""`rcllm sim` and `rcllm plan`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run, Shop

SIM = ("sim", "--nodes", "4", "--items", "3000", "--topics", "300", "--qps", "8", "--requests", "300")
PLAN = ("plan", "--items", "100000", "--qps", "40", "--slo-ms", "150", "--semantic-history", "--requests", "300")


def test_sim_shows_and_writes(run: Run, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.{end}" for name, end in (("out", "json"), ("trace", "json"), ("plot", "png"))}
    shown = run(*SIM, "--level", "linked(4)", *(word for name, path in files.items() for word in (f"--{name}", path)))
    assert shown.exit_code == 0, shown.stderr
    assert "4 nodes (qwen3-8b, 1 × a100), level linked(4), route ttft, 3,000 items" in shown.stdout
    assert "time to first token" in shown.stdout
    assert "requests simulated in a minute of one core" in shown.stderr
    told = json.loads(files["out"].read_text(encoding="utf-8"))
    assert told["options"]["level"] == "linked(4)"
    assert told["options"]["seed"] == 0
    assert told["summary"]["num_requests"] == 270
    assert 0 < told["summary"]["ttft_p50_ms"] <= told["summary"]["ttft_p99_ms"]
    assert len(json.loads(files["trace"].read_text(encoding="utf-8"))["traceEvents"]) > 600
    assert files["plot"].read_bytes().startswith(b"\x89PNG")


def test_sim_replays_a_log(run: Run, shop: Shop) -> None:
    shown = run(*SIM, "--log", shop.requests, "--placement", "hash")
    assert shown.exit_code == 0, shown.stderr
    assert "3 logged requests" in shown.stdout


def test_an_empty_log_is_not_replaced_by_generated_requests(run: Run, tmp_path: Path) -> None:
    log = tmp_path / "empty.jsonl"
    log.touch()
    shown = run(*SIM, "--log", log)
    assert shown.exit_code == 1
    assert "the request log is empty" in shown.stderr


def test_sim_is_fitted_to_measured_passes(run: Run, tmp_path: Path) -> None:
    metrics: dict[str, float] = {"num_points": 6}
    for number, rows in enumerate((1, 10, 100, 200, 400, 800)):
        values = {"rows": rows, "pairs": rows * 100.0, "kv_bytes": 1e6 * (6 - number), "ms": 20.0 + rows}
        metrics |= {f"point_{number}_{name}": value for name, value in values.items()}
    costs = tmp_path / "pass_costs.json"
    costs.write_text(json.dumps({"metrics": metrics}), encoding="utf-8")
    shown = run(*SIM, "--costs", costs, "--model", "smollm2-135m")
    assert shown.exit_code == 0, shown.stderr
    assert "smollm2-135m, as measured in pass_costs.json" in shown.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--route", "fastest"), "--route must be one of affinity, ttft"),
        (("--locality", "1.5"), "--locality must be at most 1"),
        (("--fail", "9@1"), "there is no node 9"),
        (("--topics", "4000"), "--topics 4000 exceeds --items 3000"),
        (("--level", "most"), "unknown reuse level"),
    ],
)
def test_sim_refuses_what_cannot_be(run: Run, words: tuple[str, str], told: str) -> None:
    shown = run(*SIM, *words)
    assert shown.exit_code == 2
    assert told in shown.stderr


def test_two_outputs_are_two_files(run: Run, tmp_path: Path) -> None:
    shown = run(*SIM, "--out", tmp_path / "a", "--trace", tmp_path / "a")
    assert shown.exit_code == 2
    assert "each needs its own" in shown.stderr


def test_plan_shows_and_writes(run: Run, tmp_path: Path) -> None:
    out, plot = tmp_path / "plan.json", tmp_path / "plan.png"
    shown = run(*PLAN, "--price-per-hour", "2.5", "--out", out, "--plot", plot)
    assert shown.exit_code == 0, shown.stderr
    for words in ("a million requests", "items on every node", "half the catalogue", "double the load", "meets"):
        assert words in shown.stdout
    told = json.loads(out.read_text(encoding="utf-8"))
    asked = told["as asked"]
    assert set(told) == {"as asked", *(f"{x} the {y}" for x in ("half", "double") for y in ("catalogue", "load"))}
    assert asked["nodes"] == next(trial["nodes"] for trial in asked["trials"] if trial["meets"])
    assert asked["cost_per_million"] == pytest.approx(asked["node_hours_per_million"] * 2.5)
    assert set(asked["memory_bytes_per_node"]) == {"fp32", "fp16", "bf16", "int8"}
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_plan_that_cannot_be_says_why(run: Run) -> None:
    shown = run("plan", "--items", "1000", "--qps", "1", "--slo-ms", "1", "--topics", "10")
    assert shown.exit_code == 0, shown.stderr
    assert "none is enough" in shown.stdout
    assert "alone on a node takes" in shown.stdout


def test_plan_needs_what_is_to_be_served(run: Run) -> None:
    shown = run("plan", "--items", "1000")
    assert shown.exit_code == 2
    assert "--qps" in shown.stderr
