"""Matrices of the model in the layouts that the compiled kernels read from end to end, one class for each precision.

Knows nothing of layers. Invariant: a row of a product depends, bit for bit, on that row of the input alone, however
many rows there are; so batches, drafts and strict speculation change nothing within a precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F

from rcllm.model.attend.native import Kernels
from rcllm.model.quantised import Quantised
from rcllm.model.spec import WEIGHT_GROUP


class Packed(Protocol):
    """A matrix W [out, in] and its bias, packed once. Holds no reference to what it was made of."""

    num_bytes: int  # of W as it is kept

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 [rows, in] -> W x + bias in fp32 [rows, out]."""


Pack = Callable[[Kernels, torch.Tensor, torch.Tensor | None], Packed]  # of W and the bias


class Fp32Matrix:
    """Panels of outputs, each [in, panel]."""

    def __init__(self, kernels: Kernels, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._kernels, self._bias = kernels, bias
        self._size, self._inner = weight.shape
        panels = -(-self._size // kernels.panel)
        self._packed = weight.new_empty(panels * kernels.panel * self._inner)
        kernels.call("pack", weight.contiguous(), self._size, self._inner, self._packed, torch.get_num_threads())
        self.num_bytes = self._packed.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x, threads = x.contiguous(), torch.get_num_threads()
        out = x.new_empty(len(x), self._size)
        self._kernels.call("linear", x, len(x), self._inner, self._packed, self._bias, self._size, out, threads)
        return out


class Bf16Matrix:
    """Panels of outputs, each [in / 2, panel] pairs. Inputs are rounded as well; products are summed in fp32.

    Two values are multiplied at once where the processor has AVX512-BF16, and one after the other, to the same bits,
    where it has not.
    """

    def __init__(self, kernels: Kernels, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._kernels, self._bias = kernels, bias
        self._size, self._inner = weight.shape
        panels, self._cells = -(-self._size // kernels.panel), -(-self._inner // 2)
        pairs = F.pad(weight.bfloat16(), (0, self._inner % 2)).contiguous()
        self._packed = torch.empty(panels * kernels.panel * self._cells, dtype=torch.int32)
        kernels.call("pack", pairs, self._size, self._cells, self._packed, torch.get_num_threads())
        self.num_bytes = self._packed.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x, threads = x.contiguous(), torch.get_num_threads()
        out, rounded = x.new_empty(len(x), self._size), self._packed.new_empty(len(x), self._cells)
        shape = (self._bias, self._size, out, rounded)
        self._kernels.call("linear_bf16", x, len(x), self._inner, self._packed, *shape, threads)
        return out


class QuantisedMatrix:
    """Panels of outputs in levels of 8 or 4 bits, widened in registers: equal, bit for bit, to the widened matrix."""

    def __init__(self, kernels: Kernels, weight: Quantised, bias: torch.Tensor | None, products: str = "fp32") -> None:
        """products: fp32 or bf16, what is multiplied once levels are widened."""
        self._kernels, self._bias, self._bits, self._rounds = kernels, bias, weight.bits, products == "bf16"
        self._size, self._missing = len(weight.scales), -weight.inner % WEIGHT_GROUP  # inputs of the last group
        self._inner = weight.inner + self._missing
        self.num_bytes = kernels.quantised_bytes(self._size, self._inner, self._bits)
        self._packed = torch.empty(self.num_bytes, dtype=torch.uint8)
        parts, shape = (weight.levels, weight.scales, weight.least), (self._size, self._inner, self._bits)
        kernels.call("pack_quantised", *parts, *shape, self._packed, torch.get_num_threads())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x, threads = (F.pad(x, (0, self._missing)) if self._missing else x).contiguous(), torch.get_num_threads()
        out = x.new_empty(len(x), self._size)
        rounded = torch.empty(len(x), self._inner // 2, dtype=torch.int32) if self._rounds else None
        matrix = (self._packed, self._bits, self._bias, self._size)
        self._kernels.call("linear_quantised", x, len(x), self._inner, *matrix, out, rounded, threads)
        return out


# by the precision in which matrices are kept and multiplied
PACKINGS: dict[str, Pack] = {"fp32": Fp32Matrix, "bf16": Bf16Matrix}
