"""Matrices of the model in the layouts that the compiled kernels read from end to end, one class for each precision.

Knows nothing of layers. Invariant: a row of a product depends, bit for bit, on that row of the input alone, however
many rows there are; so batches, drafts and strict speculation change nothing within a precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from rcllm.model.attend.native import Kernels


class Packed(Protocol):
    """A matrix W [out, in] and its bias, packed once. Holds no reference to what it was made of."""

    num_bytes: int  # of W as it is kept

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 [rows, in] -> W x + bias in fp32 [rows, out]."""


Pack = Callable[[Kernels, torch.Tensor, torch.Tensor | None], Packed]  # of W in fp32 and the bias


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


PACKINGS: dict[str, Pack] = {"fp32": Fp32Matrix}  # by the precision in which matrices are kept and multiplied
