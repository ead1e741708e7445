"""Choosing fresh tokens: budgets are spent to the token, on what each policy says, and nowhere else."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcllm.core.ranking import Block, Level, Plan, Policy, Prompt, RankOptions, Selection
from rcllm.core.receipts import BlockKind
from rcllm.reuse.plan import plan
from rcllm.reuse.select import RULES, Signals, Tokens, choose, relative_ranks, window
from tests.reuse.test_plan import CACHED, key, prompts

POLICIES: tuple[Policy, ...] = get_args(Policy)
SHARES = st.one_of(st.sampled_from([0.0, 0.3, 1.0]), st.floats(0, 1))


def draft(prompt: Prompt, chain: set[int]) -> Plan:
    return plan(prompt, Level("corrected", 0.3, 0.3), {key("c", i) for i in chain})


def asking(prompt: Prompt, **selection: object) -> Prompt:
    options = RankOptions(selection=Selection(**selection))  # type: ignore[arg-type]
    return Prompt(prompt.request_id, prompt.blocks, prompt.sees, (), 1, (), options)


def random_signals(num_tokens: int, seed: int) -> Signals:
    rng = np.random.default_rng(seed)
    return Signals(rng.random(num_tokens), rng.random(num_tokens), np.ones(num_tokens), rng.random(num_tokens))


def fresh_tokens(made: Plan) -> list[tuple[int, int]]:
    return [(p.block, token) for p in made.pieces if p.key is None for token in range(p.start, p.stop)]


def spent(prompt: Prompt, before: Plan, made: Plan, kind: BlockKind) -> list[tuple[int, int]]:
    """Tokens of a kind that the choice turned fresh."""
    added = sorted(set(fresh_tokens(made)) - set(fresh_tokens(before)))
    return [(block, token) for block, token in added if prompt.blocks[block].kind is kind]


@pytest.mark.parametrize("policy", POLICIES)
@given(prompts(), CACHED, SHARES, SHARES, st.integers(0, 5), st.integers(0, 99))
def test_budgets_are_spent_to_the_token_and_nowhere_else(
    policy: Policy, prompt: Prompt, chain: set[int], items: float, history: float, size: int, seed: int
) -> None:
    prompt = asking(prompt, policy=policy, window=size)
    before = draft(prompt, chain)
    made = choose(prompt, before, Level("corrected", items, history), random_signals(prompt.num_tokens, seed))
    tiled = [(p.block, token) for p in made.pieces for token in range(p.start, p.stop)]
    assert tiled == [(b, token) for b, block in enumerate(prompt.blocks) for token in range(len(block))]
    assert all(len(piece) and piece.why for piece in made.pieces)
    assert set(fresh_tokens(before)) <= set(fresh_tokens(made)), "nothing that was fresh is read"
    assert made.publish == before.publish
    tokens = Tokens.of(prompt, before)
    inside = window(prompt, tokens, size)
    assert inside.sum() == min(size, (tokens.item | tokens.history).sum())
    isolated = not any(prompt.sees[i, j] for i, b in enumerate(prompt.blocks) if b.kind is BlockKind.ITEM
                       for j, c in enumerate(prompt.blocks) if c.kind is BlockKind.ITEM)  # fmt: skip
    lists = [tokens.item & (tokens.block == i) for i in range(len(prompt.blocks))] if isolated else [tokens.item]
    for kind, share, masks in ((BlockKind.ITEM, items, lists), (BlockKind.HISTORY, history, [tokens.history])):
        wanted = sum(math.ceil(share * (mask & ~inside).sum()) + (mask & inside).sum() for mask in masks)
        assert len(spent(prompt, before, made, kind)) == wanted
    added = set(fresh_tokens(made)) - set(fresh_tokens(before))
    assert {prompt.blocks[block].kind for block, _ in added} <= {BlockKind.ITEM, BlockKind.HISTORY}


@given(prompts(), CACHED)
def test_exact_reuse_is_left_alone(prompt: Prompt, chain: set[int]) -> None:
    """The instruction and a user's cached chain are what a full prefill would give."""
    before = draft(prompt, chain)
    made = choose(asking(prompt, policy="random"), before, Level("corrected", 1.0, 1.0))
    for piece in made.pieces:
        if piece.key is not None:
            block = prompt.blocks[piece.block]
            assert block.kind is BlockKind.INSTRUCTION or piece.key == block.chain_key


