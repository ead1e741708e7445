"""`rcllm rank` and `recommend` that were killed, interrupted or short of disk go on after what they wrote."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rcllm.cli import answering
from tests.cli.conftest import Run, Shop, read_lines, write_lines

_ROOT = Path(__file__).resolve().parents[2]
_NUM_REQUESTS = 400
TIMES = ("ms", "tokens_computed")


@pytest.fixture
def many(tmp_path: Path) -> Path:
    rows = [
        {"request_id": f"r{n}", "history": [f"i{n % 40}"], "candidates": [f"i{(n + k) % 40}" for k in range(1, 9)]}
        for n in range(_NUM_REQUESTS)
    ]
    return write_lines(tmp_path / "many.jsonl", rows)


def _answers(text: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read_lines(text)]


def _count(lines: bytes) -> int:
    return lines.count(b"\n")


def _ended_by(number: signal.Signals, words: list[object], out: Path, num_lines: int) -> tuple[int, str]:
    """Runs `rcllm` in a process that gets a signal when `out` has so many lines; its exit code and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rcllm.cli.app", *map(str, words)],
        cwd=_ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if out.exists() and out.read_bytes().count(b"\n") >= num_lines:
            break
        time.sleep(0.002)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    return process.returncode, error.decode()


def test_killed_and_interrupted_it_ends_as_a_run_that_never_was(
    run: Run, shop: Shop, many: Path, tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    words = ["rank", *shop.on_items, "--in", many]
    whole = run(*words)
    assert whole.exit_code == 0, whole.stderr

    code, error = _ended_by(signal.SIGKILL, [*words, "--out", out], out, 5)
    assert code == -signal.SIGKILL, error
    killed = out.read_bytes()
    out.write_bytes(killed + b'{"request_id": "torn')  # as a kill within a write leaves it
    assert _answers(killed.decode()) == _answers(whole.stdout)[: _count(killed)]

    code, error = _ended_by(signal.SIGINT, [*words, "--out", out], out, _count(killed) + 5)
    assert code == 130, error
    interrupted = out.read_bytes()
    assert interrupted.startswith(killed)
    assert f"interrupted: {out} holds {_count(interrupted)} answers; run the same command again" in error
    assert "Traceback" not in error

    last = run(*words, "--out", out)
    assert last.exit_code == 0, last.stderr
    assert re.search(rf"{_count(interrupted)} of {_NUM_REQUESTS} requests are answered already", last.stderr)
    assert out.read_bytes().startswith(interrupted)
    assert _answers(out.read_text(encoding="utf-8")) == _answers(whole.stdout)
    again = run(*words, "--out", out)
    assert again.exit_code == 0
    assert _answers(out.read_text(encoding="utf-8")) == _answers(whole.stdout)


@contextmanager
def _largest_file(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond it: a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("default::rcllm.errors.StoreWarning")  # the store has no room either
def test_a_full_disk_keeps_what_was_written(run: Run, shop: Shop, many: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    words = ["rank", *shop.on_items, "--in", many, "--out", out]
    with _largest_file(20_001):
        full = run(*words)
    assert full.exit_code == 1
    lines = out.read_bytes()
    assert 15_000 < len(lines) <= 20_001
    assert lines.endswith(b"\n")
    assert f"{out} holds {_count(lines)} answers; run the same command again" in full.stderr
    assert run(*words).exit_code == 0
    assert len(read_lines(out.read_text(encoding="utf-8"))) == _NUM_REQUESTS


def test_failures_are_tried_again(run: Run, shop: Shop, tmp_path: Path) -> None:
    """A failure that had a cause outside the request, such as too little memory, need not be one the next time."""
    out = tmp_path / "answers.jsonl"
    rows = [{"request_id": f"r{n}", "candidates": ["i1", f"i{n}"]} for n in range(2, 6)]
    requests = write_lines(tmp_path / "requests.jsonl", rows)
    words = ["rank", *shop.on_items, "--in", requests, "--out", out]
    assert run(*words).exit_code == 0
    whole = _answers(out.read_text(encoding="utf-8"))
    second = '{"request_id": "r3", "line": 2, "error": "no memory"}'
    lines = out.read_text(encoding="utf-8").splitlines()
    out.write_text("\n".join([lines[0], second, *lines[2:]]) + "\n", encoding="utf-8")
    shown = run(*words)
    assert shown.exit_code == 0, shown.stderr
    assert "3 of 4 requests are answered already" in shown.stderr
    assert _answers(out.read_text(encoding="utf-8")) == whole


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--level", "full"), "rank.level was 'auto', is 'full'"),
        (("--readout", "likelihood"), "rank.readout was 'label', is 'likelihood'"),
        (("--receipts",), "--receipts was False, is True"),
        (("--volatile", "price"), "the content of the items is another"),
    ],
)
def test_another_job_does_not_go_on_there(
    run: Run, shop: Shop, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    out = tmp_path / "answers.jsonl"
    same = ["rank", *shop.on_items, "--in", shop.requests, "--out", out]
    assert run(*same).exit_code == 0
    before = out.read_bytes()
    shown = run(*same, *words)
    assert shown.exit_code == 2
    assert "answers of another job" in shown.stderr
    assert said in shown.stderr
    assert "--restart" in shown.stderr
    assert out.read_bytes() == before
    assert run(*same, *words, "--restart").exit_code == 0
    assert len(read_lines(out.read_text(encoding="utf-8"))) == 3
    assert out.read_bytes() != before


def test_other_requests_and_another_model_are_another_job(run: Run, shop: Shop, tmp_path: Path) -> None:
    out, requests = tmp_path / "answers.jsonl", tmp_path / "requests.jsonl"
    requests.write_bytes(shop.requests.read_bytes())
    model = tmp_path / "model"
    model.mkdir()
    for path in shop.model.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    words = ["rank", "--model", model, *shop.on_items[2:], "--in", requests, "--out", out]
    assert run(*words).exit_code == 0
    (model / "model.safetensors").write_bytes(_last_byte_changed(shop.model / "model.safetensors"))
    shown = run(*words)
    assert shown.exit_code == 2
    assert "the content of the model is another" in shown.stderr
    with requests.open("a", encoding="utf-8") as file:
        file.write('{"request_id": "more", "candidates": ["i1"]}\n')
    shown = run(*words)
    assert shown.exit_code == 2
    assert "the content of the requests is another" in shown.stderr


def _last_byte_changed(path: Path) -> bytes:
    content = path.read_bytes()
    return content[:-1] + bytes([content[-1] ^ 1])


def test_failures_beyond_those_that_are_shown_are_counted(run: Run, shop: Shop, tmp_path: Path) -> None:
    rows = [{"request_id": f"r{n}", "candidates": ["nope"]} for n in range(answering._SHOWN_FAILURES + 9)]
    shown = run("rank", *shop.on_items, "--in", write_lines(tmp_path / "bad.jsonl", rows))
    assert shown.exit_code == 1
    assert shown.stderr.count("nope") == answering._SHOWN_FAILURES
    assert "… and 9 more" in shown.stderr


@pytest.mark.parametrize("device", ["/dev/full", "/dev/null"])
def test_devices(run: Run, shop: Shop, device: str) -> None:
    shown = run("rank", *shop.on_items, "--in", shop.requests, "--out", device)
    assert shown.exit_code == (1 if device == "/dev/full" else 0)
    assert ("No space left" in shown.stderr) == (device == "/dev/full")


def test_stdout_that_is_full(shop: Shop) -> None:
    with Path("/dev/full").open("wb") as full:
        words = ["rank", *shop.on_items, "--in", shop.requests]
        ended = subprocess.run(
            [sys.executable, "-m", "rcllm.cli.app", *map(str, words)],
            cwd=_ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    error = ended.stderr.decode()
    assert ended.returncode == 1, error
    assert "stdout cannot be written: No space left on device" in error
    assert "Traceback" not in error
