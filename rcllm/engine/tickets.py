"""From a request to a ticket: its prompt looked up and planned, and what the scheduler is told of it.

Knows prefill and the clock, no queue. Invariant: nothing is computed here and nothing is changed; the same request can
be made a ticket again at another level, and keeps its number and its place in time.
"""

from __future__ import annotations

from typing import Any

from rcllm.engine.demand import demands_of
from rcllm.engine.intake import Intake
from rcllm.engine.job import Job, Opening, Ticket
from rcllm.engine.prefill import Prefill
from rcllm.metrics import Clock, Stopwatch
from rcllm.reuse.select import first_phase, max_rows
from rcllm.schedule.work import Terms, Work


class Tickets:
    """Makes them for one engine; any thread may."""

    def __init__(self, prefill: Prefill, clock: Clock) -> None:
        self._prefill, self._clock = prefill, clock

    def of(
        self,
        number: int,
        job: Job[Any, Any],
        request: object,
        submitted_s: float,
        opening: Opening,
        terms: Terms,
        watch: Stopwatch,
    ) -> Ticket:
        """lookup → plan, and what that is going to ask of the device."""
        prefill, prompt = self._prefill, opening.prompt
        with watch.stage("lookup"):
            lookup = prefill.lookup(prompt)
        with watch.stage("plan"):
            planned = prefill.plan(prompt, lookup)
            found = {} if prefill.is_anew(prompt) else lookup.worth_reading
            demands = demands_of(planned, found, prefill.kv_bytes_per_token_of(prompt), prefill.num_layers)
        return Ticket(number, job, request, submitted_s, opening, lookup, planned, watch.stages, demands, terms)

    def anew(self, ticket: Ticket, request: object, opening: Opening) -> Ticket:
        """For fewer candidates, or at another level."""
        watch = Stopwatch(self._clock)
        made = self.of(ticket.number, ticket.job, request, ticket.submitted_s, opening, ticket.terms, watch)
        made.listener, made.catalogue_version = ticket.listener, ticket.catalogue_version
        made.add(ticket.stage_ms)
        return made

    def work(self, ticket: Ticket, intake: Intake) -> Work:
        """What the scheduler sees of it."""
        opening, planned, deadline_ms = ticket.opening, ticket.planned, intake.deadline_ms(ticket.terms)
        blocks, per_token = planned.prompt.blocks, self._prefill.kv_bytes_per_token_of(planned.prompt)
        return Work(
            ticket.number,
            ticket.job.kind,
            max_rows(planned),
            (self._prefill.is_anew(planned.prompt), first_phase(planned)),
            {p.key: len(blocks[p.block]) * per_token for p in planned.plan.pieces if p.key is not None},
            opening.step_rows,
            opening.own_bytes,
            ticket.tenant,
            ticket.submitted_s,
            None if deadline_ms is None else ticket.submitted_s + deadline_ms / 1e3,
            intake.needs_ms(ticket),
        )
