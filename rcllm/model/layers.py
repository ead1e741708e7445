"""A decoder layer on either side of its attention, and all of it in one call of the compiled kernels.

Knows nothing of caches. Invariant: one call gives a row the same bits as the steps of a layer do, one by one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from rcllm.model.attend.native import Kernels
from rcllm.model.packed import Packed
from rcllm.model.rope import Rope
from rcllm.model.spec import ModelSpec

Linear = Callable[[torch.Tensor], torch.Tensor]  # [rows, in] -> [rows, out]
Norm = torch.Tensor | None  # weight of a norm over each head, [head_dim]


@dataclass(frozen=True, slots=True)
class LayerParts:
    """Weights of norms, and matrices, of one layer."""

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    q_norm: Norm
    k_norm: Norm
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear


class Layer(Protocol):
    """Both methods change the residual stream [rows, d] in place."""

    def project(self, residual: torch.Tensor, delta: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
        """residual += delta; the fused rows of its norm [rows, (H + 2·KV)·D], queries and keys turned."""

    def feed(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """residual += the projection of `attended` [rows, H·D]; the MLP of its norm [rows, d]."""


@dataclass(frozen=True, slots=True)
class Copied:
    """K and V of some rows of a pass, as they stand in the fused rows."""

    rows: torch.Tensor  # int64 [n]
    to: torch.Tensor  # [2, kv_heads, n, D]


class Workspace(threading.local):
    """Memory for what is handed on within a layer, kept for the next: new pages are slow to write to.

    It is as large as the largest pass needed; nothing in it is alive between two layers. Each thread has its own, since
    engines of several threads may share a decoder.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def of(self, num_floats: int) -> torch.Tensor:
        if len(self._memory) < num_floats:
            self._memory = torch.empty(num_floats)
        return self._memory


class CompiledLayer:
    """In fp32 between products, with matrices that are packed."""

    def __init__(self, spec: ModelSpec, rope: Rope, kernels: Kernels, parts: LayerParts, workspace: Workspace) -> None:
        """parts: with packed matrices; workspace: of all layers."""
        matrices = [m for m in (parts.qkv, parts.o, parts.gate_up, parts.down) if isinstance(m, Packed)]
        assert len(matrices) == 4, "the kernels multiply with packed matrices"
        self._workspace = workspace
        self._spec, self._rope, self._kernels = spec, rope, kernels
        self._parts = parts  # the table points into them
        norms = parts.input_norm, parts.post_norm, parts.q_norm, parts.k_norm
        pointers = torch.tensor([0 if norm is None else norm.data_ptr() for norm in norms])
        self._table = torch.cat([pointers, *(matrix.table for matrix in matrices)])
        self._heads = torch.tensor([spec.num_heads, spec.num_kv_heads, spec.head_dim])

    def project(self, residual: torch.Tensor, delta: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
        qkv = residual.new_empty(len(residual), self._spec.q_size + 2 * self._spec.kv_size)
        rows = residual, delta, len(residual), self._room(len(residual)), qkv
        self._kernels.call("project", *self._turned(positions), *rows, torch.get_num_threads())
        return qkv

    def feed(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        delta = torch.empty_like(residual)
        rows = residual, attended.contiguous(), len(residual), self._room(len(residual)), delta
        self._kernels.call("feed", self._table, self._spec.rms_eps, *rows, torch.get_num_threads())
        return delta

    def run(
        self,
        residual: torch.Tensor,
        delta: torch.Tensor | None,
        positions: torch.Tensor,
        number: int,
        reads: torch.Tensor,
        copied: Copied | None,
    ) -> torch.Tensor:
        """All of the layer: what `feed` gives after attention by `reads`, the table of NativeSegmented."""
        first, delta = delta is None, torch.empty_like(residual) if delta is None else delta
        rows = residual, delta, int(first), len(residual), self._room(len(residual)), reads, number
        kept = (None, 0, None) if copied is None else (copied.rows, len(copied.rows), copied.to)
        self._kernels.call("layer", *self._turned(positions), *rows, *kept, torch.get_num_threads())
        return delta

    def _turned(self, positions: torch.Tensor) -> tuple[torch.Tensor | float, ...]:
        rope = self._rope
        return self._table, self._heads, self._spec.rms_eps, rope.scaled_cos, rope.scaled_sin, positions

    def _room(self, rows: int) -> torch.Tensor:
        return self._workspace.of(self._kernels.count("room", self._table, rows))
