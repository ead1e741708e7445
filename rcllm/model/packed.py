"""Matrices of the model in the layouts that the compiled kernels read from end to end, one class for each precision.

Knows nothing of layers. Invariant: a row of a product depends, bit for bit, on that row of the input alone, however
many rows there are; so batches, drafts and strict speculation change nothing within a precision.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from rcllm.model.attend.native import Kernels
from rcllm.model.quantised import Quantised, quantise
from rcllm.model.spec import WEIGHT_GROUP

_INPUT_BITS = {"fp32": 32, "bf16": 16, "int8": 8}  # by what is multiplied
_CELL = 4  # inputs in 8 bits that are multiplied at once


class Packed:
    """A matrix W [out, in] and its bias, packed once. Holds no reference to what it was made of."""

    def __init__(
        self,
        kernels: Kernels,
        packed: torch.Tensor,
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        bits: int,
        products: str,
        missing: int = 0,
    ) -> None:
        """bits: of a weight; products: what inputs are rounded to; missing: zeros that end each input."""
        self._kernels, self._packed, self._bias = kernels, packed, bias  # the table below points into them
        self._size = shape[0]
        self.num_bytes = packed.nbytes  # of W as it is kept
        pointers = packed.data_ptr(), 0 if bias is None else bias.data_ptr()
        sizes = shape[0], shape[1] + missing, shape[1]
        self.table = torch.tensor([bits, _INPUT_BITS[products], *pointers, *sizes])  # for the kernels

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 [rows, in] -> W x + bias in fp32 [rows, out]."""
        x, kernels = x.contiguous(), self._kernels
        out, room = x.new_empty(len(x), self._size), torch.empty(kernels.count("product_room", self.table, len(x)))
        kernels.call("product", self.table, x, len(x), room, out, torch.get_num_threads())
        return out


Pack = Callable[[Kernels, torch.Tensor, torch.Tensor | None], Packed]  # of W and the bias


class Fp32Matrix(Packed):
    """Panels of outputs, each [in, panel]."""

    def __init__(self, kernels: Kernels, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        size, inner = weight.shape
        packed = weight.new_empty(-(-size // kernels.panel) * kernels.panel * inner)
        kernels.call("pack", weight.contiguous(), size, inner, packed, torch.get_num_threads())
        super().__init__(kernels, packed, bias, (size, inner), 32, "fp32")


class Bf16Matrix(Packed):
    """Panels of outputs, each [in / 2, panel] pairs. Inputs are rounded as well; products are summed in fp32.

    Two values are multiplied at once where the processor has AVX512-BF16, and one after the other, to the same bits,
    where it has not.
    """

    def __init__(self, kernels: Kernels, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        size, inner = weight.shape
        panels, cells = -(-size // kernels.panel), -(-inner // 2)
        pairs = F.pad(weight.bfloat16(), (0, inner % 2)).contiguous()
        packed = torch.empty(panels * kernels.panel * cells, dtype=torch.int32)
        kernels.call("pack", pairs, size, cells, packed, torch.get_num_threads())
        super().__init__(kernels, packed, bias, (size, inner), 16, "bf16")


class QuantisedMatrix(Packed):
    """Panels of outputs in levels of 8 or 4 bits, widened in registers: equal, bit for bit, to the widened matrix.

    Or multiplied as they are, by inputs that are rounded to levels of 8 bits.
    """

    def __init__(self, kernels: Kernels, weight: Quantised, bias: torch.Tensor | None, products: str = "fp32") -> None:
        """products: fp32 or bf16, what is multiplied once levels are widened; int8: the levels themselves."""
        size, missing = len(weight.scales), -weight.inner % WEIGHT_GROUP  # inputs of the last group
        shape = (size, weight.inner + missing, weight.bits)
        packed = torch.empty(kernels.count("quantised_bytes", *shape), dtype=torch.uint8)
        levels, together = (_in_cells(weight), _CELL) if products == "int8" else (weight.levels, 1)
        parts = levels, weight.scales, weight.least
        kernels.call("pack_quantised", *parts, *shape, together, packed, torch.get_num_threads())
        super().__init__(kernels, packed, bias, weight.shape, weight.bits, products, missing)


def _in_cells(weight: Quantised) -> torch.Tensor:
    """Bytes in 0 … 255: levels of 8 bits raised by 128; of 4 bits, those of a cell beside those of the next."""
    if weight.bits == 8:
        return weight.levels.view(torch.uint8) ^ 128
    pairs = torch.stack((weight.levels & 15, weight.levels >> 4), dim=-1)
    first, then = pairs.view(len(pairs), -1, 2, _CELL).unbind(2)
    return (first | then << 4).flatten(1)


def _int8_matrix(kernels: Kernels, weight: torch.Tensor, bias: torch.Tensor | None) -> Packed:
    return QuantisedMatrix(kernels, quantise(weight), bias, "int8")


# by the precision in which matrices are kept and multiplied
PACKINGS: dict[str, Pack] = {"fp32": Fp32Matrix, "bf16": Bf16Matrix, "int8": _int8_matrix}
