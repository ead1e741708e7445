"""Products with matrices in levels on a GPU, or in Triton's interpreter.

Few rows read the levels themselves. Many rows multiply, through torch, with a widened copy, which is made part by part
in one memory that all matrices share. Knows nothing of layers. Invariant: every product is that with the widened
matrix, rounded to the dtype of the rows, and summed in fp32; nothing waits for the device, and what is allocated
depends on shapes alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rcllm.late import Late
from rcllm.model.attend.triton_tables import interpreting, num_cores, padded
from rcllm.model.quantised import Quantised
from rcllm.model.spec import WEIGHT_GROUP

_KERNELS = Late("rcllm.model.level_kernels")  # imports triton, which is optional
FEW = 128  # rows that read the levels; widening first pays from there on, on an H200
_LEAST_STEPS = 4  # of one split: below, summing costs more than it gains
_SUM_COLUMNS = 1024
_WIDE_ROWS, _WIDE_INPUTS = 16, 256  # of a program that widens


@dataclass(frozen=True, slots=True)
class ProductTiling:
    """How a product of few rows is cut into programs."""

    rows: int  # of a tile
    outputs: int
    inputs: int  # of one step
    programs: int  # per core, that inputs are divided for where tiles are fewer
    num_warps: int = 4
    num_stages: int = 4

    @classmethod
    def of(cls, num_rows: int, dtype: torch.dtype, device: torch.device) -> ProductTiling:
        """What suits so many rows in `dtype`."""
        if device.type != "cuda":  # the interpreter takes its time for each program, however much that computes
            return cls(padded(max(16, min(num_rows, 128))), 256, 128, programs=1)
        return cls.on_gpu(num_rows, dtype)

    @classmethod
    def on_gpu(cls, num_rows: int, dtype: torch.dtype) -> ProductTiling:
        """A tile of few rows is narrow, so that several programs share a core; one of many reads its rows less often.

        Tiles read (1 + 2 · rows / outputs) bytes of the L2 cache for each byte of levels.
        """
        if dtype == torch.float32:
            return cls(16 if num_rows <= 16 else 32, 32, 64, 2, num_stages=2)
        return _FOR_ROWS[min(128, padded(max(16, num_rows)))]

    def splits(self, num_rows: int, size: int, inner: int, cores: int) -> tuple[int, int]:
        """Into how many parts the inputs are divided, and the steps of each."""
        steps = -(-inner // self.inputs)
        programs = max(1, -(-num_rows // self.rows) * -(-size // self.outputs))
        wanted = max(1, min(self.programs * cores // programs, steps // _LEAST_STEPS))
        each = -(-steps // wanted)
        return -(-steps // each), each


_FOR_ROWS = {
    tiling.rows: tiling
    for tiling in (
        ProductTiling(16, 64, 256, programs=3, num_stages=3),
        ProductTiling(32, 64, 128, programs=2, num_stages=3),
        ProductTiling(64, 64, 64, programs=3),
        ProductTiling(128, 128, 64, programs=2),
    )
}


class Scratch:
    """The memory that widened matrices share; one is alive at a time, within one product."""

    NUM_BYTES = 128 << 20

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(self.NUM_BYTES, dtype=torch.uint8, device=device)

    def rows(self, inner: int, dtype: torch.dtype) -> int:
        """Of a matrix that fit at once; whole tiles."""
        return max(_WIDE_ROWS, self.NUM_BYTES // (inner * dtype.itemsize) // _WIDE_ROWS * _WIDE_ROWS)

    def of(self, rows: int, inner: int, dtype: torch.dtype) -> torch.Tensor:
        return self._memory[: rows * inner * dtype.itemsize].view(dtype).view(rows, inner)


class LevelProduct:
    """A matrix W [out, in] in levels, read where they lie, and its bias."""

    def __init__(self, weight: Quantised, bias: torch.Tensor | None, scratch: Scratch) -> None:
        self._weight, self._bias, self._scratch = weight, bias, scratch
        self._size, self._inner = weight.shape

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] -> x Wᵀ + bias in the dtype of x, [rows, out]."""
        if len(x) > FEW:
            return self.of_widened(x)
        return self.of_levels(x, ProductTiling.of(len(x), x.dtype, x.device))

    def of_levels(self, x: torch.Tensor, tiling: ProductTiling) -> torch.Tensor:
        """One launch, and where inputs are divided a second one, which sums the parts in their order."""
        x, rows, size = x.contiguous(), len(x), self._size
        output = x.new_empty(rows, size)
        splits, steps = tiling.splits(rows, size, self._inner, num_cores(x.device))
        parts = output if splits == 1 else torch.empty(splits, rows, size, device=x.device)
        bias, adds = (output, False) if self._bias is None else (self._bias, True)
        grid = -(-rows // tiling.rows), -(-size // tiling.outputs), splits
        _KERNELS.product_kernel[grid](
            *(x, *self._tensors(0, size), bias, parts, rows, size, *self._sizes, x.stride(0), steps),
            **self.constants(tiling, self._weight, BIAS=adds and splits == 1),
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )
        if splits > 1:
            columns = min(_SUM_COLUMNS, padded(size))
            _KERNELS.sum_kernel[rows, -(-size // columns)](
                parts, bias, output, splits, rows, size, BIAS=adds, COLUMNS=columns
            )
        return output

    @staticmethod
    def constants(tiling: ProductTiling, weight: Quantised, **others: object) -> dict[str, object]:
        """What `product_kernel` is compiled for."""
        tile = {"ROWS": tiling.rows, "OUTPUTS": tiling.outputs, "INPUTS": tiling.inputs}
        return {**tile, "EMULATE": interpreting(), **_format(weight), **others}

    def of_widened(self, x: torch.Tensor) -> torch.Tensor:
        """Parts of the matrix one after the other, each as large as the scratch memory."""
        output = x.new_empty(len(x), self._size)
        most = self._scratch.rows(self._inner, x.dtype)
        for start in range(0, self._size, most):
            stop = min(start + most, self._size)
            part, to = self._widened(start, stop, x.dtype).T, output[:, start:stop]
            if self._bias is None:
                torch.mm(x, part, out=to)
            else:
                torch.addmm(self._bias[start:stop], x, part, out=to)
        return output

    def _widened(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows of the matrix, [stop - start, in], in scratch memory."""
        output = self._scratch.of(stop - start, self._inner, dtype)
        grid = -(-(stop - start) // _WIDE_ROWS), -(-self._inner // _WIDE_INPUTS)
        _KERNELS.widen_kernel[grid](
            *(*self._tensors(start, stop), output, stop - start, *self._sizes), **self.widen_constants(self._weight)
        )
        return output

    @staticmethod
    def widen_constants(weight: Quantised) -> dict[str, object]:
        """What `widen_kernel` is compiled for."""
        return {"ROWS": _WIDE_ROWS, "INPUTS": _WIDE_INPUTS, **_format(weight)}

    def _tensors(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Levels in pairs, scales and least values of some rows of the matrix; scales where there are no least ones."""
        weight = self._weight
        pairs = weight.levels.view(torch.int16) if weight.bits == 8 else weight.levels
        least = weight.scales if weight.least is None else weight.least
        return pairs[start:stop], weight.scales[start:stop], least[start:stop]

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Inputs; pairs of levels and groups of a row."""
        groups = self._weight.scales.shape[1]
        return self._inner, groups * WEIGHT_GROUP // 2, groups


def _format(weight: Quantised) -> dict[str, object]:
    return {"BITS": weight.bits, "GROUP": WEIGHT_GROUP, "ALIGNED": math.gcd(16, weight.scales.shape[1])}
