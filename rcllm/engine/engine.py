"""The engine on one device: requests in, scores, items, text and receipts out, through one loop.

    submit: prompt → lookup → plan     step: schedule → plan → materialise → select → assemble → forward → read → reply

Rank, recommend and generate are jobs (`engine/jobs/`), whose rows go through the layers together. Invariant: an answer
does not depend on what else is in its pass or in the cache, beyond the tolerance of the kernels (docs/numerics.md); the
cache decides how fast it comes. Threads may submit at any time; whoever waits for an answer runs the loop, one at a
time.
"""

from __future__ import annotations

import itertools
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import psutil
import torch

from rcllm.cache.pool import Held, Pool, PoolStats
from rcllm.config import Config, Hardware, resolve
from rcllm.core.ranking import Item, ItemId, Mask, RankRequest, RankResponse, UserId
from rcllm.engine.build import (
    declared_mask,
    identity,
    load_decoder,
    make_pool,
    make_prompter,
    model_fingerprint,
    open_prototypes,
)
from rcllm.engine.correct import Selected
from rcllm.engine.fit import fit
from rcllm.engine.job import Answer, Entered, Job, Opening, Ticket
from rcllm.engine.jobs.rank import Rank
from rcllm.engine.prefill import Prefill, whole_prompts
from rcllm.engine.turns import Turns
from rcllm.engine.warming import Warming, WarmProgress
from rcllm.errors import CancelledError, RcllmError, answered
from rcllm.metrics import Clock, Stage, Stopwatch, Trace
from rcllm.model.decoder import Decoder, Pass, Passed, joined, parted
from rcllm.model.pull import pull
from rcllm.prompt.blocks import Prompter
from rcllm.prototypes.pool import PrototypePool
from rcllm.reuse.assemble import Assembled
from rcllm.reuse.missing import item_owner, user_owner
from rcllm.reuse.plan import Planned
from rcllm.reuse.select import first_phase, max_rows
from rcllm.schedule.admission import Admission, AdmissionFactory, Identity, Open
from rcllm.schedule.scheduler import Scheduler
from rcllm.schedule.work import PassLimits, Work

Request = TypeVar("Request")
Response = TypeVar("Response")


