"""One replica, but for Ray: answers envelopes with an engine, and knows what the cluster has changed.

Never imports ray. Invariant: an envelope is not answered before the ledger was read as far as it says; an envelope that
comes again while it is answered, or shortly after, is not computed again; another node's envelope is given back; of a
user who is erased no answer is kept.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import AsyncIterator, Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from rcllm.cluster.live import NodeReport, packed
from rcllm.cluster.placement import Placement
from rcllm.core.ranking import ContentKey, ItemId, UserId, whose
from rcllm.engine.warming import blocks_to_warm
from rcllm.errors import ClosingError, RcllmError, UnknownItemError
from rcllm.on_ray.envelope import (
    CatchUp,
    Describe,
    Described,
    Envelope,
    Get,
    Has,
    Make,
    Outcome,
    SentBlock,
    State,
    Warm,
)
from rcllm.on_ray.ledger import Page
from rcllm.on_ray.peers import PeerStore
from rcllm.on_ray.recipe import Built
from rcllm.reuse.missing import item_owner
from rcllm.schedule.cost import Demand
from rcllm.server.backend import Asked, Change, Changed, EraseUser, PlaceItems, PutItems, RemoveItems, WarmItems
from rcllm.store.owners import one_name

_REMEMBERED = 256  # answers, for envelopes that come again
_TOKENS, _CONTEXT, _BYTES = 100, 1000, 1 << 20  # for which rates are told: rows after a context, bytes of KV
_PATIENCE_S = 30.0  # for a ledger that knows less than an envelope
_NEVER = 1.0  # bytes a second: a router that is told so counts on no fetch


class Changes(Protocol):
    """The ledger, as a replica reads it."""

    async def since(self, version: int) -> Page: ...


def shard_of(placement: Placement, node: int, catalogue: Container[ItemId]) -> tuple[ItemId, ...]:
    """The items that are placed on a replica and in the catalogue, replicated ones first."""
    if node >= placement.room.num_nodes:
        return ()
    held = np.flatnonzero(placement.held_by(node))
    ordered = held[np.argsort(~placement.replicated[held], kind="stable")]
    return tuple(i for number in ordered if (i := placement.item_ids[number]) in catalogue)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What is answered to one envelope."""

    user_id: UserId | None  # as `whose` names them
    task: asyncio.Task[Any]


