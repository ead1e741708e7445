"""The nouns that pass between stages: items, requests, prompts, plans, responses, receipts.

Frozen, without behaviour beyond parsing and small derived sizes, and without tensors: this module never
imports torch. A stage is a function from one of these to the next:
RankRequest → Prompt → Plan → (tensors, in the computing plane) → RankResponse with its RankReceipt.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, NewType

from annotated_types import Ge, Interval, MinLen

from rcllm.annotated import Opt
from rcllm.core.receipts import BlockKind, RankReceipt
from rcllm.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    BoolArray = npt.NDArray[np.bool_]
    Scores = npt.NDArray[np.float64]  # [candidates]; higher is better
    IntArray = npt.NDArray[np.int32]
else:  # names for annotations; numpy itself takes as long to import as the command line's whole help
    BoolArray = Scores = IntArray = Any

ContentKey = NewType("ContentKey", bytes)  # 32 bytes, blake3; see prompt/blocks.py for what is hashed
ItemId = NewType("ItemId", str)
UserId = NewType("UserId", str)
TokenIds = tuple[int, ...]

Readout = Literal["label", "pointwise", "likelihood"]
Layout = Literal["history_first", "items_first"]
LabelPlace = Literal["before", "after"]
Bias = Literal["none", "content_free", "running_mean"]
Mask = Literal["causal", "blocks"]
HistoryMode = Literal["chain", "shared", "semantic"]
Negatives = Literal["uniform", "popularity", "retrieved"]  # how candidates that a user did not choose are drawn
Policy = Literal["rcllm", "k_difference", "first", "question", "static", "two_pass", "tail", "random"]
Reduction = Literal["question", "mean", "sum"]
_PANEL = "How to rank"  # the heading of these options on the command line

# ---- what users bring -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of the catalogue."""

    item_id: ItemId
    fields: Mapping[str, str]  # text that may be cached: title, brand, description, …
    volatile: Mapping[str, str] = field(default_factory=dict)  # may change at any time (price, stock): rendered fresh


@dataclass(frozen=True, slots=True)
class Event:
    """One thing a user did. Exactly one of the two fields is given."""

    item_id: ItemId | None = None  # rendered from the catalogue: shared between users
    text: str | None = None  # the user's own words, a review for example: never shared between users


@dataclass(frozen=True, slots=True)
class Interaction:
    """One row of an interaction log."""

    user_id: UserId
    item_id: ItemId
    timestamp: float  # seconds since 1970, or the row's rank in the file where the data has no clock
    text: str | None = None  # review text, where the data has it
    rating: float | None = None


@dataclass(frozen=True, slots=True)
class RankRequest:
    """Rank `candidates` for a user with this `history` (oldest event first)."""

    request_id: str
    candidates: Annotated[tuple[ItemId, ...], MinLen(1)]
    history: tuple[Event, ...] = ()
    user_id: UserId | None = None
    volatile: Mapping[ItemId, Mapping[str, str]] = field(default_factory=dict)  # overrides the catalogue's, per item
    # fields of items that come with the request, instead of the catalogue's
    texts: Mapping[ItemId, Mapping[str, str]] = field(default_factory=dict)
    options: RankOptions | None = None  # None: the engine's defaults
    positive: ItemId | None = None  # the item the user did choose, where it is known; for evaluation only


# ---- how a request is answered --------------------------------------------------------------------------------------

_LEVEL = re.compile(r"^(full|exact|blocks|linked|tail|corrected|auto)(?:\(([^()]*)\))?$")


