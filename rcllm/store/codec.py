"""KV blocks as bytes and back: the one module of the store that knows tensors.

Knows nothing of tiers, nor of how bytes are sealed. Invariant: `decode` gives the very tensor that `encode` was given,
or raises CorruptBlockError.
"""

from __future__ import annotations

import numpy as np
import torch

from rcllm.store.sealed import begin, finish, open_sealed, sealed_bytes

# by the names of the configuration; int8 is for KV alone, with its scales in each row
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def encode(kv: torch.Tensor) -> memoryview:
    """`kv` [layers, 2, kv_heads, len, columns], fp32, fp16, bf16 or int8 with its scales, on any device."""
    out = memoryview(bytearray(encoded_bytes(kv)))
    place(kv, out).copy_(kv.detach())
    return finish(out)


def encoded_bytes(kv: torch.Tensor) -> int:
    """How many bytes `encode` gives."""
    return sealed_bytes(_NAMES[kv.dtype], kv.shape)


def place(kv: torch.Tensor, out: memoryview) -> torch.Tensor:
    """Where the numbers of a block like `kv` belong in `out`, whose header it writes; `sealed.finish` it afterwards."""
    room = begin(out, _NAMES[kv.dtype], kv.shape)
    return torch.frombuffer(room, dtype=kv.dtype).view(kv.shape) if kv.numel() else torch.empty_like(kv, device="cpu")


def decode(data: memoryview, *, checked: bool = False) -> torch.Tensor:
    """The block on the CPU, where `data` lies: it keeps `data` alive. Never write to it. Raises CorruptBlockError.

    checked: the bytes were seen to be whole, and have not been out of this process's memory since.
    """
    sealed = open_sealed(data, checked=checked)
    raw = np.asarray(_Bytes(sealed.kv)) if sealed.kv.nbytes else np.empty(0, dtype=np.uint8)
    return torch.from_numpy(raw).view(DTYPES[sealed.dtype]).reshape(sealed.shape)


class _Bytes:
    """Bytes as numpy takes them in place. They are called writable, since torch warns of all else; nobody writes."""

    def __init__(self, data: memoryview) -> None:
        self._view = np.frombuffer(data, dtype=np.uint8)  # whoever has an array of this keeps `data` alive
        address = self._view.__array_interface__["data"][0]
        self.__array_interface__ = {"data": (address, False), "shape": self._view.shape, "typestr": "|u1", "version": 3}
