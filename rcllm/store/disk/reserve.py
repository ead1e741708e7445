"""A little room that is kept for erasing: removing blocks needs some pages, and a full disk has none.

Knows nothing of blocks. Invariant: the file holds no data.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_NAME = "reserve"
_NUM_BYTES = 1 << 20


def keep(folder: Path) -> None:
    """Sets the room aside, where there is room."""
    file = folder / _NAME
    with contextlib.suppress(OSError):
        if not file.exists() or file.stat().st_size < _NUM_BYTES:
            file.write_bytes(bytes(_NUM_BYTES))


def release(folder: Path) -> bool:
    """Gives it to the file system; False where there was none left."""
    try:
        had = (folder / _NAME).stat().st_size
        os.truncate(folder / _NAME, 0)
    except OSError:
        return False
    return had > 0
