"""Quantised matrices the slow way: value by value as the formats are defined, products in fp64."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from rcllm.model.quantised import GROUP, Quantised


def widened(matrix: Quantised) -> torch.Tensor:
    size, inner = matrix.shape
    levels, scales = matrix.levels.numpy(), matrix.scales.numpy()
    out = np.empty((size, inner), np.float32)
    for row in range(size):
        for at in range(inner):
            scale = np.float32(scales[row, at // GROUP])
            if matrix.least is None:
                out[row, at] = np.float32(levels[row, at]) * scale
            else:
                level = levels[row, at // 2] >> 4 if at % 2 else levels[row, at // 2] & 15
                out[row, at] = np.float32(level) * scale + np.float32(matrix.least[row, at // GROUP].item())
    return torch.from_numpy(out)


def to_four_bits(weight: torch.Tensor) -> torch.Tensor:
    """The nearest values that Q4_1 can hold."""
    inner = weight.shape[1]
    values = F.pad(weight, (0, -inner % GROUP), mode="replicate").unflatten(1, (-1, GROUP))
    least = values.amin(-1, keepdim=True).half().float()
    scale = ((values.amax(-1, keepdim=True) - least) / 15).half().float()
    levels = ((values - least) / scale).nan_to_num(0.0).round().clamp(0, 15)
    return (levels * scale + least).flatten(1)[:, :inner].contiguous()


def rounded_rows(x: torch.Tensor) -> torch.Tensor:
    """Group by group to the nearest of 255 levels, ties to even; a group with an input that is not finite is NaN."""
    out = x.numpy().copy()
    with np.errstate(all="ignore"):
        for row in out:
            for start in range(0, len(row), GROUP):
                group = row[start : start + GROUP]
                largest, steps = np.abs(group).max(), np.float32(127)
                inverse = steps / largest
                levels = np.rint(group * inverse) if np.isfinite(inverse) else np.zeros_like(group)
                group[:] = levels * (largest / steps) if np.isfinite(largest) else np.nan
    return torch.from_numpy(out)


def product(matrix: Quantised, x: torch.Tensor, bias: torch.Tensor | None, products: str) -> torch.Tensor:
    """W x + bias; with products in bf16 both are rounded first, in int8 the inputs."""
    weight = matrix.widen()
    if products == "bf16":
        weight, x = weight.bfloat16().float(), x.bfloat16().float()
    if products == "int8":
        x = rounded_rows(x)
    out = x.double() @ weight.double().T
    return (out if bias is None else out + bias.double()).float()
