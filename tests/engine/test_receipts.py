"""Receipts add up, and say where each block came from."""

from __future__ import annotations

import itertools

import pytest

from rcllm.core.receipts import BlockKind
from rcllm.engine.engine import Engine
from rcllm.store.memory import MemoryStore
from tests.engine import tiny

STAGES = {
    "prompt",
    "lookup",
    "wait",
    "plan",
    "materialise",
    "select",
    "assemble",
    "forward",
    "readout",
    "publish",
    "total",
}


@pytest.mark.parametrize("level", ["full", "exact", "linked(3)", "tail(0.3)", "blocks"])
@pytest.mark.parametrize(
    ("readout", "layout"),
    [
        ("label", "history_first"),
        ("label", "items_first"),
        ("pointwise", "history_first"),
        ("likelihood", "history_first"),
    ],
)
def test_tokens_add_up_in_the_prompt_and_in_every_block(engine: Engine, level: str, readout: str, layout: str) -> None:
    """exact; the first time, on an empty cache, and the second"""
    asked = tiny.request((0, 1, 59), level=level, readout=readout, layout=layout)
    prompt = engine.prompter.build(asked)
    for run, receipt in enumerate(engine.rank(asked).receipt for _ in range(2)):
        assert receipt.num_fresh + receipt.num_reused == receipt.num_tokens == prompt.num_tokens
        assert [b.num_fresh + b.num_reused for b in receipt.blocks] == [len(b) for b in prompt.blocks]
        assert sum(b.num_fresh for b in receipt.blocks) == receipt.num_fresh
        assert receipt.stage_ms.keys() == STAGES
        assert all(ms >= 0 for ms in receipt.stage_ms.values())
        assert sum(ms for name, ms in receipt.stage_ms.items() if name != "total") <= receipt.stage_ms["total"]
        per_token = engine.decoder.spec.kv_bytes_per_token(4)
        assert receipt.kv_bytes_read == receipt.num_reused * per_token
        assert (receipt.num_computed == 0) == (level == "full" or run == 1)
        assert (receipt.level, receipt.readout, receipt.layout) == (level, readout, layout)
        for block in receipt.blocks:
            assert block.why
            assert (block.key is None) == (block.num_reused == 0) == (block.source == "fresh")
            assert block.source in (("fresh",), ("fresh", "device"))[run] or block.source == "computed"
    assert receipt.model == engine.model_id
    assert receipt.batch_size == 1
    assert receipt.context == "instruction"


def test_num_computed_counts_what_went_through_the_layers(engine: Engine) -> None:
    receipt = engine.rank(tiny.request((0, 1))).receipt
    assert receipt.num_computed == receipt.num_reused, "each reused block was missing, and computed once"
    warm = engine.rank(tiny.request((1, 0))).receipt
    assert warm.num_computed == 0
    assert {b.source for b in warm.blocks} == {"device", "fresh"}


def test_sources_name_the_tier() -> None:
    spilling = tiny.fresh(pool_tokens=130, store=MemoryStore(1 << 24))
    first, second = tiny.request((0, 1, 2, 3)), tiny.request((10, 11, 12, 13), (40, 41))
    spilling.rank(first)
    spilling.rank(second)
    again = spilling.rank(first).receipt
    assert "host" in {b.source for b in again.blocks}
    assert again.num_computed == 0
    assert again.kv_bytes_copied == 0
    spilling.pool.check()


def test_chains_are_named(engine: Engine) -> None:
    asked = tiny.request(level="exact")
    cold, warm = (engine.rank(asked).receipt for _ in range(2))
    for receipt, source in ((cold, "fresh"), (warm, "device")):
        assert [b.source for b in receipt.blocks if b.kind is BlockKind.HISTORY] == [source] * 3
    longer = engine.rank(tiny.request(5, (30, 31, 32, 33), level="exact")).receipt
    assert [b.source for b in longer.blocks if b.kind is BlockKind.HISTORY] == ["device"] * 3 + ["fresh"]
    shorter = engine.rank(tiny.request(5, (31, 32, 33), level="exact")).receipt
    assert [b.source for b in shorter.blocks if b.kind is BlockKind.HISTORY] == ["fresh"] * 3


def test_cut_text_is_noted(engine: Engine) -> None:
    response = engine.rank(tiny.request((59, 0), ("so many words " * 40,)))
    assert response.receipt.notes == (
        "1 of 1 events cut to 24 tokens: own words",
        "1 of 2 candidates cut to 40 tokens: i59",
    )


def test_the_ranking_is_by_score(engine: Engine) -> None:
    response = engine.rank(tiny.request(9))
    ranked = [response.scores[i] for i in response.order]
    assert all(a >= b for a, b in itertools.pairwise(ranked))
    assert response.ranking == tuple(response.candidates[i] for i in response.order)
    assert sorted(response.order) == list(range(9))
