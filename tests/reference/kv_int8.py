"""The slow, obvious twin of `rcllm.model.kv_int8`: one group of values after the other, scales by their bits."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt
import torch

GROUP = 16
Row = npt.NDArray[np.int8]


def quantise(values: list[float]) -> Row:
    """One row of a token and head: its levels, then the two bytes of each group's scale."""
    levels, scales = list[int](), b""
    for start in range(0, len(values), GROUP):
        group = np.array(values[start : start + GROUP], dtype=np.float32)
        high = _bf16(np.abs(group).max() / np.float32(127))
        scale = _float(high)
        for value in group:
            levels.append(int(np.clip(np.rint(value / scale), -127, 127)) if scale else 0)
        scales += high
    return np.frombuffer(np.array(levels, dtype=np.int8).tobytes() + scales, dtype=np.int8)


def widen(block: torch.Tensor) -> torch.Tensor:
    """[…, columns] in int8 → […, head_dim] in fp64."""
    rows = block.reshape(-1, block.shape[-1]).numpy()
    return torch.tensor([_widen_row(row) for row in rows], dtype=torch.float64).reshape(*block.shape[:-1], -1)


def _widen_row(row: Row) -> list[float]:
    head_dim = next(d for d in range(len(row)) if d + 2 * -(-d // GROUP) == len(row))
    scales = row[head_dim:].tobytes()
    return [
        float(level) * float(_float(scales[2 * (d // GROUP) : 2 * (d // GROUP) + 2]))
        for d, level in enumerate(row[:head_dim].tolist())
    ]


def _bf16(value: np.float32) -> bytes:
    """Rounded to the nearest, ties to even: the upper half of its bits."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


def _float(high: bytes) -> np.float32:
    (value,) = struct.unpack("<f", b"\0\0" + high)
    return np.float32(value)
