"""`rcllm calibrate`, and what `rank` and `explain` may do with and without it."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from rcllm.fidelity.calibration import Calibration
from rcllm.fidelity.target import Target
from tests.cli.conftest import Run, Shop, read_lines, write_lines

QUICK = ("--readouts", "label", "--layouts", "history_first", "--label-places", "after", "--context", "instruction")
ON = ("--candidates", "5", "--history", "3", "--timed", "2", "--count", "4")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No fidelity.json of somebody else."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def measured(run: Run, shop: Shop, tmp_path: Path) -> Calibration:
    """fidelity.json, at whose target everything passes that agrees at all."""
    words = ("calibrate", *shop.on_dataset, *QUICK, *ON, "--levels", "blocks tail(1.0)")
    shown = run(*words)
    assert shown.exit_code == 0, shown.stderr
    found = Calibration.load(tmp_path / "fidelity.json")
    assert found.num_requests == 4
    return found


def judged(found: Calibration, **target: float) -> Calibration:
    """The same figures under another target; four requests are enough here."""
    return replace(found, target=Target(min_requests=1, **target))  # type: ignore[arg-type]


def test_calibrate_writes_figures_report_and_records(run: Run, shop: Shop, tmp_path: Path) -> None:
    out = tmp_path / "new" / "shop.json"
    words = ("calibrate", *shop.on_dataset, *ON, "--levels", "blocks corrected(0.3, 0.3)", "--policies", "tail random")
    shown = run(*words, "--readouts", "label", "--contexts", "none mean(2)", "--out", out)
    assert shown.exit_code == 0, shown.stderr
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "shop.html",
        "shop.json",
        "shop.json.records.jsonl",
        "shop.png",
    ]
    found = Calibration.load(out)
    assert found.dataset == "dataset"
    assert {rung.configuration.context for rung in found.rungs} <= {"", "none", "mean(2)"}
    assert {rung.configuration.options.layout for rung in found.rungs} == {"history_first", "items_first"}
    assert "4 requests of dataset" in shown.stdout
    assert "No approximate level passes" in shown.stdout, "four requests are too few to pass"
    records = (out.parent / "shop.json.records.jsonl").read_bytes()
    assert run(*words, "--readouts", "label", "--contexts", "none mean(2)", "--out", out).exit_code == 0
    assert (out.parent / "shop.json.records.jsonl").read_bytes() == records, "nothing is measured twice"


@pytest.mark.filterwarnings("ignore:model.dtype is bf16")
def test_what_less_than_fp32_costs_is_measured_beside(run: Run, shop: Shop, tmp_path: Path) -> None:
    """A calibration in bf16 says how far bf16 itself is from fp32, and is none of an engine in fp32."""
    words = ("calibrate", *shop.on_dataset, *QUICK, *ON, "--levels", "blocks", "--dtype", "bf16")
    shown = run(*words)
    assert shown.exit_code == 0, shown.stderr
    assert "Computing in bf16 with weights full, against fp32 with full ones" in shown.stdout
    found = Calibration.load(tmp_path / "fidelity.json")
    assert found.identity.dtype == "bf16"
    assert found.precision is not None
    assert found.precision.configuration.level_name == "full"
    assert found.precision.summary.num_requests == 4
    assert found.precision.summary.measures["tau"].mean > 0.5
    refused = run("rank", "--in", shop.requests, *shop.on_items, "--fidelity", tmp_path / "fidelity.json")
    assert refused.exit_code != 0
    assert "bf16" in refused.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--readouts", "labl"), "did you mean 'label'"),
        (("--levels", "blocks exact"), "exact"),
        (("--levels", "half"), "unknown reuse level"),
        (("--contexts", "sometimes"), "unknown canonical context"),
        (("--policies", "best"), "--policies"),
        (("--cost", "euros"), "--cost"),
        (("--readouts", "pointwise", "--layouts", "items_first"), "nothing to try"),
    ],
)
def test_what_cannot_be_tried_is_said_before_the_model_is_loaded(
    run: Run, shop: Shop, words: tuple[str, ...], said: str
) -> None:
    shown = run("calibrate", "--model", "nowhere", "--dataset", shop.dataset, *words)
    assert shown.exit_code == 2
    assert said in shown.stderr


def test_sampled_contexts_need_a_dataset(run: Run, shop: Shop) -> None:
    shown = run("calibrate", *shop.on_items, "--in", shop.requests, "--contexts", "mean(4)")
    assert shown.exit_code == 2
    assert "--dataset FOLDER" in shown.stderr


def test_help_teaches(run: Run) -> None:
    shown = re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]|\x1b\[[0-9;]*m", " ", run("calibrate", "--help").stdout))
    for words in ("full recompute", "coarse to fine", "run it again", "Example:", "NDCG@10", "Kendall", "two_pass"):
        assert words in shown
    for command in ("rank", "explain"):
        assert "--allow-uncalibrated" in run(command, "--help").stdout


def test_rank_answers_exactly_until_something_is_calibrated(run: Run, shop: Shop) -> None:
    shown = run("rank", *shop.on_items, "--in", shop.requests)
    assert {answer["level"] for answer in read_lines(shown.stdout)} == {"exact"}
    assert "`rcllm calibrate` measures it" in shown.stderr
    assert len(shown.stderr.splitlines()) == 1


def test_an_uncalibrated_level_is_refused(run: Run, shop: Shop) -> None:
    for command in (("rank", "--in", shop.requests), ("explain", "--request", shop.requests)):
        shown = run(*command, *shop.on_items, "--level", "blocks")
        assert shown.exit_code == 2
        assert shown.stdout == ""
        assert "--allow-uncalibrated" in shown.stderr
    shown = run("rank", "--in", shop.requests, *shop.on_items, "--level", "blocks", "--allow-uncalibrated")
    assert {answer["level"] for answer in read_lines(shown.stdout)} == {"blocks"}


def test_rank_goes_as_far_as_the_calibration_allows(
    run: Run, shop: Shop, tmp_path: Path, measured: Calibration
) -> None:
    words = ("rank", *shop.on_dataset, "--in", shop.requests)
    judged(measured, tau=0.99, ndcg10_delta=-0.001).save(tmp_path / "fidelity.json")
    shown = run(*words)
    assert {answer["level"] for answer in read_lines(shown.stdout)} == {"tail(1.0)"}
    assert "the cheapest that passes" in shown.stderr
    assert run(*words, "--level", "blocks").exit_code == 2
    judged(measured, tau=-1.0, ndcg10_delta=-1.1).save(tmp_path / "elsewhere.json")
    assert '"level": "blocks"' in run(*words, "--fidelity", "elsewhere.json", "--level", "blocks").stdout
    assert '"level": "exact"' in run(*words, "--readout", "likelihood").stdout, "that was not measured"


def test_a_request_of_its_own_level_fails_alone(run: Run, shop: Shop, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in shop.requests.read_text(encoding="utf-8").splitlines()]
    lines[1]["options"] = {"level": "blocks"}
    path = write_lines(tmp_path / "requests.jsonl", lines)
    shown = run("rank", *shop.on_items, "--in", path, "--batch", "3")
    assert shown.exit_code == 1
    assert ["error" in answer for answer in read_lines(shown.stdout)] == [False, True, False]


def test_the_calibration_of_another_template(run: Run, shop: Shop, measured: Calibration) -> None:
    words = ("rank", *shop.on_dataset, "--in", shop.requests, "--template", "movies")
    shown = run(*words)
    assert shown.exit_code == 0, "one that happens to lie here is not used"
    assert "fidelity.json is not used" in shown.stderr
    named = run(*words, "--fidelity", "fidelity.json")
    assert named.exit_code == 2
    assert re.search(r"template \w{12} instead of \w{12}", named.stderr)
    missing = run(*words, "--fidelity", "nowhere.json")
    assert missing.exit_code == 1
    assert "rcllm calibrate" in missing.stderr


def test_a_level_of_the_configuration_file_is_kept(run: Run, shop: Shop, tmp_path: Path) -> None:
    config = tmp_path / "rcllm.toml"
    config.write_text("[rank]\nlevel = 'full'\n", encoding="utf-8")
    words = ("rank", *shop.on_items, "--in", shop.requests, "--config", config)
    assert {answer["level"] for answer in read_lines(run(*words).stdout)} == {"full"}
    config.write_text("[rank]\nreadout = 'pointwise'\n", encoding="utf-8")
    assert {answer["level"] for answer in read_lines(run(*words).stdout)} == {"exact"}


def test_the_recommended_command_can_be_run(run: Run, shop: Shop, tmp_path: Path) -> None:
    """`tail(1.0)` recomputes all and so passes with the 30 requests that a target asks for at least."""
    lines = [
        {"request_id": f"r{n}", "history": ["i1", f"i{n}"], "candidates": ["i5", "i38", f"i{6 + n}"], "positive": "i5"}
        for n in range(2, 32)
    ]
    asked = write_lines(tmp_path / "thirty.jsonl", lines)
    words = ("calibrate", *shop.on_items, "--in", asked, "--levels", "tail(1.0)", "--readouts", "pointwise")
    shown = run(*words, "--contexts", "none bos", "--timed", "1")
    assert shown.exit_code == 0, shown.stderr
    (line,) = [line for line in shown.stdout.splitlines() if line.startswith("  rcllm rank")]
    options = shlex.split(line.removesuffix("…"))[2:]
    assert options[:2] == ["--readout", "pointwise"]
    ranked = run("rank", *shop.on_items, "--in", shop.requests, *options)
    assert {answer["level"] for answer in read_lines(ranked.stdout)} == {"tail(1.0)"}


def test_an_output_that_cannot_be_is_said_before_the_model_is_loaded(run: Run, shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    for out, message in (
        ("folder", "is a folder: expected the name of a file"),
        ("report.html", "expected the name of a .json file"),
        ("file", "exists and is no calibration"),
        ("broken.json", "exists and is no calibration"),
        ("file/below.json", "cannot be written"),
    ):
        shown = run("calibrate", "--dataset", shop.dataset, "--model", tmp_path / "nowhere", "--out", tmp_path / out)
        assert message in shown.stderr.replace("\n", " "), out
        assert isinstance(shown.exception, SystemExit)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"
