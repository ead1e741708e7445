"""One setting of the C library that bounds the memory of processes in which several threads compute.

glibc gives each thread that allocates an arena of its own, and hands little of one back: four threads that ranked in
turns held 300 MB more than one (docs/log.md). Knows nothing of engines. Where there is no glibc, nothing happens.
"""

from __future__ import annotations

import ctypes
import sys

_M_ARENA_MAX = -8  # of mallopt(3)
_ARENAS = 2


def share_arenas() -> bool:
    """Lets all threads of this process share two arenas; returns whether it does. For programs, not for libraries."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and mallopt(_M_ARENA_MAX, _ARENAS) == 1