@dataclass(frozen=True, slots=True)
class Level:
    """A rung of the exactness ladder: `exact`, `corrected(0.3, 0.3)`, `linked(16)`, `tail(0.1)`, `blocks`.

    Beside it `full`, which reuses nothing, and `auto`, the cheapest rung that passes the model's calibration.
    """

    name: Literal["full", "exact", "corrected", "linked", "tail", "blocks", "auto"]
    budget: float = 0.0  # linked: fresh tokens per reused block; tail, corrected: fresh share of the reused item tokens
    history_budget: float = 0.0  # corrected: fresh share of the reused history tokens

    @classmethod
    def parse(cls, text: str | Level) -> Level:
        """Reads `text`; raises ConfigError that names the levels there are."""
        if isinstance(text, Level):
            return text
        found = _LEVEL.match(text.strip())
        name, argument = found.groups() if found else (None, None)
        try:
            match name:
                case "full" | "exact" | "blocks" | "auto" if argument is None:
                    return cls(name)
                case "corrected":
                    shares = [float(part) for part in (argument or "0.3").split(",")]
                    items, history = shares if len(shares) == 2 else (*shares, *shares)
                    if 0.0 <= items <= 1.0 and 0.0 <= history <= 1.0:
                        return cls("corrected", items, history)
                case "linked" if (k := int(argument or "16")) >= 0:
                    return cls("linked", k)
                case "tail" if 0.0 <= (share := float(argument or "0.1")) <= 1.0:
                    return cls("tail", share)
        except ValueError:
            pass
        raise ConfigError(
            f"unknown reuse level {text!r}: expected full (nothing reused), exact, corrected(r_item, r_history) or "
            "tail(r) with shares from 0 to 1, linked(k) with k ≥ 0 tokens, blocks, or auto"
        )

    def __str__(self) -> str:
        if self.name == "linked":
            return f"linked({int(self.budget)})"
        if self.name == "corrected":
            return f"corrected({self.budget}, {self.history_budget})"
        return f"tail({self.budget})" if self.name == "tail" else self.name


@dataclass(frozen=True, slots=True)
class Selection:
    """Which reused tokens level `corrected` computes afresh, at equal budgets.

    RcLLM (§III-D, its M7) scores S_i = (1 - λ)·A_i + λ·(|ΔK_i| + |ΔV_i|) after the check layer, items by A_i alone; it
    discloses neither λ, nor the reduction of A, nor the window. In layer 0, K and V depend on the token alone, so there
    only KV of other tokens (prototypes) differs. The policies: `reuse/select.py`.
    """

    policy: Policy = "rcllm"
    divergence: Annotated[float, Interval(ge=0, le=1)] = (
        0.5  # λ: weight of the KV difference against the attention, for history tokens
    )
    reduction: Reduction = "question"  # whose attention A_i is: the question's, or the mean or sum over all that see i
    window: Annotated[int, Ge(0)] = 0  # the last reused tokens before the question, fresh on top of the budgets
    check_layer: Annotated[int, Ge(0)] = 0  # layers up to this one run for all tokens; the scores are taken there


@dataclass(frozen=True, slots=True)
class RankOptions:
    """How to answer; every field has a default that works with an ordinary model."""

    # auto is exact until a calibration allows more; a model tuned under the block mask is exact at `blocks`
    level: Annotated[
        Level,
        Opt(
            "auto (the fastest that is calibrated, else exact), full (nothing reused), exact (cached prefix), "
            "corrected(r_item, r_history), linked(k), tail(r) or blocks.",
            metavar="LEVEL",
            panel=_PANEL,
        ),
    ] = Level("auto")
    readout: Annotated[
        Readout,
        Opt(
            "label: a letter per candidate; pointwise: yes or no; likelihood: how likely its text is (the one that "
            "works with an untuned model).",
            panel=_PANEL,
        ),
    ] = "label"
    layout: Annotated[Layout, Opt("What comes first in the prompt.", panel=_PANEL)] = "history_first"
    # fresh label tokens after their item see history and item
    label_place: Annotated[LabelPlace, Opt("Where a candidate's label stands, by its item.", panel=_PANEL)] = "after"
    parallel: bool = False  # all candidates share one base position and do not see each other
    bias: Bias = "none"  # correction of the label letters' own bias
    history: HistoryMode = "shared"  # reuse events position-free, only the user's own chain, or from token prototypes
    selection: Selection = Selection()  # level corrected: which tokens are fresh


