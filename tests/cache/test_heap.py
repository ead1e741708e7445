"""Threads of a program share what they free, and the system gets back what lies free between blocks."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import ctypes, sys, threading
from pathlib import Path
from rcllm.cache.heap import share_arenas

if sys.argv[1] == "shared":
    assert share_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

together = threading.Barrier(8)  # an arena of a thread that has ended is the next one's

def allocate():
    together.wait()
    for _ in range(1000):
        libc.malloc(1000)
    together.wait()

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


_SCATTERED = """
import ctypes, sys
from pathlib import Path
from rcllm.cache.heap import hand_back

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [libc.malloc(100_000) for _ in range(1000)]
for block in blocks:
    ctypes.memset(block, 1, 100_000)
for block in blocks[::2]:  # every other one goes: the heap cannot shrink from its end
    libc.free(block)
before = resident_mb()
assert hand_back()
sys.stdout.write(str(before - resident_mb()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a heap as glibc keeps it, looked at as Linux shows it")
def test_what_lies_free_between_blocks_is_handed_back() -> None:
    ran = subprocess.run([sys.executable, "-c", _SCATTERED], capture_output=True, text=True, check=True)
    assert float(ran.stdout) > 40  # of the 50 MB that were freed
