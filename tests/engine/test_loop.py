"""One loop for all jobs: mixed passes, errors that stay alone, cancelling, threads, and a clock that is given."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rcllm.codes.index import CodeIndex, CodeTokens, LiveCodes
from rcllm.core.decoding import (
    Generated,
    GenerateOptions,
    GenerateRequest,
    RecommendRequest,
    RecommendResponse,
    Speculation,
)
from rcllm.core.ranking import Event, Level, RankOptions, RankRequest, RankResponse, Selection, UserId
from rcllm.drafts.draft import PromptLookup
from rcllm.engine.engine import Engine
from rcllm.engine.jobs.generate import Generator
from rcllm.engine.jobs.recommend import Recommender
from rcllm.errors import CancelledError, ModelError, UnknownItemError, answered
from rcllm.metrics import Trace
from rcllm.model.decoder import Pass, Passed
from rcllm.reuse.missing import user_owner
from rcllm.schedule.draft_budget import DraftBudget, PassCosts
from rcllm.store.memory import MemoryStore
from rcllm.store.owners import one_name
from tests.conftest import assert_no_pins
from tests.engine import tiny
from tests.engine.test_capacity import BrokenStore
from tests.engine.tiny import IDS

SIZES = (6, 7, 5)


def recommender(engine: Engine) -> Recommender:
    codes = np.stack([np.random.default_rng(0).integers(0, size, 60) for size in SIZES], axis=1).astype(np.int32)
    starts = np.cumsum((100, *SIZES))
    tokens = CodeTokens(
        tuple(np.arange(start, start + size, dtype=np.int32) for start, size in zip(starts, SIZES, strict=False))
    )
    return Recommender(engine, LiveCodes(CodeIndex.build(codes, IDS, SIZES)), tokens)


def generator(engine: Engine) -> Generator:
    return Generator(engine, lambda request, prompt: PromptLookup(), budget=DraftBudget(PassCosts({1: 1.0, 64: 1.0})))


def history(*events: int) -> tuple[Event, ...]:
    return tuple(Event(IDS[i]) for i in events)


def items_for(name: str, *events: int) -> RecommendRequest:
    return RecommendRequest(name, history(*events), UserId(name), n=8, beam=12)


def text_for(name: str, *events: int, tokens: int = 12) -> GenerateRequest:
    options = GenerateOptions(max_tokens=tokens, speculation=Speculation("strict"))
    return GenerateRequest(name, history(*events), UserId(name), options)


def values(response: Any) -> tuple[object, ...]:
    """What was answered, without the receipt."""
    if isinstance(response, RankResponse):
        return response.scores, response.order
    if isinstance(response, Generated):
        return response.token_ids, response.text
    return response.items, response.scores


class Passes:
    """Counts the forward passes of a decoder, and the rows and groups of each."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[Pass] = []
        forward = engine.decoder.forward

        def counted(work: Pass, *more: Any, **named: Any) -> Passed:
            self.seen.append(work)
            return forward(work, *more, **named)

        monkeypatch.setattr(engine.decoder, "forward", counted)


