"""Rotary position embedding: tables of cos and sin, and the shift that makes keys position-free.

Knows nothing of blocks or prompts. Invariant: R(a) R(b) = R(a + b), so a key that is stored turned to its place within
its block, R(j) k, is turned to any place of any prompt by one rotation R(base), the same for the whole block.
Source: RoFormer (arXiv 2104.09864); the half-split layout of Llama: dimension d is paired with d + D/2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rcllm.model.frequencies import inverse_frequencies
from rcllm.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Rope:
    """cos and sin of every position; [positions, head_dim / 2], fp32."""

    cos: torch.Tensor
    sin: torch.Tensor
    scaled_cos: torch.Tensor  # times the attention scale of yarn: turns fresh queries and keys
    scaled_sin: torch.Tensor

    @classmethod
    def of(cls, spec: ModelSpec, num_positions: int, device: torch.device | str = "cpu") -> Rope:
        frequencies, scale = inverse_frequencies(spec.rope, spec.head_dim)
        # fp64: angles rounded to fp32 would make R(a) R(b) miss R(a + b) by 1e-4 radians at position 2,000
        angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequencies.double()[None, :]
        cos, sin = angles.cos().float().to(device), angles.sin().float().to(device)
        return cls(cos, sin, cos, sin) if scale == 1.0 else cls(cos, sin, cos * scale, sin * scale)

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [rows, heads, D], fresh, turned to `positions` [rows]."""
        return turn(x, self.scaled_cos[positions], self.scaled_sin[positions])

    def shift(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """x [rows, heads, D], turned before, turned on by `by` [rows] positions, forwards or backwards."""
        return turn(x, self.cos[by.abs()], self.sin[by.abs()] * by.sign()[:, None])


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns x [rows, heads, D] by the angles of cos and sin [rows, D / 2]; in fp32, result in x's dtype."""
    low, high = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)
