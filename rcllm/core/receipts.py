"""What answers say about themselves: where each block came from, what was computed, and how long it took.

Frozen and without tensors. Receipts are made with keywords alone; what all jobs have in common stands in `Receipt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rcllm.core.ranking import Selection

from rcllm.core.requests import BeamRule as BeamRule

# where the KV of a block came from; host, disk, peer and shared are the tiers of the store
Source = Literal["fresh", "computed", "device", "host", "disk", "peer", "shared", "semantic"]


Step = Literal["level", "candidates", "last_scores"]  # of the degradation ladder, in this order


class BlockKind(StrEnum):
    INSTRUCTION = "instruction"
    HISTORY = "history"
    ITEM = "item"
    QUESTION = "question"
    LABEL = "label"  # labels, delimiters and volatile fields: always fresh


@dataclass(frozen=True, slots=True)
class BlockReceipt:
    kind: BlockKind
    owner: str | None
    slot: int | None
    source: Source
    num_fresh: int
    num_reused: int
    key: str | None  # first 12 hex digits of the content key
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What every response says about itself."""

    level: str  # how far KV was reused for the prompt, as asked or as `auto` came to
    history: str  # mode of the history
    node: str
    model: str  # first 12 hex digits of the model fingerprint
    backend: str  # how attention read the segments
    num_tokens: int  # of the prompt
    num_fresh: int  # of them, computed in this request's forward
    num_reused: int
    num_computed: int  # tokens of missing blocks that were computed for it (or for its batch) and published
    stage_ms: Mapping[str, float]  # wall time of each stage that it took part in; of the whole batch
    batch_size: int  # requests whose prompts were computed together
    notes: tuple[str, ...] = ()
    degraded: tuple[Step, ...] = ()  # what was given up to keep the deadline; notes say how far
    guard: str = ""  # what the fidelity guard knew of this kind of requests; empty without one


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReceipt(Receipt):
    """What a ranking says about itself."""

    readout: str
    layout: str
    label_place: str
    context: str  # canonical context of the reused blocks
    bias: str
    selection: Selection | None = None  # level corrected: which reused tokens were computed afresh
    kv_bytes_read: int  # cached KV that attention read
    kv_bytes_copied: int  # published KV that the whole batch copied or converted before reading; 0 when read in place
    blocks: tuple[BlockReceipt, ...]


@dataclass(frozen=True, slots=True)
class BeamStep:
    """What one level of a beam search did."""

    num_parents: int  # prefixes that were extended
    num_children: int  # valid extensions: only these were ever scored
    num_kept: int
    num_dead: int  # extensions that the catalogue has, but below which no item is allowed
    num_skipped: int  # children that early termination left unsorted; 0 on a GPU, which sorts all


@dataclass(frozen=True, slots=True, kw_only=True)
class RecommendReceipt(Receipt):
    """What a recommendation says about itself."""

    rule: BeamRule
    beam: int
    epoch: int  # version of the codes that this request saw
    kv_bytes_read: int  # by attention of the steps: the prompt once a step, and each beam's own
    kv_bytes_naive: int  # the same where every beam reads the prompt for itself
    kv_bytes_copied: int  # of the prompt, where it lay in scraps and was joined first
    steps: tuple[BeamStep, ...]  # one per level
    knn: float = 0.0  # share of item-kNN in the scores; 0: the decoder alone
    num_by_knn: int = 0  # items of the answer that no beam found, item-kNN alone


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where relaxed verification took a token that greedy decoding would not have taken at that place."""

    position: int  # in the answer
    token_id: int
    argmax_id: int
    probability: float  # of the token, by the model
    argmax_probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateReceipt(Receipt):
    """What an answer says about itself."""

    speculation: str
    passes: int  # of decoding; the prompt's own, which gives the first token, not among them
    drafted: int  # tokens that passes verified
    accepted: int  # of them, those that are part of the answer
    accepted_length_mean: float  # tokens decided per pass, the pass's own token included; 0 without passes
    divergences: tuple[Divergence, ...]
