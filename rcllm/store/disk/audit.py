"""What was erased, and when: one line of JSON for each erasure, beside the blocks, on the disk before it is told.

Owners stand there as their digests. Knows nothing of blocks. Invariant: lines are added at the end, and none goes; one
that was cut short stands before the next.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rcllm.store.disk.edit import ErasedOwner
from rcllm.store.owners import digest

NAME = "audit.jsonl"
_PRECISION_S = 1e-3  # to which times are cut off


@dataclass(frozen=True, slots=True)
class Erasure:
    """One owner whose blocks were removed, or all that were removed before, where their bytes were overwritten."""

    number: int  # see DiskStore.erased_since
    owner: str | None  # its alias; None: every owner up to `number`
    blocks: int
    bytes: int
    scrubbed: bool  # whether no byte of them is left in the file


def append(folder: Path, erasures: Iterable[Erasure], now: float) -> None:
    """Raises OSError."""
    when = datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds")
    lines = "".join(json.dumps({"time": when, **asdict(erasure)}) + "\n" for erasure in erasures)
    handle = os.open(folder / NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(handle, lines.encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def erased_owners(folder: Path) -> list[ErasedOwner]:
    """Whom the lines name, and when that was at the latest; also those whom the store remembers no more.

    Raises OSError.
    """
    try:
        lines = (folder / NAME).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    told = [json.loads(line[line.rindex("{") :]) for line in lines if line.endswith("}")]
    return [
        ErasedOwner(digest(each["owner"]), datetime.fromisoformat(each["time"]).timestamp() + _PRECISION_S)
        for each in told
        if each["owner"] is not None
    ]
