"""What goes through the layers in one step of the loop: the prompts that enter, and the next passes of what runs.

Knows nothing of who waits or whose turn it is. Invariant: every part of a pass gets back what it would have got alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rcllm.cache.held import Held
from rcllm.engine.correct import Selected
from rcllm.engine.job import Answer, Entered, Job, Ticket
from rcllm.engine.prefill import Prefill, whole_prompts
from rcllm.errors import RcllmError
from rcllm.metrics import Stage
from rcllm.model.decoder import Between, Decoder, Pass, Passed, joined, parted
from rcllm.reuse.assemble import Assembled
from rcllm.reuse.plan import Planned
from rcllm.schedule.cost import Demand

_NOTHING = Selected(())


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts that enter, ready for their pass, or the error that keeps all of them from it."""

    tickets: Sequence[Ticket]
    selected: Selected = _NOTHING
    assembled: Assembled | None = None  # None: nobody enters, or nobody can
    num_computed: int = 0  # tokens of missing blocks
    error: RcllmError | None = None

    @classmethod
    def of(
        cls, tickets: Sequence[Ticket], prefill: Prefill, held: Held, stage: Stage, between: Between | None
    ) -> Prompts:
        """plan → materialise → select → assemble"""
        if not tickets:
            return cls(())
        try:
            with stage("plan"):
                batch = [prefill.replan(ticket.planned, ticket.lookup) for ticket in tickets]
            with stage("materialise"):
                num_computed = prefill.materialise(batch, [ticket.lookup for ticket in tickets], held, between)
            with stage("select"):
                selected = prefill.select(batch, held)
            with stage("assemble"):
                assembled = prefill.assemble(selected.batch, held, [ticket.opening.goes_on for ticket in tickets])
        except RcllmError as error:
            return cls(tickets, error=error)
        return cls(tickets, selected, assembled, num_computed)


@dataclass(frozen=True, slots=True)
class Steps:
    """The next passes of what runs, by job."""

    by_job: Mapping[Job[Any, Any], Sequence[Pass]]

    @classmethod
    def of(cls, running: Sequence[Ticket], stage: Stage) -> Steps:
        return cls({job: list(job.passes(stage)) for job in dict.fromkeys(ticket.job for ticket in running)})

    def take(self, passed: Iterator[Passed], stage: Stage) -> Iterator[Answer]:
        """Hands every job what its passes gave."""
        for job, passes in self.by_job.items():
            yield from job.take(list(itertools.islice(passed, len(passes))), stage)


def demand(prompts: Prompts, steps: Steps) -> Demand:
    """What a pass asked of the device, as it ran. Prompts that share a pass share what each pass costs."""
    entered = [ticket.demands.whole for ticket in prompts.tickets] if prompts.assembled else []
    groups = [group for some in steps.by_job.values() for work in some for group in work.groups]
    lengths = [sum(map(len, group.segments)) for group in groups]
    return Demand(
        passes=max((each.passes for each in entered), default=1.0),
        rows=sum(each.rows for each in entered) + sum(group.num_rows for group in groups),
        missing=prompts.num_computed,
        kv_bytes=sum(each.kv_bytes for each in entered) + sum(s.num_bytes for group in groups for s in group.segments),
        pairs=sum(each.pairs for each in entered)
        + sum(group.num_rows * length for group, length in zip(groups, lengths, strict=True)),
    )


def forward(
    decoder: Decoder, prompts: Prompts, steps: Steps, stage: Stage, between: Between | None
) -> tuple[Passed | None, Iterator[Passed]]:
    """What the pass of the prompts gave, if there is one, and what each of the others did; all in one forward pass.

    Rows of level `corrected` are on their way already, and go on alone.
    """
    passes = [work for some in steps.by_job.values() for work in some]
    first: Passed | None = None
    with stage("forward" if prompts.assembled else "step"):
        if prompts.assembled and prompts.selected.carried is not None:
            first = decoder.forward(prompts.assembled.work, prompts.selected.carried, between=between)
        elif prompts.assembled:
            passes = [prompts.assembled.work, *passes]
        passed = iter(parted(decoder.forward(joined(passes), between=between), passes) if passes else [])
    if prompts.assembled and first is None:
        first = next(passed)
    return first, passed


def enter(
    prompts: Prompts, passed: Passed | None, prefill: Prefill, held: Held, names: Mapping[str, str], stage: Stage
) -> Iterator[Answer]:
    """Publishes what was computed exactly, and hands prompts to their jobs. `names`: node and model, for receipts.

    All that jobs ask of the device is launched when this returns; the answers may wait for it.
    """
    if prompts.error is not None:
        return iter([Answer(ticket.number, prompts.error) for ticket in prompts.tickets])
    if prompts.assembled is None or passed is None:
        return iter(())
    with stage("publish"):
        entered = _entered(prompts, prompts.assembled, passed, prefill, held, names)
    jobs = dict.fromkeys(each.ticket.job for each in entered)
    parts = [job.enter([each for each in entered if each.ticket.job is job], stage) for job in jobs]
    return itertools.chain.from_iterable(parts)


def _entered(
    prompts: Prompts, assembled: Assembled, passed: Passed, prefill: Prefill, held: Held, names: Mapping[str, str]
) -> list[Entered]:
    selected, kept = prompts.selected, iter(passed.kept)
    prefill.publish(selected.batch, list(itertools.islice(kept, assembled.num_published)), held)
    segments = whole_prompts(selected.batch, held.blocks, assembled.fresh, kept)
    num_bytes = selected.bytes_read(assembled.work.groups, prefill.num_layers)
    copied = passed.bytes_copied + selected.bytes_copied
    return [
        Entered(
            ticket=ticket,
            planned=planned,
            hidden=passed.hidden,
            read_rows=rows,
            segments=some,
            shared=dict(names)
            | _shared(
                ticket,
                planned,
                prefill.notes(planned.prompt.options, ticket.lookup, held) + notes,
                passed,
                prompts,
            ),
            held=held,
            kv_bytes_read=read,
            kv_bytes_copied=copied,
        )
        for ticket, planned, rows, some, notes, read in zip(
            prompts.tickets, selected.batch, assembled.read_rows, segments, selected.notes, num_bytes, strict=True
        )
    ]


def _shared(
    ticket: Ticket, planned: Planned, notes: tuple[str, ...], passed: Passed, prompts: Prompts
) -> dict[str, Any]:
    """The fields of a receipt that every job fills alike; its times are the ticket's own, complete with the reply."""
    prompt, options = planned.prompt, planned.prompt.options
    return {
        "level": str(options.level),
        "history": options.history,
        "backend": passed.backend,
        "num_tokens": prompt.num_tokens,
        "num_fresh": planned.plan.num_fresh,
        "num_reused": planned.plan.num_reused,
        "num_computed": prompts.num_computed,
        "stage_ms": ticket.stage_ms,
        "batch_size": len(prompts.tickets),
        "degraded": ticket.opening.degraded,
        "guard": ticket.opening.guard,
        "notes": prompt.notes + notes,
    }
