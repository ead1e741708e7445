"""Which backend attends in a pass: by the kernels that there are, and by what was measured.

Invariant: the choice changes times, never what is computed, beyond the tolerance of the kernels (docs/numerics.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rcllm.model.attend.compiled import NativeGather, NativeSegmented
from rcllm.model.attend.contract import Attend
from rcllm.model.attend.native import Kernels
from rcllm.model.attend.on_torch import Gather, Segmented
from rcllm.model.attend.segments import Group
from rcllm.model.rope import Rope
from rcllm.model.spec import ModelSpec

TORCH_BACKENDS: dict[str, Callable[[ModelSpec, Rope, Sequence[Group]], Attend]] = {
    "gather": Gather,
    "segmented": Segmented,
}
BACKENDS = ("auto", *TORCH_BACKENDS)
SCRAP = 12  # tokens of a segment, on average, below which copying all first may pay


def native_fits(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the compiled kernels compute this model: fp32, whole vectors in each half of a head, sane grouping."""
    grouped = spec.num_heads // spec.num_kv_heads <= 64
    return device.type == "cpu" and dtype == torch.float32 and spec.head_dim % 32 == 0 and grouped


def prepare(name: str, spec: ModelSpec, rope: Rope, groups: Sequence[Group], kernels: Kernels | None) -> Attend:
    """The attention of one pass. `name`: one of BACKENDS; `kernels`: None where they do not fit or do not exist.

    The measured rule (`python -m benchmarks.attend`): with kernels, `segmented` wins for whole blocks of every size; on
    torch alone `gather` does, because a launch per segment and layer costs more than the copy.
    """
    if name == "auto":
        name = "segmented" if kernels and not _scattered(groups) else "gather"
    if kernels:
        return (NativeSegmented if name == "segmented" else NativeGather)(spec, rope, groups, kernels)
    return TORCH_BACKENDS[name](spec, rope, groups)


def _scattered(groups: Sequence[Group]) -> bool:
    """Whether copying the segments first pays: scraps of blocks, most of which most rows see.

    Level `corrected` leaves such scraps between the tokens that it makes fresh. Where candidates are isolated a row
    sees few of them; `segmented` skips the others, `gather` computes and masks them (docs/log.md has the times).
    """
    segments = [segment for group in groups for segment in group.segments]
    num_blocks = sum(len({segment.block for segment in group.segments}) for group in groups)
    num_tokens = sum(map(len, segments))
    if len(segments) <= 1.5 * num_blocks or num_tokens >= SCRAP * len(segments):
        return False
    masks = [group.segment_mask() for group in groups]
    return sum(int(mask.sum()) for mask in masks) > 0.5 * sum(mask.size for mask in masks)
