"""The backend that computes: answers equal the engine's own, whatever else is under way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from rcllm.core.decoding import Generated, GenerateOptions, RecommendRequest
from rcllm.core.ranking import Item, ItemId, Level, RankRequest, RankResponse, UserId
from rcllm.core.texts import ScoreRequest, ScoreResponse, TextRequest
from rcllm.engine.engine import Engine
from rcllm.engine.jobs.generate import Generator
from rcllm.errors import CancelledError, ClosingError, ErasureError, NotServedError, UnknownItemError
from rcllm.reuse.missing import item_owner, user_owner
from rcllm.server.backend import Asked, EraseUser, PutItems, RemoveItems, WarmItems
from rcllm.server.catalogue import Keeper
from rcllm.server.on_engine import EngineBackend
from rcllm.server.pools import DraftPoolsByName
from rcllm.store.owners import one_name
from tests.conftest import assert_no_pins
from tests.engine import tiny

T = TypeVar("T")


def running(backend: EngineBackend, body: Callable[[], Awaitable[T]], drain_s: float = 5.0) -> T:
    """What `body` gives while the backend runs; nothing is left of it afterwards."""

    async def whole() -> T:
        await backend.start()
        try:
            return await body()
        finally:
            await backend.stop(drain_s)

    found = asyncio.run(whole())
    assert backend.stats().num_unanswered == 0
    assert not any(thread.name == "rcllm-loop" for thread in threading.enumerate())
    return found


def _text(engine: Engine, words: str, name: str = "t", user: str | None = None, **options: Any) -> TextRequest:
    ids = engine.prompter.tokenizer.encode(words)
    parts = (ids[:-1], ids[-1:])
    return TextRequest(name, user_id=UserId(user) if user else None, options=GenerateOptions(**options), parts=parts)


def test_many_at_once_equal_each_alone_to_the_bit(tiny_engine: Engine, computing: EngineBackend) -> None:
    ranks = [tiny.request(4 + n, (30 + n, "my own words"), name=f"r{n}", level="blocks") for n in range(6)]
    texts = [_text(tiny_engine, f"a red lamp {n}", f"t{n}", max_tokens=5) for n in range(3)]
    scores = [ScoreRequest(f"s{n}", (5, 6, 7), ((8, 9), (10,)), (11, 12)) for n in range(2)]

    async def ask() -> Sequence[Any]:
        return await asyncio.gather(*(computing.answer(Asked(each)) for each in [*ranks, *texts, *scores]))

    answers = running(computing, ask)
    alone = tiny.fresh()
    for request, answer in zip(ranks, answers[: len(ranks)], strict=True):
        assert alone.rank(request).scores == answer.scores
    plain = Generator(alone).generate(texts)
    assert [each.token_ids for each in plain if isinstance(each, Generated)] == [
        each.token_ids for each in answers[len(ranks) : len(ranks) + len(texts)]
    ]
    assert_no_pins(tiny_engine)


def test_drafts_of_a_user_go_also_where_a_tier_cannot_be_reached(
    tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> int:
        raise ErasureError("the shared store does not answer")

    erased: list[str] = []
    pools = DraftPoolsByName(tiny_engine)
    monkeypatch.setattr(tiny_engine, "erase_user", fails)
    monkeypatch.setattr(pools, "erase", erased.append)
    with pytest.raises(ErasureError):
        Keeper(tiny_engine, None, pools, None).make(EraseUser(UserId("ann")))
    assert erased == ["ann"]


def test_tokens_come_as_they_are_decided_and_join_to_the_answer(tiny_engine: Engine, computing: EngineBackend) -> None:
    came: list[int] = []

    async def ask() -> Any:
        return await computing.answer(
            Asked(_text(tiny_engine, "red kettle", max_tokens=6), on_tokens=lambda ids: came.extend(ids))
        )

    answer = running(computing, ask)
    assert tuple(came) == answer.token_ids
    assert 1 <= len(came) <= 6


def test_scores_are_those_of_a_full_prefill_of_each_item(tiny_engine: Engine, computing: EngineBackend) -> None:
    """The next token after query and item, computed by ranking's slow twin: one prompt for each item."""
    query, items, labels = (20, 21, 22, 23), ((30, 31, 32), (40,), (50, 51)), (60, 61, 62)

    async def ask() -> tuple[ScoreResponse, list[ScoreResponse]]:
        together = await computing.answer(Asked(ScoreRequest("s", query, items, labels)))
        apart = [
            await computing.answer(Asked(ScoreRequest(f"s{n}", (*query, *item[:-1]), (item[-1:],), labels)))
            for n, item in enumerate(items)
        ]
        assert isinstance(together, ScoreResponse)
        return together, [each for each in apart if isinstance(each, ScoreResponse)]

    together, apart = running(computing, ask)
    for row, alone in zip(together.log_probs, apart, strict=True):
        assert row == pytest.approx(alone.log_probs[0], abs=1e-5)
        assert all(value < 0 for value in row)


