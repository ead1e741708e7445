"""The decoder once more, in differentiable torch: frozen weights and a trainable low-rank adapter.

Knows nothing of prompts or losses: it gets packed rows and returns hidden states. Invariant: with a fresh adapter it
computes what `model/decoder.py` computes (LoRA, arXiv 2106.09685: B starts at zero).
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rcllm.core.ranking import IntArray
from rcllm.model.adapter import MODULES, Adapter, LowRank, module_shape
from rcllm.model.quantised import Matrix, wide
from rcllm.model.rope import Rope
from rcllm.model.spec import ModelSpec
from rcllm.model.weights import LayerWeights, Weights
from rcllm.tune.pack import Packed, Unit


class Network(nn.Module):
    """[rows] tokens -> [wanted, d] hidden states after the final norm."""

    def __init__(
        self, spec: ModelSpec, weights: Weights, max_positions: int, rank: int, alpha: float, seed: int
    ) -> None:
        super().__init__()
        self.spec, self.weights, self.rank, self.alpha = spec, weights, rank, alpha
        self.rope = Rope.of(spec, max_positions, weights.embed.device)
        generator = torch.Generator().manual_seed(seed)
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for layer in range(spec.num_layers):
            for module in MODULES:
                rows, columns = module_shape(spec, module)
                bound = 1 / math.sqrt(columns)  # Kaiming uniform with a = √5, as LoRA and peft do
                down = torch.rand(rank, columns, generator=generator) * 2 * bound - bound
                self.down[f"{layer}_{module}"] = nn.Parameter(down.to(weights.embed.device))
                self.up[f"{layer}_{module}"] = nn.Parameter(torch.zeros(rows, rank, device=weights.embed.device))

    def adapter(self) -> Adapter:
        """What has been learnt, in copies that training does not change."""
        return Adapter(
            self.rank,
            self.alpha,
            {
                (layer, module): LowRank(
                    self.down[f"{layer}_{module}"].detach().clone(),
                    self.up[f"{layer}_{module}"].detach().clone(),
                    self.alpha / self.rank,
                )
                for layer in range(self.spec.num_layers)
                for module in MODULES
            },
        )

    def load_adapter(self, adapter: Adapter) -> None:
        """Goes on from `adapter`, whose rank and alpha must be this network's."""
        assert (adapter.rank, adapter.alpha) == (self.rank, self.alpha), "checked by whoever read it"
        with torch.no_grad():
            for (layer, module), low_rank in adapter.layers.items():
                self.down[f"{layer}_{module}"].copy_(low_rank.down)
                self.up[f"{layer}_{module}"].copy_(low_rank.up)

    def forward(self, packed: Packed, wanted: IntArray) -> torch.Tensor:
        device = self.weights.embed.device
        positions = torch.from_numpy(packed.positions).long().to(device)
        attend = [_UnitAttention(unit, self.spec, self.rope, device) for unit in packed.units]
        rows = torch.from_numpy(wanted).long().to(device)
        x = self.weights.embed[torch.from_numpy(packed.token_ids).long().to(device)]
        for i, layer in enumerate(self.weights.layers):
            attended = self._attention(i, layer, self._norm(x, layer.input_norm), positions, attend)
            if i == self.spec.num_layers - 1:
                attended, x = attended[rows], x[rows]
            x = x + self._linear(i, "o", attended, layer.o, layer.o_bias)
            x = x + self._ffn(i, layer, self._norm(x, layer.post_norm))
        return self._norm(x, self.weights.final_norm)

    def logits(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Scores the tokens that are asked for alone: hidden [n, d] becomes [n, len(token_ids)]."""
        return hidden @ self.weights.lm_head[token_ids].T

    def _attention(
        self, i: int, layer: LayerWeights, x: torch.Tensor, positions: torch.Tensor, attend: list[_UnitAttention]
    ) -> torch.Tensor:
        spec = self.spec
        fused = F.linear(x, wide(layer.qkv), layer.qkv_bias)
        fused = fused + torch.cat([self._low_rank(i, module, x) for module in "qkv"], dim=1)
        heads = fused.unflatten(1, (-1, spec.head_dim))
        q, k, v = heads.split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
        q, k = self.rope.rotate(q, positions), self.rope.rotate(k, positions)
        return torch.cat([unit(q, k, v) for unit in attend])

    def _ffn(self, i: int, layer: LayerWeights, x: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(x, wide(layer.gate_up)).chunk(2, dim=-1)
        inner = F.silu(gate + self._low_rank(i, "gate", x)) * (up + self._low_rank(i, "up", x))
        return self._linear(i, "down", inner, layer.down, None)

    def _linear(self, i: int, module: str, x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, wide(weight), bias) + self._low_rank(i, module, x)

    def _low_rank(self, layer: int, module: str, x: torch.Tensor) -> torch.Tensor:
        name = f"{layer}_{module}"
        return F.linear(F.linear(x, self.down[name]), self.up[name] * (self.alpha / self.rank))

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.spec.rms_eps)


class _UnitAttention:
    """Attention of one unit, prepared once for all layers."""

    def __init__(self, unit: Unit, spec: ModelSpec, rope: Rope, device: torch.device) -> None:
        self.start, self.stop, self.spec, self.rope = unit.start, unit.stop, spec, rope
        first, count = int(unit.keys[0]), len(unit.keys)
        run = bool((unit.keys == np.arange(first, first + count)).all())
        self.keys: slice | torch.Tensor = (
            slice(first, first + count) if run else torch.from_numpy(unit.keys).long().to(device)
        )
        self.shift = torch.from_numpy(unit.shift).long().to(device) if unit.shift.any() else None
        share = spec.num_heads // spec.num_kv_heads
        self.mask = torch.from_numpy(unit.mask).to(device).repeat(share, 1)  # [share·rows, keys]

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [all rows, H, D], k and v [all rows, KV, D] -> [rows, H·D]; heads that share keys become more rows."""
        keys, values = k[self.keys], v[self.keys]
        if self.shift is not None:
            keys = self.rope.shift(keys, self.shift)
        rows = q[self.start : self.stop].unflatten(1, (self.spec.num_kv_heads, -1))  # [rows, KV, share, D]
        grouped = rows.permute(1, 2, 0, 3).flatten(1, 2)  # [KV, share·rows, D]
        out = F.scaled_dot_product_attention(
            grouped[None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None], attn_mask=self.mask
        )[0]
        merged: torch.Tensor = out.unflatten(1, (-1, self.stop - self.start)).permute(2, 0, 1, 3).flatten(1)
        return merged
