"""What a person's files, options and machine can cause is one line and an exit code, never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rcllm.cli.ending import ended_by
from rcllm.config import num_usable_cores
from rcllm.errors import ConfigError, DataError
from tests.cli.conftest import Run, Shop


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("calibrate",), "--tau"),
        (("calibrate",), "--ndcg-delta"),
        (("tune", "--dataset", "x", "--out", "y"), "--learning-rate"),
        (("tune", "--dataset", "x", "--out", "y"), "--minutes"),
        (("sid", "train", "--codes", "x", "--out", "y"), "--skip"),
        (("sid", "train", "--codes", "x", "--out", "y"), "--minutes"),
        (("sid", "build", "--out", "y.json"), "--collaborative-weight"),
        (("pool", "build", "--out", "y"), "--threshold"),
        (("describe", "rows.jsonl", "--out", "y"), "--temperature"),
        (("describe", "rows.jsonl", "--out", "y"), "--top-p"),
        (("describe", "rows.jsonl", "--out", "y"), "--p"),
        (("describe", "rows.jsonl", "--out", "y"), "--price-per-hour"),
    ],
)
def test_what_is_no_number_is_refused_before_any_work(
    run: Run, words: tuple[str, ...], option: str, number: str
) -> None:
    ended = run(*words, f"{option}={number}")
    assert ended.exit_code == 2
    assert ended.stderr == f"error: {option} must be a finite number, got {number}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--threads", "100000"), f"--threads: expected at most {num_usable_cores()}, the cores that this process"),
        (("--memory-mb", "0"), "--memory-mb must be at least 1, got 0"),
        (("--batch", "0"), "--batch must be at least 1, got 0"),
        (("--readout", "labels"), "--readout must be one of label, pointwise, likelihood, got 'labels'; did you mean"),
        (("--level", "fast"), "--level: unknown reuse level 'fast'"),
        (("--context", "mean"), "--context: unknown canonical context 'mean'"),
    ],
)
def test_an_option_is_named_as_it_was_typed(run: Run, options: tuple[str, ...], message: str) -> None:
    ended = run("rank", "--items", "absent.jsonl", "--in", "absent.jsonl", *options)
    assert ended.exit_code == 2
    assert ended.stderr.startswith(f"error: {message}")


def test_a_file_and_a_variable_are_named_by_their_keys(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rcllm.toml"
    path.write_text("[cache]\nmemory_mb = -1\n", encoding="utf-8")
    ended = run("rank", "--in", "absent.jsonl", "--config", path)
    assert ended.stderr == f"error: {path}: cache.memory_mb must be at least 0, got -1\n"
    monkeypatch.setenv("RCLLM_CACHE_MEMORY_MB", "much")
    ended = run("rank", "--in", "absent.jsonl")
    assert ended.stderr == "error: environment: RCLLM_CACHE_MEMORY_MB must be a whole number, got 'much'\n"
    assert ended.exit_code == 2


@pytest.mark.parametrize("home", ["a-file", "a-file/below"])
def test_a_home_that_is_no_folder(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    (tmp_path / "a-file").touch()
    monkeypatch.setenv("RCLLM_HOME", str(tmp_path / home))
    ended = run("pull", "smollm2-135m-instruct")
    assert ended.exit_code == 1
    assert ended.stderr.startswith(f"error: {tmp_path / home}")
    assert "RCLLM_HOME names this folder" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_a_broken_calibration_that_nobody_asked_for(
    run: Run, shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fidelity.json").write_text('{"version": 1, "rungs": 3}', encoding="utf-8")
    words = ("rank", *shop.on_items, "--in", shop.requests)
    ended = run(*words)
    assert ended.exit_code == 0, ended.stderr
    assert "fidelity.json: expected what `rcllm calibrate` writes" in ended.stderr
    assert "It is not used" in ended.stderr
    assert '"level": "exact"' in ended.stdout
    ended = run(*words, "--fidelity", "fidelity.json")
    assert ended.exit_code == 1
    assert ended.stderr.splitlines()[-1].startswith("error: fidelity.json: expected what `rcllm calibrate` writes: ")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("no such thing"), 2, "error: no such thing"),
        (DataError("a bad file"), 1, "error: a bad file"),
        (
            PermissionError(13, "Permission denied", "/etc/x"),
            1,
            "error: /etc/x: cannot be used: Permission denied; name",
        ),
        (FileExistsError(17, "File exists", "out"), 1, "error: out: cannot be used: File exists; a file stands where"),
        (OSError(28, "No space left on device"), 1, "error: the system refused: No space left on device"),
        (MemoryError(), 1, "error: there is not enough memory"),
        (KeyboardInterrupt(), 130, "interrupted; what was finished before is kept"),
    ],
)
def test_how_commands_end(error: BaseException, code: int, words: str) -> None:
    ending = ended_by(error)
    assert ending.code == code
    assert ending.words.startswith(words)


@pytest.mark.parametrize("error", ["KeyboardInterrupt()", "MemoryError()", "OSError(5, 'Input/output error', 'disk')"])
def test_an_error_in_a_command_is_one_line(error: str) -> None:
    program = f"""
import sys
import rcllm.cli.cache as cache
from rcllm.cli.app import app
def fail(name): raise {error}
cache.pull_command = fail
app(["pull"])
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert "Traceback" not in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert ran.returncode == (130 if "Keyboard" in error else 1)


def test_a_reader_that_goes_away_is_no_error(shop: Shop) -> None:
    """As `rcllm … | head -0` does."""
    read, write = os.pipe()
    os.close(read)
    words = ["-m", "rcllm.cli.app", "rank", *shop.on_items, "--in", str(shop.requests)]
    with os.fdopen(write, "w") as nobody:
        ran: Any = subprocess.run([sys.executable, *words], stdout=nobody, stderr=subprocess.PIPE, check=False)
    assert b"Traceback" not in ran.stderr
    assert ran.returncode in (1, 141)
