"""Plans: pieces tile the prompt, levels spend what they say, and only what is exact is kept."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from rcllm.core.ranking import Block, ContentKey, Level, Plan, Prompt, RankOptions
from rcllm.core.receipts import BlockKind
from rcllm.reuse.plan import plan

LEVELS = st.one_of(
    st.sampled_from(["full", "exact", "blocks", "linked(0)", "linked(10000)", "tail(0)", "tail(1.0)"]).map(Level.parse),
    st.integers(0, 12).map(lambda k: Level("linked", k)),
    st.floats(0, 1).map(lambda share: Level("tail", share)),
)


def key(name: str, number: int) -> ContentKey:
    return ContentKey(f"{name}{number}".encode())


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    """Instruction, history (each event with or without a canonical key, chained or not), labelled items, question."""
    chained = draw(st.booleans())
    sizes = st.integers(0, 9)
    blocks = [Block(BlockKind.INSTRUCTION, (1,) * draw(st.integers(1, 9)), 0, key=key("k", 0), chain_key=key("k", 0))]
    for i, shared in enumerate(draw(st.lists(st.booleans(), max_size=4)), 1):
        own, chain = key("k", i) if shared else None, key("c", i) if chained else None
        blocks.append(Block(BlockKind.HISTORY, (2,) * draw(st.integers(1, 9)), 0, key=own, chain_key=chain))
    for slot in range(draw(st.integers(1, 5))):
        blocks.append(Block(BlockKind.ITEM, (3,) * draw(sizes), 0, f"i{slot}", key("i", slot), slot=slot))
        blocks.append(Block(BlockKind.LABEL, (4,) * draw(sizes), 0, slot=slot))
    blocks.append(Block(BlockKind.QUESTION, (5,) * draw(st.integers(1, 9)), 0))
    sees = np.tri(len(blocks), k=-1, dtype=bool)
    return Prompt("r", tuple(blocks), sees, (), 1, (), RankOptions())


CACHED = st.sets(st.integers(1, 4))


def planned(prompt: Prompt, level: Level, chain: set[int]) -> Plan:
    return plan(prompt, level, {key("c", i) for i in chain})


@given(prompts(), LEVELS, CACHED)
def test_pieces_tile_every_block_in_order(prompt: Prompt, level: Level, chain: set[int]) -> None:
    made = planned(prompt, level, chain)
    tiled = [(p.block, token) for p in made.pieces for token in range(p.start, p.stop)]
    assert tiled == [(b, token) for b, block in enumerate(prompt.blocks) for token in range(len(block))]
    assert made.num_fresh + made.num_reused == prompt.num_tokens
    assert all(len(piece) > 0 and piece.why for piece in made.pieces)
    assert all(p.key in (None, prompt.blocks[p.block].key, prompt.blocks[p.block].chain_key) for p in made.pieces)


@given(prompts(), LEVELS, CACHED)
def test_labels_and_questions_are_always_fresh(prompt: Prompt, level: Level, chain: set[int]) -> None:
    for piece in planned(prompt, level, chain).pieces:
        if prompt.blocks[piece.block].kind in (BlockKind.LABEL, BlockKind.QUESTION):
            assert piece.key is None


@given(prompts(), LEVELS, CACHED)
def test_only_fresh_history_with_an_exact_past_is_published(prompt: Prompt, level: Level, chain: set[int]) -> None:
    made = planned(prompt, level, chain)
    fresh = {p.block for p in made.pieces if p.key is None}
    inexact = [p.block for p in made.pieces if p.key is not None and p.key != prompt.blocks[p.block].chain_key]
    for index in made.publish:
        assert prompt.blocks[index].chain_key is not None
        assert index in fresh
        assert all(index < block for block in inexact), "nothing approximate is under an exact key"
        assert index not in {p.block for p in made.pieces if p.key is not None}
    if level.name == "full":
        assert made.publish == ()


@given(prompts(), CACHED)
def test_full_reuses_nothing_and_exact_the_cached_prefix(prompt: Prompt, chain: set[int]) -> None:
    assert planned(prompt, Level("full"), chain).num_reused == 0
    prefix = len(prompt.blocks[0])
    for i, block in enumerate(prompt.blocks[1:], 1):
        if block.chain_key is None or i not in chain:
            break
        prefix += len(block)
    assert planned(prompt, Level("exact"), chain).num_reused == prefix


def approximate(prompt: Prompt) -> list[int]:
    """Sizes of the blocks that have a canonical KV, the instruction's exact one aside."""
    return [len(block) for block in prompt.blocks[1:] if block.key is not None]