def test_items_of_a_score_are_reused_beyond_the_prefix(tiny_engine: Engine, computing: EngineBackend) -> None:
    items = tuple(tuple(range(start, start + 9)) for start in (30, 50, 70))
    asked = [ScoreRequest(f"s{n}", (100 + n, 101, 102), items, (60, 61), level=Level("blocks")) for n in range(2)]
    first = [
        ScoreRequest(f"f{n}", (90 + n, 91), items, (60, 61), item_first=True, level=Level("blocks")) for n in (0, 1)
    ]

    async def ask() -> list[Any]:
        return [await computing.answer(Asked(each)) for each in [*asked, *first]]

    cold, warm, _, after = [answer.receipt for answer in running(computing, ask)]
    assert cold.num_computed > 0
    assert (warm.num_computed, warm.num_reused) == (0, 3 * 8)  # another query; each item's last token is fresh
    assert (after.num_computed, after.num_reused) == (0, 3 * 9)  # the whole item, for it is read in the query


def test_a_request_that_nobody_waits_for_is_dropped_before_its_pass(
    tiny_engine: Engine, computing: EngineBackend
) -> None:
    async def ask() -> None:
        with_turn = tiny_engine.alone()
        with_turn.__enter__()  # no pass can begin
        try:
            task = asyncio.create_task(computing.answer(Asked(tiny.request(name="dropped"))))
            other = asyncio.create_task(computing.answer(Asked(tiny.request(name="wanted"))))
            while len(tiny_engine.loop.tickets) < 2:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        finally:
            with_turn.__exit__(None, None, None)
        answer = await other
        assert answer.receipt.batch_size == 1, "the other one was computed, too"

    running(computing, ask)
    assert not tiny_engine.loop.tickets
    assert_no_pins(tiny_engine)


def test_a_text_that_nobody_reads_ends_early(tiny_engine: Engine, computing: EngineBackend) -> None:
    async def ask() -> None:
        begun = asyncio.Event()
        asked = Asked(_text(tiny_engine, "red", max_tokens=4000), on_tokens=lambda ids: begun.set())
        task = asyncio.create_task(computing.answer(asked))
        await asyncio.wait_for(begun.wait(), 20)
        task.cancel()
        while tiny_engine.loop.tickets:
            await asyncio.sleep(0.001)

    running(computing, ask)
    assert_no_pins(tiny_engine)


