"""The guard within a serving loop: shadows are work of the same loop, which runs them where nothing else waits or runs.

Knows engines and their loop, and starts no thread. Invariants: a served request pays for a coin toss and an append; a
shadow pass begins on an idle engine alone, and rests after it keep the guard within `cpu_share`; what a busy engine
leaves no time for is dropped and counted; after a trip no request is answered at a level that was left.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from rcllm.core.ranking import Level, RankOptions, RankRequest, RankResponse, UserId
from rcllm.errors import CancelledError, OverloadedError
from rcllm.fidelity.monitor import GuardEvent, GuardPolicy, Rungs
from rcllm.fidelity.shadow import GuardCore, GuardStatus, Passes, Shadow, Shadowing
from rcllm.schedule.admission import Admission, Admitted, Open
from rcllm.schedule.work import KindLimits, Terms

if TYPE_CHECKING:
    from rcllm.engine.engine import Engine
    from rcllm.engine.job import Refused, Ticket

logger = logging.getLogger(__name__)

SHADOW = "shadow"  # the kind of its work
_EXACT = Level("exact")
_NO_DEADLINE = Terms(deadline_ms=float("inf"))


class Guarded:
    """An Admission that follows a guard: what `inner` admits, but never a level that the guard has left."""

    def __init__(self, inner: Admission, core: GuardCore) -> None:
        self.inner, self._core = inner, core

    def admit(self, options: RankOptions) -> Admitted:
        """Raises UncalibratedError for a level that may not be used."""
        admitted = self.inner.admit(options)
        options, monitor = admitted.options, self._core.monitor(admitted.options)
        if not monitor.can_step or options.level not in monitor.ladder:
            return admitted
        verdict, level = self._core.verdict(options), monitor.level
        if not monitor.has_left(options.level):
            return replace(admitted, guard=verdict)
        said = f"level {level} instead of {options.level}, which the fidelity guard has left"
        return Admitted(self._core.rungs(options)[level], (*admitted.notes, said), verdict)

    def cheaper(self, options: RankOptions) -> tuple[Admitted, ...]:
        """Of the levels that `inner` names, those that the guard has not left."""
        monitor, verdict = self._core.monitor(options), self._core.verdict(options)
        return tuple(
            replace(each, guard=verdict)
            for each in self.inner.cheaper(options)
            if not monitor.has_left(each.options.level)
        )


def rungs_of(inner: Admission, options: RankOptions) -> Rungs:
    """What `inner` allows instead of prefix caching for requests of this kind, and prefix caching itself."""
    exact, rungs = replace(options, level=_EXACT), dict[Level, RankOptions]()
    for each in reversed(inner.cheaper(exact)):
        rungs.setdefault(each.options.level, each.options)
    return rungs | {_EXACT: exact}


class OnlineGuard:
    """Guards one engine whose loop somebody runs: `observe` what was served, and ask `turn` when nothing else runs.

    Make it once the engine's admission is there: it stands in front of it from then on. Each kind of requests steps
    along what that admission allows for it, up to `exact`; the policy's ladder is that of the default options.
    """

    def __init__(
        self,
        engine: Engine,
        policy: GuardPolicy,
        shadowing: Shadowing | None = None,
        *,
        seed: int = 0,
        wall_clock: Callable[[], float] = time.time,
        on_event: Callable[[GuardEvent], None] = lambda event: None,
    ) -> None:
        """`on_event` runs in the thread that calls `turn`; steps are logged in any case."""
        self._engine, self._policy, self._shadowing = engine, policy, shadowing or Shadowing()
        self._core = GuardCore(
            engine.rank,
            policy,
            self._shadowing,
            defaults=engine.config.rank,
            seed=seed,
            idle=lambda: True,
            clock=engine.clock,
            wall_clock=wall_clock,
            sleep=lambda seconds: None,
            on_event=on_event,
            rungs=partial(rungs_of, engine.admission),
            complete=engine.prompter.completed,
        )
        self._job = engine.ranking(Open(engine.identity.mask), SHADOW, KindLimits(idle=True))
        self._lock = threading.RLock()  # of the coin, the counts and what waits; `on_event` may ask for `status`
        self._waiting: deque[Shadow] = deque(maxlen=self._shadowing.queue_size)
        self._passes: Passes | None = None  # of the shadow that is being computed
        self._asked: RankRequest | None = None  # its next pass, which is not due yet
        self._ticket: Ticket | Refused | None = None  # of the pass that runs
        self._engine.admission = Guarded(engine.admission, self._core)

    def observe(self, request: RankRequest, response: RankResponse) -> None:
        """Tells of a served request; from any thread, in microseconds."""
        asked = replace(request, candidates=response.candidates)  # fewer, where its deadline left no time for all
        with self._lock:
            if shadow := self._core.sample(asked, response):
                self._core.counts.num_dropped += len(self._waiting) == self._waiting.maxlen
                self._waiting.append(shadow)

    def forget_user(self, user_id: UserId) -> None:
        """Drops what waits to be computed again of a user, of every tenant."""
        with self._lock:
            kept = [shadow for shadow in self._waiting if shadow.request.user_id != user_id]
            self._core.counts.num_dropped += len(self._waiting) - len(kept)
            self._waiting = deque(kept, maxlen=self._waiting.maxlen)

    def turn(self) -> bool:
        """Puts the next pass of the guard into the engine's queue, where one is due; whether `Engine.step` has work.

        For the thread that runs the loop, when `step` found nothing to do. Takes in what the pass before gave.
        """
        if self._ticket is not None and not self._ticket.done:
            return True  # it waits for the engine to be idle
        asked = self._next()
        if asked is None:
            return False
        self._ticket = self._engine.submit(self._job, asked, terms=_NO_DEADLINE)
        return True

    @property
    def due_s(self) -> float | None:
        """In how many seconds `turn` will have something to do; None: not before another request is sampled."""
        if self._ticket is not None and self._ticket.done:
            return 0.0
        return self._core.rests_s if self._waiting or self._asked is not None else None

    def status(self) -> GuardStatus:
        """A snapshot; any thread may ask."""
        with self._lock:
            return GuardStatus(
                tuple(map(str, self._policy.ladder)),
                self._policy.target,
                self._shadowing.share,
                self._core.stats(),
                tuple(self._core.events),
                len(self._waiting),
                self._core.rests_s,
            )

    def _next(self) -> RankRequest | None:
        """What is to be ranked next; None: nothing now."""
        with self._lock:
            if self._ticket is not None:
                outcome, self._ticket = self._ticket.outcome, None
                self._take(outcome)
            while self._asked is None and self._waiting:
                self._passes = self._core.passes(self._waiting.popleft())
                self._advance(next)
            if self._asked is None or self._core.rests_s > 0:
                return None
            asked, self._asked = self._asked, None
            return asked

    def _take(self, outcome: object) -> None:
        """What became of the pass before."""
        if isinstance(outcome, RankResponse):
            stage_ms = outcome.receipt.stage_ms
            self._core.took(self._engine.clock() - (stage_ms["total"] - stage_ms["wait"]) / 1e3)
            self._advance(lambda passes: passes.send(outcome))
        elif isinstance(outcome, OverloadedError | CancelledError):
            self._core.counts.num_dropped += 1
            self._passes = None
        else:
            assert isinstance(outcome, BaseException)
            self._advance(lambda passes: passes.throw(outcome))

    def _advance(self, step: Callable[[Passes], RankRequest]) -> None:
        """To the next request of the shadow that is being computed, or to its end. A mistake ends that shadow alone."""
        assert self._passes is not None
        try:
            self._asked = step(self._passes)
        except StopIteration:
            self._passes = None
        except Exception:
            self._core.counts.num_failed += 1
            self._passes = None
            logger.exception("guard: a request could not be shadowed")
