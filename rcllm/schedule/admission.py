"""Which reuse level a request gets: as asked, as a calibration allows, or not at all.

The seam between the engine, which asks before it plans, and whoever knows how far reuse may go. Knows nothing of
measures. Invariant: what is admitted differs from what was asked in level and selection alone, and is never `auto`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Protocol

from rcllm.core.ranking import Level, Mask, RankOptions


@dataclass(frozen=True, slots=True)
class Identity:
    """What a calibration belongs to: a change of any field makes its figures those of something else."""

    model: str  # first 12 hex digits of the fingerprint of its weights and adapter
    tokenizer: str  # first 12 hex digits of its fingerprint, as of the next two
    template: str
    chat: str  # the chat format
    dtype: str
    kv_dtype: str
    mask: Mask
    weights: str = "full"  # what they are kept in
    semantic_pool: str = ""  # what answers of history "semantic" depend on, and no others

    def differences(self, other: Identity) -> tuple[str, ...]:
        """«template 0a1b… instead of 2c3d…», per field that differs from `other`, the semantic pool apart."""
        names = [f.name for f in fields(self) if f.name != "semantic_pool"]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return tuple(f"{name} {own} instead of {theirs}" for name, own, theirs in pairs if own != theirs)


@dataclass(frozen=True, slots=True)
class Admitted:
    """How a request is answered."""

    options: RankOptions
    notes: tuple[str, ...] = ()  # for the receipt: why, where it is not as asked
    guard: str = ""  # for the receipt: what a guard that watches over it knows


class Admission(Protocol):
    """Decides before planning; called for every request, from any thread. Changes nothing that it is given."""

    def admit(self, options: RankOptions) -> Admitted:
        """Raises UncalibratedError for a level that may not be used."""

    def cheaper(self, options: RankOptions) -> tuple[Admitted, ...]:
        """What may be used instead of `options`, which were admitted, to save time; the dearest of them first."""


AdmissionFactory = Callable[[Identity, str], Admission]  # of an engine's identity and canonical context


@dataclass(frozen=True, slots=True)
class Open:
    """Admits every level as asked; `auto` is the exact one, for nothing is known of the others."""

    mask: Mask = "causal"

    @classmethod
    def of(cls, identity: Identity, context: str) -> Open:
        """The default AdmissionFactory."""
        return cls(identity.mask)

    def admit(self, options: RankOptions) -> Admitted:
        if options.level.name != "auto":
            return Admitted(options)
        return exactly(options, self.mask, "for there is no calibration; `rcllm calibrate` finds how far reuse may go")

    def cheaper(self, options: RankOptions) -> tuple[Admitted, ...]:
        """What is exact all the same; of other levels nothing is known."""
        return exact_blocks(options, self.mask)


def is_exact(options: RankOptions, mask: Mask) -> bool:
    """Whether the answer is that of a full prefill under the model's mask; a model tuned for blocks reads blocks."""
    return options.level.name in ("full", "exact") or (mask == "blocks" and options.history != "semantic")


def exact_blocks(options: RankOptions, mask: Mask) -> tuple[Admitted, ...]:
    """Instead of computing every block anew: under the block mask, reading those that are cached is exact too."""
    blocks = replace(options, level=Level("blocks"))
    if options.level.name not in ("full", "exact") or not is_exact(blocks, mask):
        return ()
    return (Admitted(blocks, (f"level blocks instead of {options.level}, exact as well under the model's mask",)),)


def exactly(options: RankOptions, mask: Mask, why: str) -> Admitted:
    """`auto` resolved to the fastest level that is exact; `why` there is no faster one."""
    blocks = replace(options, level=Level("blocks"))
    if is_exact(blocks, mask):
        return Admitted(blocks, ("level auto: blocks, which is exact under the model's mask",))
    return Admitted(replace(options, level=Level("exact")), (f"level auto: exact, {why}",))
