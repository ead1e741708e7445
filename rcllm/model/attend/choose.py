"""Which backend attends in a pass: by the kernels that there are, and by what was measured.

Invariant: the choice changes times, never what is computed, beyond the tolerance of the kernels (docs/numerics.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby

import torch

from rcllm.errors import ConfigError
from rcllm.model.attend.compiled import NativeGather, NativeSegmented
from rcllm.model.attend.contract import Attend, Attended
from rcllm.model.attend.native import Kernels
from rcllm.model.attend.on_torch import Gather, Segmented
from rcllm.model.attend.on_triton import TritonAttend, triton_fits
from rcllm.model.attend.segments import Group
from rcllm.model.rope import Rope
from rcllm.model.spec import ModelSpec

TORCH_BACKENDS: dict[str, Callable[[ModelSpec, Rope, Sequence[Group]], Attend]] = {
    "gather": Gather,
    "segmented": Segmented,
}
BACKENDS = ("auto", *TORCH_BACKENDS, "triton")
SCRAP = 12  # tokens of a segment, on average, below which copying all first may pay


def native_fits(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the compiled kernels compute this model: fp32, whole vectors in each half of a head, sane grouping."""
    grouped = spec.num_heads // spec.num_kv_heads <= 64
    return device.type == "cpu" and dtype == torch.float32 and spec.head_dim % 32 == 0 and grouped


def resolved(name: str, spec: ModelSpec, device: torch.device) -> str:
    """`triton` for `auto` on a GPU where it is installed. Raises ConfigError where it is asked for and cannot run."""
    fits = triton_fits(spec, device)
    if name == "triton" and not fits:
        raise ConfigError(
            f"model.attention is triton, which needs a GPU, the package triton (pip install 'rcllm[gpu]') and heads of "
            f"a multiple of 16, got device {device.type} and heads of {spec.head_dim}; use attention = 'auto'"
        )
    return "triton" if name == "auto" and device.type == "cuda" and fits else name


def check_kept(kept: str, backend: str, device: torch.device) -> None:
    """Raises ConfigError where weights in levels would be widened once and save nothing. `backend`: resolved."""
    if kept != "full" and device.type == "cuda" and backend != "triton":
        raise ConfigError(
            f"model.weights is {kept}, which on a GPU needs the kernels in Triton, but model.attention is {backend} "
            "here: set it to 'auto' and install triton (pip install 'rcllm[gpu]'), or use weights = 'full'"
        )


def prepare(
    name: str,
    spec: ModelSpec,
    rope: Rope,
    groups: Sequence[Group],
    kernels: Kernels | None,
    merged: Sequence[bool] = (),
    products: str = "fp32",
    dtype: torch.dtype = torch.float32,
) -> Attend:
    """The attention of one pass. `name`: one of BACKENDS, `resolved`; `kernels`: None where they do not fit or exist.

    `products`: of the model; beside all but fp32 the kernels attend in bf16. Torch does in `dtype`, that of the rows.

    `merged`: per group, whether its output is merged with more keys, for which a backend that knows its logsumexp is
    needed; empty: none is. Each group is read as it would be alone, so that what else is in the pass changes no bit.

    The measured rule (`python -m benchmarks.attend`): with kernels, `segmented` wins for whole blocks of every size; on
    torch alone `gather` does, because a launch per segment and layer costs more than the copy. On a GPU one launch of
    `triton` serves all groups.
    """
    if name == "triton":
        return TritonAttend.of(spec, rope, groups, dtype)
    ways = [
        "segmented" if needs_lse else _way(name, group, kernels)
        for group, needs_lse in zip(groups, merged or [False] * len(groups), strict=True)
    ]
    runs = [(way, list(run)) for way, run in groupby(range(len(groups)), key=ways.__getitem__)]
    make = partial(_backend, kernels=kernels, products=products)
    attends = [make(way)(spec, rope, [groups[i] for i in run]) for way, run in runs]
    if len(attends) == 1:
        return attends[0]
    return Several(attends, [sum(groups[i].num_rows for i in run) for _, run in runs])


class Several:
    """Runs of groups, each with a backend of its own."""

    def __init__(self, attends: Sequence[Attend], num_rows: Sequence[int]) -> None:
        self._attends, self._num_rows = attends, list(num_rows)
        self.name = " + ".join(dict.fromkeys(attend.name for attend in attends))

    @property
    def bytes_copied(self) -> int:
        return sum(attend.bytes_copied for attend in self._attends)

    def __call__(self, layer: int, qkv: torch.Tensor) -> Attended:
        parts = [attend(layer, rows) for attend, rows in zip(self._attends, qkv.split(self._num_rows), strict=True)]
        return Attended(torch.cat([part.output for part in parts]), torch.cat([part.lse for part in parts]))


def _backend(way: str, kernels: Kernels | None, products: str) -> Callable[[ModelSpec, Rope, Sequence[Group]], Attend]:
    if kernels:
        compiled = NativeSegmented if way == "segmented" else NativeGather
        return partial(compiled, kernels=kernels, bf16=products != "fp32")
    return TORCH_BACKENDS[way]


def _way(name: str, group: Group, kernels: Kernels | None) -> str:
    if name != "auto":
        return name
    return "segmented" if kernels and not _scattered(group) else "gather"


def _scattered(group: Group) -> bool:
    """Whether copying the segments first pays: scraps of blocks, most of which most rows see.

    Level `corrected` leaves such scraps between the tokens that it makes fresh. Where candidates are isolated a row
    sees few of them; `segmented` skips the others, `gather` computes and masks them (docs/log.md has the times).
    """
    num_segments, num_blocks = len(group.segments), len({segment.block for segment in group.segments})
    if num_segments <= 1.5 * num_blocks or sum(map(len, group.segments)) >= SCRAP * num_segments:
        return False
    return bool(group.segment_mask().mean() > 0.5)
