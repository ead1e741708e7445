"""The catalogue changes under traffic: nothing reads an old text once that was said, and nothing else is computed."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from rcllm.core.ranking import Item, ItemId, RankRequest, RankResponse, UserId
from rcllm.engine.engine import Engine
from rcllm.engine.job import Refused, Ticket
from rcllm.errors import CancelledError, DataError, UnknownItemError
from rcllm.schedule.work import KindLimits
from rcllm.store.memory import MemoryStore
from tests.engine import tiny

FIRST, SECOND, THIRD = tiny.IDS[:3]


@pytest.fixture
def engine() -> Engine:
    return tiny.fresh(store=MemoryStore(1 << 24), items=dict(tiny.catalogue()))


def computed(engine: Engine, request: RankRequest) -> set[str]:
    """The candidates whose blocks were computed for a request."""
    blocks = engine.rank(request).receipt.blocks
    return {str(b.owner) for b in blocks if b.source == "computed" and b.slot is not None}


def test_a_new_text_is_read_at_once_and_it_alone_is_computed(engine: Engine) -> None:
    asked = tiny.request((0, 1, 2))
    before = engine.rank(asked)
    changes = engine.upsert_items([Item(FIRST, {"title": "quite another thing"}), engine.catalogue[SECOND]])
    assert (changes.added, changes.changed, changes.removed, changes.num_same) == ((), (FIRST,), (), 1)
    assert changes.num_blocks >= 1
    assert computed(engine, asked) == {str(FIRST)}
    after = engine.rank(asked)
    assert not np.allclose(after.scores, before.scores)
    anew = tiny.fresh(items={**tiny.catalogue(), FIRST: Item(FIRST, {"title": "quite another thing"})})
    assert np.allclose(after.scores, anew.rank(asked).scores, atol=1e-5)


def test_what_is_volatile_changes_without_computing(engine: Engine) -> None:
    asked = tiny.request((0, 1, 2))
    engine.rank(asked)
    changes = engine.upsert_items([replace(engine.catalogue[FIRST], volatile={"price": "7 or so"})])
    assert (changes.changed, changes.num_same, changes.num_blocks) == ((), 1, 0)
    assert computed(engine, asked) == set()
    assert engine.catalogue[FIRST].volatile == {"price": "7 or so"}


def test_items_come_and_go(engine: Engine) -> None:
    new = ItemId("new")
    changes = engine.upsert_items([Item(new, {"title": "a new thing"})], gone=[SECOND, ItemId("never there")])
    assert (changes.added, changes.removed) == ((new,), (SECOND,))
    assert engine.rank(RankRequest("r", (new, FIRST))).scores[0] != 0.0
    with pytest.raises(UnknownItemError):
        engine.rank(RankRequest("r", (SECOND, FIRST)))


def test_reloading_a_catalogue_computes_only_what_changed(engine: Engine) -> None:
    engine.warm()
    items = [
        Item(FIRST, {"title": "changed"}),
        *(i for i in tiny.catalogue().values() if i.item_id not in (FIRST, THIRD)),
    ]
    changes = engine.reload_items(items)
    assert (changes.added, changes.changed, changes.removed) == ((), (FIRST,), (THIRD,))
    assert changes.num_same == len(items) - 1
    progress = engine.warm()
    assert 0 < progress.computed_tokens <= 2 * len(engine.prompter.texts.event(items[0]).ids) + 8
    with pytest.raises(DataError, match="once"):
        engine.reload_items([items[0], items[0]])
    assert engine.catalogue[FIRST] == items[0], "a list that is wrong changes nothing"


def test_no_answer_that_comes_after_an_update_read_the_old_text(engine: Engine) -> None:
    asked = tiny.request((0, 1, 2, 3))
    old = engine.rank(asked)
    waiting = engine.submit(engine.rank_job, asked)
    assert not waiting.done
    engine.upsert_items([Item(FIRST, {"title": "quite another thing"})])
    assert waiting.done, "what was asked for before is answered before"
    assert waiting.outcome.scores == old.scores  # type: ignore[attr-defined]


def test_a_request_that_is_opened_during_an_update_reads_the_new_text(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, item = tiny.request((0, 1, 2, 3)), Item(FIRST, {"title": "quite another thing"})
    lookup, updated = engine.pool.lookup_many, list[bool]()

    def update_meanwhile(*arguments: object) -> object:
        if not updated:
            updated.append(True)
            engine.upsert_items([item])
        return lookup(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.pool, "lookup_many", update_meanwhile)
    anew = tiny.fresh(items={**tiny.catalogue(), FIRST: item})
    assert np.allclose(engine.rank(asked).scores, anew.rank(asked).scores, atol=1e-5)
    assert updated


def test_a_request_that_is_opened_within_a_change_sees_all_of_it(engine: Engine) -> None:
    """A regression: it read an item's new text beside another item that was already on its way out."""
    tickets = list[Ticket | Refused]()
    asking = threading.Thread(target=lambda: tickets.append(engine.submit(engine.rank_job, tiny.request((0, 1)))))

    class Changing(dict[ItemId, Item]):
        def pop(self, *given: object) -> object:  # type: ignore[override]
            asking.start()
            asking.join(0.3)
            return super().pop(*given)  # type: ignore[call-overload]

    engine.catalogue._items = Changing(engine.catalogue._items)
    engine.upsert_items([Item(FIRST, {"title": "quite another thing"})], gone=[SECOND])
    asking.join()
    assert isinstance(tickets[0].outcome, UnknownItemError)