def uniform(size: int = 8, **selection: object) -> Prompt:
    """Instruction, four events, five items and a question, of `size` tokens each; all but the question are cached."""
    kinds = [BlockKind.INSTRUCTION] + [BlockKind.HISTORY] * 4 + [BlockKind.ITEM] * 5 + [BlockKind.QUESTION]
    blocks = tuple(
        Block(kind, (i,) * size, i * size, key=None if kind is BlockKind.QUESTION else key("k", i))
        for i, kind in enumerate(kinds)
    )
    sees = np.tri(len(blocks), k=-1, dtype=bool)
    return asking(Prompt("r", blocks, sees, (), 1, (), RankOptions()), **selection)


def chosen(prompt: Prompt, level: Level, signals: Signals | None = None) -> list[tuple[int, int]]:
    before = draft(prompt, set())
    return sorted(set(fresh_tokens(choose(prompt, before, level, signals))) - set(fresh_tokens(before)))


@given(st.floats(0, 1), st.floats(0, 1))
def test_first_spends_evenly_from_the_start_of_each_block(items: float, history: float) -> None:
    per_block: dict[int, list[int]] = {}
    for block, offset in chosen(uniform(policy="first"), Level("corrected", items, history)):
        per_block.setdefault(block, []).append(offset)
    assert all(offsets == list(range(len(offsets))) for offsets in per_block.values())
    for kind in (range(1, 5), range(5, 10)):
        sizes = [len(per_block.get(block, [])) for block in kind]
        assert max(sizes) - min(sizes) <= 1


def test_tail_is_one_run_at_the_end_of_each_kind() -> None:
    assert chosen(uniform(policy="tail"), Level("corrected", 0.25, 0.25)) == (
        [(4, offset) for offset in range(8)] + [(8, 6), (8, 7)] + [(9, offset) for offset in range(8)]
    )


def test_random_depends_on_the_tokens_alone() -> None:
    level = Level("corrected", 0.4, 0.4)
    once = chosen(uniform(policy="random"), level)
    assert once == chosen(replace(uniform(policy="random"), request_id="another"), level)
    moved = uniform(policy="random")
    other = replace(moved, blocks=(replace(moved.blocks[0], token_ids=(99,) * 8), *moved.blocks[1:]))
    assert chosen(other, level) != once


@pytest.mark.parametrize(
    ("policy", "column"),
    [("question", "attention"), ("two_pass", "attention"), ("static", "attention"), ("k_difference", "squared_k")],
)
def test_the_highest_of_one_signal_are_chosen(policy: Policy, column: str) -> None:
    prompt = uniform(policy=policy)
    signals = Signals.zeros(prompt.num_tokens)
    getattr(signals, column)[[9, 20, 45, 78]] = 1.0  # (1, 1), (2, 4), (5, 5), (9, 6)
    assert chosen(prompt, Level("corrected", 2 / 40, 2 / 32), signals) == [(1, 1), (2, 4), (5, 5), (9, 6)]


def test_ties_go_to_the_earlier_token() -> None:
    prompt = uniform(policy="question")
    assert chosen(prompt, Level("corrected", 0, 3 / 32), Signals.zeros(88)) == [(1, 0), (1, 1), (1, 2)]


def rcllm(weight: float, attention: dict[int, float], divergence: dict[int, float], size: float = 1.0) -> list[int]:
    """Which three events' tokens RcLLM's score picks, as places in the prompt; unnamed tokens have a little of both."""
    signals = Signals(np.full(88, 0.01), np.full(88, 0.01), np.full(88, size), np.zeros(88))
    for column, values in ((signals.attention, attention), (signals.divergence, divergence)):
        for place, value in values.items():
            column[place] = value
    prompt = uniform(policy="rcllm", divergence=weight)
    return [block * 8 + offset for block, offset in chosen(prompt, Level("corrected", 0, 3 / 32), signals)]


