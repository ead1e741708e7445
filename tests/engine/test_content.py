"""What may be cached, for whom, and what a change does: volatile fields, titles, users' own words, erasure."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest

from rcllm.cache.held import Held
from rcllm.cache.lookup import Located, Lookup
from rcllm.cache.pool import Pool
from rcllm.core.decoding import GenerateOptions
from rcllm.core.ranking import ContentKey, Item, ItemId, RankRequest, UserId
from rcllm.core.receipts import BlockKind
from rcllm.core.texts import TextRequest
from rcllm.engine.engine import Engine
from rcllm.engine.jobs.generate import Generator
from rcllm.errors import answered
from rcllm.reuse.missing import user_owner
from rcllm.store.memory import MemoryStore
from rcllm.store.owners import one_name
from tests.engine import tiny

WORDS = ("my secret words", 31)


def keys(engine: Engine, request: RankRequest, kind: BlockKind = BlockKind.ITEM) -> list[ContentKey | None]:
    return [b.key for b in engine.prompter.build(request).blocks if b.kind is kind]


def owned(engine: Engine, user: str) -> list[ContentKey]:
    return engine.pool._index.owned_by([one_name(user_owner(user)) or ""])


@pytest.mark.parametrize("readout", ["label", "pointwise"])
def test_a_price_changes_the_answer_and_no_key(engine: Engine, readout: str) -> None:
    asked = tiny.request((0, 1, 2), readout=readout)
    dear = replace(asked, volatile={tiny.IDS[1]: {"price": "999999.99", "stock": "none"}})
    assert keys(engine, asked) == keys(engine, dear)
    before, after = engine.rank(asked), engine.rank(dear)
    assert before.scores != after.scores
    assert after.receipt.num_computed == 0, "nothing cached was touched"
    assert engine.rank(asked).scores == before.scores


def test_a_price_of_the_request_overrides_the_catalogues(engine: Engine) -> None:
    asked = tiny.request((5, 1))
    same = replace(asked, volatile={tiny.IDS[5]: {"price": "5.99"}})
    assert engine.rank(asked).scores == engine.rank(same).scores
    assert engine.rank(asked).scores != engine.rank(replace(asked, volatile={tiny.IDS[5]: {"price": "1"}})).scores


def test_a_changed_title_is_another_key_and_an_equal_text_the_same() -> None:
    engine = tiny.build()
    asked = tiny.request((0, 1))
    before = keys(engine, asked)
    wanted = engine.rank(asked).scores
    engine.catalogue.put([Item(tiny.IDS[0], {"title": "another thing"})])
    changed = keys(engine, asked)
    assert changed[0] != before[0]
    assert changed[1] == before[1]
    assert engine.rank(asked).scores != wanted
    engine.catalogue.put([replace(tiny.catalogue()[tiny.IDS[1]], item_id=ItemId("copy"))])
    copy = keys(engine, replace(asked, candidates=(ItemId("copy"),)))
    assert copy == [before[1]], "the content is the key, not the id"


def test_a_users_own_words_have_no_shared_key_and_the_history_around_them_has(engine: Engine) -> None:
    one, other, nobody = (
        engine.prompter.build(tiny.request(3, WORDS, user=user)).blocks[1:3] for user in ("u1", "u2", None)
    )
    assert [b.private for b in one] == [True, False]
    assert one[0].key is not None
    assert one[0].key != other[0].key
    assert nobody[0].key is None, "without a user nobody could erase it"
    assert one[1].key == other[1].key == nobody[1].key is not None
    assert not {b.chain_key for b in one} & {b.chain_key for b in other}
    assert all(b.chain_key is None for b in nobody)
    chained = engine.prompter.build(tiny.request(3, WORDS, history="chain")).blocks[1:3]
    assert all(b.key is None for b in chained)


def test_anothers_own_words_are_never_read_though_they_are_the_same(engine: Engine) -> None:
    """The same words of two users are computed twice, and each is erased with its own."""
    asked = tiny.request(3, WORDS)
    engine.rank(asked)
    other = engine.rank(replace(asked, user_id=UserId("u2")))
    sources = [b.source for b in other.receipt.blocks if b.kind is BlockKind.HISTORY]
    assert sources == ["computed", "device"], "own words, and an event of the catalogue"
    assert len(owned(engine, "u1")) == len(owned(engine, "u2")) == 1
    item = ItemId("u1")  # an item of the user's name is another owner
    engine.catalogue.put([replace(tiny.catalogue()[tiny.IDS[7]], item_id=item)])
    engine.rank(tiny.request(1, (30,)))
    engine.rank(replace(tiny.request(1), candidates=(item,)))
    assert engine.erase_user(UserId("u1")) == 1
    engine.catalogue.put([], gone=[item])


def keys_of_chain(engine: Engine, request: RankRequest) -> list[ContentKey | None]:
    return [b.chain_key for b in engine.prompter.build(request).blocks if b.kind is BlockKind.HISTORY]


def test_names_of_users_cannot_be_chosen_to_meet_anothers_key(engine: Engine) -> None:
    """A regression: names were joined to token ids by a zero byte, and the empty name was the name of nobody."""
    ids = engine.prompter.event(tiny.request(1, ("abc",)).history[0]).ids
    forged = "u1\0" + np.asarray(ids[:1], "<i4").tobytes()[:-1].decode("latin-1")
    a = engine.prompter
    shared = {b.key for b in a.build(tiny.request(1, (30,), user="")).blocks}
    assert not shared & {b.chain_key for b in a.build(tiny.request(1, (30,), user="")).blocks[1:] if b.chain_key}
    assert keys_of_chain(engine, tiny.request(1, ("abc",))) != keys_of_chain(
        engine, tiny.request(1, ("abc",), user=forged)
    )


@pytest.mark.parametrize("events", [WORDS, (30, 31, 32)])
def test_users_never_share_a_chain(engine: Engine, events: tuple[int | str, ...]) -> None:
    asked = tiny.request(3, events, level="exact")
    first = engine.rank(asked)
    other = engine.rank(replace(asked, user_id=UserId("u2")))
    assert other.scores == first.scores
    assert all(b.source == "fresh" for b in other.receipt.blocks if b.kind is BlockKind.HISTORY)
    nobody = engine.rank(replace(asked, user_id=None))
    assert all(b.source == "fresh" for b in nobody.receipt.blocks if b.kind is BlockKind.HISTORY)
    assert len(owned(engine, "u1")) == len(owned(engine, "u2")) == len(events)


@pytest.mark.parametrize(
    ("level", "history", "num_blocks"),
    [
        ("exact", "shared", 2),
        ("exact", "chain", 2),
        ("blocks", "chain", 2),
        ("blocks", "shared", 1),
        ("linked(3)", "shared", 1),
        ("corrected(.3,.3)", "shared", 1),
        ("corrected(.3,.3)", "chain", 2),
    ],
)
def test_an_erased_user_is_gone_and_served_again(engine: Engine, level: str, history: str, num_blocks: int) -> None:
    """In a chain every event is the user's; position-free, only what is in the user's own words."""
    asked = tiny.request(3, WORDS, level=level, history=history)
    first = engine.rank(asked)
    engine.rank(replace(asked, user_id=UserId("u2")))
    assert len(owned(engine, "u1")) == num_blocks
    assert engine.erase_user(UserId("u1")) == num_blocks
    assert not owned(engine, "u1")
    assert len(owned(engine, "u2")) == num_blocks
    again = engine.rank(asked)
    sources = [b.source for b in again.receipt.blocks if b.kind is BlockKind.HISTORY]
    assert sources == (["fresh"] * 2 if num_blocks == 2 else ["computed", "device"])
    assert np.allclose(again.scores, first.scores, atol=1e-5)
    assert engine.erase_user(UserId("nobody")) == 0


def test_erasing_reaches_the_tier_below() -> None:
    engine = tiny.fresh(pool_tokens=200, store=MemoryStore(1 << 24))
    for user in ("u1", "u2"):
        engine.rank(tiny.request(3, WORDS, level="exact", user=user))
    for start in range(10, 30, 4):
        engine.rank(tiny.request(tuple(range(start, start + 4)), (40, 41), user=None))
    chain = keys_of_chain(engine, tiny.request(3, WORDS))
    assert engine.pool.store.lookup_many([k for k in chain if k]), "the case this test is about"
    assert engine.erase_user(UserId("u1")) >= len(WORDS)
    assert not any(key in engine.pool.lookup_many([key]) for key in chain if key)


class _Forgetful(Pool):
    """Says that it has whatever it is asked for."""

    def lookup_many(self, keys: Iterable[ContentKey]) -> Lookup:
        return Lookup({key: Located("device", 1, 0.0) for key in keys})

    def refreshed(self, lookup: Lookup, keys: Iterable[ContentKey]) -> Lookup:
        return self.lookup_many(keys)


def test_a_chain_that_is_gone_after_planning_is_recomputed_for_its_user_alone() -> None:
    """A regression: the tokens before it, the user's own, were cached without an owner, out of reach of erasure."""
    engine = tiny.fresh()
    asked = tiny.request(3, WORDS, level="exact")
    wanted = engine.rank(asked).scores
    forgetful = _Forgetful(1 << 24, engine.pool.dtype, engine.pool.device)
    engine = Engine(engine.config, engine.decoder, engine.prompter, forgetful, engine.model_id)
    response = engine.rank(asked)
    assert np.allclose(response.scores, wanted, atol=1e-4)
    assert [b.source for b in response.receipt.blocks if b.kind is BlockKind.HISTORY] == ["computed"] * 2
    engine.erase_user(UserId("u1"))
    lengths = {kv.kv.shape[3] for kv in engine.pool._blocks.values()}
    assert lengths == {len(engine.prompter.instructions["history_first"])}, "only the instruction is left"


