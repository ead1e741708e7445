"""Two passes under way: the next is launched before the answers of the last are read. The CPU plays the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from rcllm.core.ranking import RankRequest, RankResponse, UserId
from rcllm.engine import loop as loop_module
from rcllm.engine.engine import Engine
from rcllm.errors import ModelError
from rcllm.metrics import Trace
from rcllm.model.decoder import Pass, Passed
from rcllm.schedule.work import PassLimits
from tests.conftest import assert_no_pins
from tests.engine import tiny
from tests.engine.test_loop import generator, recommender, text_for, values


def flying(trace: Trace | None = None, rows: int = 100) -> Engine:
    """rows: of a pass, at most."""
    made = tiny.fresh()
    engine = Engine(made.config, made.decoder, made.prompter, made.pool, made.model_id, trace=trace)
    engine.warm()
    engine.loop._flies = True
    engine.loop.scheduler.limits = dataclasses.replace(engine.loop.scheduler.limits, rows=rows)
    return engine


def asked(count: int, level: str = "blocks") -> list[RankRequest]:
    return [tiny.request((i, i + 1, i + 9), (i, 31, 40), name=f"r{i}", user=f"u{i}", level=level) for i in range(count)]


def answers(engine: Engine, requests: list[RankRequest]) -> list[object]:
    return [values(answer) for answer in engine.rank_batch(requests)]


@pytest.mark.parametrize("level", ["blocks", "exact", "corrected(0.3, 0.3)"])
def test_answers_are_those_of_one_pass_after_the_other(level: str) -> None:
    engine, twin = flying(), tiny.fresh()
    requests = asked(12, level)
    assert answers(engine, requests) == [values(twin.rank(request)) for request in requests]
    assert engine.loop._flight is None
    assert_no_pins(engine)


def test_the_next_pass_is_launched_before_the_last_is_read() -> None:
    trace = Trace()
    engine = flying(trace)
    answers(engine, asked(12))
    begun = {span.batch: span.start_s for span in reversed(trace.spans) if span.stage == "forward"}
    read = {span.batch: span.start_s for span in trace.spans if span.stage == "readout"}  # what is launched comes first
    assert len(begun) > 2
    pairs = [(begun[batch + 1], read[batch]) for batch in sorted(begun) if batch + 1 in begun]
    assert all(launched < landed for launched, landed in pairs)


def test_a_pass_is_launched_while_more_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = flying(rows=10_000)
    monkeypatch.setattr(loop_module, "_WORTH_ROWS", 100)
    sizes = list[int]()
    launch = engine.loop._launch

    def launched(entering, running, between):  # type: ignore[no-untyped-def]
        sizes.append(len(entering))
        return launch(entering, running, between)

    monkeypatch.setattr(engine.loop, "_launch", launched)
    twin = tiny.fresh()
    assert answers(engine, asked(12)) == [values(twin.rank(request)) for request in asked(12)]
    assert sum(sizes) == 12
    assert len(sizes) > 2, "not all wait for the last to be asked"


def test_an_error_is_told_to_its_own_pass_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = flying()
    forward, number = engine.decoder.forward, iter(range(100))

    def failing(work: Pass, *more: object, **named: object) -> Passed:
        if next(number) == 1:
            raise ModelError("the second pass breaks")
        return forward(work, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.decoder, "forward", failing)
    found = engine.rank_batch(asked(12))
    failed = [answer for answer in found if isinstance(answer, ModelError)]
    assert 0 < len(failed) < 12
    twin = tiny.fresh()
    for request, answer in zip(asked(12), found, strict=True):
        if isinstance(answer, RankResponse):
            assert values(answer) == values(twin.rank(request))
    assert_no_pins(engine)


def launched_without_landing(engine: Engine, requests: list[RankRequest]) -> list[object]:
    tickets = [engine.submit(engine.rank_job, request) for request in requests]
    assert engine.step()
    assert engine.loop._flight is not None
    return tickets


def test_whoever_computes_alone_waits_for_what_is_under_way() -> None:
    engine = flying()
    tickets = launched_without_landing(engine, asked(12))
    assert not any(ticket.done for ticket in tickets)  # type: ignore[attr-defined]
    with engine.alone():
        assert engine.loop._flight is None
        assert any(ticket.done for ticket in tickets)  # type: ignore[attr-defined]
    while engine.step():
        pass
    assert all(isinstance(ticket.outcome, RankResponse) for ticket in tickets)  # type: ignore[attr-defined]
    assert_no_pins(engine)


def test_cancelling_what_is_under_way_answers_it_and_drops_the_rest() -> None:
    engine = flying()
    tickets = launched_without_landing(engine, asked(12))
    engine.cancel(tickets)  # type: ignore[arg-type]
    outcomes = [type(ticket.outcome).__name__ for ticket in tickets]  # type: ignore[attr-defined]
    assert set(outcomes) == {"RankResponse", "CancelledError"}
    assert not engine.step()
    assert_no_pins(engine)


def test_what_goes_on_is_read_before_the_next_pass() -> None:
    """Texts and searches beside rankings: their next step needs what the last one gave."""
    engine, twin = flying(), tiny.fresh()
    generating = generator(engine)
    alone = generator(twin).generate([text_for("t", 8, 9, 10)])
    ticket = engine.submit(generating, text_for("t", 8, 9, 10))
    tickets = [engine.submit(engine.rank_job, request) for request in asked(12)]
    while engine.step():
        pass
    assert values(ticket.outcome) == values(alone[0])
    assert [values(each.outcome) for each in tickets] == [values(twin.rank(request)) for request in asked(12)]
    assert recommender(engine) is not None


def test_erasing_a_user_whose_ranking_is_under_way_leaves_nothing_of_them() -> None:
    engine = flying()
    tickets = launched_without_landing(engine, asked(12, "exact"))
    engine.erase_user(UserId("u0"))
    while engine.step():
        pass
    assert all(ticket.done for ticket in tickets)  # type: ignore[attr-defined]
    assert engine.erase_user(UserId("u0")) == 0


def test_a_pass_waits_where_both_would_read_more_than_fits() -> None:
    engine = flying(rows=10_000)
    scheduler = engine.loop.scheduler
    tickets = [engine.submit(engine.rank_job, request) for request in asked(8)]
    whole = scheduler.turn(0.0).kv_bytes
    for number in list(scheduler._running):
        scheduler.end(number)
    scheduler.limits = PassLimits(rows=10_000, kv_bytes=whole // 2)
    engine.cancel(tickets)

    def most_held(limit: int) -> Iterator[int]:
        scheduler.limits = PassLimits(rows=10_000, kv_bytes=limit)
        waiting = [engine.submit(engine.rank_job, request) for request in asked(8)]
        while not all(ticket.done for ticket in waiting):
            assert engine.step()
            yield sum(each.kv_bytes for each in (engine.loop._flight,) if each)

    assert max(most_held(whole // 2)) <= whole // 2
