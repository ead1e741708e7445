"""The decoder that generates semantic IDs, in trainable torch: Qwen3's shape and names, random weights, dropout.

Knows nothing of items or codes. Invariant: without dropout it computes what `model/decoder.py` and transformers compute
from its `state_dict`, whose names are theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from rcllm.model.rope import Rope
from rcllm.model.spec import ModelSpec
from rcllm.sid.config import NetworkConfig

_INITIAL_STD = 0.02


class CodeNetwork(nn.Module):
    """[batch, len] tokens -> [batch, len, d] hidden states after the final norm; the head is the embedding."""

    def __init__(self, config: NetworkConfig, hf_config: Mapping[str, Any]) -> None:
        super().__init__()
        spec = ModelSpec.from_hf(hf_config)
        self.spec = spec
        self.rope = Rope.of(spec, spec.max_positions, torch.device("cpu"))
        self.dropout = nn.Dropout(config.dropout)
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(_Layer(spec, self.rope, self.dropout) for _ in range(spec.num_layers))
        self.norm = nn.RMSNorm(spec.hidden_size, spec.rms_eps)

    def reset(self, seed: int) -> None:
        """Random weights; what each layer adds begins small."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() > 1:
                    shrink = (
                        (2 * self.spec.num_layers) ** 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                    )
                    parameter.normal_(0.0, _INITIAL_STD / shrink, generator=generator)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows are causal and begin at position 0; what follows a row's end changes nothing before it."""
        positions = torch.arange(token_ids.shape[1])
        x = self.dropout(self.embed_tokens(token_ids))
        for layer in self.layers:
            x = layer(x, positions)
        hidden: torch.Tensor = self.norm(x)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores all tokens: hidden states […, d] become logits […, vocab]."""
        return F.linear(hidden, self.embed_tokens.weight)


class _Attention(nn.Module):
    def __init__(self, spec: ModelSpec, rope: Rope) -> None:
        super().__init__()
        self.spec, self.rope = spec, rope
        self.q_proj = nn.Linear(spec.hidden_size, spec.q_size, bias=False)
        self.k_proj = nn.Linear(spec.hidden_size, spec.kv_size, bias=False)
        self.v_proj = nn.Linear(spec.hidden_size, spec.kv_size, bias=False)
        self.o_proj = nn.Linear(spec.q_size, spec.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(spec.head_dim, spec.rms_eps)
        self.k_norm = nn.RMSNorm(spec.head_dim, spec.rms_eps)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        size = self.spec.head_dim
        q, k, v = (project(x).unflatten(-1, (-1, size)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self._turn(self.q_norm(q), positions), self._turn(self.k_norm(k), positions)
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
        attended: torch.Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return attended

    def _turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[batch, len, heads, D] -> [batch, heads, len, D]"""
        rows = self.rope.rotate(x.transpose(0, 1).flatten(1, 2), positions)
        turned: torch.Tensor = rows.unflatten(1, (x.shape[0], -1)).permute(1, 2, 0, 3)
        return turned


class _Mlp(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.ffn_size, bias=False)
        self.up_proj = nn.Linear(spec.hidden_size, spec.ffn_size, bias=False)
        self.down_proj = nn.Linear(spec.ffn_size, spec.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


class _Layer(nn.Module):
    def __init__(self, spec: ModelSpec, rope: Rope, dropout: nn.Dropout) -> None:
        super().__init__()
        self.self_attn, self.mlp, self.dropout = _Attention(spec, rope), _Mlp(spec), dropout
        self.input_layernorm = nn.RMSNorm(spec.hidden_size, spec.rms_eps)
        self.post_attention_layernorm = nn.RMSNorm(spec.hidden_size, spec.rms_eps)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), positions))
        out: torch.Tensor = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return out
