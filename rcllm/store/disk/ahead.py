"""Announces reads of mapped memory to the system, which then brings the pages in while others compute.

Knows nothing of blocks. Where the platform takes no advice, nothing happens.
"""

from __future__ import annotations

import ctypes
import mmap

from rcllm.store.disk.lease import address_of

_WILLNEED: int | None = getattr(mmap, "MADV_WILLNEED", None)
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if _WILLNEED is not None else None
if _madvise is not None:
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def announce(data: memoryview) -> None:
    """That these bytes of a mapped file will be read. Returns before they are there."""
    if _madvise is not None:
        address = address_of(data)
        start = address - address % mmap.PAGESIZE
        _madvise(start, address + len(data) - start, _WILLNEED)
