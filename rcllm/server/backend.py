"""What the HTTP application needs of whatever answers, as a contract and its nouns.

`on_engine.py` answers with engines, `fake.py` by rule. Never imports torch. Invariant: an answer comes once, as a
response or as an error; an answer that nobody waits for any more is not computed where that can still be helped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rcllm.cluster.placement import Placement
from rcllm.core.decoding import Generated, RecommendRequest, RecommendResponse
from rcllm.core.ranking import Item, ItemId, RankOptions, RankRequest, RankResponse, Readout, TokenIds, UserId
from rcllm.core.texts import ScoreRequest, ScoreResponse, TextRequest
from rcllm.fidelity.shadow import GuardStatus
from rcllm.prompt.chat import ChatPrompt, Message
from rcllm.schedule.cost import CostStats
from rcllm.schedule.work import DEFAULT_TERMS, Terms
from rcllm.store.contract import TierStats

Request = RankRequest | RecommendRequest | ScoreRequest | TextRequest
Response = RankResponse | RecommendResponse | ScoreResponse | Generated
KINDS: Mapping[type, str] = {
    RankRequest: "rank",
    RecommendRequest: "recommend",
    ScoreRequest: "score",
    TextRequest: "generate",
}


@dataclass(frozen=True, slots=True)
class About:
    """What is served."""

    model: str  # as it was named
    fingerprint: str  # first 12 hex digits, of weights and adapter
    max_positions: int
    max_candidates: int
    kinds: frozenset[str]  # of KINDS
    shown: tuple[str, ...] = ("title",)  # fields of items that the template shows
    options: RankOptions = field(default_factory=RankOptions)  # of rankings that bring none
    rerank: Readout = "pointwise"  # which read-out answers reranking

    @property
    def text_field(self) -> str:
        """The field of an item that a text without a name is taken for."""
        usual = ("title", "text", "description")
        return next((name for name in usual if name in self.shown), self.shown[0] if self.shown else usual[0])


class Texts(Protocol):
    """Texts to token ids and back. Called by any thread."""

    def opening(self, text: str) -> TokenIds:
        """A whole prompt that an application wrote; control tokens in it are meant."""

    def going_on(self, text: str) -> TokenIds:
        """The same for what follows another text."""

    def chat(self, messages: Sequence[Message]) -> ChatPrompt:
        """A conversation, in which nobody can write a control token. Raises RequestError."""

    def decode(self, ids: Sequence[int]) -> str:
        """Raises RequestError for ids that the vocabulary lacks."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request on its way to the backend."""

    request: Request
    terms: Terms = DEFAULT_TERMS  # its deadline: until the first token, or the scores
    again: bool = False  # it was answered before, and its level is the one that it was answered at
    on_tokens: Callable[[Sequence[int]], None] | None = None  # called in the event loop as a text goes on


# ---- changes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PutItems:
    """Adds items or replaces their text. When it is made, no answer reads an old text of theirs any more."""

    items: tuple[Item, ...]
    codes: Mapping[ItemId, tuple[int, ...]] = field(default_factory=dict)  # semantic IDs, to recommend them by


@dataclass(frozen=True, slots=True)
class RemoveItems:
    item_ids: tuple[ItemId, ...]


@dataclass(frozen=True, slots=True)
class EraseUser:
    """Removes everything that was computed from a user's words and kept."""

    user_id: UserId
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class WarmItems:
    """Computes items ahead of requests, in the background; None: the whole catalogue."""

    item_ids: tuple[ItemId, ...] | None = None


NO_SHARDS = "one process serves here, and holds what it has room for: only a cluster has shards"


@dataclass(frozen=True, slots=True)
class PlaceItems:
    """Brings a cluster nearer to a placement: `num_items` copies are made, and `num_left` are left for the next time.

    Replicas answer meanwhile. What is on its way between two of them is computed where it is asked for.
    """

    placement: Placement
    max_moves: int | None = None  # copies, at most; None: all


Change = PutItems | RemoveItems | EraseUser | WarmItems | PlaceItems


@dataclass(frozen=True, slots=True)
class Changed:
    num_items: int = 0  # added, replaced, removed, or moved
    num_new: int = 0
    num_blocks: int = 0  # of cached KV that were removed
    num_left: int = 0  # items that a bound left where they are
    acknowledged: tuple[str, ...] = ()  # replicas on which it holds; empty where one process serves


@dataclass(frozen=True, slots=True)
class Warmth:
    """How far warming is."""

    running: bool = False
    done_blocks: int = 0
    total_blocks: int = 0
    full: bool = False  # the cache has no room for the rest
    error: str = ""


@dataclass(frozen=True, slots=True)
class Door:
    """What waits, and what became of requests where they are taken in."""

    num_waiting: int = 0
    wait_ms: float = 0.0  # that the next ranking would wait, by estimate
    outcomes: Mapping[str, int] = field(default_factory=dict)  # accepted, overloaded, late, expired, probed
    degraded: Mapping[str, int] = field(default_factory=dict)  # answers, by what they gave up for their deadline


@dataclass(frozen=True, slots=True)
class Stats:
    """What the backend holds at this moment."""

    num_items: int = 0
    num_unanswered: int = 0  # requests that wait or are computed
    num_blocks: int = 0  # in the pool
    num_bytes: int = 0
    budget_bytes: int = 0
    code_bytes: int = 0  # of the codes of a catalogue on a GPU that searches them, beside the pool
    hits: Mapping[str, int] = field(default_factory=dict)  # blocks that were asked for, by the tier that had them
    misses: int = 0
    evictions: int = 0
    store_errors: int = 0
    tiers: tuple[TierStats, ...] = ()  # below the pool, the nearest first
    rates: Mapping[str, float] = field(default_factory=dict)  # that were timed, in bytes or FLOPs per second
    door: Door = Door()
    costs: CostStats | None = None  # how well passes were estimated
    guard: GuardStatus | None = None  # None: nothing is guarded
    loop_failures: int = 0  # passes that ended by a mistake of ours
    guard_failures: int = 0  # the same of the guard's turns
    warmth: Warmth = Warmth()


class Backend(Protocol):
    """Answers requests and makes changes. All of its methods are called in one event loop."""

    @property
    def about(self) -> About: ...
    @property
    def texts(self) -> Texts: ...
    @property
    def items(self) -> Mapping[ItemId, Item]:
        """The catalogue as it is now; may be read by any thread while it changes."""

    async def start(self) -> None:
        """Begins to answer."""

    async def stop(self, drain_s: float) -> None:
        """Takes no more requests, waits so long for those under way, and ends what is left with CancelledError."""

    async def answer(self, asked: Asked) -> Response:
        """Raises RcllmError. Cancelling the task withdraws the request: it is dropped before its next pass."""

    async def change(self, change: Change) -> Changed:
        """Returns when the change holds for every answer that comes later. Raises RcllmError."""

    def stats(self) -> Stats:
        """Costs microseconds; waits for no pass."""
