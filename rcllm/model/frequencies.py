"""Inverse frequencies of rotary position embeddings, for every kind that a RopeSpec can name.

Knows nothing of positions or keys. Invariant: fp32 results equal those of transformers' ROPE_INIT_FUNCTIONS to the
last bit, because at position 8,000 a relative error of 1e-7 in a frequency already turns a key by a milliradian;
so the order of operations here is theirs.
"""

from __future__ import annotations

import math

import torch

from rcllm.model.spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> tuple[torch.Tensor, float]:
    """Angles per position, fp32 [head_dim / 2], and the scale of cos and sin (1.0 but for yarn)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    wavelengths = rope.theta**exponents  # in radians⁻¹; [head_dim / 2]
    match rope.kind:
        case "default" | "dynamic":  # dynamic differs only beyond the original context, where a spec ends
            return 1.0 / wavelengths, 1.0
        case "linear":
            return 1.0 / wavelengths / rope.factor, 1.0
        case "llama3":
            return _llama3(1.0 / wavelengths, rope), 1.0
        case "yarn":
            return _yarn(wavelengths, rope, head_dim), _yarn_attention_scale(rope)


def _llama3(frequencies: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between blended (Llama 3.1)."""
    context = rope.original_max_positions
    lengths = 2 * math.pi / frequencies  # tokens per turn
    longest, shortest = context / rope.low_freq_factor, context / rope.high_freq_factor
    scaled = torch.where(lengths > longest, frequencies / rope.factor, frequencies)
    smooth = (context / lengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * scaled / rope.factor + smooth * scaled
    between = ~(lengths < shortest) & ~(lengths > longest)
    return torch.where(between, blended, scaled)


def _yarn(wavelengths: torch.Tensor, rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): a ramp over the dimensions between stretched and original frequencies."""

    def dimension(turns: float) -> float:  # that makes so many turns within the original context
        return (head_dim * math.log(rope.original_max_positions / (turns * 2 * math.pi))) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0.0  # an empty ramp would divide by zero
    ramp = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    keep = 1 - ramp
    return 1.0 / (rope.factor * wavelengths) * (1 - keep) + 1.0 / wavelengths * keep


def _yarn_attention_scale(rope: RopeSpec) -> float:
    def scale(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
