"""One decoder-only transformer for all families: a forward pass over fresh rows that attend to cached segments.

Knows nothing of caches, prompts or servers: it gets rows, their positions and their groups, and returns the hidden
states that were asked for and the KV of the rows to keep. Invariant: with no segments and a causal mask it is the
model, equal to `transformers` (fp32, ≤ 1e-4 in the logits).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rcllm.model.attention import Group, native_fits, prepare
from rcllm.model.native import kernels
from rcllm.model.ops import Linear, NativeOps, Ops, TorchOps
from rcllm.model.rope import Rope
from rcllm.model.spec import ModelSpec
from rcllm.model.weights import LayerWeights, Weights


@dataclass(frozen=True, slots=True)
class Keep:
    """Rows `start` to `stop` of a pass form a block at position `base`, whose KV is wanted."""

    start: int
    stop: int
    base: int


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass."""

    token_ids: torch.Tensor  # [rows], int64, on the model's device
    positions: torch.Tensor  # [rows], int64
    groups: Sequence[Group]  # in row order, covering all rows
    wanted: torch.Tensor  # [wanted], int64: rows whose final hidden state is read
    keep: Sequence[Keep] = ()


@dataclass(frozen=True, slots=True)
class Passed:
    hidden: torch.Tensor  # [wanted, d], after the final norm
    kept: list[torch.Tensor]  # per Keep: [layers, 2, kv_heads, len, D], K turned to block-local positions
    backend: str
    bytes_copied: int  # of published KV


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear


class Decoder:
    """The model on one device. Not thread-safe: one pass at a time."""

    def __init__(
        self, spec: ModelSpec, weights: Weights, backend: str = "auto", max_positions: int | None = None
    ) -> None:
        self.spec, self.backend = spec, backend
        self.embed, self.lm_head, self.final_norm = weights.embed, weights.lm_head, weights.final_norm
        self.device, self.dtype = weights.embed.device, weights.embed.dtype
        self.max_positions = min(spec.max_positions, max_positions or spec.max_positions)
        self.rope = Rope.of(spec, self.max_positions, self.device)
        self.kernels = kernels() if native_fits(spec, self.dtype, self.device) else None
        self._ops: Ops = NativeOps(spec, self.rope, self.kernels) if self.kernels else TorchOps(spec, self.rope)
        self._layers = [self._layer(w) for w in weights.layers]

    def _layer(self, w: LayerWeights) -> _Layer:
        linear = self._ops.linear
        matrices = linear(w.qkv, w.qkv_bias), linear(w.o, w.o_bias), linear(w.gate_up, None), linear(w.down, None)
        return _Layer(w.input_norm, w.post_norm, w.q_norm, w.k_norm, *matrices)

    @torch.inference_mode()
    def forward(self, work: Pass) -> Passed:
        """Runs the layers over the rows of `work`. After the last layer's attention only the wanted rows go on."""
        assert int(work.positions.max()) < self.max_positions, "planning refuses prompts beyond the context"
        attend = prepare(self.backend, self.spec, self.rope, work.groups, self.kernels)
        kept = _Kept(self, work.keep) if work.keep else None
        residual = self.embed[work.token_ids]
        delta = None
        for i, layer in enumerate(self._layers):
            qkv = layer.qkv(self._ops.add_norm(residual, delta, layer.input_norm))
            self._ops.rotate(qkv, work.positions, layer.q_norm, layer.k_norm)
            if kept is not None:
                kept.take(i, qkv)
            attended = attend(i, qkv).output
            if i == len(self._layers) - 1:
                attended, residual = attended[work.wanted], residual[work.wanted]
            normed = self._ops.add_norm(residual, layer.o(attended), layer.post_norm)
            delta = layer.down(self._ops.swiglu(layer.gate_up(normed)))
        hidden = self._ops.add_norm(residual, delta, self.final_norm)
        return Passed(hidden, kept.blocks() if kept else [], attend.name, attend.bytes_copied)

    def logits(self, hidden: torch.Tensor, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        """[n, d] -> fp32 [n, vocab], or the columns of `token_ids` alone."""
        head = self.lm_head if token_ids is None else self.lm_head[token_ids]
        return (hidden @ head.T).float()

    @torch.inference_mode()
    def full_logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits of every position of one plain causal sequence; [n, vocab], fp32."""
        n = len(token_ids)
        rows = torch.arange(n, device=self.device)
        tokens = torch.tensor(token_ids, device=self.device)
        return self.logits(self.forward(Pass(tokens, rows, (Group.causal(n),), wanted=rows)).hidden)


class _Kept:
    """Collects K and V of the rows to keep, layer by layer, K shifted back to block-local positions."""

    def __init__(self, decoder: Decoder, keep: Sequence[Keep]) -> None:
        spec, device = decoder.spec, decoder.device
        self.spec, self.rope, self.keep = spec, decoder.rope, keep
        self.rows = torch.cat([torch.arange(k.start, k.stop, device=device) for k in keep])
        self.back = torch.cat([torch.full((k.stop - k.start,), -k.base, device=device) for k in keep])
        shape = (spec.num_layers, 2, spec.num_kv_heads, len(self.rows), spec.head_dim)
        self.kv = torch.empty(shape, dtype=decoder.dtype, device=device)

    def take(self, layer: int, qkv: torch.Tensor) -> None:
        kv = qkv[self.rows, self.spec.q_size :].unflatten(1, (2, self.spec.num_kv_heads, self.spec.head_dim))
        k = self.rope.shift(kv[:, 0], self.back)
        self.kv[layer, 0] = k.transpose(0, 1)
        self.kv[layer, 1] = kv[:, 1].transpose(0, 1)

    def blocks(self) -> list[torch.Tensor]:
        """Views into the buffer; whoever publishes one copies it."""
        return list(self.kv.split([k.stop - k.start for k in self.keep], dim=3))
