"""A backend that answers by rule: no model, no threads, no torch. For tests of this server, and of whatever calls it.

    app = make_app(FakeBackend({"a": "red lamp", "b": "blue lamp"}))

A candidate scores by how many words it shares with the history; a text is answered with its own words, last first; a
token is a byte. Invariant: equal requests get equal answers, and errors are those that an engine would raise.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rcllm.core.decoding import FinishReason, Generated, RecommendRequest, RecommendResponse
from rcllm.core.ranking import Event, Item, ItemId, RankOptions, RankRequest, RankResponse, TokenIds, order
from rcllm.core.receipts import BlockKind, BlockReceipt, GenerateReceipt, RankReceipt, Receipt, RecommendReceipt
from rcllm.core.texts import ScoreRequest, ScoreResponse, TextRequest
from rcllm.data.live import LiveCatalogue
from rcllm.errors import (
    ClosingError,
    NotServedError,
    OverloadedError,
    PromptTooLongError,
    RcllmError,
    RequestError,
    UnknownItemError,
)
from rcllm.prompt.chat import ChatPrompt, Message
from rcllm.server.backend import (
    KINDS,
    NO_SHARDS,
    About,
    Asked,
    Change,
    Changed,
    EraseUser,
    PlaceItems,
    PutItems,
    RemoveItems,
    Request,
    Response,
    Stats,
    Texts,
    WarmItems,
    Warmth,
)

_WORD = re.compile(r"\w+")
_POSITIONS = 1 << 16


class FakeBackend:
    """See `Backend`."""

    def __init__(
        self,
        items: Mapping[Any, str] | None = None,
        *,
        kinds: frozenset[str] = frozenset(KINDS.values()),
        delay_s: float = 0.0,
        rule: Callable[[Request], Response | RcllmError] | None = None,
        max_waiting: int = 0,
    ) -> None:
        """`items`: titles by id. `delay_s`: of every answer. `rule`: what answers instead; an error is raised.

        `max_waiting`: requests that are answered at a time, where one more is refused; 0: all.
        """
        titles = {ItemId(item_id): title for item_id, title in (items or {}).items()}
        self.catalogue = LiveCatalogue({i: Item(i, {"title": title}) for i, title in titles.items()})
        self.about = About("fake", "0" * 12, _POSITIONS, 500, kinds, options=RankOptions(readout="pointwise"))
        self.texts: Texts = FakeTexts()
        self.answered: list[Request] = []
        self.cancelled: list[Request] = []
        self._delay_s, self._rule, self._max_waiting = delay_s, rule or self._by_rule, max_waiting
        self._seen: Counter[str] = Counter()  # texts that are «cached», by their owner's name and text
        self._closing = False
        self._unanswered = 0
        self._warmth = Warmth()

    @property
    def items(self) -> LiveCatalogue:
        return self.catalogue

    async def start(self) -> None:
        self._closing = False

    async def stop(self, drain_s: float) -> None:
        self._closing = True
        for _ in range(int(drain_s / 0.01)):
            if not self._unanswered:
                return
            await asyncio.sleep(0.01)

    async def answer(self, asked: Asked) -> Response:
        if self._closing:
            raise ClosingError("the server is going down; send the request to another one")
        if KINDS[type(asked.request)] not in self.about.kinds:
            raise NotServedError(f"nothing here answers requests of kind {KINDS[type(asked.request)]}")
        if self._max_waiting and self._unanswered >= self._max_waiting:
            raise OverloadedError(f"{self._unanswered} requests wait: ask again later", 1.0)
        self._unanswered += 1
        try:
            await asyncio.sleep(self._delay_s)
            outcome = self._rule(asked.request)
            if isinstance(outcome, RcllmError):
                raise outcome
            if isinstance(outcome, Generated) and asked.on_tokens is not None:
                for token in outcome.token_ids:
                    asked.on_tokens((token,))
                    await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled.append(asked.request)
            raise
        finally:
            self._unanswered -= 1
        self.answered.append(asked.request)
        return outcome

    async def change(self, change: Change) -> Changed:
        match change:
            case PutItems():
                num_new = self.catalogue.put(change.items)
                return Changed(len(change.items), num_new, self._forget({item.item_id for item in change.items}))
            case RemoveItems():
                self.catalogue.check_all_known(change.item_ids)
                self.catalogue.put((), gone=change.item_ids)
                return Changed(len(set(change.item_ids)), 0, self._forget(set(change.item_ids)))
            case EraseUser():
                return Changed(num_blocks=self._forget({f"user {change.user_id}"}))
            case WarmItems():
                for item_id in self.catalogue if change.item_ids is None else change.item_ids:
                    self._reused(item_id, self._text(item_id, {}))
                self._warmth = Warmth(done_blocks=len(self._seen), total_blocks=len(self._seen))
            case PlaceItems():
                raise RequestError(NO_SHARDS)
        return Changed()

    def stats(self) -> Stats:
        return Stats(
            num_items=len(self.catalogue),
            num_unanswered=self._unanswered,
            num_blocks=len(self._seen),
            hits={"device": sum(self._seen.values())},
            misses=len(self._seen),
            warmth=self._warmth,
        )

    # ---- the rules ----

    def _by_rule(self, request: Request) -> Response:
        match request:
            case RankRequest():
                return self._rank(request)
            case RecommendRequest():
                return self._recommend(request)
            case ScoreRequest():
                return _score(request)
        return _generate(request, self.texts, self._reused(f"user {request.user_id}", repr(request.parts[:-1])))

    def _rank(self, request: RankRequest) -> RankResponse:
        if len(request.candidates) > self.about.max_candidates:
            raise RequestError(f"expected at most {self.about.max_candidates} candidates, got more")
        if len(set(request.candidates)) < len(request.candidates):
            raise RequestError("expected each candidate once, got one again")
        wanted = self._words(request.history, request.texts)
        texts = [self._text(item_id, request.texts) for item_id in request.candidates]
        scores = tuple(2.0 * sum(wanted[word] > 0 for word in _words(text)) - 1.0 for text in texts)
        reused = [self._reused(i, text) for i, text in zip(request.candidates, texts, strict=True)]
        blocks = tuple(
            BlockReceipt(
                BlockKind.ITEM, item_id, slot, "device" if there else "computed", 0, len(text), None, "by rule"
            )
            for slot, (item_id, text, there) in enumerate(zip(request.candidates, texts, reused, strict=True))
        )
        options = request.options or self.about.options
        receipt = RankReceipt(
            **_shared(sum(map(len, texts)), sum(len(t) for t, there in zip(texts, reused, strict=True) if there)),
            readout=options.readout,
            layout=options.layout,
            label_place="none",
            context="none",
            bias="none",
            kv_bytes_read=0,
            kv_bytes_copied=0,
            blocks=blocks,
        )
        return RankResponse(request.request_id, request.candidates, scores, order(scores), receipt)

    def _recommend(self, request: RecommendRequest) -> RecommendResponse:
        wanted = self._words(request.history, {})
        ids = [i for i in self.catalogue if i not in request.deny and (request.allow is None or i in request.allow)]
        found = sorted(ids, key=lambda i: -sum(wanted[word] > 0 for word in _words(self._text(i, {}))))[: request.n]
        receipt = RecommendReceipt(
            **_shared(1, 0),
            rule=request.rule,
            beam=request.beam,
            epoch=0,
            kv_bytes_read=0,
            kv_bytes_naive=0,
            kv_bytes_copied=0,
            steps=(),
        )
        scores = tuple(-math.log(2.0 + place) for place in range(len(found)))
        return RecommendResponse(request.request_id, tuple(found), scores, receipt)

    def _words(self, history: Sequence[Event], texts: Mapping[ItemId, Mapping[str, str]]) -> Counter[str]:
        shown = (e.text if e.text is not None else self._text(e.item_id or ItemId(""), texts) for e in history)
        return Counter(word for text in shown for word in _words(text))

    def _text(self, item_id: ItemId, texts: Mapping[ItemId, Mapping[str, str]]) -> str:
        fields = texts.get(item_id)
        if fields is None:
            item = self.catalogue.get(item_id)
            if item is None:
                raise UnknownItemError(f"item {item_id!r} is not in the catalogue of {len(self.catalogue)} items")
            fields = item.fields
        return " ".join(fields.values())

    def _reused(self, owner: str, text: str) -> bool:
        name = f"{owner}\n{text}"
        self._seen[name] += 1
        return self._seen[name] > 1

    def _forget(self, owners: set[str] | set[ItemId]) -> int:
        gone = [name for name in self._seen if name.partition("\n")[0] in owners]
        for name in gone:
            del self._seen[name]
        return len(gone)


class FakeTexts:
    """A token is a byte of UTF-8."""

    def opening(self, text: str) -> TokenIds:
        return tuple(text.encode("utf-8", "replace"))

    going_on = opening

    def chat(self, messages: Sequence[Message]) -> ChatPrompt:
        if not messages:
            raise RequestError("messages: expected at least one message, got none")
        parts = tuple(self.opening(f"{each.role}: {each.content}\n") for each in messages)
        return ChatPrompt((*parts, self.opening("assistant: ")), messages[0].role == "system")

    def decode(self, ids: Sequence[int]) -> str:
        if any(not 0 <= each < 256 for each in ids):
            raise RequestError("expected token ids from 0 to 255, got another")
        return bytes(ids).decode("utf-8", "replace")


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))


def _shared(num_tokens: int, num_reused: int) -> dict[str, Any]:
    stage_ms = {"wait": 0.1, "forward": 1.0, "total": 1.5}
    shared: dict[str, Any] = {
        "level": "exact",
        "history": "shared",
        "node": "fake",
        "model": "0" * 12,
        "backend": "rule",
    }
    counts = {"num_fresh": num_tokens - num_reused, "num_reused": num_reused, "num_computed": 0, "batch_size": 1}
    return {**shared, **counts, "num_tokens": num_tokens, "stage_ms": stage_ms}


def _score(request: ScoreRequest) -> ScoreResponse:
    if not request.items or not all(request.items) or not request.label_ids:
        raise RequestError("expected at least one item with tokens, and one label token")
    rows = tuple(
        tuple(-math.log(2.0 + (sum(item) + label) % 7) for label in request.label_ids) for item in request.items
    )
    tokens = len(request.query) + sum(map(len, request.items))
    return ScoreResponse(request.request_id, rows, Receipt(**_shared(tokens, 0)))


def _generate(request: TextRequest, texts: Texts, reused: bool) -> Generated:
    prompt = [token for part in request.parts for token in part]
    if not prompt:
        raise RequestError("the prompt is empty; there is nothing to go on from")
    if len(prompt) + 1 > _POSITIONS:
        raise PromptTooLongError(f"the prompt needs more than {_POSITIONS} positions; send a shorter one")
    words = texts.decode(prompt).split()
    text, reason = " ".join(reversed(words)), "eos"
    for stop in request.options.stop:
        if stop in text:
            text, reason = text[: text.index(stop)], "stop"
    ids = texts.opening(text)
    if len(ids) > request.options.max_tokens:
        ids, reason = ids[: request.options.max_tokens], "length"
        text = texts.decode(ids)
    receipt = GenerateReceipt(
        **_shared(len(prompt), sum(map(len, request.parts[:-1])) if reused else 0),
        speculation="none",
        passes=max(len(ids) - 1, 0),
        drafted=0,
        accepted=0,
        accepted_length_mean=1.0,
        divergences=(),
    )
    finish: FinishReason = reason  # type: ignore[assignment]
    return Generated(request.request_id, text, ids, finish, receipt)
