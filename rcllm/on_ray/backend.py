"""The cluster as a `Backend`: the HTTP application asks it as it asks one engine.

Never imports ray: a `Fleet` brings envelopes to replicas. Invariant: a request gets one outcome, however many replicas
die over it; a change holds on every replica that lives before it is told to be made, and on the others before they
answer.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rcllm.cluster.live import LiveCluster
from rcllm.cluster.moves import matched, plan_moves
from rcllm.cluster.view import RoutedRequest
from rcllm.config import ClusterConfig
from rcllm.core.ranking import Item, ItemId
from rcllm.core.texts import TextRequest
from rcllm.data.live import LiveCatalogue
from rcllm.errors import ClosingError, OverloadedError
from rcllm.on_ray.aim import ByPolicy, Named
from rcllm.on_ray.envelope import Ask, CatchUp, Envelope, LostError, Make, Outcome, State, Warm
from rcllm.on_ray.ledger import Ledger
from rcllm.on_ray.merged import merged
from rcllm.on_ray.requests import Sizes, user_key
from rcllm.server.backend import (
    About,
    Asked,
    Change,
    Changed,
    EraseUser,
    PlaceItems,
    PutItems,
    RemoveItems,
    Response,
    Stats,
    Texts,
    WarmItems,
)

logger = logging.getLogger(__name__)
_LOOK_S = 1.0  # how often replicas are asked what they hold and have done
_ANSWER_S = 5.0  # for how long a replica may be silent about that
_RETRY_S = 1.0  # after which a client may ask again
_PAUSE_S = 0.2  # before a request is sent again, where every replica has lost it


class Fleet(Protocol):
    """Brings envelopes to replicas."""

    async def ask(self, envelope: Envelope) -> Outcome:
        """Raises LostError where the replica died; cancelling it withdraws the question."""

    def stream(self, envelope: Envelope) -> AsyncIterator[tuple[int, ...] | Outcome]:
        """Tokens as they come, then the outcome. Raises LostError."""


class Keeper(Protocol):
    """Keeps the ledger where replicas read it."""

    async def version(self) -> int:
        """Of what is kept."""

    async def adopt(self, ledger: Ledger) -> int:
        """Takes over what `ledger` has, where it has more; returns the version that is kept now."""


@dataclass(slots=True)
class Tally:
    """What became of requests on their way."""

    lost: int = 0  # answers that a replica's death took, whose requests were sent again
    hedged: int = 0  # requests that a second replica was asked
    hedges_won: int = 0  # of them, those that it answered first


class ClusterBackend:
    """See `Backend`."""

    def __init__(
        self,
        fleet: Fleet,
        keeper: Keeper,
        cluster: LiveCluster,
        config: ClusterConfig,
        about: About,
        texts: Texts,
        sizes: Sizes,
        ledger: Ledger,
    ) -> None:
        """`sizes.catalogue`: a `LiveCatalogue`, which this one changes; `ledger`: what was changed before."""
        assert isinstance(sizes.catalogue, LiveCatalogue)
        self.about, self.texts, self.tally = about, texts, Tally()
        self._catalogue = sizes.catalogue
        self._fleet, self._keeper, self._cluster, self._config = fleet, keeper, cluster, config
        self._sizes, self._ledger = sizes, ledger
        self._changing = asyncio.Lock()
        self._numbers = itertools.count()  # of requests, in the order of arrival
        self._attempts = itertools.count()
        self._unanswered = 0
        self._closing = False
        self._seen: dict[int, Stats] = {}
        self._looking: asyncio.Task[None] | None = None
        for change in ledger.since(0).changes:
            self._note(change)

    @property
    def items(self) -> Mapping[ItemId, Item]:
        return self._catalogue

    async def start(self) -> None:
        await self._look()
        self._looking = asyncio.create_task(self._look_on())

    async def stop(self, drain_s: float) -> None:
        self._closing = True
        end = asyncio.get_running_loop().time() + drain_s
        while self._unanswered and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.01)
        if self._looking is not None:
            self._looking.cancel()

    # ---- answers ----

    async def answer(self, asked: Asked) -> Response:
        if self._closing:
            raise ClosingError("the server is going down; send the request to another one")
        self._unanswered += 1
        try:
            routed = self._sizes.routed(next(self._numbers), asked.request)
            sending = _Sending(uuid.uuid4().hex, asked, routed)
            response = await (self._streamed(sending) if _streams(asked) else self._whole(sending))
            self._sizes.learn(asked.request, response)
            return response
        finally:
            self._unanswered -= 1

    async def _whole(self, sending: _Sending) -> Response:
        """An answer that comes at once: from the first replica that has it."""
        if not self._config.hedge_ms:
            return await self._sent(sending)
        first = asyncio.ensure_future(self._sent(sending))
        try:
            done, _ = await asyncio.wait({first}, timeout=self._config.hedge_ms / 1e3)
            if done or len(self._cluster.up) < 2:
                return await first
            self.tally.hedged += 1
            return await self._hedged(first, sending)
        finally:
            first.cancel()

    async def _hedged(self, first: asyncio.Future[Response], sending: _Sending) -> Response:
        """The answer of whichever of two replicas is sooner; an error counts where both have one."""
        if sending.aim is not None:
            sending.tried.add(sending.aim.wished)  # a host that is cut never says that it has taken a request
        second = asyncio.ensure_future(self._sent(replace(sending, name=f"{sending.name} again")))
        try:
            waiting = {first, second}
            while waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for each in done:
                    if each.exception() is None:
                        self.tally.hedges_won += each is second
                        return each.result()
            return first.result()
        finally:
            second.cancel()

    async def _sent(self, sending: _Sending) -> Response:
        """The outcome of one request, which is sent again where a replica dies over it."""
        return await self._trying(sending, self._fleet.ask)

    async def _streamed(self, sending: _Sending) -> Response:
        """The same for a text whose tokens are told as they come.

        Another replica writes the same text, since draws depend on the request: what was told already is left out.
        """
        told: list[int] = []
        on_tokens = sending.asked.on_tokens
        assert on_tokens is not None

        async def read(envelope: Envelope) -> Outcome:
            num_read = 0
            async for part in self._fleet.stream(envelope):
                if isinstance(part, Outcome):
                    return part
                known, new = told[num_read : num_read + len(part)], part[max(0, len(told) - num_read) :]
                if list(part[: len(known)]) != known:
                    raise ClosingError("the replica died, and another one writes another text; ask again")
                num_read += len(part)
                told.extend(new)
                if new:
                    on_tokens(new)
            raise LostError("the stream ended without an outcome")

        return await self._trying(sending, read)

    async def _trying(self, sending: _Sending, ask: Callable[[Envelope], Awaitable[Outcome]]) -> Response:
        """Asks one replica after another until one lives long enough to answer."""
        for _ in range(self._config.attempts):
            aim = sending.aim = ByPolicy(self._cluster, sending.routed, next(self._attempts), sending.tried)
            hints = self._cluster.holders(sending.routed)
            asked = replace(sending.asked, on_tokens=None)
            answered = None
            try:
                outcome = await ask(Envelope(sending.name, asked, self._ledger.version, aim=aim, hints=hints))
                self._hear(outcome)
                answered = sending.routed if outcome.error is None else None
                response: Response = _value(outcome)
                return response
            except LostError as error:
                self.tally.lost += 1
                logger.warning("a replica was lost over a request, which is sent again: %s", error)
                if aim.node >= 0:
                    self._cluster.lost(aim.node)
                await asyncio.sleep(_PAUSE_S if sending.tried >= set(self._cluster.up) else 0.0)
            finally:
                if aim.node >= 0:
                    self._cluster.ended(aim.node, aim.number, answered)
        raise OverloadedError(f"{self._config.attempts} replicas died over this request; ask again", _RETRY_S)

    def _hear(self, outcome: Outcome) -> None:
        if outcome.report is not None:
            self._cluster.heard(outcome.report)

    # ---- changes ----

    async def change(self, change: Change) -> Changed:
        if self._closing:
            raise ClosingError("the server is going down, and changes nothing any more")
        if isinstance(change, WarmItems):
            return _sum(await self._all(Warm(change.item_ids)))
        async with self._changing:
            return await (self._place(change) if isinstance(change, PlaceItems) else self._change(change))

    async def _change(self, change: Change) -> Changed:
        """First on one replica, which may refuse it; then into the ledger, and on all of them."""
        if isinstance(change, RemoveItems):
            self._catalogue.check_all_known(change.item_ids)
        made: Changed = await self._anywhere(Make(change))
        version = self._ledger.add(change)
        await self._keep(version)
        self._note(change)
        acknowledged = await self._all(CatchUp())
        num_blocks = made.num_blocks + sum(each.num_blocks for each in acknowledged.values())
        return replace(made, num_blocks=num_blocks, acknowledged=tuple(f"node {node}" for node in sorted(acknowledged)))

    async def _place(self, wish: PlaceItems) -> Changed:
        """As many of the moves to a placement as are allowed. The hottest items are those that were asked for most."""
        now, new = self._cluster.placement, wish.placement
        if now.room.num_nodes == new.room.num_nodes and now.num_items == new.num_items:
            now = replace(now, num_bytes=new.num_bytes, room=new.room)  # those that are dealt have no sizes
        heat = self._cluster.heat()
        plan = await asyncio.to_thread(lambda: plan_moves(now, matched(now, new), heat, wish.max_moves))
        placed = PlaceItems(plan.after)
        await self._keep(self._ledger.add(placed))
        self._note(placed)
        acknowledged = await self._all(CatchUp())
        names = tuple(f"node {node}" for node in sorted(acknowledged))
        return replace(_sum(acknowledged), num_items=len(plan.moves), num_left=plan.num_left, acknowledged=names)

    async def _keep(self, version: int) -> None:
        """Where replicas read it. Raises ClosingError where that cannot be."""
        if await self._keeper.adopt(self._ledger) < version:
            raise ClosingError("the change could not be kept for replicas that come back; ask again")

    def _note(self, change: Change) -> None:
        """What the HTTP side itself knows of it."""
        match change:
            case PutItems():
                self._catalogue.put(change.items)
                self._outdate([item.item_id for item in change.items])
            case RemoveItems():
                self._catalogue.put((), gone=change.item_ids)
                self._outdate(change.item_ids)
            case EraseUser():
                self._cluster.outdate([user_key(change.user_id, change.tenant)])
            case PlaceItems():
                self._cluster.place(change.placement)

    def _outdate(self, item_ids: Sequence[ItemId]) -> None:
        self._sizes.forget(item_ids)
        self._cluster.outdate(item_ids)

    # ---- all replicas ----

    async def _anywhere(self, ask: Ask) -> Any:
        """One replica's answer, whichever lives. Raises RcllmError."""
        for _ in range(self._config.attempts):
            try:
                return _value(await self._fleet.ask(Envelope(uuid.uuid4().hex, ask, self._ledger.version)))
            except LostError:
                await asyncio.sleep(_PAUSE_S)
        raise ClosingError(f"{self._config.attempts} replicas died over this change, which was not made; ask again")

    async def _all(self, ask: Ask, patience_s: float | None = None) -> dict[int, Any]:
        """The answers of all replicas that live, by node. Raises RcllmError where one has an error.

        A replica that dies meanwhile has none: what it has to know it reads before it answers again.
        """
        asking = {node: self._at(node, ask, patience_s) for node in range(self._cluster.num_nodes)}
        outcomes = await asyncio.gather(*asking.values())
        return {node: _value(each) for node, each in zip(asking, outcomes, strict=True) if each is not None}

    async def _at(self, node: int, ask: Ask, patience_s: float | None) -> Outcome | None:
        """None: that node does not live, or is silent."""
        envelope = Envelope(uuid.uuid4().hex, ask, self._ledger.version, node, Named(node, self._cluster))
        try:
            async with asyncio.timeout(patience_s):
                outcome = await self._fleet.ask(envelope)
        except (LostError, TimeoutError):
            return None
        self._hear(outcome)
        return None if outcome.missed else outcome

    # ---- what there is to see ----

    def stats(self) -> Stats:
        return replace(merged(self._seen.values()), num_items=len(self._catalogue), num_unanswered=self._unanswered)

    async def _look(self) -> None:
        self._seen = await self._all(State(), _ANSWER_S)
        if await self._keeper.version() < self._ledger.version:  # it was lost, and begun anew
            await self._keeper.adopt(self._ledger)

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self._look()
            except Exception:  # seen again in a moment; requests go on
                logger.exception("the replicas could not be looked at")


@dataclass(slots=True)
class _Sending:
    """One request on its way."""

    name: str
    asked: Asked
    routed: RoutedRequest
    tried: set[int] = field(default_factory=set)  # nodes that it was sent to; a hedge knows them as well
    aim: ByPolicy | None = None  # of the attempt that is under way


def _streams(asked: Asked) -> bool:
    return isinstance(asked.request, TextRequest) and asked.on_tokens is not None


def _value(outcome: Outcome) -> Any:
    if outcome.error is not None:
        raise outcome.error
    return outcome.value


def _sum(made: Mapping[int, Changed]) -> Changed:
    return Changed(num_blocks=sum(each.num_blocks for each in made.values()))
