"""The slow, obvious twin of products in bf16: operands are rounded by torch, and everything else is in fp64.

What is rounded: matrices and their inputs; in attention the queries with their scale in base 2, keys in their place,
values, and weights over a power of two. The embedding is kept rounded; norms, angles, residuals and sums are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from rcllm.model.attend.contract import Attended
from rcllm.model.attend.segments import Group
from rcllm.model.spec import ModelSpec
from rcllm.model.weights import Weights
from tests.reference import attend as reference


def rounded(x: torch.Tensor) -> torch.Tensor:
    """To the nearest bf16, ties to even; in fp64."""
    return x.bfloat16().double()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    product = rounded(x) @ rounded(weight).T
    return product if bias is None else product + bias


def over(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Attended:
    """One row's attention; q [H, D] over keys and values [seen, H, D]."""
    scale = torch.tensor(math.log2(math.e) / math.sqrt(q.shape[-1])).double()  # as fp32 holds it
    scores = (rounded(q * scale) * rounded(keys)).sum(-1)  # [seen, H], in base 2
    top = scores.amax(0).round()  # any whole number gives the same: it shifts the exponent of weights alone
    weights = rounded(torch.exp2(scores - top))
    total = weights.sum(0)
    output = (weights[..., None] * rounded(values)).sum(0) / total[:, None]
    return Attended(output.flatten(), (top + torch.log2(total)) * math.log(2))


def attend(spec: ModelSpec, groups: Sequence[Group], layer: int, qkv: torch.Tensor) -> Attended:
    return reference.attend(spec, groups, layer, qkv, over)


Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]  # of inputs, a matrix and its bias


@torch.inference_mode()
def full_logits(
    spec: ModelSpec,
    weights: Weights,
    token_ids: Sequence[int],
    linear: Linear = linear,
    table: Callable[[torch.Tensor], torch.Tensor] = rounded,
    attend: Callable[[ModelSpec, Sequence[Group], int, torch.Tensor], Attended] = attend,
) -> torch.Tensor:
    """Logits of every position of one causal sequence; [n, vocab]. Of `weights` in fp32, without scaled RoPE.

    `linear`, `table` and `attend`: for products, the embedding and attention that are not those of bf16.
    """

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.rms_eps) * weight

    x = table(weights.embed)[torch.tensor(token_ids)]
    q_size, kv_size = spec.q_size, spec.kv_size
    for layer in weights.layers:
        qkv = linear(norm(x, layer.input_norm), layer.qkv, layer.qkv_bias)
        heads = qkv[:, : q_size + kv_size].unflatten(1, (-1, spec.head_dim))
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = heads.split((spec.num_heads, spec.num_kv_heads), dim=1)
            heads = torch.cat((norm(q, layer.q_norm), norm(k, layer.k_norm)), dim=1)
        turned = torch.stack([reference.turn(spec, row, at) for at, row in enumerate(heads)])
        qkv = torch.cat((turned.flatten(1), qkv[:, q_size + kv_size :]), dim=1)
        attended = attend(spec, [Group.causal(len(token_ids))], 0, qkv).output
        x = x + linear(attended, layer.o, layer.o_bias)
        gate, up = linear(norm(x, layer.post_norm), layer.gate_up, None).chunk(2, dim=-1)
        x = x + linear(F.silu(gate) * up, layer.down, None)
    return linear(norm(x, weights.final_norm), weights.lm_head, None)