class Worker:
    """Runs in one event loop; `start` before anything else. `life`: names this process."""

    def __init__(
        self,
        node: int,
        life: str,
        built: Built,
        placement: Placement,
        changes: Changes,
        peers: PeerStore | None = None,
    ) -> None:
        self.node, self._life, self._peers = node, life, peers
        self._engine, self._backend, self._close = built.engine, built.backend, built.close
        self._placement, self._changes = placement, changes
        self.version = 0
        self._reading = asyncio.Lock()  # of the ledger
        self._answers: OrderedDict[str, _Answer] = OrderedDict()  # by the names of envelopes
        self._numbers = itertools.count(1)
        self._by_owner = {one_name(item_owner(item_id)): n for n, item_id in enumerate(placement.item_ids)}
        self._below: frozenset[int] = frozenset()  # items that a tier of this machine has, when it was last looked at
        self._report = NodeReport(node, life, 0)
        self._loading: asyncio.Future[None] | None = None  # of its shard; kept, so that it is not collected

    # ---- its life ----

    async def start(self, warm: bool) -> None:
        """Reads what has changed, and then begins to load its shard: from its own tiers, its peers, or by computing."""
        await self._backend.start()
        await self._catch_up(0)
        self._loading = asyncio.ensure_future(self._load_shard(warm))

    async def stop(self, drain_s: float) -> None:
        await self._backend.stop(drain_s)
        await asyncio.to_thread(self._close)

    def move(self, node: int) -> None:
        """It has another number from now on, and another shard."""
        if node != self.node:
            self.node = node
            self._report = replace(self._report, node=node)
            self._loading = asyncio.ensure_future(self._load_shard(warm=True))

    def shard(self) -> tuple[ItemId, ...]:
        """See `shard_of`."""
        return shard_of(self._placement, self.node, self._engine.catalogue)

    async def _load_shard(self, warm: bool) -> None:
        """Computes what is missing, in the background; what lower tiers have counts as held."""
        while True:
            try:
                self._below = await asyncio.to_thread(self._found_below, self.shard())
                if warm and (item_ids := self.shard()):
                    await self._backend.change(WarmItems(item_ids))
                return
            except UnknownItemError:  # an item was removed meanwhile: the shard is what is left
                continue

    def _found_below(self, item_ids: Sequence[ItemId]) -> frozenset[int]:
        blocks = blocks_to_warm(self._engine.prompter, self._engine.config.rank, item_ids)
        with self._alone():
            found = self._engine.pool.lookup_many(block.key for block in blocks)
        there = {one_name(block.owner) for block in blocks if found.is_near(block.key)}
        return frozenset(self._by_owner[owner] for owner in there if owner in self._by_owner)

    # ---- envelopes ----

    async def handle(self, envelope: Envelope) -> Outcome:
        """Answers one question that has one answer."""
        if envelope.node is not None and envelope.node != self.node:
            return Outcome(self.node, missed=True)
        try:
            value = await self._once(envelope) if isinstance(envelope.ask, Asked) else await self._value(envelope)
            return Outcome(self.node, value, report=self._told())
        except RcllmError as error:
            return Outcome(self.node, error=error, report=self._told())

    async def stream(self, envelope: Envelope) -> AsyncIterator[tuple[int, ...] | Outcome]:
        """Answers a request for a text: its tokens as they come, and then the outcome."""
        assert isinstance(envelope.ask, Asked)
        coming: asyncio.Queue[tuple[int, ...] | None] = asyncio.Queue()
        asked = replace(envelope.ask, on_tokens=lambda ids: coming.put_nowait(tuple(ids)))
        answering = asyncio.ensure_future(self._answer(envelope, asked))
        answering.add_done_callback(lambda _: coming.put_nowait(None))
        try:
            while (ids := await coming.get()) is not None:
                yield ids
            try:
                yield Outcome(self.node, answering.result(), report=self._told())
            except RcllmError as error:
                yield Outcome(self.node, error=error, report=self._told())
        finally:
            answering.cancel()

    async def _once(self, envelope: Envelope) -> Any:
        """The same answer for the same envelope. Who goes away withdraws it for all."""
        answer = self._answers.get(envelope.name)
        if answer is None or answer.task.cancelled():
            assert isinstance(envelope.ask, Asked)
            user_id = whose(envelope.ask.request.user_id, envelope.ask.request.tenant)
            answer = _Answer(user_id, asyncio.ensure_future(self._answer(envelope, envelope.ask)))
            self._answers[envelope.name] = answer
            while len(self._answers) > _REMEMBERED and next(iter(self._answers.values())).task.done():
                self._answers.popitem(last=False)
        return await answer.task

    async def _answer(self, envelope: Envelope, asked: Asked) -> Any:
        await self._catch_up(envelope.version)
        if self._peers is not None and envelope.hints:
            self._peers.suggest(node for node in envelope.hints if node != self.node)
        return await self._backend.answer(asked)

    async def _value(self, envelope: Envelope) -> Any:
        match envelope.ask:
            case Describe():
                return Described(self._backend.about, self._engine.kv_bytes_per_token)
            case State():
                return self._backend.stats()
            case Make(change):
                return await self._make(change)
            case CatchUp():
                return await self._catch_up(envelope.version)
            case Warm(item_ids):
                return await self._warm(item_ids)
            case Has(keys):
                return await asyncio.to_thread(self._has, keys)
            case Get(keys):
                return await asyncio.to_thread(self._get, keys)
        raise AssertionError(envelope.ask)

    async def _warm(self, item_ids: tuple[ItemId, ...] | None) -> Changed:
        placed = self.shard()
        if item_ids is not None:
            for item_id in item_ids:
                self._engine.prompter.item(item_id)
            here = frozenset(placed)
            known = frozenset(self._placement.item_ids)
            placed = tuple(i for i in item_ids if i in here or i not in known)
        return await self._backend.change(WarmItems(placed)) if placed else Changed()

    # ---- changes ----

    async def _catch_up(self, version: int) -> Changed:
        """Reads the ledger, at least as far as `version`. Raises ClosingError where it cannot."""
        if self.version >= version > 0:
            return Changed()
        async with self._reading:
            if self.version >= version > 0:
                return Changed()
            page = await self._page(version)
            made = [await self._make(self._known(change)) for change in page.changes]
            self.version = page.version
            return _sum(made)

    async def _page(self, version: int) -> Page:
        end = asyncio.get_running_loop().time() + _PATIENCE_S
        while (page := await self._changes.since(self.version)).version < version:
            if asyncio.get_running_loop().time() > end:
                raise ClosingError(
                    f"replica {self.node} cannot learn what changed: the ledger is at {page.version}, and {version} is "
                    "wanted; ask again"
                )
            await asyncio.sleep(0.1)
        return page

    async def _make(self, change: Change) -> Changed:
        if isinstance(change, PlaceItems):
            return await self._place(change.placement)
        changed = await self._backend.change(change)
        match change:
            case PutItems():
                await self._renew(tuple(item.item_id for item in change.items))
            case RemoveItems():
                self._below -= self._numbers_of(change.item_ids)
            case EraseUser():
                gone = whose(change.user_id, change.tenant)
                self._answers = OrderedDict((k, each) for k, each in self._answers.items() if each.user_id != gone)
        return changed

    async def _renew(self, item_ids: tuple[ItemId, ...]) -> None:
        """What a replica holds stays held when its text changes."""
        self._below -= self._numbers_of(item_ids)
        if self._loading is None:  # it has just begun, and will load its whole shard
            return
        here = frozenset(self.shard())
        if again := tuple(item_id for item_id in item_ids if item_id in here):
            as_before = await asyncio.to_thread(self._found_below, again)  # meanwhile the whole shard may be found
            self._below |= as_before
            await self._backend.change(WarmItems(again))

    def _numbers_of(self, item_ids: Sequence[ItemId]) -> frozenset[int]:
        """In the placement, of those that it has."""
        names = map(one_name, map(item_owner, item_ids))
        return frozenset(self._by_owner[name] for name in names if name in self._by_owner)

    async def _place(self, placement: Placement) -> Changed:
        """Gives up what is no longer placed here, and begins to load what is, in the background."""
        before = self.shard()
        self._placement = placement
        here = set(self.shard())
        gone = [item_id for item_id in before if item_id not in here]
        num_blocks = await asyncio.to_thread(lambda: sum(map(self._engine.retire_item, gone)))
        self._loading = asyncio.ensure_future(self._load_shard(warm=True))
        return Changed(num_blocks=num_blocks)

    def _known(self, change: Change) -> Change:
        """Of items that a ledger removes, those that are there: a replica that comes back may never have had them."""
        if not isinstance(change, RemoveItems):
            return change
        return RemoveItems(tuple(i for i in change.item_ids if i in self._engine.catalogue))

    # ---- blocks for other replicas ----

    def _has(self, keys: Sequence[ContentKey]) -> Mapping[ContentKey, int]:
        with self._alone():
            return {key: each.num_bytes for key, each in self._engine.pool.lookup_many(keys).found.items()}

    def _get(self, keys: Sequence[ContentKey]) -> Mapping[ContentKey, SentBlock]:
        with self._alone():
            stored = self._engine.pool.sealed(keys)
        return {
            key: SentBlock(np.frombuffer(block.data, dtype=np.uint8), block.cost, block.owner, block.space)
            for key, block in stored.items()
        }

    def _alone(self) -> AbstractContextManager[None]:
        """In this thread, no other replica is asked."""
        return nullcontext() if self._peers is None else self._peers.silent()

    # ---- what it tells of itself ----

    def report(self) -> NodeReport:
        """With what it holds, for the router; the same object while nothing changes."""
        holds = packed(self._held(), self._placement.num_items)
        now = replace(self._rated(), holds=holds)
        if replace(now, number=0) != replace(self._report, number=0):
            self._report = replace(now, number=next(self._numbers))
        return self._report

    def _told(self) -> NodeReport:
        """Without what it holds, to go with an answer."""
        return replace(self._rated(), number=next(self._numbers))

    def _held(self) -> frozenset[int]:
        here = (self._by_owner.get(owner) for owner in self._engine.pool.owners())
        return self._below.union(number for number in here if number is not None)

    def _rated(self) -> NodeReport:
        """Its queue and its rates, by the cost model that also takes requests in."""
        costs, fetch = self._engine.costs, self._engine.pool.rates.bytes_of["peer"].per_s
        if self._peers is None:
            fetch = _NEVER
        rows = Demand(missing=_TOKENS, pairs=_TOKENS * _CONTEXT)
        return NodeReport(
            self.node,
            self._life,
            0,
            round(self._engine.queue().ahead_ms / 1e3, 3),
            round(_TOKENS / max(costs.ms(rows), 1e-6) * 1e3, 1),
            round(_BYTES / max(costs.ms(Demand(kv_bytes=_BYTES)), 1e-6) * 1e3, -6),
            round(fetch, -6) or _NEVER,
        )


def _sum(made: Sequence[Changed]) -> Changed:
    return Changed(
        sum(each.num_items for each in made), sum(each.num_new for each in made), sum(each.num_blocks for each in made)
    )
