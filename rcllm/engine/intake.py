"""Takes requests in: by what they are estimated to take, within bounds, giving up what a deadline leaves no time for.

Estimates come from `schedule/cost.py`, decisions from `schedule/overload.py` and `schedule/ladder.py`; what is here
makes the ways that they choose between. Knows no queue and computes nothing. Invariant: a request without a deadline is
answered as it was asked or refused, and what was given up stands in its receipt.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from rcllm.config import ScheduleConfig
from rcllm.core.ranking import RankOptions, RankRequest, RankResponse, UserId, order
from rcllm.core.receipts import RankReceipt, Step
from rcllm.engine.job import Opening, Ticket
from rcllm.engine.jobs.rank import Rank
from rcllm.errors import DeadlineError, RequestError
from rcllm.metrics import Clock
from rcllm.schedule.cost import MARGIN, CostModel
from rcllm.schedule.ladder import Probe, Rung, budget_ms, choose
from rcllm.schedule.last_scores import LastScores
from rcllm.schedule.overload import refusal, too_late
from rcllm.schedule.work import Queue, Terms

Reopened = Callable[[Ticket, object, Opening], Ticket]  # a ticket anew, for another request or another opening


@dataclass(slots=True)
class IntakeCounts:
    """What became of requests at the door, and of those whose deadline passed behind it."""

    num_accepted: int = 0
    num_overloaded: int = 0  # refused: too much waits
    num_late: int = 0  # refused: no way of answering is fast enough
    num_expired: int = 0  # accepted, and not computed, for there was no time left
    num_probes: int = 0  # computed though they were estimated to be late, to test the estimate
    degraded: dict[Step, int] = field(default_factory=dict)

    @property
    def outcomes(self) -> dict[str, int]:
        """By what became of them."""
        return {
            "accepted": self.num_accepted,
            "overloaded": self.num_overloaded,
            "late": self.num_late,
            "expired": self.num_expired,
            "probed": self.num_probes,
        }


class Intake:
    """For one engine. Threads may share it. `node`, `model_id`: for the receipts of what is not computed."""

    def __init__(
        self, config: ScheduleConfig, costs: CostModel, clock: Clock, reopened: Reopened, node: str, model_id: str
    ) -> None:
        self._config, self._costs, self._clock, self._reopened = config, costs, clock, reopened
        self._node, self._model_id = node, model_id
        self.last_scores = LastScores(config.last_scores or 0)
        self._counts, self._lock = IntakeCounts(), threading.Lock()
        self._probe = Probe()

    def counts(self) -> IntakeCounts:
        """A snapshot."""
        with self._lock:
            return replace(self._counts, degraded=dict(self._counts.degraded))

    # ---- times ----

    def deadline_ms(self, terms: Terms) -> float | None:
        """From the arrival of a request; None: it has all the time."""
        return terms.deadline_ms if terms.deadline_ms is not None else self._config.deadline_ms or None

    def needs_ms(self, ticket: Ticket) -> float:
        """What the pass of its prompt takes, by estimate, alone and with its missing blocks."""
        return self._costs.ms(ticket.demands.whole) + ticket.demands.fetch_ms

    def left_ms(self, ticket: Ticket, queue: Queue, running_ms: float) -> float:
        """What its pass may take; infinite without a deadline. Raises OverloadedError where too much waits."""
        self.check_room(queue, running_ms)
        deadline_ms = self.deadline_ms(ticket.terms)
        if deadline_ms is None:
            return math.inf
        return budget_ms(deadline_ms, self._elapsed_ms(ticket), running_ms + queue.ahead_ms)

    def check_room(self, queue: Queue, running_ms: float = 0.0) -> None:
        """Raises OverloadedError where too much waits."""
        if (error := refusal(self._config, queue, running_ms)) is not None:
            self.count_overloaded()
            raise error

    def in_time(self, needs_ms: float, left_ms: float) -> bool:
        """Whether what takes so long, by estimate, can be answered as it was asked."""
        return needs_ms * MARGIN <= left_ms

    def _elapsed_ms(self, ticket: Ticket) -> float:
        return (self._clock() - ticket.submitted_s) * 1e3

    # ---- giving up ----

    def degraded(self, ticket: Ticket, left_ms: float, is_idle: Callable[[], bool]) -> Ticket:
        """The same request, answered in a way that is in time, or answered already.

        Raises OverloadedError where one would be, were there nobody before it, and DeadlineError where none would.
        """
        ways, prior = list(self._ways(ticket)), ticket.terms.prior
        _check_prior(ticket)
        taken = choose(ways, left_ms, prior, self._config.min_candidates)
        if taken is not None:
            return self._fewer(taken.way, taken.keep) if taken.keep is not None else taken.way
        if (known := self._by_last_scores(ticket)) is not None:
            return known
        deadline_ms = self.deadline_ms(ticket.terms) or 0.0
        alone_ms = budget_ms(deadline_ms, self._elapsed_ms(ticket), 0.0)
        needs_ms = min(way.ms for way in ways)
        if choose(ways, alone_ms, prior, self._config.min_candidates) is not None:
            self.count_overloaded()
            raise too_late(deadline_ms, (alone_ms - left_ms) / MARGIN, needs_ms)
        if self._probe.passes(is_idle, self._costs.num_passes):
            return self._without_deadline(ticket)
        with self._lock:
            self._counts.num_late += 1
        raise DeadlineError(
            f"it takes {needs_ms:,.0f} ms at least, by estimate, more than the {alone_ms:,.0f} until its deadline: "
            "give it more time, or ask for fewer candidates"
        )

    def _ways(self, ticket: Ticket) -> Iterator[Rung[Ticket]]:
        """As it was asked, then at the cheaper levels that its admission allows."""
        yield self._rung(ticket)
        if isinstance(ticket.job, Rank):
            for opening in ticket.job.cheaper(ticket.opening):
                yield self._rung(self._reopened(ticket, ticket.request, opening))

    def _rung(self, ticket: Ticket) -> Rung[Ticket]:
        fixed, *candidates = self._costs.each_ms(ticket.demands.parts)
        return Rung(ticket, fixed + ticket.demands.fetch_ms, tuple(candidates))

    def _fewer(self, ticket: Ticket, keep: tuple[int, ...]) -> Ticket:
        assert isinstance(ticket.job, Rank)
        request, opening = ticket.job.fewer(ticket.request, ticket.opening, keep)
        return self._reopened(ticket, request, opening)

    def _without_deadline(self, ticket: Ticket) -> Ticket:
        with self._lock:
            self._counts.num_probes += 1
        said = "computed though it was estimated to be late, so that the estimate is tested"
        prompt = replace(ticket.opening.prompt, notes=(*ticket.opening.prompt.notes, said))
        anew = self._reopened(ticket, ticket.request, replace(ticket.opening, prompt=prompt))
        anew.terms = replace(ticket.terms, deadline_ms=math.inf)
        return anew

    # ---- last known scores ----

    def _by_last_scores(self, ticket: Ticket) -> Ticket | None:
        """The ticket with its answer, where enough is known of its candidates."""
        request, options = ticket.request, ticket.opening.prompt.options
        if not isinstance(request, RankRequest) or request.user_id is None:
            return None
        known = self.last_scores.known(request.user_id, ticket.tenant, _kind(options), request.candidates)
        if len(known.scores) < min(self._config.min_candidates, len(request.candidates)):
            return None
        candidates = tuple(each for each in request.candidates if each in known.scores)
        scores = tuple(known.scores[each] for each in candidates)
        fewer = len(candidates) < len(request.candidates)
        steps: tuple[Step, ...] = ("candidates", "last_scores") if fewer else ("last_scores",)
        said = [f"last known scores, computed up to {self._clock() - known.oldest_s:,.0f} s ago"]
        if fewer:
            said.append(f"{len(candidates)} of {len(request.candidates)} candidates, those whose scores are known")
        receipt = self._receipt(ticket, (*ticket.opening.prompt.notes, *said), steps)
        self.count_accepted(steps)
        ticket.end(RankResponse(request.request_id, candidates, scores, order(scores), receipt))
        return ticket

    def _receipt(self, ticket: Ticket, notes: tuple[str, ...], steps: tuple[Step, ...]) -> RankReceipt:
        options = ticket.opening.prompt.options
        return RankReceipt(
            node=self._node,
            model=self._model_id,
            level="none",
            history=options.history,
            backend="none",
            num_tokens=0,
            num_fresh=0,
            num_reused=0,
            num_computed=0,
            stage_ms={**ticket.stage_ms, "total": self._elapsed_ms(ticket)},
            batch_size=0,
            notes=notes,
            degraded=steps,
            readout=options.readout,
            layout=options.layout,
            label_place="none",
            context="none",
            bias=options.bias,
            kv_bytes_read=0,
            kv_bytes_copied=0,
            blocks=(),
        )

    def keep(self, ticket: Ticket, response: object) -> None:
        """Remembers the scores of an answer."""
        if isinstance(response, RankResponse) and (user_id := ticket.request.user_id) is not None:
            kind, tenant = _kind(ticket.planned.prompt.options), ticket.tenant
            now = self._clock()
            self.last_scores.keep(user_id, tenant, kind, response.candidates, response.scores, now)

    def forget_user(self, user_id: UserId, tenant: str) -> None:
        self.last_scores.forget_user(user_id, tenant)

    # ---- counts ----

    def count_accepted(self, steps: tuple[Step, ...]) -> None:
        with self._lock:
            self._counts.num_accepted += 1
            for step in steps:
                self._counts.degraded[step] = self._counts.degraded.get(step, 0) + 1

    def count_overloaded(self) -> None:
        with self._lock:
            self._counts.num_overloaded += 1

    def count_expired(self) -> None:
        with self._lock:
            self._counts.num_expired += 1


def _check_prior(ticket: Ticket) -> None:
    prior, candidates = ticket.terms.prior, ticket.demands.parts.shape[0] - 1
    if prior and len(prior) != candidates:
        raise RequestError(f"expected a prior for each of {candidates} candidates, got {len(prior)}")


def _kind(options: RankOptions) -> str:
    """Scores of one kind are on one scale."""
    return f"{options.readout} bias-{options.bias}"
