"""The steps of a decoder layer other than attention: in plain torch, on the compiled CPU kernels, and on a GPU.

Knows nothing of caches. Invariant: all variants compute the same function (fp32, error ≤ 1e-5); torch is the
reference.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from rcllm.late import Late
from rcllm.model.attend.native import Kernels
from rcllm.model.attend.triton_tables import padded
from rcllm.model.layers import CompiledLayer, Layer, LayerParts, Linear, Norm, Workspace
from rcllm.model.level_products import LevelProduct, Scratch
from rcllm.model.packed import PACKINGS, QuantisedMatrix
from rcllm.model.quantised import Matrix, Quantised, round_rows, wide
from rcllm.model.rope import Rope
from rcllm.model.spec import ModelSpec

_ON_GPU = Late("rcllm.model.layer_kernels")  # imports triton, which is optional
_COLUMNS = 1024  # of one program of SwiGLU


def torch_linear(weight: torch.Tensor, bias: torch.Tensor | None, packing: str = "fp32") -> Linear:
    """packing: bf16 or int8 beside activations in fp32 is their rounding alone, and no quicker.

    int8: the matrix has the values of its levels already.
    """
    if packing == "bf16":
        rounded = weight.bfloat16().float()
        return lambda x: F.linear(x.bfloat16().float(), rounded, bias)
    if packing == "int8":
        return lambda x: F.linear(round_rows(x), weight, bias)
    return lambda x: F.linear(x, weight, bias)


class Ops(Protocol):
    """What a layer needs beside attention. `add_norm` and `rotate` change their first argument in place."""

    def linear(self, weight: Matrix, bias: torch.Tensor | None) -> Linear: ...

    def layer(self, parts: LayerParts) -> Layer:
        """Of matrices that `linear` made."""

    def add_norm(self, residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        """residual += delta; returns RMSNorm(residual) · weight. All [rows, hidden]."""

    def rotate(self, qkv: torch.Tensor, positions: torch.Tensor, q_norm: Norm, k_norm: Norm) -> None:
        """Norms (Qwen3) and turns the heads of q and k in the fused rows [rows, (H + 2·KV)·D]."""

    def keep(self, qkv: torch.Tensor, rows: torch.Tensor, back: torch.Tensor | None, to: torch.Tensor) -> None:
        """K and V of some `rows` of qkv [rows, (H + 2·KV)·D] to [2, KV, len, D], K turned back by `back` positions."""

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[rows, 2·ffn] -> [rows, ffn]."""