def test_a_pass_that_breaks_is_told_to_those_in_it_and_the_loop_goes_on(
    tiny_engine: Engine, computing: EngineBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, broken = tiny_engine.turn, threading.Event()

    def turn() -> bool:
        if tiny_engine.loop.tickets and not broken.is_set():
            broken.set()
            raise RuntimeError(" ".join(["words", "of", "a", "user"]))
        return real()

    monkeypatch.setattr(tiny_engine, "turn", turn)

    async def ask() -> Any:
        with pytest.raises(RuntimeError):
            await computing.answer(Asked(tiny.request(name="first")))
        return await computing.answer(Asked(tiny.request(name="second")))

    assert running(computing, ask).request_id == "second"
    assert computing.stats().loop_failures == 1
    assert "a pass ended by a mistake" in caplog.text
    assert "words of a user" not in caplog.text


def test_draining_answers_what_is_under_way_and_takes_no_more(computing: EngineBackend) -> None:
    async def ask() -> tuple[Any, Exception]:
        await computing.start()
        under_way = asyncio.create_task(computing.answer(Asked(tiny.request())))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(computing.stop(10.0))
        await asyncio.sleep(0)
        try:
            await computing.answer(Asked(tiny.request()))
        except ClosingError as error:
            refused: Exception = error
        await stopping
        return await under_way, refused

    answer, refused = asyncio.run(ask())
    assert isinstance(answer, RankResponse)
    assert isinstance(refused, ClosingError)


def test_what_does_not_end_in_time_is_ended(tiny_engine: Engine, computing: EngineBackend) -> None:
    async def ask() -> None:
        await computing.start()
        endless = asyncio.create_task(computing.answer(Asked(_text(tiny_engine, "red", max_tokens=8000))))
        await asyncio.sleep(0.05)
        await computing.stop(0.0)
        with pytest.raises(CancelledError):
            await endless

    asyncio.run(ask())


def test_what_is_not_served_is_said(computing: EngineBackend) -> None:
    async def ask() -> None:
        with pytest.raises(NotServedError, match="--decoder"):
            await computing.answer(Asked(RecommendRequest("r")))
        with pytest.raises(UnknownItemError):
            await computing.answer(Asked(replace(tiny.request(), candidates=(ItemId("none"),))))

    running(computing, ask)


# ---- changes --------------------------------------------------------------------------------------------------------


def _titled(item_id: str, title: str) -> Item:
    return Item(ItemId(item_id), {"title": title})


def test_after_a_change_no_answer_reads_the_old_text(tiny_engine: Engine, computing: EngineBackend) -> None:
    """Also where a request that names the item was under way when the change came."""
    asked = tiny.request((1, 2, 3), (4,), level="blocks")
    changed = dict(tiny.catalogue())
    changed[ItemId("i2")] = _titled("i2", "something else altogether")
    wanted = tiny.fresh(items=changed).rank(asked).scores

    async def ask() -> tuple[Any, Any, bool]:
        with tiny_engine.alone():  # the request under way cannot be computed yet
            under_way = asyncio.create_task(computing.answer(Asked(asked)))
            while not tiny_engine.loop.tickets:
                await asyncio.sleep(0.001)
            change = asyncio.create_task(computing.change(PutItems((changed[ItemId("i2")],))))
            await asyncio.sleep(0.05)
            waits = not change.done()
        await change
        was_answered = under_way.done()
        return await under_way, await computing.answer(Asked(asked)), waits and was_answered

    before, after, waited = running(computing, ask)
    assert waited, "the change returned while the old text was still to be read"
    assert before.scores != wanted
    assert after.scores == wanted


def test_items_come_and_go(tiny_engine: Engine, computing: EngineBackend) -> None:
    asked = replace(tiny.request(3), candidates=(ItemId("new"), ItemId("i1")))

    async def ask() -> None:
        with pytest.raises(UnknownItemError):
            await computing.answer(Asked(asked))
        changed = await computing.change(PutItems((_titled("new", "a new thing"), _titled("i1", "blue kettle 1"))))
        assert (changed.num_items, changed.num_new) == (2, 1)
        await computing.answer(Asked(asked))
        removed = await computing.change(RemoveItems((ItemId("new"),)))
        assert removed.num_blocks > 0, "its blocks are still there"
        with pytest.raises(UnknownItemError):
            await computing.answer(Asked(asked))
        with pytest.raises(UnknownItemError):
            await computing.change(RemoveItems((ItemId("i1"), ItemId("new"))))
        assert ItemId("i1") in tiny_engine.prompter.catalogue, "part of a wrong change was made"

    running(computing, ask)


def test_erasing_a_user_leaves_no_block_of_theirs(tiny_engine: Engine, computing: EngineBackend) -> None:
    async def ask() -> tuple[int, int]:
        await computing.answer(Asked(tiny.request(events=("my own words", "more of them"), user="u9", level="blocks")))
        await computing.answer(Asked(replace(_text(tiny_engine, "a b c d", user="u9", max_tokens=2), pool="p")))
        first = await computing.change(EraseUser(UserId("u9")))
        return first.num_blocks, (await computing.change(EraseUser(UserId("u9")))).num_blocks

    first, second = running(computing, ask)
    assert first >= 3
    assert second == 0
    assert not tiny_engine.pool._index.owned_by([one_name(user_owner(UserId("u9"))) or ""])


def test_warming_leaves_out_what_is_gone_when_its_turn_comes(tiny_engine: Engine, computing: EngineBackend) -> None:
    async def ask() -> None:
        with tiny_engine.alone():
            await computing.change(WarmItems((ItemId("i1"),)))
            await computing.change(WarmItems((ItemId("i2"), ItemId("i3"))))
            tiny_engine.catalogue.put((), gone=(ItemId("i2"),))
        while computing.stats().warmth.running:
            await asyncio.sleep(0.005)
        assert not computing.stats().warmth.error
        assert tiny_engine.pool.owners() >= {one_name(item_owner(name)) for name in ("i1", "i3")}

    running(computing, ask)


def test_warming_goes_on_in_the_background(tiny_engine: Engine, computing: EngineBackend) -> None:
    async def ask() -> None:
        await computing.change(WarmItems((ItemId("i1"), ItemId("i2"))))
        await computing.change(WarmItems())
        while computing.stats().warmth.running:
            await asyncio.sleep(0.005)
        warmth = computing.stats().warmth
        assert warmth.done_blocks == warmth.total_blocks > 100
        assert not warmth.error
        answer = await computing.answer(Asked(tiny.request(level="blocks")))
        assert isinstance(answer, RankResponse)
        assert answer.receipt.num_computed == 0

    running(computing, ask)


def test_inline_texts_answer_as_the_catalogue_would(tiny_engine: Engine, computing: EngineBackend) -> None:
    asked = tiny.request((1, 2, 3), (4, 5), level="blocks")
    named = {ItemId(f"i{n}"): dict(tiny.catalogue()[ItemId(f"i{n}")].fields) for n in (1, 2, 3, 4, 5)}
    foreign = {ItemId(f"x{n}"): texts for n, texts in zip((1, 2, 3, 4, 5), named.values(), strict=True)}
    inline = RankRequest(
        "inline",
        (ItemId("x1"), ItemId("x2"), ItemId("x3")),
        tuple(replace(event, item_id=ItemId(f"x{n}")) for n, event in zip((4, 5), asked.history, strict=True)),
        asked.user_id,
        texts=foreign,
        options=asked.options,
    )

    async def ask() -> tuple[Any, Any]:
        return await computing.answer(Asked(asked)), await computing.answer(Asked(inline))

    own, other = running(computing, ask)
    assert own.scores == other.scores
    assert other.receipt.num_computed == 0, "equal texts have equal keys, whatever the items are called"
