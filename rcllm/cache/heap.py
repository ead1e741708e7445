"""The C library's heap: what keeps the memory of a process that computes and caches near what it uses.

glibc gives each thread that allocates an arena of its own: four threads that ranked in turns held 300 MB more than one.
It also keeps what blocks of many sizes leave between others: beside a pool of 150 MB that evicts all the time, 160 MB
within a minute (docs/log.md). Knows nothing of blocks. Where there is no glibc, nothing happens.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_M_ARENA_MAX = -8  # of mallopt(3)
_ARENAS = 2


def share_arenas() -> bool:
    """Lets all threads of this process share two arenas; returns whether it does. For programs, not for libraries."""
    mallopt = _of_glibc("mallopt")
    return mallopt is not None and mallopt(_M_ARENA_MAX, _ARENAS) == 1


def hand_back() -> bool:
    """Gives the system all pages that nothing lies on, in 3 to 30 ms; returns whether there were any."""
    malloc_trim = _of_glibc("malloc_trim")
    return malloc_trim is not None and malloc_trim(0) == 1


def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
