"""Blocks that a slow tier has are computed, and a receipt says so; those of a fast one are read."""

from __future__ import annotations

from rcllm.core.ranking import Item
from rcllm.engine.engine import Engine
from rcllm.store.memory import MemoryStore
from tests.engine import tiny

ASKED = tiny.request(6, (1, 2), level="blocks")


def over(bytes_per_s: float) -> Engine:
    """An engine over a store that another one has filled, which believes the store to be so fast."""
    store = MemoryStore(1 << 24)
    tiny.fresh(store=store).warm()
    engine = tiny.fresh(store=store)
    engine.pool.rates.bytes_of["host"].per_s = bytes_per_s
    return engine


def test_a_tier_that_is_slower_than_computing_is_passed_over() -> None:
    slow, fast = over(1.0), over(1e12)
    computed, read = slow.rank(ASKED), fast.rank(ASKED)
    assert {block.source for block in computed.receipt.blocks} == {"computed", "fresh"}
    assert {block.source for block in read.receipt.blocks} == {"host", "fresh"}
    assert computed.scores == read.scores
    assert any("sooner computed than read" in note for note in computed.receipt.notes)
    assert not any("sooner computed than read" in note for note in read.receipt.notes)
    assert slow.pool.rates.bytes_of["host"].per_s > 1.0, "it may have become faster unseen"


def test_both_rates_are_learned() -> None:
    engine = over(1e12)
    engine.rank(ASKED)
    engine.rank(tiny.request((40, 41), ("my own words",), level="exact"))
    rates = engine.pool.rates
    assert rates.bytes_of["host"].timed_s > 0
    assert rates.flops.timed_s == 0, "nothing was missing so far"
    engine.upsert_items([Item(tiny.IDS[0], {"title": "another thing"})])
    engine.rank(ASKED)
    assert rates.flops.timed_s > 0
