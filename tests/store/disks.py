"""Blocks and processes for the tests of the disk tier."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from rcllm.core.ranking import ContentKey
from rcllm.store.contract import Stored
from rcllm.store.disk import DiskStore
from rcllm.store.sealed import finish, open_sealed, seal

ROOT = Path(__file__).resolve().parents[2]
MB = 1 << 20


def key(number: int) -> ContentKey:
    return ContentKey(number.to_bytes(32, "big"))


def block(number: int, num_bytes: int = 20_000, owner: str | None = None, cost: float = 1.0, space: str = "") -> Stored:
    """A sealed block whose KV is known from its number."""
    out, kv = seal("fp32", (1, 1, 1, 1, num_bytes // 4))
    np.frombuffer(kv, np.uint32)[:] = np.arange(num_bytes // 4, dtype=np.uint32) + number * 1_000_003 % (1 << 31)
    return Stored(finish(out), cost, owner, space)


def put(store: DiskStore, numbers: Iterable[int], owner: str | None = None, num_bytes: int = 20_000) -> None:
    store.put_many({key(number): block(number, num_bytes, owner) for number in numbers})


def served(store: DiskStore, numbers: Iterable[int], num_bytes: int = 20_000) -> set[int]:
    """Which of `numbers` it has; fails where one is not what was put."""
    found = store.get_many([key(number) for number in numbers])
    return {number_of(each, stored, num_bytes) for each, stored in found.items()}


def number_of(each: ContentKey, stored: Stored, num_bytes: int = 20_000) -> int:
    """The number of a block, which must be whole and the very one that was put under its key."""
    number = int.from_bytes(each, "big")
    open_sealed(stored.data)
    assert stored.data == block(number, num_bytes).data, f"block {number} is another one"
    return number


def run(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a process of its own to its end."""
    return subprocess.run(
        command(code, *args), env=environment(), capture_output=True, text=True, timeout=120, check=False
    )


def start(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(code, *args), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def command(code: str, *args: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, args)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
