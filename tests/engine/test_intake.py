"""What is taken in, refused, given up or dropped, on a tiny engine whose costs and clock the test decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from rcllm.config import ScheduleConfig
from rcllm.core.decoding import GenerateOptions, GenerateRequest
from rcllm.core.ranking import Level, RankOptions, RankRequest, RankResponse, UserId
from rcllm.engine.engine import Engine
from rcllm.engine.job import Refused, Ticket
from rcllm.engine.jobs.generate import Generator
from rcllm.errors import DeadlineError, OverloadedError, RequestError
from rcllm.schedule.admission import Admitted, Open
from rcllm.schedule.cost import CostModel, Demand, Rates
from rcllm.schedule.work import Terms
from tests.conftest import assert_no_pins
from tests.engine import tiny


class Fixed(CostModel):
    """Ten milliseconds a pass and one for each row; it learns nothing."""

    def __init__(self) -> None:
        super().__init__(Rates(10.0, 1.0, 0.0, 0.0, 0.0))
        self.seen: list[Demand] = []
        self.num_passes = 1

    def observe(self, demand: Demand, ms: float) -> None:
        self.seen.append(demand)


class Levels(Open):
    """Allows the levels that it is told, as if they were calibrated."""

    levels = ("tail(0.3)", "blocks")

    def cheaper(self, options: RankOptions) -> tuple[Admitted, ...]:
        texts = self.levels if options.level.name == "exact" else ()
        return tuple(Admitted(replace(options, level=Level.parse(text)), (f"calibrated: {text}",)) for text in texts)


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def make() -> Iterator[Callable[..., Engine]]:
    made = []

    def build(**schedule: Any) -> Engine:
        plain = tiny.fresh()
        config = replace(plain.config, schedule=ScheduleConfig(**schedule))
        engine = Engine(
            config, plain.decoder, plain.prompter, plain.pool, plain.model_id, Levels("causal"), clock=Time()
        )  # fmt: skip
        engine.loop.costs = engine.intake._costs = Fixed()
        made.append(engine)
        return engine

    yield build
    for engine in made:
        while engine.step():
            pass
        engine.loop.scheduler.check()
        assert_no_pins(engine)


def ask(
    engine: Engine, request: RankRequest, deadline_ms: float | None = None, tenant: str = "", **terms: Any
) -> Ticket | Refused:
    return engine.submit(
        engine.rank_job, replace(request, tenant=tenant), terms=Terms(deadline_ms=deadline_ms, **terms)
    )


def answer(engine: Engine, ticket: Ticket | Refused) -> RankResponse:
    while not ticket.done:
        assert engine.step()
    assert isinstance(ticket.outcome, RankResponse), ticket.outcome
    return ticket.outcome


def needs(engine: Engine, request: RankRequest) -> float:
    """The deadline that is just enough on an idle engine."""
    ticket = ask(engine, request)
    assert isinstance(ticket, Ticket)
    engine.cancel([ticket])
    return 1.25 * (10 + float(ticket.demands.whole.rows))


ASKED = tiny.request(12, (30, 31), level="exact")
ANONYMOUS = replace(ASKED, user_id=None)  # nothing of it is cached but the instruction


def test_by_default_everything_is_taken_in_as_it_was_asked(make: Callable[..., Engine]) -> None:
    engine = make()
    tickets = [ask(engine, tiny.request(3, name=f"r{i}", level="exact")) for i in range(300)]
    assert all(isinstance(ticket, Ticket) for ticket in tickets)
    receipt = answer(engine, tickets[0]).receipt
    assert (receipt.level, receipt.degraded, receipt.guard) == ("exact", (), "")
    assert engine.intake.counts().num_accepted == 300


def test_a_request_that_is_in_time_is_answered_as_it_was_asked(make: Callable[..., Engine]) -> None:
    engine = make()
    enough = needs(engine, ASKED)
    given = answer(engine, ask(engine, ASKED, enough))
    assert (given.receipt.level, given.receipt.degraded) == ("exact", ())
    assert given.scores == tiny.fresh().rank(ASKED).scores


def test_each_rung_in_turn_and_each_is_told_and_counted(make: Callable[..., Engine]) -> None:
    engine = make(min_candidates=3)
    deadlines = {level: needs(engine, tiny.asking(ASKED, level=level)) for level in ("exact", "tail(0.3)", "blocks")}
    assert deadlines["exact"] > deadlines["tail(0.3)"] > deadlines["blocks"]
    tail = answer(engine, ask(engine, ASKED, deadlines["exact"] - 1)).receipt
    assert (tail.level, tail.degraded, tail.notes[-1]) == ("tail(0.3)", ("level",), "calibrated: tail(0.3)")
    blocks = answer(engine, ask(engine, ASKED, deadlines["tail(0.3)"] - 1))
    assert (blocks.receipt.level, blocks.receipt.degraded) == ("blocks", ("level",))
    fewer = answer(engine, ask(engine, ASKED, deadlines["blocks"] - 1))
    assert fewer.receipt.degraded == ("level", "candidates")
    assert fewer.candidates == ASKED.candidates[:11]
    assert "11 of 12 candidates" in fewer.receipt.notes[-1]
    assert fewer.scores == tiny.fresh().rank(tiny.asking(tiny.request(11, (30, 31)), level="blocks")).scores
    counts = engine.intake.counts()
    assert counts.degraded == {"level": 3, "candidates": 1}
    assert counts.num_late == 0


def test_the_candidates_with_the_least_prior_are_left_out(make: Callable[..., Engine]) -> None:
    engine = make(min_candidates=3)
    deadline = needs(engine, tiny.asking(ASKED, level="blocks")) - 1
    prior = tuple(0.0 if i == 4 else 1.0 for i in range(12))
    given = answer(engine, ask(engine, ASKED, deadline, prior=prior))
    assert given.candidates == tuple(each for i, each in enumerate(ASKED.candidates) if i != 4)
    wrong = ask(engine, ASKED, deadline, prior=(1.0,))
    assert isinstance(wrong.outcome, RequestError)
    assert "each of 12 candidates, got 1" in str(wrong.outcome)


def test_never_a_level_that_the_admission_does_not_name(make: Callable[..., Engine]) -> None:
    engine = make(min_candidates=3)
    engine.admission = Open("causal")
    deadline = needs(engine, tiny.asking(ANONYMOUS, level="blocks"))
    given = answer(engine, ask(engine, ANONYMOUS, 2 * deadline))
    assert (given.receipt.level, given.receipt.degraded) == ("exact", ("candidates",))
    whole = make(min_candidates=12)
    whole.admission = Open("causal")
    assert isinstance(ask(whole, ANONYMOUS, deadline).outcome, DeadlineError), "blocks would have been in time"


def test_last_known_scores_and_nothing_of_a_user_who_was_erased(make: Callable[..., Engine]) -> None:
    engine = make(min_candidates=3, last_scores=100)
    too_little = 1.0
    assert isinstance(ask(engine, ASKED, too_little).outcome, DeadlineError), "nothing is known yet"
    before = answer(engine, ask(engine, ASKED))
    engine.clock.now = 7.0  # type: ignore[attr-defined]
    given = ask(engine, replace(ASKED, candidates=ASKED.candidates[2:9] + tiny.IDS[40:42]), too_little)
    assert given.done, "nothing was computed for it"
    response = given.outcome
    assert isinstance(response, RankResponse)
    assert response.candidates == ASKED.candidates[2:9]
    assert response.scores == before.scores[2:9]
    assert response.receipt.degraded == ("candidates", "last_scores")
    assert "up to 7 s ago" in response.receipt.notes[-2]
    assert isinstance(ask(engine, ASKED, too_little, tenant="other").outcome, DeadlineError)
    late = ask(engine, replace(ASKED, request_id="waits"))
    engine.erase_user(UserId("u1"))
    answer(engine, late)
    assert isinstance(ask(engine, ASKED, too_little).outcome, DeadlineError), "neither before nor after is kept"


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(make: Callable[..., Engine]) -> None:
    engine = make(max_waiting=4)
    tickets = [ask(engine, replace(ASKED, request_id=f"r{i}")) for i in range(6)]
    assert [type(ticket) for ticket in tickets] == [Ticket] * 4 + [Refused] * 2
    error = tickets[-1].outcome
    assert isinstance(error, OverloadedError)
    assert error.retry_after_s == pytest.approx(needs(make(), ASKED) / 1.25e3)
    assert isinstance(ask(engine, ASKED, tenant="quiet"), Ticket), "it has a part of the queue of its own"
    while engine.step():
        pass
    assert isinstance(ask(engine, ASKED), Ticket)
    assert engine.intake.counts().num_overloaded == 2


def test_the_queue_can_be_looked_at(make: Callable[..., Engine]) -> None:
    engine = make()
    assert (engine.queue().num_waiting, engine.queue().ahead_ms) == (0, 0.0)
    ask(engine, ASKED, tenant="ann")
    assert engine.queue("ann").num_own == 1
    assert engine.queue("ann").ahead_ms == pytest.approx(needs(make(), ASKED) / 1.25)
    assert engine.queue("bob").num_tenants == 2


def test_what_would_wait_too_long_is_refused(make: Callable[..., Engine]) -> None:
    engine = make(max_wait_ms=1.0)
    assert isinstance(ask(engine, ASKED), Ticket), "nobody waits"
    assert isinstance(ask(engine, ASKED).outcome, OverloadedError)


def test_what_would_be_in_time_alone_is_overload_and_what_never_would_is_a_missed_deadline(
    make: Callable[..., Engine],
) -> None:
    engine = make(min_candidates=12)
    blocks = tiny.asking(ASKED, level="blocks")
    enough = needs(engine, blocks)
    assert isinstance(ask(engine, blocks, enough), Ticket)
    second = ask(engine, blocks, enough).outcome
    assert isinstance(second, OverloadedError)
    assert "it would wait" in str(second)
    never = ask(engine, blocks, enough - 1).outcome
    assert isinstance(never, DeadlineError)
    counts = engine.intake.counts()
    assert (counts.num_accepted, counts.num_overloaded, counts.num_late) == (2, 1, 1)  # one was cancelled by `needs`


def test_a_deadline_that_passes_in_the_queue_is_not_computed(make: Callable[..., Engine]) -> None:
    engine = make()
    ticket, other = ask(engine, ASKED, 10_000.0), ask(engine, replace(ASKED, request_id="patient"))
    engine.clock.now = 10.0  # type: ignore[attr-defined]
    assert engine.step()
    assert isinstance(ticket.outcome, DeadlineError)
    assert isinstance(other.outcome, RankResponse)
    assert engine.intake.counts().num_expired == 1
    assert len(engine.costs.seen) == 1  # type: ignore[attr-defined]
    alone = ask(engine, ASKED, 10_000.0)
    engine.clock.now = 30.0  # type: ignore[attr-defined]
    assert not engine.step(), "nobody is left to compute for"
    assert isinstance(alone.outcome, DeadlineError)


def test_a_deadline_for_all_may_be_configured(make: Callable[..., Engine]) -> None:
    engine = make(deadline_ms=1.0)
    assert isinstance(ask(engine, ASKED).outcome, DeadlineError)
    assert isinstance(ask(engine, ASKED, 1e9), Ticket), "a request's own goes before it"


def test_texts_have_deadlines_too_and_no_ladder(make: Callable[..., Engine]) -> None:
    engine = make()
    generating = Generator(engine)
    asked = GenerateRequest("t", ASKED.history, options=GenerateOptions(max_tokens=2))
    assert isinstance(engine.submit(generating, asked, terms=Terms(deadline_ms=1.0)).outcome, DeadlineError)
    assert isinstance(engine.submit(generating, asked, terms=Terms(deadline_ms=1e6)), Ticket)


def test_an_estimate_that_is_too_high_is_tested_now_and_then(make: Callable[..., Engine]) -> None:
    engine = make()
    tickets = [ask(engine, ASKED, 1.0) for _ in range(33)]
    computed = [ticket for ticket in tickets if isinstance(ticket, Ticket)]
    assert len(computed) == 1
    assert "so that the estimate is tested" in answer(engine, computed[0]).receipt.notes[-1]
    assert engine.intake.counts().num_probes == 1


def test_what_is_asked_of_the_device_is_what_the_receipt_says(make: Callable[..., Engine]) -> None:
    engine = make()
    for level in ("full", "exact", "linked(4)", "tail(0.3)", "blocks", "corrected(0.3, 0.3)"):
        asked = tiny.asking(ASKED, level=level)
        ticket = ask(engine, asked)
        assert isinstance(ticket, Ticket)
        receipt = answer(engine, ticket).receipt
        seen = engine.costs.seen[-1]  # type: ignore[attr-defined]
        assert (seen.passes, seen.missing) == (1.0, receipt.num_computed)
        if level.startswith("corrected"):
            layers = engine.decoder.spec.num_layers
            assert seen.rows == pytest.approx(
                receipt.num_fresh * (layers - 1) / layers + receipt.num_tokens / layers, rel=0.02
            )
        else:
            assert (seen.rows, seen.kv_bytes) == (receipt.num_fresh, receipt.kv_bytes_read)


def test_missing_blocks_and_steps_are_asked_for_as_well(make: Callable[..., Engine]) -> None:
    engine = make()
    asked = tiny.asking(ASKED, level="blocks")
    cold = ask(engine, asked)
    assert isinstance(cold, Ticket)
    item_tokens = sum(
        len(block) for block in cold.planned.prompt.blocks if block.key is not None or block.chain_key is not None
    )
    assert 0 < cold.demands.whole.missing <= item_tokens
    answer(engine, cold)
    warm = ask(engine, asked)
    assert isinstance(warm, Ticket)
    assert warm.demands.whole.missing == 0
    engine.submit(Generator(engine), GenerateRequest("t", ASKED.history, options=GenerateOptions(max_tokens=3)))
    assert engine.step()
    assert engine.step()
    step = engine.costs.seen[-1]  # type: ignore[attr-defined]
    assert step.rows == 1
    assert step.kv_bytes > 0