# ---- a prompt, decided but not computed -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Block:
    """A run of tokens at its place in one prompt.

    A block with neither key is always fresh. `key` names its KV in the canonical context (reusable anywhere),
    `chain_key` its KV after exactly the blocks that precede it here (reusable as a prefix, without error).
    """

    kind: BlockKind
    token_ids: TokenIds
    base: int  # position of its first token
    owner: str | None = None  # item id or user id
    key: ContentKey | None = None
    chain_key: ContentKey | None = None
    slot: int | None = None  # candidate number, for items and what belongs to them
    private: bool = False  # in the words of one user (the owner): never shared, and erased with them

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Read:
    """Score `token_ids` as the next token after token `offset` of block `block`; none: the hidden state is wanted."""

    block: int
    offset: int
    token_ids: TokenIds
    slot: int | None = None  # the candidate it scores; None: all of them


@dataclass(frozen=True, slots=True)
class Prompt:
    """Typed blocks in order, who sees whom, and what is read at the end."""

    request_id: str
    blocks: tuple[Block, ...]
    sees: BoolArray  # [blocks, blocks]; sees[i, j]: tokens of i attend to all of j (j ≠ i); inside a block: causal
    reads: tuple[Read, ...]
    num_candidates: int
    label_ids: tuple[TokenIds, ...]  # per candidate, its label; empty for read-outs without labels
    options: RankOptions
    user_id: UserId | None = None
    notes: tuple[str, ...] = ()  # what was cut or changed on the way, for the receipt

    @property
    def num_tokens(self) -> int:
        return sum(len(block) for block in self.blocks)

    @property
    def token_ids(self) -> TokenIds:
        """All tokens, block after block."""
        return tuple(token for block in self.blocks for token in block.token_ids)

    @property
    def isolated(self) -> bool:
        """Whether the candidates do not see each other, so that none stands nearer to the question than the others."""
        items = [i for i, block in enumerate(self.blocks) if block.kind is BlockKind.ITEM]
        return not self.sees[items][:, items].any()


@dataclass(frozen=True, slots=True)
class Matches:
    """For each token of a run: whether a prototype stands for it, which, and how near that is."""

    reused: BoolArray  # [len]
    prototype: npt.NDArray[np.int64]  # [len]; meaningful where reused
    cosine: npt.NDArray[np.float32]  # [len], of the nearest that was found; 0: none, or always fresh

    def __len__(self) -> int:
        return len(self.reused)


@dataclass(frozen=True, slots=True)
class Borrowed:
    """A block of a history of which at least one token is read from the pool."""

    key: ContentKey  # names the block of matched KV within one batch; nothing is ever published under it
    matches: Matches


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens `start` to `stop` of one block, all fresh or all reused."""

    block: int  # index into Prompt.blocks
    start: int
    stop: int
    key: ContentKey | None  # the KV block they are read from; None: fresh
    why: str

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Plan:
    """The decision for one request: pieces in prompt order, and what to keep of what gets computed.

    Pieces tile every block without gap or overlap: [0 … stop) [stop … stop') … [… len).
    """

    pieces: tuple[Piece, ...]
    publish: tuple[int, ...]  # wholly fresh blocks whose KV is exact under their chain key

    @property
    def num_fresh(self) -> int:
        return sum(len(piece) for piece in self.pieces if piece.key is None)

    @property
    def num_reused(self) -> int:
        return sum(len(piece) for piece in self.pieces if piece.key is not None)


# ---- the answer -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RankResponse:
    request_id: str
    candidates: tuple[ItemId, ...]  # as asked
    scores: tuple[float, ...]  # one per candidate, in the order asked; higher is better
    order: tuple[int, ...]  # candidate indices, best first; ties by candidate order
    receipt: RankReceipt = field(repr=False)

    @property
    def ranking(self) -> tuple[ItemId, ...]:
        """Item ids, best first."""
        return tuple(self.candidates[i] for i in self.order)


def order(scores: Sequence[float]) -> tuple[int, ...]:
    """Candidate indices, best first; ties by candidate order."""
    return tuple(sorted(range(len(scores)), key=lambda i: (math.isnan(scores[i]), -scores[i])))
