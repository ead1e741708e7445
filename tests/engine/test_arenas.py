"""Threads of a program share what they free."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import ctypes, sys, threading
from pathlib import Path
from rcllm.engine.arenas import share_arenas

if sys.argv[1] == "shared":
    assert share_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def allocate():
    for _ in range(1000):
        libc.malloc(1000)

threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sys.stdout.write(str(Path("/proc/self/maps").read_text().count("---p 00000000 00:00 0")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's arenas are looked at as Linux maps them")
def test_threads_share_arenas() -> None:
    """An arena is a mapping of 64 MB, most of it reserved: there are fewer such mappings where arenas are shared."""

    def count(way: str) -> int:
        ran = subprocess.run([sys.executable, "-c", _PROGRAM, way], capture_output=True, text=True, check=True)
        return int(ran.stdout)

    assert count("shared") < count("apart")
