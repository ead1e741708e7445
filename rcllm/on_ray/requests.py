"""A request as a router sees it: which blocks it reads, how long they are, and how many rows are its own.

Never imports ray or torch. Sizes come from the tokenizer that the replicas have as well, and are remembered; rows are
learned from receipts. Invariant: nothing here fails a request: an item that is not known has no size to speak of.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rcllm.cluster.view import RoutedBlock, RoutedRequest
from rcllm.core.decoding import RecommendRequest
from rcllm.core.ranking import Event, Item, ItemId, RankRequest, UserId, whose
from rcllm.core.texts import ScoreRequest
from rcllm.prompt.texts import Texts
from rcllm.server.backend import Request, Response

_FIRST_ROWS = 8.0  # of a candidate, before any receipt: its labels, and its part of the question
_KEPT = 0.95  # of what receipts said before, with each one
_OWN_WORDS = 16  # tokens of an event in a user's words, by guess: they are not tokenised for this


def user_key(user_id: UserId | None, tenant: str) -> Hashable:
    """Names what is kept of one user, beside items' ids."""
    return None if user_id is None else ("user", whose(user_id, tenant))


@dataclass(slots=True)
class Sizes:
    """How long items are, and how many rows requests bring. `catalogue`: as it is now; `token_bytes`: of KV."""

    catalogue: Mapping[ItemId, Item]
    texts: Texts
    token_bytes: int
    reads_items: bool = True  # whether candidates are cached blocks, as they are but for read-out `likelihood`
    _tokens: dict[ItemId, int] = field(default_factory=dict)
    _rows: float = _FIRST_ROWS  # per candidate

    def routed(self, number: int, request: Request) -> RoutedRequest:
        """`number`: in the order of arrival."""
        match request:
            case RankRequest():
                items = tuple(self._items(request)) if self.reads_items else ()
                history = tuple(self._history(request.history, request.user_id, request.tenant))
                return RoutedRequest(number, items, history, round(self._rows * len(request.candidates)))
            case RecommendRequest():
                history = tuple(self._history(request.history, request.user_id, request.tenant))
                return RoutedRequest(number, (), history, round(_FIRST_ROWS))
            case ScoreRequest():
                rows = len(request.query) + sum(map(len, request.items))
            case _:
                rows = sum(map(len, request.parts))
        key = user_key(request.user_id, request.tenant)
        own = () if key is None else (RoutedBlock(key, rows * self.token_bytes, rows),)
        return RoutedRequest(number, (), own, 0 if own else rows)

    def learn(self, request: Request, response: Response) -> None:
        """How many rows a request turned out to bring."""
        if isinstance(request, RankRequest) and request.candidates:
            rows = response.receipt.num_fresh / len(request.candidates)
            self._rows = _KEPT * self._rows + (1.0 - _KEPT) * rows

    def forget(self, item_ids: Sequence[ItemId]) -> None:
        """Their texts have changed."""
        for item_id in item_ids:
            self._tokens.pop(item_id, None)

    def _items(self, request: RankRequest) -> Iterator[RoutedBlock]:
        for item_id in request.candidates:
            if item_id not in request.texts:  # else its text comes with the request, and is nobody's to hold
                yield self._block(item_id)

    def _history(self, events: Sequence[Event], user_id: UserId | None, tenant: str) -> Iterator[RoutedBlock]:
        own = 0
        for event in events:
            if event.item_id is None:
                own += _OWN_WORDS
            else:
                yield self._block(event.item_id)
        key = user_key(user_id, tenant)
        if own and key is not None:
            yield RoutedBlock(key, own * self.token_bytes, own)

    def _block(self, item_id: ItemId) -> RoutedBlock:
        tokens = self._tokens.get(item_id)
        if tokens is None:
            item = self.catalogue.get(item_id)
            tokens = 0 if item is None else len(self.texts.item(item).ids)
            self._tokens[item_id] = tokens
        return RoutedBlock(item_id, tokens * self.token_bytes, tokens)
