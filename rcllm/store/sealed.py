"""Blocks as they lie in a store: a versioned header, a checksum, and KV as bytes. Never imports torch.

    magic, version, dtype, five sizes, XXH3 of all the rest | KV, as it lies in memory

Knows nothing of tensors or tiers. Invariant: `open_sealed` gives the very bytes that were sealed, or raises
CorruptBlockError. The header has 48 bytes: behind the 16 of an LMDB page, KV begins at a multiple of 64.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from rcllm.errors import RcllmError

_HEADER = struct.Struct("<4sHH5I12xQ")
HEADER_BYTES = _HEADER.size
_CHECKSUM = struct.Struct("<Q")
_CHECKED = HEADER_BYTES - _CHECKSUM.size  # bytes of the header before the checksum, which it covers
_MAGIC = b"rKVb"
FORMAT_VERSION = 2
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}  # by dtype; its place is its code in the header
_DTYPES = tuple(ITEM_BYTES)


class CorruptBlockError(RcllmError):
    """Bytes that are no block, not a whole one, or not the one that was written: a miss, for whoever asked."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """What a block is, and its bytes."""

    dtype: str
    shape: tuple[int, ...]  # [layers, 2, kv_heads, len, columns]
    kv: memoryview  # of the bytes that were opened


def seal(dtype: str, shape: Sequence[int]) -> tuple[bytearray, memoryview]:
    """Room for a block, and the part of it that the KV belongs in; `finish` it afterwards."""
    out = bytearray(sealed_bytes(dtype, shape))
    return out, begin(memoryview(out), dtype, shape)


def sealed_bytes(dtype: str, shape: Sequence[int]) -> int:
    """How large a block is, with its header."""
    return HEADER_BYTES + math.prod(shape) * ITEM_BYTES[dtype]


def begin(out: memoryview, dtype: str, shape: Sequence[int]) -> memoryview:
    """The same as `seal` in room that is there already, whose KV it returns."""
    _HEADER.pack_into(out, 0, _MAGIC, FORMAT_VERSION, _DTYPES.index(dtype), *shape, 0)
    return out[HEADER_BYTES:]


def finish(out: bytearray | memoryview) -> memoryview:
    """Writes the checksum of a block whose KV is in its place."""
    _CHECKSUM.pack_into(out, _CHECKED, _checksum(memoryview(out)))
    return memoryview(out)


def open_sealed(data: memoryview, *, checked: bool = False) -> Sealed:
    """Raises CorruptBlockError for what is not whole, or not as it was written; `checked`: its KV was seen to be."""
    if data.nbytes < HEADER_BYTES:
        raise CorruptBlockError(f"{data.nbytes} bytes are no KV block; its header alone has {HEADER_BYTES}")
    magic, version, code, *shape, checksum = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != FORMAT_VERSION or code >= len(_DTYPES):
        raise CorruptBlockError(f"expected a KV block of format {FORMAT_VERSION}, got {magic!r}, format {version}")
    dtype = _DTYPES[code]
    if data.nbytes != sealed_bytes(dtype, shape) or not (checked or _checksum(data) == checksum):
        raise CorruptBlockError(f"a KV block of {data.nbytes} bytes is not whole, or not as it was written")
    return Sealed(dtype, tuple(shape), data[HEADER_BYTES:])


def is_whole(data: memoryview) -> bool:
    """Whether `open_sealed` would take it."""
    try:
        open_sealed(data)
    except CorruptBlockError:
        return False
    return True


def _checksum(data: memoryview) -> int:
    """Of the header, but for the checksum's own place, and of the KV."""
    return xxhash.xxh3_64_intdigest(data[HEADER_BYTES:], seed=xxhash.xxh3_64_intdigest(data[:_CHECKED]))
