"""Page-locked memory of the host, from which and to which a GPU copies beside what it computes.

Knows nothing of blocks. Invariant: where the system refuses to lock so much, the memory is there all the same, and a
warning says so.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import numpy as np
import numpy.typing as npt
import torch

from rcllm.errors import ConfigError, StoreWarning


def page_locked(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Bytes in whole pages, registered as they are: torch's own allocator would round them up to a power of two.

    Raises ConfigError where the machine has not so many.
    """
    try:
        memory: npt.NDArray[np.uint8] = np.frombuffer(mmap(-1, num_bytes, flags=MAP_PRIVATE | MAP_ANONYMOUS), np.uint8)
    except OSError as error:
        raise ConfigError(f"{num_bytes / 1e9:.1f} GB of host memory: {error}. Lower store.host_mb") from error
    runtime = torch.cuda.cudart()
    address = memory.ctypes.data
    refused = int(runtime.cudaHostRegister(address, num_bytes, 0))
    if refused:
        with contextlib.suppress(RuntimeError):  # CUDA tells the next kernel of it, whoever launches that
            torch.ones(1, device="cuda")
        warnings.warn(
            f"the system refuses to lock {num_bytes / 1e9:.1f} GB of host memory (CUDA error {refused}): blocks from "
            "there go through a smaller buffer, which takes longer. Allow more (ulimit -l), or lower store.host_mb",
            StoreWarning,
            stacklevel=2,
        )
    else:
        weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
    return memory
