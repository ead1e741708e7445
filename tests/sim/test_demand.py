"""Token counts by level: by hand, and against the plan that the engine makes of the same prompt."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcllm.core.ranking import Block, ContentKey, Prompt
from rcllm.core.receipts import BlockKind
from rcllm.core.requests import Level, RankOptions
from rcllm.reuse.plan import plan
from rcllm.sim.demand import Reuse, There, Tokens, demand
from tests.sim.small import KV_BYTES, MODEL

TOKENS = Tokens(instruction=200, history=400, items=(100, 100, 100, 100), fresh=50)
ALL = There(hit_tokens=400, missing=(), history=True)
NONE = There(hit_tokens=0, missing=(100,) * 4, history=False)


def fresh(level: str, there: There, **changed: bool) -> tuple[int, int]:
    """Fresh tokens, and tokens of blocks that are built."""
    found = demand(TOKENS, there, Reuse(Level.parse(level), **changed), MODEL, KV_BYTES)
    return found.num_fresh, found.num_built


def test_by_hand() -> None:
    assert fresh("full", ALL) == (1050, 0)
    assert fresh("exact", ALL) == (1050 - 600, 0)
    assert fresh("exact", NONE) == (1050 - 200, 0), "without the user's own KV the prefix is the instruction"
    assert fresh("blocks", ALL) == (50, 0)
    assert fresh("blocks", NONE) == (50 + 400, 400), "items are built as blocks, the history is fresh"
    assert fresh("blocks", NONE, inline_misses=True) == (50 + 400 + 400, 0)
    assert fresh("linked(16)", ALL) == (50 + 4 * 16, 0)
    assert fresh("tail(0.3)", ALL) == (50 + 120, 0)
    assert fresh("corrected(0.3, 0.2)", ALL) == (50 + 120 + 80, 0)


def test_rcllm_as_it_describes_itself() -> None:
    """Instruction and fresh fields always, 30 % of what is reused, misses whole."""
    there = There(hit_tokens=300, missing=(100,), history=False)
    found = demand(TOKENS, there, Reuse.rcllm_paper(0.3, 0.3), MODEL, KV_BYTES)
    assert found.num_fresh == 50 + 200 + 90 + 100 + 120
    assert found.max_rows == TOKENS.total, "layer 0 runs for all tokens"
    layers = MODEL.num_layers
    assert found.shape.rows == pytest.approx((1050 + (layers - 1) * 560) / layers)
    assert found.shape.copied_bytes == (300 + 400) * KV_BYTES


def test_structure_of_a_history_is_fresh_and_so_is_the_window() -> None:
    plain, marked = (
        demand(TOKENS, ALL, Reuse.rcllm_paper(0.3, 0.3, structure_share=share, window=window), MODEL, KV_BYTES)
        for share, window in ((0.0, 0), (0.5, 64))
    )
    assert marked.num_fresh - plain.num_fresh == 200 + 60 - 120 + 64


def test_a_full_prefill_has_causal_pairs() -> None:
    found = demand(TOKENS, NONE, Reuse(Level("full")), MODEL, KV_BYTES)
    assert (found.shape.rows, found.shape.pairs, found.shape.kv_bytes) == (1050, 1050 * 1051 / 2, 0)


@pytest.mark.parametrize("level", ["exact", "corrected(0.3, 0.3)", "linked(16)", "tail(0.1)", "blocks"])
def test_more_misses_cost_more(level: str) -> None:
    reuse = Reuse(Level.parse(level), semantic_history=True)
    rows = [
        demand(TOKENS, There(400 - 100 * n, (100,) * n, False), reuse, MODEL, KV_BYTES).shape.rows for n in range(5)
    ]
    assert rows == sorted(rows)
    assert (rows[0] < rows[4]) == reuse.reads_items


def test_saved_tokens_are_what_a_hit_saves() -> None:
    """The router is told the same saving that the pass then has; materialised blocks are computed wholly."""
    for level in ("full", "exact", "corrected(0.3, 0.3)", "linked(16)", "blocks"):
        for inline in (False, True):
            reuse = Reuse(Level.parse(level), semantic_history=True, inline_misses=inline)
            hit, miss = (
                demand(TOKENS, There(400 - 100 * n, (100,) * n, False), reuse, MODEL, KV_BYTES) for n in (0, 1)
            )
            saved = miss.num_fresh + miss.num_built - hit.num_fresh - hit.num_built
            assert reuse.saved_tokens(100) == saved, (level, inline)


# ---- against the engine's plan --------------------------------------------------------------------------------------


def prompt(tokens: Tokens) -> Prompt:
    """The engine's prompt of the same sizes: instruction, history, items, question."""
    kinds = [(BlockKind.INSTRUCTION, tokens.instruction), (BlockKind.HISTORY, tokens.history)]
    kinds += [(BlockKind.ITEM, size) for size in tokens.items] + [(BlockKind.QUESTION, tokens.fresh)]
    blocks, base = [], 0
    for number, (kind, size) in enumerate(kinds):
        key = None if kind is BlockKind.QUESTION else ContentKey(b"%d" % number)
        chain = ContentKey(b"chain %d" % number) if kind is not BlockKind.QUESTION else None
        blocks.append(Block(kind, (0,) * size, base, key=key, chain_key=chain))
        base += size
    sees = np.tril(np.ones((len(blocks), len(blocks)), dtype=np.bool_))
    return Prompt("r", tuple(blocks), sees, (), len(tokens.items), (), RankOptions())


@settings(max_examples=50, deadline=None)
@given(
    st.builds(
        Tokens,
        st.integers(1, 300),
        st.integers(1, 500),
        st.lists(st.integers(1, 200), min_size=1, max_size=8).map(tuple),
        st.integers(1, 80),
    ),
    st.sampled_from(["full", "exact", "blocks"]),
)
def test_fresh_tokens_are_those_of_the_engine(tokens: Tokens, level: str) -> None:
    found = [ContentKey(b"chain 1")]
    planned = plan(prompt(tokens), Level.parse(level), found)
    there = There(sum(tokens.items), (), history=True)
    assert demand(tokens, there, Reuse(Level.parse(level)), MODEL, KV_BYTES).num_fresh == planned.num_fresh


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=8).map(tuple), st.integers(0, 64), st.floats(0, 1))
def test_budgets_spend_what_the_engine_spends(items: tuple[int, ...], k: int, share: float) -> None:
    """Without a history, whose share of a `linked` or `tail` budget depends on how its events are cut."""
    tokens = Tokens(50, 0, items, 20)
    there = There(sum(items), (), history=True)
    for level in (Level("linked", k), Level("tail", share)):
        planned = plan(prompt(tokens), level, ())
        counted = demand(tokens, there, Reuse(level), MODEL, KV_BYTES).num_fresh
        assert counted == planned.num_fresh