def test_a_prompt_that_begins_with_a_users_words_is_recomputed_for_that_user_alone() -> None:
    """A regression: its first part was taken for an instruction, and cached for everybody, out of reach of erasure."""
    made = tiny.fresh()
    forgetful = _Forgetful(1 << 24, made.pool.dtype, made.pool.device)
    engine = Engine(made.config, made.decoder, made.prompter, forgetful, made.model_id)
    parts = ((5, 6, 7), (8, 9), (10,))
    for user in ("u1", "u2"):
        asked = TextRequest("t", user_id=UserId(user), options=GenerateOptions(max_tokens=2), parts=parts)
        answered(Generator(engine).generate([asked]))
    assert len(owned(engine, "u1")) == len(owned(engine, "u2")) == 3, "two parts, and what stands before the second"
    engine.erase_user(UserId("u1"))
    assert set(engine.pool._blocks) == set(owned(engine, "u2"))


def test_erasing_waits_for_a_request_that_is_about_to_publish(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A regression: a batch that ended after `erase_user` returned left the user's blocks behind."""
    eraser = threading.Thread(target=engine.erase_user, args=("u1",))
    publish = Held.publish

    def erase_first(self: Held, *arguments: object) -> None:
        if not eraser.ident:
            eraser.start()
            eraser.join(timeout=0.3)
        publish(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Held, "publish", erase_first)
    engine.rank(tiny.request(3, WORDS, level="exact"))
    eraser.join(timeout=30)
    assert not owned(engine, "u1")


def test_a_retired_item_is_gone(engine: Engine) -> None:
    engine.rank(tiny.request((0, 1), (30,)))
    assert engine.retire_item(tiny.IDS[0]) == 1
    assert engine.retire_item(tiny.IDS[0]) == 0
    receipt = engine.rank(tiny.request((0, 1), (30,))).receipt
    assert [b.source for b in receipt.blocks if b.kind is BlockKind.ITEM] == ["computed", "device"]


def test_an_item_and_a_user_of_one_name_are_two_owners(engine: Engine) -> None:
    engine.rank(tiny.request((0,), WORDS, user="i0", level="exact"))
    engine.rank(tiny.request((0,), ()))
    assert engine.erase_user(UserId("i0")) == 2
    assert engine.retire_item(ItemId("i0")) == 1


def test_a_users_words_leave_no_copy() -> None:
    engine = tiny.build()
    engine.rank(tiny.request(3, ("my own words",)))
    kept = [text for text, _ in engine.prompter.texts._remembered._known]
    assert sum("lamp" in text or "kettle" in text for text in kept) == 2, "candidates are"
    assert not any("my own words" in text for text in kept)
