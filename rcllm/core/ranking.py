"""The nouns that pass between the stages of a ranking: prompts, plans, responses. Of requests: `core/requests.py`.

Frozen, without behaviour beyond small derived sizes, and without tensors: this module never imports torch. A stage is a
function from one of these to the next: RankRequest → Prompt → Plan → (tensors, in the computing plane) → RankResponse
with its RankReceipt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NewType

from rcllm.core.receipts import BlockKind, RankReceipt
from rcllm.core.requests import Bias as Bias
from rcllm.core.requests import Event as Event
from rcllm.core.requests import HistoryMode as HistoryMode
from rcllm.core.requests import Interaction as Interaction
from rcllm.core.requests import Item as Item
from rcllm.core.requests import ItemId as ItemId
from rcllm.core.requests import LabelPlace as LabelPlace
from rcllm.core.requests import Layout as Layout
from rcllm.core.requests import Level as Level
from rcllm.core.requests import Mask as Mask
from rcllm.core.requests import Negatives as Negatives
from rcllm.core.requests import Policy as Policy
from rcllm.core.requests import RankOptions as RankOptions
from rcllm.core.requests import RankRequest as RankRequest
from rcllm.core.requests import Readout as Readout
from rcllm.core.requests import Reduction as Reduction
from rcllm.core.requests import Selection as Selection
from rcllm.core.requests import TokenIds as TokenIds
from rcllm.core.requests import UserId as UserId
from rcllm.core.requests import whose as whose

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    BoolArray = npt.NDArray[np.bool_]
    Scores = npt.NDArray[np.float64]  # [candidates]; higher is better
    IntArray = npt.NDArray[np.int32]
else:  # names for annotations; numpy itself takes as long to import as the command line's whole help
    BoolArray = Scores = IntArray = Any

ContentKey = NewType("ContentKey", bytes)  # 32 bytes, blake3; see prompt/blocks.py for what is hashed

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
    user_id: UserId | None = None  # as `whose` names the user
    notes: tuple[str, ...] = ()  # what was cut or changed on the way, for the receipt

    @property
    def num_tokens(self) -> int:
        return sum(len(block.token_ids) for block in self.blocks)

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
    def read(self) -> tuple[ContentKey, ...]:
        """Of the KV that pieces are read from, each once."""
        return tuple(dict.fromkeys(piece.key for piece in self.pieces if piece.key is not None))

    @property
    def num_fresh(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces if piece.key is None)

    @property
    def num_reused(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces if piece.key is not None)


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
