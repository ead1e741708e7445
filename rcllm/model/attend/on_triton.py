"""Attention over segments on a GPU: one launch for each layer of a pass, whatever rows and segments are in it.

Cached blocks are read in place, in any dtype and anywhere in memory. Where few rows read many keys, keys are divided
among programs, and a second, small launch merges them by their logsumexp. Knows nothing of when it is used.
Invariant: nothing in a layer waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from rcllm.late import Late
from rcllm.model.attend.contract import Attended
from rcllm.model.attend.segments import Group
from rcllm.model.attend.triton_tables import HostTables, Tables, Tiling, interpreting, padded
from rcllm.model.rope import Rope
from rcllm.model.spec import INT8_GROUP, ModelSpec, kv_row_bytes

_KERNELS, _LANGUAGE = Late("rcllm.model.attend.triton_kernels"), Late("triton.language")  # triton is optional
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}  # of rows


def triton_fits(spec: ModelSpec, device: torch.device) -> bool:
    """Whether the kernels can run here, and compute this model."""
    runs = find_spec("triton") is not None and (device.type == "cuda" or interpreting())
    return runs and spec.head_dim % 16 == 0


class TritonAttend:
    """One pass's attention, on a GPU or in Triton's interpreter."""

    name = "triton"
    bytes_copied = 0

    def __init__(
        self,
        spec: ModelSpec,
        rope: Rope,
        tables: Tables,
        kinds: int,
        groups: Sequence[Group] = (),
        output: torch.Tensor | None = None,
    ) -> None:
        """kinds: bits of the dtypes that cached KV may have; groups: keeps alive the memory that the tables tell of.

        output: [rows, H·D], what every layer writes to, in rows of which the tables tell; None: each makes its own.
        """
        self._spec, self._rope, self._tables, self._kinds, self._groups = spec, rope, tables, kinds, groups
        self._output = output

    @classmethod
    def of(
        cls, spec: ModelSpec, rope: Rope, groups: Sequence[Group], dtype: torch.dtype, tiling: Tiling | None = None
    ) -> TritonAttend:
        """Sends the tables of a pass whose rows are in `dtype`. tiling: None for what suits groups and device."""
        device = rope.cos.device
        tiling = tiling or Tiling.of(spec, groups, device, dtype)
        host = HostTables(spec, groups, tiling)
        tables = Tables(spec, host.layout, tiling, device)
        tables.send(host, anchor=rope.cos)
        return cls(spec, rope, tables, host.kinds, groups)

    def __call__(self, layer: int, qkv: torch.Tensor) -> Attended:
        spec, rope = self._spec, self._rope
        tables, tiling = self._tables, self._tables.tiling
        output = qkv.new_empty(qkv.shape[0], spec.q_size) if self._output is None else self._output
        lse = torch.empty(qkv.shape[0], spec.num_heads, device=qkv.device)
        parts = (tables.part_output, tables.part_lse)
        pass_tables = (tables.tiles, tables.tasks, tables.visits, tables.rows, tables.bits)
        scale = math.log2(math.e) / math.sqrt(spec.head_dim)  # the kernel's exponential is base 2
        numbers = (layer, scale, qkv.stride(0))
        _KERNELS.attend_kernel[len(tables.tasks), spec.num_kv_heads](
            *(qkv, output, lse, *parts, rope.cos, *pass_tables, rope.cos, rope.sin, *numbers),
            **self.constants(spec, tiling, self._kinds, qkv.dtype),
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )
        if len(tables.merges):
            _KERNELS.merge_kernel[len(tables.merges), tables.tile_rows, spec.num_heads](
                *(*parts, output, lse, tables.merges),
                **self.merge_constants(spec, tables.tile_rows),
                num_warps=1,
            )
        return Attended(output, lse)

    @staticmethod
    def constants(spec: ModelSpec, tiling: Tiling, kinds: int, dtype: torch.dtype) -> dict[str, object]:
        """What `attend_kernel` is compiled for."""
        return {
            "H": spec.num_heads,
            "KV": spec.num_kv_heads,
            "HALF": spec.head_dim // 2,
            "HALF_PADDED": max(16, padded(spec.head_dim // 2)),
            "SHARE_PADDED": padded(spec.num_heads // spec.num_kv_heads),
            "ROWS": tiling.queries,
            "KEYS": tiling.keys,
            "KINDS": kinds,
            "GROUP": INT8_GROUP,
            "ALIGNED": math.gcd(16, kv_row_bytes(spec.head_dim, 1)),
            "DTYPE": getattr(_LANGUAGE, _DTYPES[dtype]),
            "EMULATE": interpreting(),
        }

    @staticmethod
    def merge_constants(spec: ModelSpec, tile_rows: int) -> dict[str, object]:
        """What `merge_kernel` is compiled for."""
        width = spec.head_dim
        return {"H": spec.num_heads, "WIDTH": width, "WIDTH_PADDED": padded(width), "TILE_ROWS": tile_rows}
