"""Assembling: what a pass keeps of fresh rows is in as few runs as the prompt allows, and every row is in one."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from rcllm.core.ranking import Level, Prompt, Read
from rcllm.reuse.assemble import Assembled, assemble
from rcllm.reuse.plan import Planned
from tests.reuse.test_plan import CACHED, LEVELS, planned, prompts


def placed(prompt: Prompt) -> Prompt:
    """Its blocks one behind the other."""
    blocks, base = [], 0
    for block in prompt.blocks:
        blocks.append(replace(block, base=base))
        base += len(block)
    return replace(prompt, blocks=tuple(blocks))


def assembled(asked: list[tuple[Prompt, Level, set[int]]]) -> tuple[list[Planned], Assembled]:
    batch = [Planned(prompt, planned(prompt, level, chain)) for prompt, level, chain in asked]
    kv = {p.key: torch.zeros(1, 2, 1, 9, 2) for each in batch for p in each.plan.pieces if p.key is not None}
    return batch, assemble(batch, kv, torch.device("cpu"), [True] * len(batch))


@given(st.lists(st.tuples(prompts().map(placed), LEVELS, CACHED), min_size=1, max_size=3))
def test_runs_hold_every_fresh_row_and_break_only_where_something_is_cached(
    asked: list[tuple[Prompt, Level, set[int]]],
) -> None:
    batch, made = assembled(asked)
    positions, row = made.work.positions.tolist(), 0
    for each, runs in zip(batch, made.fresh, strict=True):
        for run in runs:
            assert run.start == row
            assert positions[run.start : run.stop] == list(range(run.base, run.base + run.stop - run.start))
            row = run.stop
        assert all(before.base + before.stop - before.start < run.base for before, run in pairwise(runs))
        assert sum(run.stop - run.start for run in runs) == each.plan.num_fresh
    assert row == len(positions)


@given(prompts().map(placed))
def test_a_prompt_that_is_computed_whole_is_one_run(prompt: Prompt) -> None:
    _, made = assembled([(prompt, Level("full"), set())])
    assert [(run.start, run.stop, run.base) for run in made.fresh[0]] == [(0, prompt.num_tokens, 0)]


@given(st.lists(st.tuples(prompts().map(placed), LEVELS, CACHED), min_size=1, max_size=3))
def test_rows_are_the_fresh_tokens_one_by_one(asked: list[tuple[Prompt, Level, set[int]]]) -> None:
    """exact, against a list of every row; reads stand in the last block, which is always fresh"""
    asked = [(replace(prompt, reads=reads_of(prompt)), level, chain) for prompt, level, chain in asked]
    batch, made = assembled(asked)
    rows = [
        (number, piece.block, offset)
        for number, each in enumerate(batch)
        for piece in each.plan.pieces
        for offset in range(piece.start, piece.stop)
        if piece.key is None
    ]
    blocks = [batch[number].prompt.blocks[block] for number, block, _ in rows]
    assert made.work.token_ids.tolist() == [b.token_ids[row[2]] for b, row in zip(blocks, rows, strict=True)]
    assert made.work.positions.tolist() == [b.base + row[2] for b, row in zip(blocks, rows, strict=True)]
    for number, (group, read_rows) in enumerate(zip(made.work.groups, made.read_rows, strict=True)):
        own = [(block, offset) for each, block, offset in rows if each == number]
        assert list(zip(group.block.tolist(), group.offset.tolist(), strict=True)) == own
        found = made.work.wanted[torch.from_numpy(read_rows).long()].tolist()
        assert [rows[row] for row in found] == [(number, r.block, r.offset) for r in batch[number].prompt.reads]
    assert len(set(made.work.wanted.tolist())) == len(made.work.wanted), "a row is wanted once"
    kept = [rows[keep.start] for keep in made.work.keep[: made.num_published]]
    assert kept == [(number, index, 0) for number, each in enumerate(batch) for index in each.plan.publish]


def reads_of(prompt: Prompt) -> tuple[Read, ...]:
    """Of the first and the last token of its question, the last of them twice."""
    last = len(prompt.blocks) - 1
    end = len(prompt.blocks[last]) - 1
    return tuple(Read(last, offset, (1,)) for offset in (0, end, end))
