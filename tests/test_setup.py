"""What a newcomer sees of `make setup`: what happens and how long it takes, and the log only where a step fails.

pip is played by a script, since the real one takes minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHATTY_PIP = """#!/bin/sh
case "$*" in
*"import torch"*) exit 1 ;;
*"torch==2.13.0"*) echo "torch, before all others" ;;
*) i=0; while [ $i -lt 300 ]; do echo "Collecting package $i"; i=$((i + 1)); done; exit STATUS ;;
esac
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def set_up(folder: Path, status: int) -> subprocess.CompletedProcess[str]:
    python = folder / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(CHATTY_PIP.replace("STATUS", str(status)), encoding="utf-8")
    python.chmod(0o755)
    return make_setup(folder)


def make_setup(folder: Path) -> subprocess.CompletedProcess[str]:
    """As from a shell, also where `make test` runs this."""
    variables = [f"VENV={folder / 'venv'}", f"log={folder / 'setup.log'}"]
    shell = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", "setup", *variables], cwd=ROOT, env=shell, capture_output=True, text=True)


def test_setting_up_says_what_happens_and_keeps_the_log(tmp_path: Path) -> None:
    shown = set_up(tmp_path, 0)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert len(lines) == 3
    assert "minutes" in lines[0]
    assert lines[1].startswith("2/3 torch")
    assert lines[2].startswith("3/3 rcllm")
    log = (tmp_path / "setup.log").read_text(encoding="utf-8").splitlines()
    assert (log[0], log[-1]) == ("torch, before all others", "Collecting package 299")
    again = make_setup(tmp_path)
    assert again.returncode == 0
    assert "Setting up" not in again.stdout


def test_a_step_that_fails_shows_the_end_of_its_log(tmp_path: Path) -> None:
    shown = set_up(tmp_path, 1)
    assert shown.returncode != 0
    assert "Collecting package 299" in shown.stdout
    assert "Collecting package 200" not in shown.stdout
    assert f"The whole log: {tmp_path / 'setup.log'}" in shown.stdout
    assert not (tmp_path / "venv" / ".rcllm-ready").exists()