def test_an_update_does_not_wait_for_idle_time(engine: Engine) -> None:
    """A regression: under steady load there is none, so that it hung. Shadows of a guard are such work."""
    shadow = engine.submit(engine.ranking(engine.admission, "later", KindLimits(idle=True)), tiny.request((0, 1)))
    ranking = engine.submit(engine.rank_job, tiny.request((0, 2)))
    engine.upsert_items([Item(FIRST, {"title": "quite another thing"})])
    assert isinstance(shadow.outcome, CancelledError)
    assert isinstance(ranking.outcome, RankResponse)


def test_updates_of_several_threads_leave_the_last_word(engine: Engine) -> None:
    """Each thread owns an item; rankings run meanwhile, and every thread sees its own last text."""
    wrong = list[str]()

    def update(item_id: ItemId) -> None:
        for n in range(5):
            engine.upsert_items([Item(item_id, {"title": f"{item_id} number {n}"})])
            engine.rank(tiny.request((0, 1, 2, 3)))
            if engine.catalogue[item_id].fields["title"] != f"{item_id} number {n}":
                wrong.append(item_id)

    threads = [threading.Thread(target=update, args=(item_id,)) for item_id in tiny.IDS[:4]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    engine.pool.check()
    tiny_again = tiny.fresh(items=dict(engine.catalogue))
    asked = tiny.request((0, 1, 2, 3))
    assert np.allclose(engine.rank(asked).scores, tiny_again.rank(asked).scores, atol=1e-5)


def test_tenants_share_items_and_never_users(engine: Engine) -> None:
    asked = replace(tiny.request((0, 1), ("my own words", 5), user="u1", level="exact"), tenant="a")
    engine.rank(asked)
    again = engine.rank(asked).receipt
    assert {b.source for b in again.blocks if b.kind == "history"} == {"device"}
    for other in (replace(asked, tenant="b"), replace(asked, tenant="")):
        receipt = engine.rank(other).receipt
        assert {b.source for b in receipt.blocks if b.kind == "history"} == {"fresh"}, "another tenant's user hit"
    blocks = engine.rank(replace(tiny.request((0, 1)), tenant="c")).receipt
    assert engine.rank(replace(tiny.request((0, 1)), tenant="d")).receipt.num_computed == 0
    assert blocks.level == "blocks"


def test_a_user_is_erased_for_one_tenant(engine: Engine) -> None:
    asked = replace(tiny.request((0, 1), ("my own words",), user="u1", level="exact"), tenant="a")
    for tenant in ("a", "b"):
        engine.rank(replace(asked, tenant=tenant))
    assert engine.erase_user(UserId("u1"), "a") > 0
    assert engine.erase_user(UserId("u1"), "a") == 0
    assert engine.erase_user(UserId("u1")) == 0
    assert engine.erase_user(UserId("u1"), "b") > 0
