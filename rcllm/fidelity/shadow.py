"""The guard's work on one served request: recompute it in full, compare, and let the monitor decide.

Knows engines only as a function that ranks, no threads and no torch; time is what its clock says. Invariant: the engine
computes for the guard during at most `cpu_share` of the time between the beginnings of any two of its passes.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

from rcllm.core.ranking import Level, RankOptions, RankRequest, RankResponse
from rcllm.errors import ConfigError, RcllmError
from rcllm.fidelity.monitor import DriftMonitor, GuardEvent, GuardPolicy, Rungs, rank_loss

logger = logging.getLogger(__name__)

Passes = Generator[RankRequest, RankResponse, None]

_FULL = Level("full")
_KEPT_EVENTS = 1000
_POLL_S = 0.01  # how often a pass that is due looks whether the engine is idle


@dataclass(frozen=True, slots=True)
class Shadowing:
    """How much is recomputed, and when."""

    share: float = 0.05  # of the served requests, drawn at random
    cpu_share: float = 0.05  # of wall time; after a pass of c seconds the guard rests c · (1 / cpu_share - 1)
    patience_s: float = 30.0  # a pass that waited so long for an idle engine runs on a busy one
    queue_size: int = 4  # sampled requests that wait; beyond, the oldest is dropped and counted

    def __post_init__(self) -> None:
        if not (0.0 <= self.share <= 1.0 and 0.0 < self.cpu_share <= 1.0):
            raise ConfigError(f"expected share and cpu_share from 0 to 1, got {self.share} and {self.cpu_share}")
        if self.queue_size < 1 or self.patience_s < 0:
            raise ConfigError(f"expected queue_size ≥ 1, patience_s ≥ 0, got {self.queue_size} and {self.patience_s}")


@dataclass(frozen=True, slots=True)
class KindStats:
    """Where one kind of requests stands."""

    requests: str
    level: str
    e_value: float  # evidence of drift; 1/α trips
    num_samples: int  # at this level
    mean_loss: float  # at this level; NaN before the first sample
    rung: int = 0  # of the level on the ladder of these requests; 0 is the cheapest


@dataclass(slots=True)
class GuardCounts:
    num_observed: int = 0
    num_sampled: int = 0
    num_dropped: int = 0  # sampled, but newer ones took their place while they waited
    num_stale: int = 0  # sampled at a level that had been left when their turn came
    num_undefined: int = 0  # full recompute ranked nothing: a single candidate, or all scores equal
    num_failed: int = 0  # the engine or an `on_event` raised
    num_shadowed: int = 0  # came to the tests
    shadow_s: float = 0.0  # time in passes, waiting for the engine included


@dataclass(frozen=True, slots=True)
class GuardStats:
    """A snapshot of what the guard has counted so far."""

    counts: GuardCounts
    kinds: tuple[KindStats, ...]


@dataclass(frozen=True, slots=True)
class GuardStatus:
    """What a page and metrics show."""

    ladder: tuple[str, ...]  # of the policy, cheapest first; a kind of requests may have one of its own
    target: float  # highest mean loss that is fine
    share: float  # of the served requests that are recomputed
    stats: GuardStats
    events: tuple[GuardEvent, ...]  # the latest steps, oldest first
    num_waiting: int  # sampled requests that were not recomputed yet
    rests_s: float  # until the next pass may begin


@dataclass(frozen=True, slots=True)
class Shadow:
    """A served request that waits to be recomputed."""

    request: RankRequest
    options: RankOptions  # as it was asked
    response: RankResponse


class GuardCore:
    """The guard without its thread: whoever calls `run` does the work.

    `rank`: `Engine.rank`, or another engine's over the same model and catalogue. `sleep` may raise to give up a shadow.
    `rungs`: along which a kind of requests steps; by default the policy's ladder. `complete`: adds to a request what is
    made for its user, while it is known who that is.
    """

    def __init__(
        self,
        rank: Callable[[RankRequest], RankResponse],
        policy: GuardPolicy,
        shadowing: Shadowing,
        *,
        defaults: RankOptions,
        seed: int,
        idle: Callable[[], bool],
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        sleep: Callable[[float], None],
        on_event: Callable[[GuardEvent], None],
        rungs: Callable[[RankOptions], Rungs] | None = None,
        complete: Callable[[RankRequest], RankRequest] = lambda request: request,
    ) -> None:
        self._rank, self._policy, self._shadowing, self._defaults = rank, policy, shadowing, defaults
        self.rungs, self._complete = rungs or policy.rungs, complete
        self._random, self._idle, self._clock, self._wall_clock = random.Random(seed), idle, clock, wall_clock
        self._sleep, self._on_event = sleep, on_event
        self._monitors: dict[str, DriftMonitor] = {}
        self.events: deque[GuardEvent] = deque(maxlen=_KEPT_EVENTS)
        self.counts = GuardCounts()
        self._ready_at = clock()

    def monitor(self, options: RankOptions) -> DriftMonitor:
        """Of requests of this kind; any thread may ask."""
        kind = kind_of(options)
        if (found := self._monitors.get(kind)) is None:
            policy = self._policy.along(tuple(self.rungs(options)))
            found = self._monitors.setdefault(kind, DriftMonitor(policy, kind))
        return found

    def level(self, options: RankOptions) -> Level:
        return self.monitor(options).level

    def sample(self, request: RankRequest, response: RankResponse) -> Shadow | None:
        """Tosses the coin. Only answers of the level in use count; a request may have asked for another one."""
        self.counts.num_observed += 1
        if self._random.random() >= self._shadowing.share:
            return None
        options = request.options or self._defaults
        monitor = self.monitor(options)
        if not monitor.can_step or response.receipt.level != str(monitor.level):
            return None
        self.counts.num_sampled += 1
        return Shadow(request, options, response)

    def run(self, shadow: Shadow) -> None:
        """Recomputes one request and moves the level if the evidence is there. Raises what `rank` and `sleep` raise."""
        passes = self.passes(shadow)
        with contextlib.suppress(StopIteration):
            asked = next(passes)
            while True:
                try:
                    response = self._ranked(asked)
                except RcllmError as error:
                    asked = passes.throw(error)
                else:
                    asked = passes.send(response)

    def passes(self, shadow: Shadow) -> Passes:
        """The same pass by pass, for whoever runs them: yields what is to be ranked and is sent the response, or thrown
        the error."""
        monitor, rungs = self.monitor(shadow.options), self.rungs(shadow.options)
        level, cheaper = monitor.level, monitor.cheaper
        if shadow.response.receipt.level != str(level):
            self.counts.num_stale += 1
            return
        request = self._complete(shadow.request)
        full = (yield _asked(request, replace(shadow.options, level=_FULL))).scores
        served = shadow.response
        if shadow.options.bias == "running_mean":
            served = yield _asked(request, rungs[level])
        loss, cheaper_loss = rank_loss(full, served.scores), None
        if loss is None:
            self.counts.num_undefined += 1
            return
        if cheaper is not None:
            try:
                cheaper_loss = rank_loss(full, (yield _asked(request, rungs[cheaper])).scores)
            except RcllmError:  # or it is refused: that must not hide the losses of the level in use
                self.counts.num_failed += 1
                logger.exception("guard: request %s could not be ranked at %s", request.request_id, cheaper)
        if monitor.level != level:  # another request has moved it meanwhile
            self.counts.num_stale += 1
            return
        self.counts.num_shadowed += 1
        if event := monitor.observe(loss, cheaper_loss, self._wall_clock()):
            self._tell(event)

    def took(self, start_s: float) -> None:
        """A pass that began at `start_s` has ended; the next may begin when the guard has rested."""
        took = self._clock() - start_s
        self.counts.shadow_s += took
        self._ready_at = start_s + took / self._shadowing.cpu_share

    @property
    def rests_s(self) -> float:
        """Until the next pass may begin."""
        return max(0.0, self._ready_at - self._clock())

    def verdict(self, options: RankOptions) -> str:
        """What is known of requests of this kind, in a sentence for receipts."""
        monitor = self.monitor(options)
        test = monitor.drift
        found = (
            f"mean loss {test.mean_loss:.4f} (target {test.bound:g}), e-value {test.e_value:.3g} of {1 / test.alpha:g}"
        )
        return (
            f"{monitor.level}: {found}, over {test.num_samples} shadows" if test.num_samples else self._since(monitor)
        )

    def _since(self, monitor: DriftMonitor) -> str:
        last = next((event for event in reversed(self.events) if event.requests == monitor.requests), None)
        told = f"{last.kind} from {last.from_level}" if last else "no request of this kind was recomputed yet"
        return f"{monitor.level}: {told}"

    def stats(self) -> GuardStats:
        kinds = tuple(
            KindStats(kind, str(m.level), m.drift.e_value, m.drift.num_samples, m.drift.mean_loss, m.rung)
            for kind, m in list(self._monitors.items())
        )
        return GuardStats(replace(self.counts), kinds)

    def _ranked(self, asked: RankRequest) -> RankResponse:
        """Ranks when the budget and the engine's other work let it."""
        self._sleep(self.rests_s)
        give_up_at = self._clock() + self._shadowing.patience_s
        while not self._idle() and self._clock() < give_up_at:
            self._sleep(_POLL_S)
        start = self._clock()
        try:
            return self._rank(asked)
        finally:
            self.took(start)

    def _tell(self, event: GuardEvent) -> None:
        self.events.append(event)
        log = logger.info if event.kind == "step_back" else logger.warning
        log(
            "guard: %s from %s to %s for requests %s: mean loss %.4f lately, %.4f over %d shadows, e-value %.3g",
            event.kind,
            event.from_level,
            event.to_level,
            event.requests,
            event.recent_loss,
            event.mean_loss,
            event.num_samples,
            event.e_value,
        )
        self._on_event(event)


def _asked(request: RankRequest, options: RankOptions) -> RankRequest:
    """Without the user, so that nothing derived from one who may have been erased since is published again; and
    without a bias that depends on the requests before."""
    bias = "none" if options.bias == "running_mean" else options.bias
    return replace(request, user_id=None, options=replace(options, bias=bias))


def kind_of(options: RankOptions) -> str:
    """Requests that are answered alike but for the level; they share a rung and its evidence."""
    name = f"{options.readout} {options.layout} label-{options.label_place} history-{options.history}"
    return f"{name} bias-{options.bias}" + (" parallel" if options.parallel else "")
