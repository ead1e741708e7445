"""KV blocks as bytes and back: the one module of the store that knows tensors.

    magic, version, dtype, five sizes, XXH3 of all the rest | KV, as it lies in memory

Knows nothing of tiers. Invariant: `decode` gives the very tensor that `encode` was given, or raises CorruptBlockError.
"""

from __future__ import annotations

import math
import struct

import numpy as np
import torch
import xxhash

from rcllm.errors import RcllmError

_HEADER = struct.Struct("<4sHH5I4xQ")  # 40 bytes, so that what follows is aligned to 8
_CHECKSUM = struct.Struct("<Q")
_CHECKED = _HEADER.size - _CHECKSUM.size  # bytes of the header before the checksum, which it covers
_MAGIC, _VERSION = b"rKVb", 1
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_CODES = {code: dtype for dtype, code in _DTYPES.items()}


class CorruptBlockError(RcllmError):
    """Bytes that are no block, not a whole one, or not the one that was written: a miss, for whoever asked."""


def encode(kv: torch.Tensor) -> memoryview:
    """`kv` [layers, 2, kv_heads, len, head_dim], fp32, fp16 or bf16, on any device."""
    raw = kv.detach().to("cpu").contiguous().view(torch.uint8).numpy()
    out = bytearray(_HEADER.size + raw.nbytes)
    payload = memoryview(out)[_HEADER.size :]
    np.frombuffer(payload, dtype=np.uint8)[:] = raw.ravel()
    _HEADER.pack_into(out, 0, _MAGIC, _VERSION, _DTYPES[kv.dtype], *kv.shape, 0)
    _CHECKSUM.pack_into(out, _CHECKED, _checksum(memoryview(out)))
    return memoryview(out)


def decode(data: memoryview) -> torch.Tensor:
    """The block, on the CPU; a view of `data` where that may be written to, else a copy. Raises CorruptBlockError."""
    if data.nbytes < _HEADER.size:
        raise CorruptBlockError(f"{data.nbytes} bytes are no KV block; its header alone has {_HEADER.size}")
    magic, version, code, *shape, checksum = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != _VERSION or code not in _CODES:
        raise CorruptBlockError(f"expected a KV block of format {_VERSION}, got {magic!r}, format {version}")
    num_bytes = math.prod(shape) * _CODES[code].itemsize
    if data.nbytes != _HEADER.size + num_bytes or _checksum(data) != checksum:
        raise CorruptBlockError(f"a KV block of {num_bytes} bytes is not whole, or not as it was written")
    raw = np.frombuffer(data[_HEADER.size :], dtype=np.uint8)
    return torch.from_numpy(raw if raw.flags.writeable else raw.copy()).view(_CODES[code]).reshape(shape)


def _checksum(data: memoryview) -> int:
    """Of the header, but for the checksum's own place, and of the KV."""
    return xxhash.xxh3_64_intdigest(data[_HEADER.size :], seed=xxhash.xxh3_64_intdigest(data[:_CHECKED]))
