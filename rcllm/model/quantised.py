"""Matrices in levels of 8 or 4 bits, in groups of 32 inputs that share a scale, as GGUF's Q8_0, Q4_0 and Q4_1 are.

    8 bits: value = level · scale,  level in -127 … 127        4 bits: value = level · scale + least,  level in 0 … 15

Knows nothing of kernels or layers. Invariant: a matrix that came from such a file keeps its every value, bit for bit;
any other is rounded to 8 bits, where a value differs by half a step of its group, 1/254 of the largest value there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from rcllm.errors import ModelError
from rcllm.model.spec import WEIGHT_GROUP as GROUP

_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 23}  # values that are looked at together, each in some 25 bytes


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix [out, in]. Reading rows of it gives fp32, as indexing a tensor does."""

    inner: int  # in; below, the inputs of whole groups count, of which the last may mean nothing
    levels: torch.Tensor  # int8 [out, in], or uint8 [out, in / 2]: inputs 2i in the low bits, 2i + 1 in the high ones
    scales: torch.Tensor  # fp16 [out, in / GROUP]
    least: torch.Tensor | None  # fp16 [out, in / GROUP], with 4 bits
    is_exact: bool  # whether it holds the very values that it was made of

    @property
    def bits(self) -> int:
        return 8 if self.least is None else 4

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.levels), self.inner

    @property
    def device(self) -> torch.device:
        return self.levels.device

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        return (self.levels, self.scales) if self.least is None else (self.levels, self.scales, self.least)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """fp32 [*rows, in]"""
        least = None if self.least is None else self.least[rows]
        return _values(self.levels[rows], self.scales[rows], least)[..., : self.inner].contiguous()

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Quantised:
        """With each part changed, for example moved, or its rows put in another order."""
        least = None if self.least is None else change(self.least)
        return replace(self, levels=change(self.levels), scales=change(self.scales), least=least)

    def widen(self) -> torch.Tensor:
        """All of it in fp32."""
        return _values(self.levels, self.scales, self.least)[:, : self.inner].contiguous()


Matrix = torch.Tensor | Quantised  # [out, in]


def wide(matrix: Matrix) -> torch.Tensor:
    """As a tensor; in fp32 what is in levels."""
    return matrix if isinstance(matrix, torch.Tensor) else matrix.widen()


def in_host_memory(matrix: Matrix) -> Matrix:
    return matrix.cpu() if isinstance(matrix, torch.Tensor) else matrix.map(torch.Tensor.cpu)


def joined(matrices: Sequence[Quantised]) -> Quantised:
    """Stacked by rows: matrices of as many inputs and bits."""
    levels, scales, *least = (torch.cat(parts) for parts in zip(*(each.parts for each in matrices), strict=True))
    is_exact = all(each.is_exact for each in matrices)
    return Quantised(matrices[0].inner, levels, scales, least[0] if least else None, is_exact)


def quantise(weight: torch.Tensor) -> Quantised:
    """The levels of a matrix, on its device. Raises ModelError."""
    for levels_of in (_q4_1, _q4_0, _q8_0):
        if (found := _by_parts(weight, levels_of)).is_exact:
            return found
    if not torch.isfinite(found.scales).all():
        raise ModelError("a weight is too large for int8, whose scales are in fp16; set model.weights to full")
    return found


def round_rows(x: torch.Tensor) -> torch.Tensor:
    """Inputs [rows, in] as values of levels of 8 bits, a scale in fp32 for each GROUP of a row.

    An input that is not finite makes its group NaN. Where 127 / largest overflows a group is taken for zeros.
    """
    groups = F.pad(x, (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = (torch.tensor(127.0) / largest).nan_to_num(0.0, posinf=0.0)  # a number would be times 1 / largest
    scale = torch.where(largest.isfinite(), largest / 127, torch.nan)
    rounded: torch.Tensor = (groups * inverse).round() * scale
    return rounded.flatten(1)[:, : x.shape[1]]


# ---- a way for each kind of file: what its scales would be if the values came from it ----


@dataclass(frozen=True, slots=True)
class _Groups:
    scales: torch.Tensor  # fp16 [out, groups]
    least: torch.Tensor | None


_Way = Callable[[torch.Tensor], _Groups]  # of values [out, groups, GROUP]


def _q4_1(values: torch.Tensor) -> _Groups:
    """From the least value to the largest in 15 steps."""
    low, high = values.aminmax(dim=-1)
    return _Groups(((high - low) / 15).half(), low.half())


def _q4_0(values: torch.Tensor) -> _Groups:
    """The value that is largest, of either sign, lies 8 steps below zero."""
    far = values.gather(-1, values.abs().argmax(-1, keepdim=True))[..., 0]
    return _Groups((far / -8).half(), far.half())


def _q8_0(values: torch.Tensor) -> _Groups:
    return _Groups((values.abs().amax(-1) / 127).half(), None)


def _by_parts(weight: torch.Tensor, way: _Way) -> Quantised:
    """Rows by rows, so that little is held beside the matrix. With 4 bits it gives up where a value is not exact."""
    at_once = max(1, _AT_ONCE[weight.device.type] // weight.shape[1])
    whole = _empty_like(_rounded(weight[:1].float(), way), len(weight))
    is_exact = True
    for start in range(0, len(weight), at_once):
        part = _rounded(weight[start : start + at_once].float(), way)
        is_exact &= part.is_exact
        if whole.bits == 4 and not is_exact:
            break
        for to, values in zip(whole.parts, part.parts, strict=True):
            to[start : start + at_once] = values
    return replace(whole, is_exact=is_exact)


def _empty_like(rows: Quantised, count: int) -> Quantised:
    """Room for so many rows of that kind."""
    levels, scales, *least = (part.new_empty(count, part.shape[1]) for part in rows.parts)
    return replace(rows, levels=levels, scales=scales, least=least[0] if least else None)


def _rounded(rows: torch.Tensor, way: _Way) -> Quantised:
    inner = rows.shape[1]
    missing = -inner % GROUP
    whole = F.pad(rows, (0, missing), mode="replicate") if missing else rows  # it changes no least or largest value
    values = whole.unflatten(1, (-1, GROUP))
    groups = way(values)
    lowest, highest = (-127, 127) if groups.least is None else (0, 15)
    offset = values if groups.least is None else values - groups.least.float()[..., None]
    steps = (offset / groups.scales.float()[..., None]).nan_to_num_(0.0).round_().clamp_(lowest, highest)
    levels = steps.flatten(1).to(torch.int8)
    if groups.least is not None:
        pairs = levels.view(torch.uint8).unflatten(1, (-1, 2))
        levels = pairs[..., 0] | pairs[..., 1] << 4
    is_exact = torch.equal(_values(levels, groups.scales, groups.least), whole)
    return Quantised(inner, levels, groups.scales, groups.least, is_exact)


def _values(levels: torch.Tensor, scales: torch.Tensor, least: torch.Tensor | None) -> torch.Tensor:
    """The product of level and scale is exact in fp32, and so is rounded once, where the least value is added."""
    if least is not None:
        levels = torch.stack((levels & 15, levels >> 4), dim=-1).flatten(-2)
    groups = levels.unflatten(-1, (-1, GROUP)).float().mul_(scales.float()[..., None])
    if least is not None:
        groups += least.float()[..., None]
    values: torch.Tensor = groups.flatten(-2)
    return values
