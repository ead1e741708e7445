"""Runs a job in a process of its own that dies by SIGKILL, as a machine that is switched off would end it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_DIE = """
import os, signal
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def die_at(call, real, after=False):
    calls = [0]
    def wrapped(*given, **named):
        calls[0] += 1
        if calls[0] == call and not after:
            die()
        found = real(*given, **named)
        if calls[0] == call:
            die()
        return found
    return wrapped
"""


def run_killed(code: str) -> None:
    """`code` must die: it may call `die()`, or wrap a function by `die_at(call, real, after)`."""
    ended = subprocess.run(
        [sys.executable, "-c", _DIE + code],
        cwd=_ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
