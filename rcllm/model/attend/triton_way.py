"""What both ways of attending on a GPU have in common: tables and parts on the device, and what kernels are made for.

Knows nothing of which way suits a pass. Invariant: tasks that share rows write parts, and `merge` joins all of them.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from rcllm.late import Late
from rcllm.model.attend.triton_tables import UNIT, DeviceTables, Shape, Tiling, interpreting, padded, share_of
from rcllm.model.rope import Rope
from rcllm.model.spec import INT8_GROUP, ModelSpec, kv_row_bytes

_KERNELS, _LANGUAGE = Late("rcllm.model.attend.triton_kernels"), Late("triton.language")  # triton is optional
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}  # of rows


class PartShape(Protocol):
    """What the kernels of one way are compiled for, and how long its tables are."""

    @property
    def tiling(self) -> Tiling: ...

    @property
    def slots(self) -> int: ...

    @property
    def tables(self) -> tuple[Shape, ...]: ...


class PartTables(Protocol):
    """The groups of a pass that are attended to in one way, in numpy."""

    def arrays(self, anchor: int) -> list[npt.NDArray[np.generic]]:
        """As they are sent. anchor: the address that the distances of cached KV are counted from."""


class Way:
    """Of one shape: tables on the device, and room for what tasks of one row tile find."""

    def __init__(self, spec: ModelSpec, rope: Rope, shape: PartShape) -> None:
        self._spec, self._rope, device = spec, rope, rope.cos.device
        self._tables, self._tile_rows = DeviceTables(shape.tables, device), shape.tiling.rows(spec)
        self._scale = math.log2(math.e) / math.sqrt(spec.head_dim)  # the kernels' exponential is base 2
        slots = (max(1, shape.slots), self._tile_rows, spec.num_heads)
        self._parts = torch.empty(*slots, spec.head_dim, device=device), torch.empty(slots, device=device)

    def send(self, host: PartTables) -> None:
        """Tells of another pass of this shape."""
        anchor = self._rope.cos.data_ptr()
        assert anchor % UNIT == 0
        self._tables.send(host.arrays(anchor))

    def _merge(self, output: torch.Tensor, lse: torch.Tensor, merges: torch.Tensor) -> None:
        """Joins the parts: outputs and logsumexps, by slot."""
        if len(merges):
            _KERNELS.merge_kernel[len(merges), self._tile_rows, self._spec.num_heads](
                *(*self._parts, output, lse, merges), **merge_constants(self._spec, self._tile_rows), num_warps=1
            )


def head_constants(spec: ModelSpec) -> dict[str, object]:
    """What kernels are compiled for that read heads whole."""
    width = spec.head_dim
    heads = {"H": spec.num_heads, "KV": spec.num_kv_heads, "SHARE_PADDED": share_of(spec)}
    return {**heads, "WIDTH": width, "WIDTH_PADDED": padded(width)}


def reading_constants(spec: ModelSpec, kinds: int) -> dict[str, object]:
    """What reading cached KV is compiled for."""
    half = spec.head_dim // 2
    return {
        "KV": spec.num_kv_heads,
        "HALF": half,
        "HALF_PADDED": max(16, padded(half)),
        "KINDS": kinds,
        "GROUP": INT8_GROUP,
        "ALIGNED": math.gcd(16, kv_row_bytes(spec.head_dim, 1)),
    }


def row_constants(tiling: Tiling, dtype: torch.dtype) -> dict[str, object]:
    """What products of rows are compiled for."""
    emulates = {"DTYPE": getattr(_LANGUAGE, _DTYPES[dtype]), "EMULATE": interpreting()}
    return {"ROWS": tiling.queries, "KEYS": tiling.keys, **emulates}


def merge_constants(spec: ModelSpec, tile_rows: int) -> dict[str, object]:
    """What `merge_kernel` is compiled for."""
    width = spec.head_dim
    return {"H": spec.num_heads, "WIDTH": width, "WIDTH_PADDED": padded(width), "TILE_ROWS": tile_rows}
