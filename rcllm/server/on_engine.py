"""The backend that computes: an engine, and a decoder of semantic IDs beside it where there is one.

Texts are tokenised and keys looked up in worker threads, passes run in the loop's thread, answers come back to the
event loop. Knows nothing of HTTP. Invariant: every request that was taken in gets one outcome, whatever becomes of its
client, of its pass, or of this server.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rcllm.core.decoding import RecommendRequest
from rcllm.core.ranking import Item, ItemId, RankRequest, RankResponse, TokenIds
from rcllm.core.texts import ScoreRequest, TextRequest
from rcllm.engine.engine import Engine
from rcllm.engine.job import Job, Refused, Ticket
from rcllm.engine.jobs.generate import Generator
from rcllm.engine.jobs.recommend import Recommender
from rcllm.engine.jobs.score import Score
from rcllm.errors import CancelledError, ClosingError, NotServedError, RequestError
from rcllm.fidelity.online import OnlineGuard
from rcllm.prompt.chat import Chat, ChatPrompt, Message
from rcllm.prompt.tokenizer import Tokenizer
from rcllm.schedule.admission import Open
from rcllm.server.backend import KINDS, About, Asked, Change, Changed, Door, Response, Stats, WarmItems
from rcllm.server.catalogue import Keeper
from rcllm.server.loop import Loop
from rcllm.server.pools import DraftPoolsByName
from rcllm.server.warmer import Warmer

_SUBMITTERS = 2  # threads that tokenise and look up; both wait for the same interpreter most of the time


@dataclass(frozen=True, slots=True)
class _Route:
    """Who answers one kind of request."""

    engine: Engine
    job: Job[Any, Any]


class EngineBackend:
    """Serves `engine`, and `recommender` beside it. See `Backend`."""

    def __init__(
        self,
        engine: Engine,
        name: str,
        recommender: Recommender | None = None,
        guard: OnlineGuard | None = None,
    ) -> None:
        """`name`: what the model is called to clients. `guard`: of the engine's rankings, for idle time."""
        self._engine, self._guard, self._recommender = engine, guard, recommender
        self._pools = DraftPoolsByName(engine)
        generator = Generator(engine, self._pools.drafter_of)
        self._routes: dict[type, _Route] = {
            RankRequest: _Route(engine, engine.rank_job),
            ScoreRequest: _Route(engine, Score(engine)),
            TextRequest: _Route(engine, generator),
        }
        if engine.prompter.template.open:
            del self._routes[RankRequest]
        if recommender is not None:
            self._routes[RecommendRequest] = _Route(recommender.engine, recommender)
        self._pinned = _Route(engine, engine.ranking(Open(engine.identity.mask)))  # rankings that are run again
        self.texts = EngineTexts(engine.prompter.tokenizer, Chat(engine.prompter.tokenizer, engine.prompter.chat))
        self.about = _about(engine, name, frozenset(self._routes))
        engines = [engine] if recommender is None else [engine, recommender.engine]
        if engines[-1] is not engine:
            engines[-1].loop.makes_way_for(engine.loop)
        self._loop = Loop(engines, self._fail_all, guard)
        self._keeper = Keeper(engine, recommender, self._pools, guard)
        self._warmer = Warmer(engine)
        self._submitters = ThreadPoolExecutor(_SUBMITTERS, thread_name_prefix="rcllm-submit")
        self._changers = ThreadPoolExecutor(1, thread_name_prefix="rcllm-change")
        self._lock = threading.Lock()
        self._unanswered: set[Waiting] = set()
        self._opening: Counter[str] = Counter()  # requests whose prompts are being made, by tenant
        self._closing = False

    @property
    def items(self) -> Mapping[ItemId, Item]:
        return self._engine.catalogue

    async def start(self) -> None:
        self._loop.start()

    async def stop(self, drain_s: float) -> None:
        self._closing = True
        await asyncio.to_thread(self._warmer.stop)
        end = asyncio.get_running_loop().time() + drain_s
        while self._unanswered and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(self._loop.stop)
        self._fail_all(CancelledError("the server went down before the request was answered"))
        self._submitters.shutdown(wait=False, cancel_futures=True)
        self._changers.shutdown(wait=False, cancel_futures=True)

    async def answer(self, asked: Asked) -> Response:
        if self._closing:
            raise ClosingError("the server is going down; send the request to another one")
        if type(asked.request) not in self._routes:
            raise NotServedError("nothing here answers such requests: " + _WANTING[type(asked.request)])
        waiting = Waiting(self, asked, asyncio.get_running_loop())
        self._enter(waiting)
        try:
            outcome: Response = await waiting.future
            if isinstance(asked.request, RankRequest) and isinstance(outcome, RankResponse) and not asked.again:
                self._observe(asked.request, outcome)
            return outcome
        except asyncio.CancelledError:
            waiting.abandon()
            raise

    def _observe(self, request: RankRequest, response: RankResponse) -> None:
        """Lets the guard draw from what was served."""
        if self._guard is not None:
            self._guard.observe(request, response)
            if self._guard.due_s is not None:
                self._loop.wake()

    async def change(self, change: Change) -> Changed:
        if isinstance(change, WarmItems):
            self._warmer.begin(change.item_ids)
            return Changed()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._changers, self._keeper.make, change)

    def stats(self) -> Stats:
        pool = self._engine.stats()
        return Stats(
            num_items=len(self._engine.catalogue),
            num_unanswered=len(self._unanswered),
            num_blocks=pool.num_blocks,
            num_bytes=pool.num_bytes,
            budget_bytes=pool.budget_bytes,
            code_bytes=0 if self._recommender is None else self._recommender.device_bytes,
            hits={str(tier): number for tier, number in pool.hits.items()},
            misses=pool.misses,
            evictions=pool.evictions,
            store_errors=pool.store_errors,
            tiers=pool.tiers,
            rates=self._engine.pool.rates.timed(),
            door=self._door(),
            costs=self._engine.costs.stats(),
            guard=None if self._guard is None else self._guard.status(),
            loop_failures=self._loop.failures,
            guard_failures=self._loop.idle_failures,
            warmth=self._warmer.warmth,
        )

    def _door(self) -> Door:
        engines = {route.engine for route in self._routes.values()}
        counts, queue = [engine.intake.counts() for engine in engines], self._engine.queue()
        degraded, outcomes = Counter[str](), Counter[str]()
        for each in counts:
            degraded.update(each.degraded)
            outcomes.update(each.outcomes)
        with self._lock:
            num_opening = self._opening.total()
        return Door(queue.num_waiting + num_opening, queue.ahead_ms, dict(outcomes), dict(degraded))

    # ---- requests under way ----

    def _enter(self, waiting: Waiting) -> None:
        """Hands it to a worker thread. Raises OverloadedError at once where too much waits, before any work for it."""
        tenant, route = waiting.asked.request.tenant, self._route(waiting.asked)
        with self._lock:
            num_opening, num_own = self._opening.total(), self._opening[tenant]
        route.engine.loop.check_room(route.job, tenant, num_opening, num_own)
        with self._lock:
            self._unanswered.add(waiting)
            self._opening[tenant] += 1
        self._submitters.submit(self._submit, waiting, route)

    def _route(self, asked: Asked) -> _Route:
        is_pinned = asked.again and isinstance(asked.request, RankRequest)
        return self._pinned if is_pinned else self._routes[type(asked.request)]

    def _submit(self, waiting: Waiting, route: _Route) -> None:
        """In a worker thread: prompt, look-up, plan."""
        if waiting.abandoned:
            self._opened(waiting)
            self.ended(waiting)
            return
        try:
            ticket = route.engine.submit(route.job, waiting.asked.request, terms=waiting.asked.terms, listener=waiting)
        except Exception as error:  # a mistake of ours; told to its client alone
            waiting.done(error)
            return
        finally:
            self._opened(waiting)
        if isinstance(ticket, Refused) or ticket.done:  # an answer may be there at once: scores that were kept
            waiting.done(ticket.outcome)
            return
        waiting.entered(ticket)
        self._loop.wake()

    def withdraw(self, waiting: Waiting, ticket: Ticket) -> None:
        self._routes[type(waiting.asked.request)].engine.withdraw(ticket)
        self._loop.wake()

    def _opened(self, waiting: Waiting) -> None:
        with self._lock:
            self._opening[waiting.asked.request.tenant] -= 1
            self._opening += Counter()  # without tenants that have none

    def ended(self, waiting: Waiting) -> None:
        with self._lock:
            self._unanswered.discard(waiting)

    def _fail_all(self, error: Exception) -> None:
        with self._lock:
            unanswered = list(self._unanswered)
        for waiting in unanswered:
            waiting.fail(error)