class Engine:
    """Make one with `Engine.build`."""

    def __init__(
        self,
        config: Config,
        decoder: Decoder,
        prompter: Prompter,
        pool: Pool,
        model_id: str,
        admission: Admission | None = None,
        prototypes: PrototypePool | None = None,
        *,
        clock: Clock = time.perf_counter,
        node: str = "",
        trace: Trace | None = None,
    ) -> None:
        """admission: which reuse levels may be used; None for all. prototypes: for history "semantic".

        clock: seconds; node: what receipts call this machine, by default its name; trace: told of every stage.
        """
        self.config, self.decoder, self.prompter, self.pool, self.model_id = config, decoder, prompter, pool, model_id
        self.prototypes, self.node, self.trace = prototypes, node or platform.node(), trace
        self.clock = clock
        self._prefill = Prefill(decoder, prompter, pool, config.cache, _mask(config), prototypes)
        self._rank = Rank(
            config, decoder, prompter, self._prefill, admission or Open.of(self.identity, prompter.context_name)
        )
        kv_bytes = pool.budget // 2  # of one pass; the other half is for what runs on
        self._scheduler = Scheduler(PassLimits(config.cache.pass_tokens, kv_bytes))
        self._tickets: dict[int, Ticket] = {}  # those that wait or run
        self._lock = threading.Lock()  # of the scheduler and the tickets; never held while something is computed
        self._turns = Turns()  # who computes
        self._numbers = itertools.count()
        self._num_passes = 0

    @classmethod
    def build(
        cls,
        catalogue: Mapping[ItemId, Item],
        config: Config | None = None,
        samples: Sequence[RankRequest] = (),
        admission: AdmissionFactory = Open.of,
    ) -> Engine:
        """Loads the model and makes an empty cache.

        `samples`: real requests for the canonical contexts `typical` and `mean(n)`. `admission`: told what the engine
        is, makes what decides which reuse levels may be used; by default, all. Fetches the model when it is not
        there. Warns of a catalogue or configuration that template or adapter do not fit. Raises ConfigError, DataError,
        ModelError, FetchError.
        """
        memory = psutil.virtual_memory().total
        config = declared_mask(resolve(config or Config(), Hardware(torch.cuda.is_available(), memory)))
        if config.model.threads:
            torch.set_num_threads(config.model.threads)
        fitted = fit(catalogue, config)
        fitted.warn()
        folder = pull(config.model.path)
        model = model_fingerprint(config, folder)
        decoder = load_decoder(config, folder)
        prompter = make_prompter(config, folder, model, decoder, fitted, samples)
        model_id = model.hex()[:12]
        prototypes = open_prototypes(config, decoder, prompter)
        admitting = admission(identity(config, prompter, model_id, prototypes), prompter.context_name)
        return cls(config, decoder, prompter, make_pool(config, decoder), model_id, admitting, prototypes)

    @property
    def identity(self) -> Identity:
        """What a calibration of this engine holds for."""
        return identity(self.config, self.prompter, self.model_id, self.prototypes)

    @property
    def admission(self) -> Admission:
        """Which reuse levels rankings may use."""
        return self._rank.admission

    @admission.setter
    def admission(self, admission: Admission) -> None:
        self._rank.admission = admission

    # ---- asking ----

    def rank(self, request: RankRequest) -> RankResponse:
        """Scores the candidates of one request. Raises RequestError, ConfigError or CapacityError."""
        return answered(self.rank_batch([request]))[0]

    def rank_batch(self, requests: Sequence[RankRequest]) -> list[RankResponse | RcllmError]:
        """Per request its response, or its error; misses and fresh tokens are computed together as memory allows."""
        return self.run(self._rank, requests)

    def run(self, job: Job[Request, Response], requests: Sequence[Request]) -> list[Response | RcllmError]:
        """Per request its response, or its error, in their order."""
        tickets = [self.submit(job, request) for request in requests]
        try:
            self._loop(until=lambda: all(ticket.done for ticket in tickets))
        finally:
            self.cancel(tickets)  # where an interrupt left some
        return [_result(ticket) for ticket in tickets]

    def stream(
        self, job: Job[Request, Response], requests: Iterable[Request], ahead: int
    ) -> Iterator[tuple[Request, Response | RcllmError]]:
        """Requests with what became of them, as they are done; takes more in while fewer than `ahead` are under way."""
        source, alive = iter(requests), list[Ticket]()
        try:
            while True:
                for request in itertools.islice(source, ahead - len(alive)):
                    alive.append(self.submit(job, request))
                if not alive:
                    return
                self._loop(until=partial(_any_done, alive))
                done, alive = [t for t in alive if t.done], [t for t in alive if not t.done]
                yield from ((ticket.request, _result(ticket)) for ticket in done)
        finally:
            self.cancel(alive)

    # ---- the loop ----

    def submit(self, job: Job[Request, Response], request: Request) -> Ticket:
        """Takes a request in, in the caller's thread; a wrong one is done at once, with its error."""
        ticket, watch = Ticket(next(self._numbers), job, request, self.clock()), Stopwatch(self.clock)
        try:
            with watch.stage("prompt"):
                ticket.opening = job.open(request)
            with watch.stage("lookup"):
                ticket.lookup = self._prefill.lookup(ticket.opening.prompt)
            with watch.stage("plan"):
                ticket.planned = self._prefill.plan(ticket.opening.prompt, ticket.lookup)
        except RcllmError as error:
            ticket.outcome = error
            return ticket
        ticket.add(watch.stages)
        with self._lock:
            self._scheduler.open(job.kind, job.limits)
            self._scheduler.add(self._work(ticket))
            self._tickets[ticket.number] = ticket
        return ticket

    def step(self) -> bool:
        """One pass over the rows of whoever's turn it is; False where nobody waits. One thread at a time."""
        entering, running = self._schedule()
        if not entering and not running:
            return False
        watch = Stopwatch(self.clock, self.trace, self._num_passes)
        self._num_passes += 1
        answers: list[Answer] = []
        try:
            with self._prefill.pool_of([_planned(ticket) for ticket in entering]).hold() as held:
                prompts = self._prompts(entering, held, answers, watch.stage)
                steps = self._steps(running, watch.stage)
                passed = self._forward(prompts, steps, watch.stage)
                answers += self._read(prompts, steps, passed, held, watch.stage)
        except BaseException as error:  # a pass that broke is told to everybody in it, and an interrupt to its thread
            answers = [Answer(ticket.number, error) for ticket in (*entering, *running)]
            if not isinstance(error, Exception):
                raise
        finally:
            self._reply(answers, (*entering, *running), watch.stages)
        return True

    def _schedule(self) -> tuple[list[Ticket], list[Ticket]]:
        """Who enters with the next pass, and who goes on."""
        with self._lock:
            turn = self._scheduler.turn()
            entering, running = ([self._tickets[n] for n in some] for some in (turn.enter, turn.step))
        for ticket in entering:
            waited = (self.clock() - ticket.submitted_s) * 1e3 - sum(ticket.stage_ms.values())
            ticket.stage_ms["wait"] = max(0.0, waited)
        return entering, running

    def _prompts(self, entering: Sequence[Ticket], held: Held, failed: list[Answer], stage: Stage) -> _Prompts | None:
        """The pass of the prompts that enter; an error here is theirs alone, and what runs goes on."""
        if not entering:
            return None
        try:
            with stage("plan"):
                batch = [self._prefill.replan(_planned(ticket), ticket.lookup) for ticket in entering]
            with stage("materialise"):
                num_computed = self._prefill.materialise(batch, held)
            with stage("select"):
                selected = self._prefill.select(batch, held)
            with stage("assemble"):
                going_on = [_opening(ticket).goes_on for ticket in entering]
                assembled = self._prefill.assemble(selected.batch, held, going_on)
        except RcllmError as error:
            failed += [Answer(ticket.number, error) for ticket in entering]
            return None
        return _Prompts(entering, selected, assembled, num_computed)

    def _steps(self, running: Sequence[Ticket], stage: Stage) -> list[_Step]:
        """The next passes of what runs, by job."""
        jobs = dict.fromkeys(ticket.job for ticket in running)
        return [_Step(job, list(job.passes(stage))) for job in jobs]

    def _forward(self, prompts: _Prompts | None, steps: Sequence[_Step], stage: Stage) -> list[Passed]:
        """What the prompts' pass gave, if there is one, then each of the others; all in one forward pass.

        Rows of level `corrected` are on their way already, and go on alone.
        """
        passes = [work for step in steps for work in step.passes]
        alone: list[Passed] = []
        with stage("forward" if prompts is not None else "step"):
            if prompts is not None and prompts.selected.carried is not None:
                alone = [self.decoder.forward(prompts.assembled.work, prompts.selected.carried)]
            elif prompts is not None:
                passes = [prompts.assembled.work, *passes]
            return alone + (parted(self.decoder.forward(joined(passes)), passes) if passes else [])

    def _read(
        self,
        prompts: _Prompts | None,
        steps: Sequence[_Step],
        passed: Sequence[Passed],
        held: Held,
        stage: Stage,
    ) -> list[Answer]:
        """Hands every job the rows of its requests; publishes what was computed exactly."""
        answers, left = list[Answer](), iter(passed)
        first = next(left) if prompts is not None else None
        for step in steps:
            answers += step.job.take(list(itertools.islice(left, len(step.passes))), stage)
        if prompts is not None and first is not None:
            with stage("publish"):
                entered = self._entered(prompts, first, held)
            for job in dict.fromkeys(each.ticket.job for each in entered):
                answers += job.enter([each for each in entered if each.ticket.job is job], stage)
        return answers

    def _entered(self, prompts: _Prompts, passed: Passed, held: Held) -> list[Entered]:
        selected, assembled = prompts.selected, prompts.assembled
        kept = iter(passed.kept)
        self._prefill.publish(selected.batch, list(itertools.islice(kept, assembled.num_published)), held)
        segments = whole_prompts(selected.batch, held.blocks, assembled.fresh, kept)
        read = selected.bytes_read(assembled.work.groups, self.decoder.spec.num_layers)
        return [
            Entered(
                ticket,
                planned,
                passed.hidden,
                rows,
                some,
                self._shared(planned, notes, passed, prompts),
                held,
                num_bytes,
                passed.bytes_copied + selected.bytes_copied,
            )
            for ticket, planned, rows, some, notes, num_bytes in zip(
                prompts.tickets, selected.batch, assembled.read_rows, segments, selected.notes, read, strict=True
            )
        ]

    def _shared(self, planned: Planned, notes: tuple[str, ...], passed: Passed, prompts: _Prompts) -> Mapping[str, Any]:
        """The fields of a receipt that every job fills alike; times are filled in with the reply."""
        prompt, options = planned.prompt, planned.prompt.options
        return {
            "level": str(options.level),
            "history": options.history,
            "node": self.node,
            "model": self.model_id,
            "backend": passed.backend,
            "num_tokens": prompt.num_tokens,
            "num_fresh": planned.plan.num_fresh,
            "num_reused": planned.plan.num_reused,
            "num_computed": prompts.num_computed,
            "stage_ms": {},
            "batch_size": len(prompts.tickets),
            "notes": prompt.notes + self._prefill.notes(options) + notes,
        }

    def _reply(self, answers: Sequence[Answer], took_part: Sequence[Ticket], stage_ms: Mapping[str, float]) -> None:
        """Gives every answer to its ticket, with the times of all passes that the request took part in."""
        for ticket in took_part:
            ticket.add(stage_ms)
        for answer in answers:
            ticket = self._tickets[answer.number]
            if isinstance(answer.outcome, BaseException):
                ticket.job.drop(ticket.number)
                ticket.outcome = answer.outcome
            else:
                total_ms = (self.clock() - ticket.submitted_s) * 1e3
                receipt = replace(answer.outcome.receipt, stage_ms={**ticket.stage_ms, "total": total_ms})
                ticket.outcome = replace(answer.outcome, receipt=receipt)
        self._prefill.forget_erased((_planned(ticket).prompt, ticket.lookup) for ticket in took_part)
        with self._lock:
            for answer in answers:
                self._scheduler.end(answer.number)
                del self._tickets[answer.number]

    def cancel(self, tickets: Iterable[Ticket]) -> None:
        """Ends requests that are not done; waits for the pass that runs."""
        if undone := [ticket for ticket in tickets if not ticket.done]:
            with self._turns.alone(), self._lock:
                for ticket in undone:
                    if not ticket.done and self._scheduler.cancel(ticket.number):
                        ticket.job.drop(ticket.number)
                        ticket.outcome = CancelledError("the request was cancelled before it was answered")
                        del self._tickets[ticket.number]

    def _loop(self, until: Callable[[], bool]) -> None:
        """Runs passes, or waits while another thread does, until `until` holds."""
        while self._turns.acquire(unless=until):
            try:
                self.step()
            finally:
                self._turns.release()

    def _work(self, ticket: Ticket) -> Work:
        opening, planned = _opening(ticket), _planned(ticket)
        blocks = planned.prompt.blocks
        per_token = self._kv_bytes_per_token
        return Work(
            ticket.number,
            ticket.job.kind,
            max_rows(planned),
            (self._prefill.is_anew(planned.prompt), first_phase(planned)),
            {p.key: len(blocks[p.block]) * per_token for p in planned.plan.pieces if p.key is not None},
            opening.step_rows,
            opening.own_bytes,
            arrival_s=ticket.submitted_s,
        )

    # ---- the cache ----

    def warm(
        self,
        item_ids: Iterable[ItemId] | None = None,
        *,
        on_progress: Callable[[WarmProgress], None] | None = None,
    ) -> WarmProgress:
        """Computes items ahead of requests, as candidates and (history "shared") as events, for the default options.

        Blocks that exist are skipped, so it can be repeated and resumed. Stops when the pool is full: what is left is
        computed when it is asked for. Give the most requested items first. Requests are served in between.
        """
        warming = Warming(self._prefill, self.prompter, self.pool, self.config, self.clock)
        for progress in warming.run(item_ids, self._turns.alone):
            if on_progress:
                on_progress(progress)
        return progress

    def erase_user(self, user_id: UserId) -> int:
        """Removes every block derived from a user; returns how many there were.

        Waits for the pass that is running, which may be about to publish some. The semantic pool is a read-only file
        that was made of users' texts: build it again without the user (`rcllm pool build --exclude-users`).
        """
        return self._erase(user_owner(user_id) or "")

    def retire_item(self, item_id: ItemId) -> int:
        """Removes the blocks of an item whose text changed or that is gone; returns how many there were.

        Not needed for correctness: new text has new keys. It frees the memory of the old ones at once.
        """
        return self._erase(item_owner(item_id) or "")

    def _erase(self, owner: str) -> int:
        with self._turns.alone():
            self._prefill.corrector.rankings.forget(owner)
            return self.pool.delete_owner(owner)

    def stats(self) -> PoolStats:
        return self.pool.stats()

    @property
    def _kv_bytes_per_token(self) -> int:
        return self.decoder.spec.kv_bytes_per_token(self.pool.dtype.itemsize)


@dataclass(frozen=True, slots=True)
class _Prompts:
    """The prompts that enter with a pass."""

    tickets: Sequence[Ticket]
    selected: Selected
    assembled: Assembled
    num_computed: int


@dataclass(frozen=True, slots=True)
class _Step:
    """The passes of one job."""

    job: Job[Any, Any]
    passes: Sequence[Pass]


def _any_done(tickets: Sequence[Ticket]) -> bool:
    return any(ticket.done for ticket in tickets)


def _result(ticket: Ticket) -> Any:
    """A response or one of our errors; raises what is neither, such as a mistake of ours."""
    if isinstance(ticket.outcome, BaseException) and not isinstance(ticket.outcome, RcllmError):
        raise ticket.outcome
    return ticket.outcome


def _opening(ticket: Ticket) -> Opening:
    assert ticket.opening is not None, "a refused request is in no queue"
    return ticket.opening


def _planned(ticket: Ticket) -> Planned:
    assert ticket.planned is not None, "a refused request is in no queue"
    return ticket.planned


def _mask(config: Config) -> Mask:
    assert config.model.mask != "auto", "mask is resolved by declared_mask"
    return config.model.mask