@given(prompts(), st.integers(0, 12), CACHED)
def test_linked_makes_the_first_k_tokens_of_each_reused_block_fresh(prompt: Prompt, k: int, chain: set[int]) -> None:
    blocks, linked = planned(prompt, Level("blocks"), chain), planned(prompt, Level("linked", k), chain)
    assert linked.num_fresh - blocks.num_fresh == sum(min(k, size) for size in approximate(prompt))
    for piece in linked.pieces:
        if prompt.blocks[piece.block].key is not None and piece.block > 0:
            assert (piece.key is None) == (
                piece.start == 0 and piece.stop == min(k, len(prompt.blocks[piece.block])) > 0
            )


@given(prompts(), st.floats(0, 1), CACHED)
def test_tail_makes_the_last_share_of_the_reused_tokens_fresh(prompt: Prompt, share: float, chain: set[int]) -> None:
    assume(sum(block.kind is BlockKind.ITEM for block in prompt.blocks) > 1)  # a single one sees no other
    blocks, tail = planned(prompt, Level("blocks"), chain), planned(prompt, Level("tail", share), chain)
    assert tail.num_fresh - blocks.num_fresh == math.ceil(share * sum(approximate(prompt)))
    reused = [
        (p.block, p.start) for p in tail.pieces if p.key == prompt.blocks[p.block].key is not None and p.block > 0
    ]
    spent = [
        (p.block, p.start) for p in tail.pieces if p.key is None and prompt.blocks[p.block].key is not None and p.block
    ]
    assert not reused or not spent or max(reused) < min(spent), "one contiguous run at the end"


@given(prompts(), st.floats(0, 1), CACHED)
def test_isolated_candidates_have_a_tail_each(prompt: Prompt, share: float, chain: set[int]) -> None:
    prompt = replace(prompt, sees=np.zeros_like(prompt.sees))
    tail = planned(prompt, Level("tail", share), chain)
    for i, block in enumerate(prompt.blocks):
        if block.kind is BlockKind.ITEM:
            fresh = [p for p in tail.pieces if p.block == i and p.key is None]
            assert sum(map(len, fresh)) == math.ceil(share * len(block))
            assert all(piece.stop == len(block) for piece in fresh)


@given(prompts(), CACHED)
def test_blocks_reuses_all_that_can_be(prompt: Prompt, chain: set[int]) -> None:
    made = planned(prompt, Level("blocks"), chain)
    assert made.num_reused >= len(prompt.blocks[0]) + sum(approximate(prompt))


@given(prompts(), LEVELS, CACHED)
def test_what_is_cached_does_not_change_what_shared_blocks_are_read(
    prompt: Prompt, level: Level, chain: set[int]
) -> None:
    """A regression: at `blocks` the user's cached chain took the place of shared events, and changed the answer."""
    if level.name != "exact" and all(b.key for b in prompt.blocks if b.kind is BlockKind.HISTORY):
        assert planned(prompt, level, chain).pieces == planned(prompt, level, set()).pieces


@given(prompts(), LEVELS, CACHED)
def test_planning_is_pure(prompt: Prompt, level: Level, chain: set[int]) -> None:
    assert planned(prompt, level, chain) == planned(replace(prompt), level, set(chain))


def test_what_decides_imports_no_torch() -> None:
    modules = (
        "rcllm.reuse.plan, rcllm.reuse.select, rcllm.prompt.blocks, rcllm.store.index, rcllm.core.ranking, rcllm.config"
    )
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
