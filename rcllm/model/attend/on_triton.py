"""Attention over segments on a GPU: a launch or two for each layer of a pass, whatever rows and segments are in it.

Groups of few rows read cached blocks where they lie; the keys of groups of many rows are laid side by side first, once
for each layer. Where tasks are too few for the GPU, keys are divided among them, and merged by their logsumexp. Knows
nothing of when it is used. Invariant: nothing in a layer waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate

import torch

from rcllm.model.attend import triton_in_place, triton_laid
from rcllm.model.attend.contract import Attended
from rcllm.model.attend.segments import Group
from rcllm.model.attend.triton_in_place import InPlaceShape, InPlaceTables
from rcllm.model.attend.triton_laid import LaidShape, LaidTables
from rcllm.model.attend.triton_tables import Tiling, interpreting, num_cores, share_of
from rcllm.model.rope import Rope
from rcllm.model.spec import ModelSpec

FEW_QUERIES = 128  # of a KV head in a group, up to which its keys are read in place: one tile
LAID_BYTES = 1 << 30  # of keys and values that lie side by side for a layer, at most


def triton_fits(spec: ModelSpec, device: torch.device) -> bool:
    """Whether the kernels can run here, and compute this model."""
    runs = find_spec("triton") is not None and (device.type == "cuda" or interpreting())
    return runs and spec.head_dim % 16 == 0


@dataclass(frozen=True, slots=True)
class Tilings:
    """How both ways cut a pass."""

    in_place: Tiling
    laid: Tiling

    @classmethod
    def of(cls, spec: ModelSpec, few: Sequence[Group], dtype: torch.dtype, device: torch.device) -> Tilings:
        """few: groups that are read in place."""
        cores, num_rows = num_cores(device), max((group.num_rows for group in few), default=1)
        return cls(triton_in_place.tiling_of(spec, num_rows, dtype, cores), triton_laid.tiling_of(dtype, cores))


@dataclass(frozen=True, slots=True)
class PassShape:
    """What passes have in common that can use the same tables on the device."""

    in_place: InPlaceShape | None  # None: no group is read so
    laid: LaidShape | None

    def rounded(self, rows: int) -> PassShape:
        """For all passes of about this size, of at most `rows` rows."""
        return PassShape(
            None if self.in_place is None else self.in_place.rounded(rows),
            None if self.laid is None else self.laid.rounded(rows),
        )


class HostTables:
    """A pass as it is told to the kernels, on the host."""

    def __init__(
        self,
        spec: ModelSpec,
        groups: Sequence[Group],
        dtype: torch.dtype,
        device: torch.device,
        tilings: Tilings | None = None,
    ) -> None:
        """dtype: of the rows; tilings: None for what suits groups and device."""
        starts = list(accumulate((group.num_rows for group in groups), initial=0))
        is_laid = _laid(spec, groups, dtype)
        placed = list(zip(groups, starts, is_laid, strict=False))
        few, many = ([group for group, _, laid in placed if laid == which] for which in (False, True))
        tilings = tilings or Tilings.of(spec, few, dtype, device)
        self.in_place: InPlaceTables | None = None
        self.laid: LaidTables | None = None
        if few:
            self.in_place = InPlaceTables(spec, few, [at for _, at, laid in placed if not laid], tilings.in_place)
        if many:
            self.laid = LaidTables(spec, many, [at for _, at, laid in placed if laid], tilings.laid)
        self.shape = PassShape(
            None if self.in_place is None else self.in_place.shape, None if self.laid is None else self.laid.shape
        )


def _laid(spec: ModelSpec, groups: Sequence[Group], dtype: torch.dtype) -> list[bool]:
    """Which groups' keys are laid side by side: those of many rows, as long as there is room."""
    share, room, found = share_of(spec), LAID_BYTES // (2 * spec.kv_size * dtype.itemsize), list[bool]()
    for group in groups:
        num_keys = group.num_rows + sum(map(len, group.segments))
        found.append(group.num_rows * share > FEW_QUERIES and num_keys <= room)
        room -= num_keys if found[-1] else 0
    return found


class TritonAttend:
    """Attention of passes of one shape, on a GPU or in Triton's interpreter."""

    name = "triton"
    bytes_copied = 0

    def __init__(self, spec: ModelSpec, rope: Rope, shape: PassShape, output: torch.Tensor | None = None) -> None:
        """output: [rows, H·D], what every layer writes to, where the tables tell of rows; None: each makes its own."""
        self._spec, self._output = spec, output
        self._in_place = None if shape.in_place is None else shape.in_place.on(spec, rope)
        self._laid = None if shape.laid is None else shape.laid.on(spec, rope)
        self._groups: Sequence[Group] = ()

    @classmethod
    def of(
        cls, spec: ModelSpec, rope: Rope, groups: Sequence[Group], dtype: torch.dtype, tilings: Tilings | None = None
    ) -> TritonAttend:
        """Of one pass, whose rows are in `dtype`."""
        host = HostTables(spec, groups, dtype, rope.cos.device, tilings)
        attend = cls(spec, rope, host.shape)
        attend.send(host)
        attend._groups = groups  # keeps alive the memory that the tables tell of
        return attend

    def send(self, host: HostTables) -> None:
        """Tells of another pass of this shape."""
        if self._in_place and host.in_place:
            self._in_place.send(host.in_place)
        if self._laid and host.laid:
            self._laid.send(host.laid)

    def __call__(self, layer: int, qkv: torch.Tensor) -> Attended:
        output = qkv.new_empty(qkv.shape[0], self._spec.q_size) if self._output is None else self._output
        lse = torch.empty(qkv.shape[0], self._spec.num_heads, device=qkv.device)
        for part in (self._in_place, self._laid):
            if part:
                part(layer, qkv, output, lse)
        return Attended(output, lse)
