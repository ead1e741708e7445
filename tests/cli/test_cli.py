"""The frame of the command line: help, version, and how errors become lines and exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run, Shop

COMMANDS = ["pull", "warm", "rank", "explain", "bench ttft", "demo", "doctor"]


def test_help_explains_the_flow(run: Run) -> None:
    shown = run("--help")
    assert shown.exit_code == 0
    for word in ("pull", "warm", "rank", "explain", "bench", "demo", "doctor", "--version"):
        assert word in shown.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(run: Run, command: str) -> None:
    shown = run(*command.split(), "--help")
    assert shown.exit_code == 0
    assert f"Example: rcllm {command}" in " ".join(shown.stdout.split())


def test_help_keeps_square_brackets(run: Run) -> None:
    assert "[model]" in run("rank", "--help").stdout


def test_version(run: Run) -> None:
    shown = run("--version")
    assert shown.exit_code == 0
    assert shown.stdout.startswith("rcllm ")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--level", "blok"], "unknown reuse level 'blok'"),
        (["--readout", "guess"], "readout must be one of label, pointwise, likelihood"),
        (["--layout", "items_first", "--readout", "likelihood"], "needs layout history_first"),
        (["--kv-dtype", "int4"], "--kv-dtype must be one of auto, fp32, fp16, bf16, int8, got 'int4'"),
        (["--context", "average"], "unknown canonical context"),
        (["--context", "typical"], "give --dataset FOLDER"),
        (["--template", "shoping"], "did you mean 'shopping'?"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
        (["--memory-mb", "1"], "Raise cache.memory_mb"),
    ],
)
def test_wrong_options_are_one_line_and_exit_2(run: Run, shop: Shop, options: list[str], said: str) -> None:
    shown = run("rank", *shop.on_items, "--in", shop.requests, *options)
    assert shown.exit_code == 2
    assert said in shown.stderr
    assert shown.stderr.startswith("error: ")
    assert "Traceback" not in shown.stderr
    assert shown.stdout == ""


def test_unknown_options_exit_2(run: Run) -> None:
    assert run("rank", "--nonsense").exit_code == 2


def test_there_must_be_items(run: Run, shop: Shop) -> None:
    shown = run("rank", "--in", shop.requests)
    assert shown.exit_code == 2
    assert "--items FILE" in shown.stderr


@pytest.mark.parametrize("option", ["--items", "--in", "--dataset"])
def test_missing_files_exit_1(run: Run, shop: Shop, option: str) -> None:
    files = {"--items": str(shop.items), "--in": str(shop.requests)} | {option: "nowhere.jsonl"}
    shown = run("rank", "--model", shop.model, *(word for pair in files.items() for word in pair))
    assert shown.exit_code == 1
    assert "nowhere.jsonl" in shown.stderr


def test_debug_lets_errors_through(run: Run, shop: Shop) -> None:
    shown = run("--debug", "rank", *shop.on_items, "--in", "nowhere.jsonl")
    assert shown.exit_code == 1
    assert type(shown.exception).__name__ == "DataError"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted; what was finished before is kept"),
        (
            PermissionError(13, "Permission denied", "/root/cache"),
            1,
            "error: /root/cache: cannot be used: Permission denied; name a place that you may write to",
        ),
    ],
)
def test_what_ends_a_command_has_no_traceback(
    run: Run, shop: Shop, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    def fail(options: object) -> None:
        raise error

    monkeypatch.setattr("rcllm.cli.rank.load_inputs", fail)
    shown = run("rank", *shop.on_items, "--in", shop.requests)
    assert shown.exit_code == code
    assert shown.stderr.startswith(said)
    assert shown.stderr.count("\n") == 1
    assert isinstance(shown.exception, SystemExit)


def test_rank_tells_how_it_ends_and_goes_on(run: Run) -> None:
    shown = " ".join(run("rank", "--help").stdout.split())
    for words in ("--restart", "0 when all requests were answered", "130 when interrupted", "OUT.job.json"):
        assert words in shown


def test_options_win_over_the_configuration_file(run: Run, shop: Shop, tmp_path: Path) -> None:
    config = tmp_path / "rcllm.toml"
    config.write_text("[rank]\nlevel = 'exact'\nreadout = 'pointwise'\n", encoding="utf-8")
    words = ["rank", *shop.on_items, "--in", shop.requests, "--config", config]
    assert '"level": "exact", "readout": "pointwise"' in run(*words).stdout
    words.append("--allow-uncalibrated")
    assert '"level": "blocks", "readout": "pointwise"' in run(*words, "--level", "blocks").stdout
    config.write_text("[rank]\nlevle = 'exact'\n", encoding="utf-8")
    shown = run(*words)
    assert shown.exit_code == 2
    assert "did you mean 'level'?" in shown.stderr