class SteppedLayer:
    """A layer one step after the other."""

    def __init__(self, ops: Ops, parts: LayerParts) -> None:
        self._ops, self._parts = ops, parts

    def project(self, residual: torch.Tensor, delta: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
        parts = self._parts
        qkv = parts.qkv(self._ops.add_norm(residual, delta, parts.input_norm))
        self._ops.rotate(qkv, positions, parts.q_norm, parts.k_norm)
        return qkv

    def feed(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        parts = self._parts
        normed = self._ops.add_norm(residual, parts.o(attended), parts.post_norm)
        return parts.down(self._ops.swiglu(parts.gate_up(normed)))


def keep_rows(
    spec: ModelSpec, rope: Rope, qkv: torch.Tensor, rows: torch.Tensor, back: torch.Tensor | None, to: torch.Tensor
) -> None:
    """See `Ops.keep`."""
    k, v = qkv[rows, spec.q_size :].unflatten(1, (2, spec.num_kv_heads, spec.head_dim)).unbind(1)
    to[0] = (k if back is None else rope.shift(k, -back)).transpose(0, 1)
    to[1] = v.transpose(0, 1)


class TorchOps:
    """Plain torch, any dtype, any device."""

    def __init__(self, spec: ModelSpec, rope: Rope, packing: str = "fp32") -> None:
        """packing: fp32 for the dtype of the weights, whatever it is; bf16 or int8."""
        self.spec, self.rope, self._packing = spec, rope, packing

    def linear(self, weight: Matrix, bias: torch.Tensor | None) -> Linear:
        """Levels are widened once: on torch alone they are the same numbers, and save nothing."""
        return torch_linear(wide(weight), bias, self._packing)

    def layer(self, parts: LayerParts) -> Layer:
        return SteppedLayer(self, parts)

    def add_norm(self, residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        if delta is not None:
            residual += delta
        return self._norm(residual, weight)

    def rotate(self, qkv: torch.Tensor, positions: torch.Tensor, q_norm: Norm, k_norm: Norm) -> None:
        spec = self.spec
        heads = qkv[:, : spec.q_size + spec.kv_size].unflatten(1, (-1, spec.head_dim))
        q, k = heads.split((spec.num_heads, spec.num_kv_heads), dim=1)
        if q_norm is not None and k_norm is not None:
            q.copy_(self._norm(q, q_norm))
            k.copy_(self._norm(k, k_norm))
        heads.copy_(self.rope.rotate(heads, positions))

    def keep(self, qkv: torch.Tensor, rows: torch.Tensor, back: torch.Tensor | None, to: torch.Tensor) -> None:
        keep_rows(self.spec, self.rope, qkv, rows, back, to)

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.spec.rms_eps)).to(x.dtype) * weight


class TritonOps(TorchOps):
    """On a GPU, or in Triton's interpreter: products by torch, but for levels, and one launch for each other step."""

    def __init__(self, spec: ModelSpec, rope: Rope, packing: str = "fp32") -> None:
        super().__init__(spec, rope, packing)
        self._scratch: Scratch | None = None  # made with the first matrix in levels

    def linear(self, weight: Matrix, bias: torch.Tensor | None) -> Linear:
        if not isinstance(weight, Quantised) or self._packing != "fp32":
            return super().linear(weight, bias)
        self._scratch = self._scratch or Scratch(weight.device)
        return LevelProduct(weight, bias, self._scratch)

    def add_norm(self, residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(residual)
        rows, size = residual.shape
        adds = delta is not None
        tensors = (residual, delta if adds else residual, weight, output)
        _ON_GPU.add_norm_kernel[rows,](*tensors, size, self.spec.rms_eps, ADDS=adds, SIZE_PADDED=padded(size))
        return output

    def rotate(self, qkv: torch.Tensor, positions: torch.Tensor, q_norm: Norm, k_norm: Norm) -> None:
        spec, rope = self.spec, self.rope
        norms = q_norm is not None and k_norm is not None
        weights = (q_norm, k_norm) if norms else (qkv, qkv)
        _ON_GPU.rotate_kernel[len(qkv),](
            *(qkv, positions, rope.scaled_cos, rope.scaled_sin, *weights, qkv.stride(0), spec.rms_eps),
            **self.rotate_constants(norms),
        )

    def rotate_constants(self, norms: bool) -> dict[str, object]:
        """What `rotate_kernel` is compiled for."""
        spec = self.spec
        heads, half = spec.num_heads + spec.num_kv_heads, spec.head_dim // 2
        sizes = {"HEADS": heads, "HEADS_PADDED": padded(heads), "HALF": half, "HALF_PADDED": padded(half)}
        return {"NORMS": norms, "H": spec.num_heads, **sizes}

    def keep(self, qkv: torch.Tensor, rows: torch.Tensor, back: torch.Tensor | None, to: torch.Tensor) -> None:
        rope, shifts = self.rope, back is not None
        tables = (rows, rows if back is None else back, rope.cos, rope.sin)
        _ON_GPU.keep_kernel[len(rows),](
            *(qkv, *tables, to, qkv.stride(0), len(rows)), **self.keep_constants(shifts=shifts)
        )

    def keep_constants(self, *, shifts: bool) -> dict[str, object]:
        """What `keep_kernel` is compiled for."""
        spec = self.spec
        heads, half = spec.num_kv_heads, spec.head_dim // 2
        sizes = {"KV": heads, "KV_PADDED": padded(heads), "HALF": half, "HALF_PADDED": padded(half)}
        return {"H": spec.num_heads, **sizes, "SHIFTS": shifts}

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        rows, double = gate_up.shape
        size = double // 2
        output, columns = gate_up.new_empty(rows, size), min(_COLUMNS, padded(size))
        _ON_GPU.swiglu_kernel[rows, -(-size // columns)](gate_up, output, size, COLUMNS=columns)
        return output


class NativeOps:
    """fp32 on the CPU between products: fused passes over memory, and matrices that are packed once."""

    def __init__(self, spec: ModelSpec, rope: Rope, kernels: Kernels, packing: str = "fp32") -> None:
        """packing: how matrices are kept and multiplied, a name of PACKINGS."""
        self.spec, self.rope, self.kernels = spec, rope, kernels
        self._packing, self._workspace = packing, Workspace()

    def linear(self, weight: Matrix, bias: torch.Tensor | None) -> Linear:
        if isinstance(weight, Quantised):
            return QuantisedMatrix(self.kernels, weight, bias, self._packing)
        return PACKINGS[self._packing](self.kernels, weight, bias)

    def layer(self, parts: LayerParts) -> Layer:
        return CompiledLayer(self.spec, self.rope, self.kernels, parts, self._workspace)

    def add_norm(self, residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(residual)
        rows, size = residual.shape
        threads = torch.get_num_threads()
        self.kernels.call("add_norm", residual, delta, weight, self.spec.rms_eps, rows, size, out, threads)
        return out

    def rotate(self, qkv: torch.Tensor, positions: torch.Tensor, q_norm: Norm, k_norm: Norm) -> None:
        spec, rope = self.spec, self.rope
        heads = torch.tensor([spec.num_heads, spec.num_kv_heads, spec.head_dim])
        tables = (heads, positions, rope.scaled_cos, rope.scaled_sin, q_norm, k_norm, spec.rms_eps)
        self.kernels.call("rotate", qkv, qkv.stride(0), len(qkv), *tables, torch.get_num_threads())

    def keep(self, qkv: torch.Tensor, rows: torch.Tensor, back: torch.Tensor | None, to: torch.Tensor) -> None:
        keep_rows(self.spec, self.rope, qkv, rows, back, to)

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        rows, double = gate_up.shape
        out = gate_up.new_empty(rows, double // 2)
        self.kernels.call("swiglu", gate_up, rows, double // 2, out, torch.get_num_threads())
        return out
