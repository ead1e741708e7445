"""What is computed ahead of requests: all that fits, block by block, and nothing at the cost of what is there."""

from __future__ import annotations

import pytest

from rcllm.core.ranking import Item, UserId
from rcllm.engine.engine import Engine
from rcllm.engine.warming import WarmProgress, blocks_to_warm
from rcllm.store.memory import MemoryStore
from tests.conftest import assert_no_pins
from tests.engine import tiny


def sizes(engine: Engine) -> list[int]:
    """Tokens of the blocks that a whole catalogue is, in the order in which they are computed."""
    return [len(missing.token_ids) for missing in blocks_to_warm(engine.prompter, engine.config.rank, None)]


def test_a_full_pool_is_filled_to_the_last_block_that_fits() -> None:
    """A regression: a chunk of blocks that did not fit as a whole was given up, down to its first block."""
    whole = tiny.fresh()
    instruction = len(whole.prompter.instructions["history_first"])
    wanted = sizes(whole)
    room = instruction + sum(wanted[:7]) + wanted[7] - 1  # seven blocks and almost an eighth
    engine = tiny.fresh(pool_tokens=room)
    told = list[WarmProgress]()
    last = engine.warm(on_progress=told.append)
    assert (last.done_blocks, last.full) == (7, True)
    assert told[-1] == last
    assert engine.stats().num_blocks == 7 + 1, "and the instruction"
    assert engine.stats().evictions == 0
    assert_no_pins(engine)


def test_warming_again_computes_nothing(engine: Engine) -> None:
    first = engine.warm()
    assert (first.done_blocks, first.full, first.eta_s) == (first.total_blocks, False, 0.0)
    assert first.computed_tokens >= sum(sizes(engine))
    again = engine.warm()
    assert (again.done_blocks, again.computed_tokens) == (again.total_blocks, 0)


def test_requests_that_name_warmed_items_compute_none_of_them(engine: Engine) -> None:
    engine.warm(tiny.IDS[:5])
    receipt = engine.rank(tiny.request(5, (1, 2), level="blocks")).receipt
    assert receipt.num_computed == 0
    assert {block.source for block in receipt.blocks if block.num_reused} == {"device"}


def test_warming_evicts_nothing_that_a_user_left(engine: Engine) -> None:
    engine.rank(tiny.request(3, ("my own words",), level="exact", user="ann"))
    engine.warm()
    assert engine.erase_user(UserId("ann")) > 0


def test_an_item_that_changes_while_others_are_warmed_is_warmed_as_it_reads_then(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A regression: the update removed the old blocks, and the run computed and published them again."""
    monkeypatch.setattr("rcllm.engine.warming._CHUNK_TOKENS", 40)
    kept, gone = tiny.IDS[50:52]
    old = {missing.key for missing in blocks_to_warm(engine.prompter, engine.config.rank, [kept, gone])}
    told = list[WarmProgress]()

    def update(progress: WarmProgress) -> None:
        if not told:
            engine.upsert_items([Item(kept, {"title": "quite another thing"})], gone=[gone])
        told.append(progress)

    last = engine.warm(on_progress=update)
    assert (last.done_blocks, last.full) == (last.total_blocks, False)
    assert not old & engine.pool._blocks.keys()
    new = {missing.key for missing in blocks_to_warm(engine.prompter, engine.config.rank, [kept])}
    assert new <= engine.pool._blocks.keys()


def test_what_does_not_fit_into_the_pool_is_kept_below_it() -> None:
    store = MemoryStore(1 << 24)
    instruction = len(tiny.fresh().prompter.instructions["history_first"])
    engine = tiny.fresh(pool_tokens=instruction + 100, store=store)
    told = engine.warm()
    assert (told.done_blocks, told.full) == (told.total_blocks, False)
    assert engine.stats().evictions == 0
    assert engine.stats().tiers[0].num_blocks >= told.total_blocks
    engine.pool.rates.bytes_of["host"].per_s = 1e12  # blocks of so small a model are sooner computed than read
    receipt = engine.rank(tiny.request(8, (1, 2), level="blocks")).receipt
    assert receipt.num_computed == 0
    assert "host" in {block.source for block in receipt.blocks}
    assert_no_pins(engine)


def test_warming_stops_where_the_tier_below_is_full_too() -> None:
    instruction = len(tiny.fresh().prompter.instructions["history_first"])
    per_token = tiny.fresh().decoder.spec.kv_bytes_per_token(4)
    engine = tiny.fresh(pool_tokens=instruction + 100, store=MemoryStore((instruction + 300) * per_token))
    told = engine.warm()
    assert told.full
    assert 0 < told.done_blocks < told.total_blocks
    assert engine.stats().tiers[0].evictions == 0


def test_an_engine_over_the_store_of_another_computes_nothing_and_answers_the_same() -> None:
    store, asked = MemoryStore(1 << 24), tiny.request(8, (1, 2), level="blocks")
    first = tiny.fresh(store=store)
    first.warm()
    wanted = first.rank(asked)
    second = tiny.fresh(store=store)
    assert second.warm().computed_tokens == 0
    second.pool.rates.bytes_of["host"].per_s = 1e12  # blocks of so small a model are sooner computed than read
    answer = second.rank(asked)
    assert answer.receipt.num_computed == 0
    sources = {block.kind: block.source for block in answer.receipt.blocks if block.num_reused}
    assert sources == {"instruction": "device", "history": "host", "item": "host"}, "warming looks for the first one"
    assert answer.scores == wanted.scores
