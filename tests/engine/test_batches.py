"""What else is in a batch, in the cache, or in other threads does not change an answer; nor, where it is promised, does
the order of the candidates. Close, 1e-5 (row counts choose kernels), unless a test says otherwise.
"""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rcllm.core.ranking import Block, Prompt, RankRequest, RankResponse
from rcllm.engine.engine import Engine
from rcllm.errors import answered
from rcllm.store.memory import MemoryStore
from tests.engine import tiny
from tests.engine.opening import RankPrompt

TOLERANCE = 1e-5


def mixed(count: int) -> list[RankRequest]:
    """Requests of all kinds: read-outs, layouts, levels, users, and none of them twice."""
    shapes: itertools.cycle[dict[str, Any]] = itertools.cycle(
        [
            {"level": "blocks"},
            {"level": "linked(4)", "layout": "items_first"},
            {"readout": "pointwise"},
            {"level": "exact", "history": "chain"},
            {"readout": "likelihood", "level": "exact"},
            {"level": "full", "parallel": True},
            {"level": "tail(0.2)", "label_place": "before", "layout": "items_first", "parallel": True},
        ]
    )
    chosen = random.Random(3)
    return [
        tiny.request(
            tuple(chosen.sample(range(60), chosen.randint(1, 9))),
            tuple(chosen.choices(range(60), k=chosen.randint(0, 5))),
            user=f"u{i}",
            name=f"r{i}",
            **shape,
        )
        for i, shape in zip(range(count), shapes)  # noqa: B905 - the shapes repeat for ever
    ]


def assert_same(got: RankResponse, wanted: RankResponse) -> None:
    assert got.request_id == wanted.request_id
    assert got.candidates == wanted.candidates
    assert np.abs(np.array(got.scores) - np.array(wanted.scores)).max() < TOLERANCE


def singly(requests: list[RankRequest], family: str = tiny.NATIVE) -> list[RankResponse]:
    """Each on an engine with an empty cache."""
    return [tiny.fresh(family).rank(request) for request in requests]


def test_a_batch_answers_as_each_request_alone(any_engine: Engine) -> None:
    requests = mixed(14)
    family = tiny.NATIVE if any_engine.decoder.kernels else tiny.TORCH
    batch = answered(any_engine.rank_batch(requests))
    assert {response.receipt.batch_size for response in batch} == {14}
    for got, wanted in zip(batch, singly(requests, family), strict=True):
        assert_same(got, wanted)


def test_a_batch_that_splits_into_parts_answers_the_same() -> None:
    engine = tiny.fresh()
    small = replace(engine.config, cache=replace(engine.config.cache, pass_tokens=300))
    engine = Engine(small, engine.decoder, engine.prompter, engine.pool, engine.model_id)
    requests = mixed(14)
    batch = answered(engine.rank_batch(requests))
    sizes = [response.receipt.batch_size for response in batch]
    assert len(batch) == 14
    assert max(sizes) < 14
    for got, wanted in zip(batch, singly(requests), strict=True):
        assert_same(got, wanted)


def test_a_part_that_evicts_the_chain_planned_for_the_next_is_made_good() -> None:
    """A regression in waiting: the plan said `cached`, and by then it no longer is."""
    requests = mixed(12)
    wanted = singly([replace(r, options=replace(requests[3].options)) for r in requests])  # type: ignore[type-var]
    engine = tiny.fresh(pool_tokens=700)
    chained = [replace(r, options=requests[3].options) for r in requests]
    for _ in range(3):
        for got, expected in zip(answered(engine.rank_batch(chained)), wanted, strict=True):
            assert_same(got, expected)
    engine.pool.check()


def test_the_number_of_compute_threads_does_not_change_an_answer(any_engine: Engine) -> None:
    requests = mixed(7)
    wanted = singly(requests, tiny.NATIVE if any_engine.decoder.kernels else tiny.TORCH)
    torch.set_num_threads(2)
    for got, expected in zip(answered(any_engine.rank_batch(requests)), wanted, strict=True):
        assert_same(got, expected)


def test_an_empty_batch_is_answered() -> None:
    assert tiny.fresh().rank_batch([]) == []


