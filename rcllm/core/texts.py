"""The nouns of requests that are asked in token ids: texts to go on from, and items to score after a query.

Frozen and without tensors; this module never imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rcllm.core.decoding import GenerateRequest
from rcllm.core.ranking import Level, TokenIds, UserId
from rcllm.core.receipts import Receipt


@dataclass(frozen=True, slots=True)
class TextRequest(GenerateRequest):
    """An answer that goes on from `parts`, which are cached apart; the history of the request is not used.

    The first part is shared by everybody where `shares_first`, as the words of an application are. The other parts are
    kept as the user's own, or not at all where no user is named.
    """

    parts: tuple[TokenIds, ...] = ()
    shares_first: bool = False
    pool: str = ""  # of earlier answers to draft from, and to learn this one into; empty: nothing is drafted


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """How likely each of `label_ids` is as the next token after the query and each item, every item by itself."""

    request_id: str
    query: TokenIds
    items: tuple[TokenIds, ...]
    label_ids: TokenIds
    item_first: bool = False  # the item stands before the query
    user_id: UserId | None = None  # whose words the query is, so that its KV may be kept
    level: Level | None = None  # None: exact
    tenant: str = ""  # whose user it is, as in RankRequest


@dataclass(frozen=True, slots=True)
class ScoreResponse:
    request_id: str
    log_probs: tuple[tuple[float, ...], ...]  # [items][labels], over the whole vocabulary
    receipt: Receipt = field(repr=False)
