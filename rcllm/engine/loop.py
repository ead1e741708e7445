"""The loop: requests in, passes over the rows of whoever's turn it is, answers out.

    submit: prompt → lookup → plan     step: schedule → plan → materialise → select → assemble → forward → read → reply

Knows jobs by their contract alone, and neither catalogue files nor tiers. Invariant: a request that was taken in gets
one outcome; an answer does not depend on what else is in its pass, beyond the tolerance of the kernels. Any thread may
submit; passes run one at a time, in the thread of whoever waits, and rankings between the layers of a pass that others
are in, by the scheduler's rule. On a GPU a pass of rankings is launched before the answers of the one before are read.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from rcllm.cache.pool import Pool
from rcllm.config import Config
from rcllm.data.live import LiveCatalogue
from rcllm.engine.flight import Flight
from rcllm.engine.intake import Intake
from rcllm.engine.job import Answer, Job, Listener, Refused, Ticket
from rcllm.engine.passes import Prompts, Steps, demand, enter, forward
from rcllm.engine.prefill import Prefill
from rcllm.engine.tickets import Tickets
from rcllm.engine.turns import Turns
from rcllm.errors import CancelledError, DeadlineError, RcllmError
from rcllm.metrics import PassClock, Stopwatch, Trace
from rcllm.model.decoder import Between, Decoder
from rcllm.reuse.missing import user_owner
from rcllm.schedule.cost import CostModel, Demand, Rates
from rcllm.schedule.scheduler import Scheduler
from rcllm.schedule.work import NO_LIMIT, PassLimits, Queue, Terms, Turn, Work

_WORTH_ROWS = 384  # that wait: a pass over fewer takes hardly less time, for the weights are read anyway


class RequestLoop:
    """One device's requests under way. `names`: node and model, as receipts call them."""

    def __init__(
        self,
        config: Config,
        decoder: Decoder,
        prefill: Prefill,
        pool: Pool,
        catalogue: LiveCatalogue,
        clock: PassClock,
        names: Mapping[str, str],
        trace: Trace | None,
    ) -> None:
        self._decoder, self._prefill, self._pool, self._catalogue = decoder, prefill, pool, catalogue
        self._clock, self._pass_clock, self._names, self._trace = clock.steady, clock, names, trace
        kv_bytes, schedule = pool.budget // 2, config.schedule  # of one pass; the other half is for what runs on
        limits = PassLimits(config.cache.pass_tokens, kv_bytes, schedule.other_rows or NO_LIMIT)
        self.scheduler = Scheduler(limits, schedule.tenant_shares)
        spec = decoder.spec
        self.costs = CostModel(Rates.first(spec.linear_flops_per_token, spec.attention_flops(1)))
        self._make = Tickets(prefill, clock)
        self.intake = Intake(schedule, self.costs, clock, self._make.anew, names["node"], names["model"])
        self.tickets: dict[int, Ticket] = {}  # those that wait or run
        self._hurried_loops: tuple[RequestLoop, ...] = (self,)  # whose rankings may enter between layers here
        self._withdrawn: list[Ticket] = []  # to be dropped before the next pass
        self._lock = threading.Lock()  # of the scheduler and the tickets; never held while something is computed
        self._turns = Turns()  # who computes
        self._numbers = itertools.count()
        self._num_passes = 0
        self._pass_ends_s = 0.0  # of the pass that runs, by estimate
        self._yields = False  # whether rankings may come between its layers
        self._in_pass = frozenset[int]()  # whose rows are in it
        self._given_rows = 0.0  # of it that are done, since it began or made way; a layer counts as its part of a row
        self._flies = decoder.device.type != "cpu"  # whether a pass may be launched before the one before it has ended
        self._flight: Flight | None = None  # it, once it was launched
        self._landed_s = 0.0  # when the last pass had ended
        self._unseen, self._unseen_ms = Demand(), 0.0  # of passes that were only launched: nobody waited for their end

    def submit(
        self,
        job: Job[Any, Any],
        request: Any,
        terms: Terms,
        listener: Listener | None,
    ) -> Ticket | Refused:
        """See `Engine.submit`."""
        number, start = next(self._numbers), self._clock()
        taken: Ticket | None = None
        try:
            while taken is None:
                ticket = self._open(number, job, request, start, terms)
                ticket.listener = listener
                taken = self._take_in(ticket)
        except RcllmError as error:
            return Refused(request, error)
        return taken

    def _open(self, number: int, job: Job[Any, Any], request: Any, start: float, terms: Terms) -> Ticket:
        """prompt → lookup → plan"""
        watch, version = Stopwatch(self._clock), self._catalogue.version
        with watch.stage("prompt"):
            opening = job.open(request)
        ticket = self._make.of(number, job, request, start, opening, terms, watch)
        ticket.catalogue_version = version
        return ticket

    def _take_in(self, ticket: Ticket) -> Ticket | None:
        """Into the queue, as it was asked or as its deadline allows; None: its items may read differently by now.

        Raises OverloadedError, DeadlineError.
        """
        work = self._make.work(ticket, self.intake)
        with self._lock:
            self.scheduler.open(ticket.job.kind, ticket.job.limits)
            queue = self.scheduler.queue(work)
            left_ms = self.intake.left_ms(ticket, queue, self._running_ms(queue, ticket.opening.goes_on))
            if self.intake.in_time(work.ms, left_ms):
                return self._enqueue(ticket, work)
        ticket = self.intake.degraded(ticket, left_ms, lambda: not self.tickets)
        if ticket.done:
            return ticket
        work = self._make.work(ticket, self.intake)
        with self._lock:
            return self._enqueue(ticket, work)

    def _running_ms(self, queue: Queue, goes_on: bool) -> float:
        """What the pass that runs still takes, and what goes on beside and between the passes that come first.

        `goes_on`: whether whoever asks does; what does not may enter before the pass ends.
        """
        limits = self.scheduler.limits
        rows = min(self.scheduler.other_rows, limits.other_rows)
        others_ms = self.costs.ms(Demand(rows=rows * (1 + queue.ahead_rows // limits.rows)))
        running_ms = max(0.0, self._pass_ends_s - self._clock()) * 1e3
        if self._yields and not goes_on:
            running_ms = min(running_ms, self.costs.ms(Demand(rows=limits.other_rows)))
        return running_ms + others_ms

    def _enqueue(self, ticket: Ticket, work: Work) -> Ticket | None:
        if self._catalogue.has_changed(ticket.catalogue_version):
            return None
        self.scheduler.add(work)
        self.tickets[ticket.number] = ticket
        if not ticket.job.limits.idle:
            self.intake.count_accepted(ticket.opening.degraded)
        return ticket

    def check_room(self, job: Job[Any, Any], tenant: str, num_more: int = 0, num_own: int = 0) -> None:
        """Raises OverloadedError where a request would be refused for what waits, before its prompt is made.

        `num_more`: requests whose prompts are being made; `num_own`: of them, those of its tenant.
        """
        queue = self.queue(job, tenant)
        queue = replace(queue, num_waiting=queue.num_waiting + num_more, num_own=queue.num_own + num_own)
        self.intake.check_room(queue)

    def queue(self, job: Job[Any, Any], tenant: str) -> Queue:
        """What a request of a tenant would find, were it asked for now."""
        with self._lock:
            self.scheduler.open(job.kind, job.limits)
            found = self.scheduler.queue(Work(-1, job.kind, 0, tenant=tenant, arrival_s=self._clock()))
            return replace(found, ahead_ms=found.ahead_ms + self._running_ms(found, goes_on=True))

    def under_way(self) -> list[Ticket]:
        """Requests that wait or run."""
        with self._lock:
            return list(self.tickets.values())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nothing is computed inside, for changes of what jobs keep between passes."""
        with self._turns.alone():
            self._land_all()
            yield

    def turn(self) -> bool:
        """`step` in this thread's turn, beside others that compute; for whoever runs the loop for everybody."""
        with self._turns.alone():
            return self.step()

    def hasten(self) -> None:
        """Launches a pass of what waits while more is being asked, where the device would do nothing meanwhile."""
        if not self._flies:
            return
        with self._lock:
            is_worth_it = self.scheduler.waiting_rows >= _WORTH_ROWS
        if not is_worth_it or not self._turns.acquire_now():
            return
        try:
            if self._flight is None or self._flight.has_ended:
                self.step(more=True)
        finally:
            self._turns.release()

    def step(self, *, more: bool = False) -> bool:
        """One pass over the rows of whoever's turn it is; False where nobody waits. One thread at a time.

        On a device that computes beside the host, a pass that all in it end with is read after the next one is
        launched, where somebody waits for that; `more`: somebody will.
        """
        self._drop_withdrawn()
        beside = self._flight.kv_bytes if self._flight else 0
        with self._lock:
            turn = self.scheduler.turn(self._clock(), beside)  # schedule
            self._yields, self._given_rows = turn.yields and self.scheduler.limits.other_rows < NO_LIMIT, 0.0
        entering, running = self._take_turn(turn)
        if not entering and not running:
            landed = self._land_all()
            self._pool.settle()  # nobody waits, so that copies may be waited for
            return landed
        numbers = frozenset(ticket.number for ticket in (*entering, *running))
        self._in_pass |= numbers
        try:
            flight = self._launch(entering, running, self._make_way if self._yields else None)
        except BaseException:
            self._in_pass -= numbers
            raise
        finally:
            self._yields = False
        flight.kv_bytes = turn.kv_bytes
        before, self._flight = self._flight, flight
        self._land(before)
        if not (self._flies and flight.may_wait and (more or self.scheduler.num_waiting)):
            self._land_all()
        return True

    def _land_all(self) -> bool:
        """Nothing is under way after it; False where nothing was."""
        flight, self._flight = self._flight, None
        self._land(flight)
        return flight is not None

    def _land(self, flight: Flight | None) -> None:
        """Waits for a pass that was launched, and answers."""
        if flight is None:
            return
        try:
            self._end(flight)
        finally:
            self._in_pass -= {ticket.number for ticket in flight.tickets}
            self.scheduler.pass_ended(self._flight.kv_bytes if self._flight else 0)
        self._pool.write_through()  # what was published, for whoever comes after this process
        self._pool.tidy()

    def _launch(self, entering: Sequence[Ticket], running: Sequence[Ticket], between: Between | None) -> Flight:
        """`between`: called between its layers."""
        clock = self._pass_clock
        watch = Stopwatch(clock, self._trace, self._num_passes)
        self._num_passes += 1
        flight = Flight(entering, running, watch, clock(), clock.away_s)
        self._pass_ends_s = self._clock() + sum(map(self.intake.needs_ms, entering)) / 1e3
        try:
            pool = self._prefill.pool_of([ticket.planned for ticket in entering])
            since = min((ticket.lookup.erasures for ticket in entering), default=None)
            held = flight.holding.enter_context(pool.hold(since))
            # plan, materialise, select, assemble
            prompts = Prompts.of(entering, self._prefill, held, watch.stage, between)
            steps = Steps.of(running, watch.stage)  # assemble
            flight.asked = demand(prompts, steps)
            self._pass_ends_s = self._clock() + (self.costs.ms(flight.asked) / 1e3 - (clock() - flight.start_s))
            first, passed = forward(self._decoder, prompts, steps, watch.stage, between)  # forward
            flight.launched(self._decoder.device)
            stepped = list(steps.take(passed, watch.stage))  # read
            entered = enter(prompts, first, self._prefill, held, self._names, watch.stage)  # publish, read
            flight.answers = itertools.chain(stepped, entered)
        except BaseException as error:  # a pass that broke is told to everybody in it, and an interrupt to its thread
            flight.failed(error)
            if not isinstance(error, Exception):
                self._end(flight)
                raise
        return flight

    def _end(self, flight: Flight) -> None:
        """Waits for the answers of a pass, and gives them."""
        clock, answers = self._pass_clock, list[Answer]()
        try:
            answers += flight.answers
            self._observe(flight)
        except BaseException as error:
            flight.failed(error)
            answers = list(flight.answers)
            if not isinstance(error, Exception):
                raise
        finally:
            flight.holding.close()
            self._landed_s, beside = clock(), self._flight
            self._pass_ends_s = self._clock() + self.costs.ms(beside.asked) / 1e3 if beside else 0.0
            away_s = clock.away_s - flight.away_s
            away = {"yield": away_s * 1e3} if away_s > 0.0 else {}
            self._reply(answers, flight, flight.watch.stages | away)  # reply

    def _observe(self, flight: Flight) -> None:
        """Learns what passes cost. One that nobody waited for is seen with the next that somebody does wait for."""
        if flight.asked.rows:
            took_s = self._pass_clock() - max(flight.start_s, self._landed_s)
            self._unseen += flight.asked
            self._unseen_ms += took_s * 1e3 - flight.watch.stages.get("measure", 0.0)
        if self._unseen.rows and flight.has_ended:
            self.costs.observe(self._unseen, self._unseen_ms)
            self._unseen, self._unseen_ms = Demand(), 0.0

    def makes_way_for(self, other: RequestLoop) -> None:
        """Rankings of another model on this device enter between the layers of passes here as well."""
        self._hurried_loops += (other,)

    def _make_way(self, rows: int) -> None:
        """Between two layers of a pass over `rows` rows: rankings that wait, if it has done enough by then."""
        self._given_rows += rows / self._decoder.spec.num_layers
        for loop in self._hurried_loops:
            if loop.scheduler.num_hurried and self._has_let_in(loop):
                self._given_rows = 0.0

    def _has_let_in(self, loop: RequestLoop) -> bool:
        """Whether rankings of a loop ran in between."""
        start, ends_s, landed_s = self._clock(), self._pass_ends_s, self._landed_s
        with self._pass_clock.away():
            entered = loop.interlude(self._given_rows) if loop is self else loop.turn_between(self._given_rows)
        self._pass_ends_s, self._landed_s = ends_s + self._clock() - start, landed_s
        return entered

    def turn_between(self, given_rows: float) -> bool:
        """`interlude` in a pass of another loop; False where another thread computes here."""
        if not self._turns.acquire_now():
            return False
        try:
            return self.interlude(given_rows)
        finally:
            self._turns.release()

    def interlude(self, given_rows: float) -> bool:
        """A pass of rankings that wait, if what it interrupts has gone on by enough rows; whether there was one."""
        self._drop_withdrawn()
        with self._lock:
            turn = self.scheduler.interlude(given_rows, self._clock())
        entering, _ = self._take_turn(turn)
        if entering:
            self._end(self._launch(entering, (), None))
            self._turns.look()
        return bool(entering)

    def _take_turn(self, turn: Turn) -> tuple[list[Ticket], list[Ticket]]:
        """Who enters with the next pass, and who goes on; ends those whose time is over."""
        with self._lock:
            stepping = [n for n in turn.step if n not in self._in_pass]  # what is under way has no next step
            entering, running = ([self.tickets[n] for n in some] for some in (turn.enter, stepping))
            expired = [self.tickets.pop(number) for number in turn.expired]
        for ticket in expired:
            self.intake.count_expired()
            ticket.end(DeadlineError("too little time was left until its deadline when its turn came"))
        for ticket in entering:
            waited = (self._clock() - ticket.submitted_s) * 1e3 - sum(ticket.stage_ms.values())
            ticket.stage_ms["wait"] = max(0.0, waited)
        return entering, running

    def _reply(self, answers: Sequence[Answer], flight: Flight, stage_ms: Mapping[str, float]) -> None:
        """Gives every answer to its ticket, with the times of all passes that the request took part in."""
        for ticket in flight.tickets:
            ticket.add(stage_ms)
        for answer in answers:
            ticket = self.tickets[answer.number]
            if isinstance(answer.outcome, BaseException):
                ticket.job.drop(ticket.number)
                ticket.end(answer.outcome)
            else:
                ticket.stage_ms["total"] = (self._clock() - ticket.submitted_s) * 1e3
                if not self._was_erased(ticket):
                    self.intake.keep(ticket, answer.outcome)
                ticket.end(answer.outcome)
        with self._lock:
            for answer in answers:
                self.scheduler.end(answer.number)
                del self.tickets[answer.number]
        self._prefill.forget_erased((ticket.planned.prompt, ticket.lookup) for ticket in flight.entering)

    def _was_erased(self, ticket: Ticket) -> bool:
        """Whether its user was erased after it had been asked for."""
        owner = user_owner(ticket.planned.prompt.user_id)
        return owner is not None and self._pool.was_erased(owner, ticket.lookup.erasures)

    def cancel(self, tickets: Iterable[Ticket | Refused]) -> None:
        """Ends requests that are not done; waits for the pass that runs."""
        if undone := [ticket for ticket in tickets if isinstance(ticket, Ticket) and not ticket.done]:
            with self.alone():
                self._drop(ticket for ticket in undone if not ticket.done)

    def withdraw(self, ticket: Ticket) -> None:
        """Ends a request before the next pass; returns at once."""
        with self._lock:
            self._withdrawn.append(ticket)

    def _drop_withdrawn(self) -> None:
        """What is in the pass that runs is dropped after it."""
        with self._lock:
            now = [ticket for ticket in self._withdrawn if ticket.number not in self._in_pass]
            self._withdrawn = [ticket for ticket in self._withdrawn if ticket.number in self._in_pass]
        self._drop(now)

    def _drop(self, tickets: Iterable[Ticket]) -> None:
        """Called by the thread whose turn it is, between passes."""
        dropped = []
        with self._lock:
            for ticket in tickets:
                if not ticket.done and self.scheduler.cancel(ticket.number):
                    del self.tickets[ticket.number]
                    dropped.append(ticket)
        for ticket in dropped:
            ticket.job.drop(ticket.number)
            ticket.end(CancelledError("the request was cancelled before it was answered"))

    def run(self, until: Callable[[], bool]) -> None:
        """Runs passes, or waits while another thread does, until `until` holds."""
        while self._turns.acquire(unless=until):
            try:
                self.step()
            finally:
                self._turns.release()