@pytest.mark.parametrize("readout", ["pointwise", "likelihood"])
@pytest.mark.parametrize("level", ["full", "blocks", "linked(3)"])
def test_isolated_candidates_score_the_same_in_any_order_and_list(any_engine: Engine, readout: str, level: str) -> None:
    numbers = (0, 1, 7, 58, 9, 12)
    forward = any_engine.rank(tiny.request(numbers, readout=readout, level=level))
    backward = any_engine.rank(tiny.request(numbers[::-1], readout=readout, level=level))
    alone = [any_engine.rank(tiny.request((n,), readout=readout, level=level)).scores[0] for n in numbers]
    assert np.allclose(forward.scores, backward.scores[::-1], atol=TOLERANCE)
    assert np.allclose(forward.scores, alone, atol=TOLERANCE)


def _moved(prompt: Prompt, slots: list[int]) -> Prompt:
    """The prompt with its candidates' blocks, labels included, listed in another order."""
    own: dict[int, list[int]] = {slot: [i for i, b in enumerate(prompt.blocks) if b.slot == slot] for slot in slots}
    first = min(min(blocks) for blocks in own.values())
    last = max(max(blocks) for blocks in own.values())
    order = [*range(first), *(i for slot in slots for i in own[slot]), *range(last + 1, len(prompt.blocks))]
    blocks: list[Block] = [prompt.blocks[i] for i in order]
    place = {old: new for new, old in enumerate(order)}
    sees = prompt.sees[np.ix_(order, order)]
    return replace(
        prompt, blocks=tuple(blocks), sees=sees, reads=tuple(replace(r, block=place[r.block]) for r in prompt.reads)
    )


@pytest.mark.parametrize("layout", ["history_first", "items_first"])
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("level", ["full", "blocks"])
def test_parallel_labelled_candidates_may_be_listed_in_any_order_if_they_keep_their_labels(
    engine: Engine, layout: str, place: str, level: str
) -> None:
    """What holds under `parallel`: a candidate with its label is a set member. Moving the pair changes no score."""
    asked = tiny.request((0, 1, 7, 9), layout=layout, label_place=place, level=level, parallel=True)
    prompt = engine.prompter.build(asked)
    moved = _moved(prompt, [2, 0, 3, 1])
    scores = [answered(engine.run(RankPrompt(engine, p), [asked]))[0].scores for p in (prompt, moved)]
    assert np.allclose(scores[0], scores[1], atol=TOLERANCE)


def test_labels_belong_to_slots_so_other_labels_are_another_question(engine: Engine) -> None:
    """What does not hold: candidates in another order get other labels, and scores move, `parallel` or not."""
    for parallel in (False, True):
        forward = engine.rank(tiny.request((0, 1, 7, 9), parallel=parallel)).scores
        backward = engine.rank(tiny.request((9, 7, 1, 0), parallel=parallel)).scores[::-1]
        assert not np.allclose(forward, backward, atol=1e-3)


def test_a_slot_under_parallel_hides_its_place_from_its_item(engine: Engine) -> None:
    """exact: what stands between a label and the history does not depend on the slot; only the label tells."""
    orders = ((3, 4, 5), (5, 3, 4), (4, 5, 3))
    blocks = [b for order in orders for b in engine.prompter.build(tiny.request(order, parallel=True)).blocks]
    items = [b for b in blocks if b.kind == "item"]
    assert len(items) == 9
    assert len({(b.owner, b.base, b.token_ids, b.key) for b in items}) == 3


@pytest.mark.parametrize("host", [False, True])
def test_threads_on_a_small_pool_get_the_scores_of_one(host: bool) -> None:
    requests = mixed(40)
    wanted = {response.request_id: response for response in singly(requests)}
    engine = tiny.fresh(pool_tokens=900, store=MemoryStore(1 << 20) if host else None)
    with ThreadPoolExecutor(8) as threads:
        for response in threads.map(engine.rank, requests * 2):
            assert_same(response, wanted[response.request_id])
    assert engine.stats().evictions > 0
    engine.pool.check()
    assert not engine.pool._index._pins