def test_rcllm_weighs_attention_against_divergence() -> None:
    attention, divergence = {10: 3.0, 11: 2.0, 12: 1.0}, {20: 270.0, 21: 220.0, 22: 110.0}
    assert rcllm(0.0, attention, divergence) == [10, 11, 12]
    assert rcllm(1.0, attention, divergence) == [20, 21, 22]
    assert rcllm(0.3, attention, divergence) == [10, 11, 20]
    assert rcllm(0.5, attention, divergence) == [10, 20, 21], (
        "a hundred times larger, and no more than that on one scale"
    )


def test_rcllm_takes_rounding_for_nothing() -> None:
    """Differences a thousand times smaller than the KV, as 16 bits leave them, do not outweigh attention."""
    attention, rounding = {10: 3.0, 11: 2.0, 12: 1.0}, dict.fromkeys((20, 21, 22), 1.0)
    assert rcllm(0.5, attention, rounding, size=10_000.0) == [10, 11, 12]
    assert rcllm(0.9, attention, rounding) == [20, 21, 22]


def test_rcllm_judges_items_by_attention_alone() -> None:
    prompt = uniform(policy="rcllm", divergence=1.0)
    signals = random_signals(88, 1)
    signals.divergence[40:80] = np.arange(40) * 100
    only = Signals(signals.attention, signals.squared_k, signals.size, signals.squared_k)
    level = Level("corrected", 0.3, 0)
    assert chosen(prompt, level, signals) == chosen(prompt, level, only)
    assert chosen(prompt, level, signals) == chosen(asking(prompt, policy="question"), level, signals)


def test_the_window_is_on_top_of_the_budget() -> None:
    prompt = uniform(policy="first", window=10)
    got = chosen(prompt, Level("corrected", 0, 0))
    assert got == [(8, 6), (8, 7)] + [(9, offset) for offset in range(8)]
    more = chosen(prompt, Level("corrected", 0.5, 0))
    assert set(got) < set(more)
    assert len(more) == 10 + 15


def test_each_isolated_candidate_has_a_window_of_its_own() -> None:
    """Pointwise: two questions, each of which sees its own item."""
    kinds = [BlockKind.INSTRUCTION, BlockKind.ITEM, BlockKind.QUESTION, BlockKind.ITEM, BlockKind.QUESTION]
    blocks = tuple(
        Block(kind, (i,) * 4, 0, key=None if kind is BlockKind.QUESTION else key("k", i))
        for i, kind in enumerate(kinds)
    )
    sees = np.tri(5, k=-1, dtype=bool)
    sees[3:, 1:3] = False
    prompt = asking(Prompt("r", blocks, sees, (), 2, (), RankOptions()), policy="first", window=1)
    assert chosen(prompt, Level("corrected", 0, 0)) == [(1, 3), (3, 3)]


def test_isolated_candidates_have_a_budget_each() -> None:
    prompt = uniform(policy="tail")
    sees = prompt.sees.copy()
    sees[5:10, 5:10] = False
    got = chosen(replace(prompt, sees=sees), Level("corrected", 0.2, 0))
    assert got == [(block, offset) for block in range(5, 10) for offset in (6, 7)]


@given(st.lists(st.floats(0, 1), max_size=9), st.data())
def test_relative_ranks_compare_between_blocks(attention: list[float], data: st.DataObject) -> None:
    ranks = relative_ranks(np.array(attention))
    assert all(0 < rank < 1 for rank in ranks)
    assert len(set(ranks)) == len(ranks)
    for i, j in data.draw(st.permutations([(i, j) for i in range(len(ranks)) for j in range(len(ranks))])):
        assert attention[i] <= attention[j] or ranks[i] > ranks[j]


def test_every_policy_has_a_rule() -> None:
    assert set(RULES) == set(POLICIES)
    assert all(rule.why for rule in RULES.values())