@pytest.mark.parametrize("level", ["blocks", "exact", "tail(0.3)", "corrected(0.3, 0.3)"])
def test_a_ranking_a_recommendation_and_a_text_in_one_pass_equal_each_alone(
    monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    """exact, to the bit on the compiled kernels: rows share the reading of the weights and nothing else"""
    asked = tiny.request((0, 1, 2, 7), (30, 31), level=level)
    alone = [
        values(tiny.fresh().rank(asked)),
        values(recommender(tiny.fresh()).recommend(items_for("r", 5, 6))),
        values(answered(generator(tiny.fresh()).generate([text_for("t", 8, 9, 10)]))[0]),
    ]
    engine = tiny.fresh()
    engine.warm()
    recommending, generating = recommender(engine), generator(engine)
    tickets = [engine.submit(recommending, items_for("r", 5, 6)), engine.submit(generating, text_for("t", 8, 9, 10))]
    passes = Passes(engine, monkeypatch)
    assert engine.step()
    assert len(passes.seen) == 1, "both prompts go through the layers together"
    tickets.insert(0, engine.submit(engine.rank_job, asked))
    del passes.seen[:]
    assert engine.step()
    rows = [len(work.token_ids) for work in passes.seen]
    if level.startswith("corrected"):  # its rows are on their way already
        assert len(rows) == 2
    else:
        assert len(rows) == 1
        assert len(passes.seen[0].groups) == 3, "one group of rows for each"
        assert len(passes.seen[0].asides) == 0
    while not all(ticket.done for ticket in tickets):
        assert engine.step()
    assert [values(ticket.outcome) for ticket in tickets] == alone
    assert not engine.step(), "nobody waits"
    assert_no_pins(engine)


def test_many_of_all_kinds_from_several_threads_are_answered_as_alone(engine: Engine) -> None:
    recommending, generating = recommender(engine), generator(engine)
    ranks = [tiny.request((i, i + 1, i + 9), (i, 31), name=f"rank{i}", level="blocks") for i in range(12)]
    items = [items_for(f"items{i}", i, i + 3) for i in range(8)]
    texts = [text_for(f"text{i}", i, i + 5, tokens=4 + i) for i in range(8)]
    alone = [values(tiny.fresh().rank(request)) for request in ranks]
    alone += [values(recommender(tiny.fresh()).recommend(request)) for request in items]
    alone += [values(answered(generator(tiny.fresh()).generate([request]))[0]) for request in texts]
    calls = [lambda request=request: engine.rank(request) for request in ranks]
    calls += [lambda request=request: recommending.recommend(request) for request in items]
    calls += [lambda request=request: answered(generating.generate([request]))[0] for request in texts]
    order = np.random.default_rng(1).permutation(len(calls)).tolist()
    with ThreadPoolExecutor(8) as threads:
        found = dict(zip(order, threads.map(lambda i: calls[i](), order), strict=True))
    for number, expected in enumerate(alone):
        if isinstance(found[number], RecommendResponse):  # whose few logits torch sums, by how many rows there are
            assert values(found[number])[0] == expected[0]
            assert np.allclose(values(found[number])[1], expected[1], atol=1e-5)
        else:
            assert values(found[number]) == expected
    engine.loop.scheduler.check()
    assert engine.loop.scheduler.num_running == engine.loop.scheduler.num_waiting == 0


def test_a_wrong_request_fails_alone_and_costs_no_pass(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    good, wrong = tiny.request(3, name="good"), RankRequest("wrong", (IDS[0], "nobody"))  # type: ignore[arg-type]
    passes = Passes(engine, monkeypatch)
    before, failed, after = engine.rank_batch([good, wrong, good])
    assert isinstance(failed, UnknownItemError)
    assert isinstance(before, RankResponse)
    assert isinstance(after, RankResponse)
    assert before.scores == after.scores
    assert before.receipt.batch_size == 2
    assert sum(len(work.wanted) > 0 for work in passes.seen) == 1, "nothing is run again one by one"


def test_a_pass_that_breaks_is_told_to_everybody_in_it_and_the_next_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [tiny.request(3, name=f"r{i}") for i in range(3)]
    wanted = [response.scores for response in answered(engine.rank_batch(asked))]

    def broken(*given: object, **named: object) -> Passed:
        raise RuntimeError("a mistake of ours")

    with monkeypatch.context() as patched:
        patched.setattr(engine.decoder, "forward", broken)
        with pytest.raises(RuntimeError, match="a mistake"):
            engine.rank_batch(asked)
        with pytest.raises(RuntimeError, match="a mistake"):
            recommender(engine).recommend(items_for("r", 1))
    assert_no_pins(engine)
    assert [response.scores for response in answered(engine.rank_batch(asked))] == wanted


def test_an_interrupt_leaves_a_loop_that_goes_on(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    generating = generator(engine)

    def interrupted(*given: object, **named: object) -> Passed:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(engine.decoder, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generating.generate([text_for("a", 1), text_for("b", 2)])
    assert engine.loop.scheduler.num_running == engine.loop.scheduler.num_waiting == 0
    assert len(answered(generating.generate([text_for("a", 1)]))) == 1
    assert_no_pins(engine)


@pytest.mark.parametrize("kind", ["rank", "recommend", "generate"])
def test_scores_that_are_not_numbers_are_an_error_of_their_request(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A regression: broken weights ranked candidates in the order asked, and wrote NaN into JSON."""
    engine, spoilt_before = tiny.fresh(), list[bool]()
    forward = engine.decoder.forward

    def spoilt(work: Pass, *more: Any, **named: Any) -> Passed:
        passed = forward(work, *more, **named)
        if len(passed.hidden) < 2 or spoilt_before:
            return passed
        spoilt_before.append(True)
        hidden = passed.hidden.clone()
        hidden[-1] = torch.nan  # of the last request of the batch
        return replace(passed, hidden=hidden)

    monkeypatch.setattr(engine.decoder, "forward", spoilt)
    asks: dict[str, Any] = {
        "rank": lambda: engine.rank_batch([tiny.request(3, name=name) for name in ("a", "b")]),
        "recommend": lambda: recommender(engine).recommend_batch([items_for("a", 1), items_for("b", 2)]),
        "generate": lambda: generator(engine).generate([text_for("a", 1, tokens=1), text_for("b", 2, tokens=1)]),
    }
    good, bad = asks[kind]()
    assert not isinstance(good, Exception)
    assert isinstance(bad, ModelError)
    assert "not numbers" in str(bad)
    assert_no_pins(engine)


def test_a_stream_that_is_left_cancels_what_it_asked_for(engine: Engine) -> None:
    generating = generator(engine)
    stream = generating.stream(text_for(f"t{i}", i, tokens=30) for i in range(40))
    next(stream)
    assert engine.loop.scheduler.num_running
    stream.close()
    assert engine.loop.scheduler.num_running == engine.loop.scheduler.num_waiting == 0
    assert not generating._live
    assert_no_pins(engine)


def test_a_search_whose_requests_are_all_cancelled_lets_go_of_its_blocks(engine: Engine) -> None:
    recommending = recommender(engine)
    tickets = [engine.submit(recommending, items_for(f"r{i}", i)) for i in range(2)]
    assert engine.step()
    engine.cancel(tickets[:1])
    assert engine.step(), "the other is searched on"
    engine.cancel(tickets[1:])
    assert all(isinstance(ticket.outcome, CancelledError) for ticket in tickets)
    assert not engine.step()
    assert_no_pins(engine)
    assert len(recommending.recommend(items_for("again", 1)).items) == 8


def test_erasing_a_user_reaches_requests_that_were_asked_before(engine: Engine) -> None:
    """A request that waits while its user is erased is answered, and leaves nothing behind."""
    asked = tiny.request(3, ("my own words",), level="exact", user="ann")
    ticket = engine.submit(engine.rank_job, asked)
    engine.erase_user(UserId("ann"))
    assert engine.step()
    assert isinstance(ticket.outcome, RankResponse)
    assert engine.erase_user(UserId("ann")) == 0


def test_erasing_a_user_reaches_how_words_were_ranked_for_a_request_that_was_asked_before(engine: Engine) -> None:
    level = {"level": "corrected(.3,.3)", "selection": Selection("static")}
    engine.submit(engine.rank_job, tiny.request(3, ("my own words",), user="ann", **level))
    engine.erase_user(UserId("ann"))
    assert engine.step()
    owners = {ranking.owner for ranking in engine._prefill.corrector.rankings._known.values()}
    assert "item:i0" in owners
    assert "user:ann" not in owners


def test_erasing_a_user_whose_text_is_being_written_asks_the_store_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A regression: every pass of the text erased the user again, in every tier."""
    store, erased = MemoryStore(1 << 24), list[str]()
    monkeypatch.setattr(store, "delete_owner", lambda owner: len(erased.append(owner) or []))
    engine = tiny.fresh(store=store)
    ticket = engine.submit(generator(engine), text_for("ann", 1, 2))
    assert engine.step()
    engine.erase_user(UserId("ann"))
    while engine.step():
        pass
    assert isinstance(ticket.outcome, Generated)
    assert len(erased) == 1


def test_a_tier_that_cannot_erase_fails_nobody_who_was_asked_before() -> None:
    """A regression: the pass of the erased user's request raised, and every request that waited was lost."""
    engine = tiny.fresh(store=BrokenStore())
    asked = [tiny.request(3, ("my own words",), level="exact", user=user) for user in ("ann", "bob")]
    tickets = [engine.submit(engine.rank_job, request) for request in asked]
    with pytest.raises(OSError, match="broken"):
        engine.erase_user(UserId("ann"))
    while engine.step():
        pass
    assert all(isinstance(ticket.outcome, RankResponse) for ticket in tickets)
    assert not engine.pool._index.owned_by([one_name(user_owner("ann")) or ""])


def test_times_are_of_the_clock_that_was_given() -> None:
    ticks = itertools.count()
    made, trace = tiny.fresh(), Trace()
    engine = Engine(
        made.config, made.decoder, made.prompter, made.pool, made.model_id,
        clock=lambda: float(next(ticks)), node="here", trace=trace,
    )  # fmt: skip
    receipt = engine.rank(tiny.request(3)).receipt
    assert receipt.node == "here"
    assert all(ms == int(ms) and ms % 1000 == 0 for ms in receipt.stage_ms.values()), "whole ticks"
    assert receipt.stage_ms["total"] >= sum(ms for name, ms in receipt.stage_ms.items() if name != "total")
    assert [span.stage for span in trace.spans][:2] == ["plan", "materialise"]


def test_a_waiting_thread_is_answered_while_another_goes_on(engine: Engine) -> None:
    """Whoever steps answers others as well, and they leave at once."""
    generating, answers = generator(engine), list[Sequence[object]]()
    long = threading.Thread(target=lambda: answers.append(generating.generate([text_for("long", 1, tokens=200)])))
    long.start()
    while not engine.loop.scheduler.num_running and long.is_alive():
        pass
    engine.rank(tiny.request(3))
    still_running = long.is_alive()
    long.join()
    assert still_running, "a ranking does not wait for a text to end"
    assert len(answers[0]) == 1


def test_the_default_options_are_those_of_the_engine(engine: Engine) -> None:
    asked = RankRequest("r", IDS[:3], options=RankOptions(Level("blocks")))
    assert engine.rank(asked).receipt.level == "blocks"
