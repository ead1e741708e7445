"""Rankings that enter between the layers of a pass that others are in: when, and that no answer changes by it."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rcllm.core.ranking import Level, RankResponse
from rcllm.engine.engine import Engine
from rcllm.engine.job import Job, Refused, Ticket
from rcllm.errors import CancelledError, answered
from rcllm.schedule.work import KindLimits
from tests.conftest import assert_no_pins
from tests.engine import tiny
from tests.engine.test_loop import generator, history, items_for, recommender, text_for, values

RANKING = tiny.request((0, 1, 2, 7), (30, 31), level="blocks")


class Arrivals:
    """Calls something once, in the first pass that is given, when it has come to a layer."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.call: Callable[[], object] | None = None
        run = engine.decoder._run

        def running(number: int, *more: Any) -> torch.Tensor:
            if number == 0 and self.call is not None:
                call, self.call = self.call, None
                call()
            return run(number, *more)

        monkeypatch.setattr(engine.decoder, "_run", running)


def others(engine: Engine, first: str) -> tuple[Job[Any, Any], Any]:
    """A request of something else than a ranking, whose pass has many rows."""
    match first:
        case "text":
            return generator(engine), text_for("t", *range(20))
        case "search":
            return recommender(engine), items_for("s", *range(20))
        case _:
            asked = items_for("s", *range(20))
            return recommender(engine), type(asked)("s", history(*range(20)), n=8, beam=12, level=Level("blocks"))