class Waiting:
    """One request under way; listens to its ticket, in the thread that computes."""

    def __init__(self, backend: EngineBackend, asked: Asked, loop: asyncio.AbstractEventLoop) -> None:
        self.asked = asked
        self.future: asyncio.Future[Any] = loop.create_future()
        self.abandoned = False
        self._backend, self._loop = backend, loop
        self._ticket: Ticket | None = None
        self._lock = threading.Lock()

    def entered(self, ticket: Ticket) -> None:
        with self._lock:
            self._ticket = ticket
            if not self.abandoned:
                return
        self._backend.withdraw(self, ticket)

    def abandon(self) -> None:
        """Nobody waits any more."""
        with self._lock:
            self.abandoned, ticket = True, self._ticket
        if ticket is not None and not ticket.done:
            self._backend.withdraw(self, ticket)

    def fail(self, error: Exception) -> None:
        """Tells its client, and withdraws it."""
        self._tell(_settle, self.future, error)
        self.abandon()
        self._backend.ended(self)

    # ---- Listener ----

    def tokens(self, token_ids: Sequence[int]) -> None:
        if self.asked.on_tokens is not None:
            self._tell(self.asked.on_tokens, tuple(token_ids))

    def done(self, outcome: object) -> None:
        self._backend.ended(self)
        self._tell(_settle, self.future, outcome)

    def _tell(self, call: Any, *values: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended, and with it whoever waited
            self._loop.call_soon_threadsafe(call, *values)


def _settle(future: asyncio.Future[Any], outcome: object) -> None:
    if future.done():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


class EngineTexts:
    """`Texts` by a model's own tokenizer and chat template."""

    def __init__(self, tokenizer: Tokenizer, chat: Chat) -> None:
        self._tokenizer, self._chat = tokenizer, chat

    def opening(self, text: str) -> TokenIds:
        ids, bos = self._tokenizer.encode_opening(text), self._tokenizer.bos_ids
        return ids if ids[: len(bos)] == bos else bos + ids

    def going_on(self, text: str) -> TokenIds:
        return self._tokenizer.encode_control(text)

    def chat(self, messages: Sequence[Message]) -> ChatPrompt:
        return self._chat.prompt(messages)

    def decode(self, ids: Sequence[int]) -> str:
        if wrong := [each for each in ids if not 0 <= each < self._tokenizer.vocab_size]:
            raise RequestError(f"expected token ids from 0 to {self._tokenizer.vocab_size - 1}, got {wrong[0]}")
        return self._tokenizer.decode(ids)


_WANTING: Mapping[type, str] = {
    RankRequest: "the model's template is for open prompts; serve one that ranks",
    RecommendRequest: "no decoder of semantic IDs is loaded; name one with --decoder, made by `rcllm sid train`",
    ScoreRequest: "the model scores no texts",
    TextRequest: "the model writes no texts",
}


def _about(engine: Engine, name: str, kinds: frozenset[type]) -> About:
    prompter = engine.prompter
    return About(
        model=name,
        fingerprint=engine.model_id,
        max_positions=engine.decoder.max_positions,
        max_candidates=prompter.max_candidates,
        kinds=frozenset(KINDS[kind] for kind in kinds),
        shown=prompter.template.shown,
        options=engine.config.rank,
        rerank=engine.config.rank.readout if prompter.learnt.readout else "pointwise",
    )