@pytest.mark.parametrize("first", ["text", "search", "missing blocks"])
def test_a_ranking_that_comes_during_a_pass_of_others_is_answered_within_it(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """exact, to the bit on the compiled kernels: neither it nor what it interrupts is answered otherwise than alone"""
    job, request = others(tiny.fresh(), first)
    alone = values(answered([job.engine.run(job, [request])[0]])[0]), values(tiny.fresh().rank(RANKING))  # type: ignore[attr-defined]
    engine, ranked = tiny.fresh(other_rows=1), list[Ticket | Refused]()
    arrivals = Arrivals(engine, monkeypatch)
    interrupted = engine.submit(*others(engine, first))
    arrivals.call = lambda: ranked.append(engine.submit(engine.rank_job, RANKING))
    assert engine.step()
    assert ranked[0].done, "the pass of the others had not ended when it came"
    assert not interrupted.done
    while engine.step():
        pass
    assert (values(interrupted.outcome), values(ranked[0].outcome)) == alone
    for ticket in (interrupted, ranked[0]):
        stages = ticket.outcome.receipt.stage_ms  # type: ignore[attr-defined]
        assert sum(ms for name, ms in stages.items() if name != "total") <= stages["total"]
        assert ("yield" in stages) == (ticket is interrupted)
    engine.loop.scheduler.check()
    assert_no_pins(engine)


def test_what_an_interrupted_pass_costs_is_learned_without_what_came_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """A regression: it was counted from the end of the ranking on, by a clock that stands still meanwhile: below 0."""
    made, ticks, seen = tiny.fresh(other_rows=1), itertools.count(), list[tuple[float, float]]()
    clock = lambda: float(next(ticks))  # noqa: E731
    engine = Engine(made.config, made.decoder, made.prompter, made.pool, made.model_id, clock=clock)
    arrivals, interrupted = Arrivals(engine, monkeypatch), engine.submit(*others(engine, "text"))
    assert isinstance(interrupted, Ticket)
    before = dict(interrupted.stage_ms)
    arrivals.call = lambda: engine.submit(engine.rank_job, RANKING)
    monkeypatch.setattr(engine.loop.costs, "observe", lambda demand, ms: seen.append((demand.rows, ms)))
    assert engine.step()
    stages = {name: ms - before.get(name, 0.0) for name, ms in interrupted.stage_ms.items()}
    assert stages.pop("yield") > 0
    stages.pop("wait", None)
    (_, between_ms), (rows, ms) = seen
    assert rows > 20, "the text's own pass ends last"
    assert between_ms > 0
    assert ms >= sum(stages.values())


def test_a_pass_of_another_model_makes_way_unless_its_rankings_are_computed_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A decoder of semantic IDs stands beside the ranker, each with an engine of its own."""
    ranker, searcher = tiny.fresh(other_rows=1), tiny.fresh(other_rows=1)
    searcher.loop.makes_way_for(ranker.loop)
    arrivals, ranked = Arrivals(searcher, monkeypatch), list[Ticket | Refused]()
    for is_busy in (False, True):
        searcher.submit(*others(searcher, "search"))
        arrivals.call = lambda: ranked.append(ranker.submit(ranker.rank_job, RANKING))
        with ranker.alone() if is_busy else contextlib.nullcontext():
            assert searcher.turn()
        assert ranked[-1].done != is_busy
        while searcher.turn() or ranker.turn():
            pass
        assert ranked[-1].done


@pytest.mark.parametrize("other_rows", [0, 100_000])
def test_a_pass_makes_no_way_before_it_has_gone_on_enough(other_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """0: no limit, so that nothing is ever interrupted."""
    engine, ranked = tiny.fresh(other_rows=other_rows), list[Ticket | Refused]()
    arrivals = Arrivals(engine, monkeypatch)
    engine.submit(*others(engine, "text"))
    arrivals.call = lambda: ranked.append(engine.submit(engine.rank_job, RANKING))
    assert engine.step()
    assert not ranked[0].done
    assert engine.step()
    assert ranked[0].done
    assert isinstance(ranked[0].outcome, RankResponse)
    assert "yield" not in ranked[0].outcome.receipt.stage_ms


def test_what_is_withdrawn_during_a_pass_is_dropped_before_the_ranking_or_after_the_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, ranked = tiny.fresh(other_rows=1), list[Any]()
    arrivals = Arrivals(engine, monkeypatch)
    generating, request = others(engine, "text")
    text: Any = engine.submit(generating, request)
    waiting: Any = engine.submit(engine.ranking(engine.admission, "later", KindLimits(idle=True)), RANKING)

    def come_and_go() -> None:
        ranked.extend(engine.submit(engine.rank_job, RANKING) for _ in range(2))
        for ticket in (text, ranked[0], waiting):
            engine.withdraw(ticket)

    arrivals.call = come_and_go
    assert engine.step()
    assert isinstance(ranked[0].outcome, CancelledError)
    assert isinstance(waiting.outcome, CancelledError)
    assert isinstance(ranked[1].outcome, RankResponse)
    assert not text.done, "its pass goes on to its end"
    assert not engine.step()
    assert isinstance(text.outcome, CancelledError)
    engine.loop.scheduler.check()
    assert_no_pins(engine)


def test_an_error_of_a_ranking_between_layers_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = values(answered(generator(tiny.fresh()).generate([text_for("t", *range(20))]))[0])
    engine, ranked = tiny.fresh(other_rows=1), list[Any]()
    arrivals = Arrivals(engine, monkeypatch)
    text: Any = engine.submit(*others(engine, "text"))

    def broken(*given: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(engine.rank_job, "enter", broken)
    arrivals.call = lambda: ranked.append(engine.submit(engine.rank_job, RANKING))
    while engine.step():
        pass
    assert isinstance(ranked[0].outcome, RuntimeError)
    assert values(text.outcome) == alone
    assert_no_pins(engine)


def test_a_thread_that_waits_for_its_ranking_leaves_while_the_pass_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, answers = tiny.fresh(other_rows=1), list[RankResponse]()
    arrivals, asked = Arrivals(engine, monkeypatch), threading.Event()
    engine.submit(*others(engine, "text"))
    thread = threading.Thread(target=lambda: answers.append(engine.rank(RANKING)))

    def come() -> None:
        thread.start()
        while not engine.loop.scheduler.num_hurried:
            pass
        asked.set()

    arrivals.call = come
    feed = engine.decoder._layers[-1].feed

    def last_layer(residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        if asked.is_set() and len(residual) == 1:  # the text's own, whose last token alone goes on
            thread.join(10)
        return feed(residual, attended)

    monkeypatch.setattr(engine.decoder._layers[-1], "feed", last_layer)
    assert engine.turn()
    assert len(answers) == 1
    thread.join()
