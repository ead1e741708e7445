"""The position-bias probe: nothing where there is nothing, and a planted preference found with its size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rcllm.core.ranking import RankRequest, RankResponse
from rcllm.engine.engine import Engine
from rcllm.errors import RequestError
from rcllm.fidelity.position import latin_orders, position_bias
from tests.engine import tiny

SLOT_GAIN = 0.7


def asked(count: int = 3, candidates: int = 6, **options: Any) -> list[RankRequest]:
    return [
        tiny.request(tuple(range(i, i + candidates)), (30 + i, 40 + i), user=None, name=f"r{i}", **options)
        for i in range(count)
    ]


class Planted:
    """An engine whose scores are the item's number and `gain` for standing in the first slot."""

    def __init__(self, engine: Engine, gain: float, worth: float = 1.0) -> None:
        self.engine, self.gain, self.worth = engine, gain, worth

    def rank_batch(self, requests: Sequence[RankRequest]) -> list[RankResponse]:
        return [
            replace(response, scores=tuple(self.score(response, slot) for slot in range(len(response.scores))))
            for response in self.engine.rank_batch(requests)
        ]

    def score(self, response: RankResponse, slot: int) -> float:
        return self.worth * float(response.candidates[slot][1:]) + self.gain * (slot == 0)


@pytest.mark.parametrize(("num_items", "permutations"), [(2, 1), (2, 5), (7, 6), (7, 20), (10, 4)])
def test_orders_are_latin(num_items: int, permutations: int) -> None:
    orders = latin_orders(num_items, permutations, np.random.default_rng(0))
    assert orders.shape == (permutations + 1, num_items)
    assert orders[0].tolist() == list(range(num_items))
    assert (np.sort(orders, axis=1) == np.arange(num_items)).all()
    square = orders[:num_items]  # the first one; none of its items stands twice in one slot
    assert all(len(set(column)) == len(square) for column in square.T.tolist())


def test_orders_follow_the_seed() -> None:
    first, again, other = (latin_orders(9, 5, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("readout", ["pointwise", "likelihood"])
@pytest.mark.parametrize("level", ["blocks", "full"])
def test_isolated_candidates_have_no_position(any_engine: Engine, readout: str, level: str) -> None:
    """exact, up to rounding in fp32"""
    found = position_bias(any_engine, asked(readout=readout, level=level), permutations=4)
    assert found.between_variance > 1e-3, "items differ, or there would be nothing to see"
    assert found.within_variance < 1e-8
    assert found.order_share < 1e-6
    assert (found.tau, found.top1) == (pytest.approx(1.0), 1.0)
    assert all(abs(slot.mean) < 1e-4 for slot in found.slots)


def test_labels_name_slots(engine: Engine) -> None:
    """Random models prefer some letters: the probe must see it, in isolated candidates too."""
    for options in ({}, {"layout": "items_first", "parallel": True}):
        found = position_bias(engine, asked(level="blocks", **options), permutations=5)
        assert found.order_share > 0.05
        assert found.tau < 1.0


def test_a_planted_preference_is_found(engine: Engine) -> None:
    """All 6 rows of a Latin square: an item stands first once in 6 orders, so the first slot gains 5/6 of the gain."""
    found = position_bias(Planted(engine, SLOT_GAIN), asked(), permutations=5)
    assert found.slots[0].mean == pytest.approx(SLOT_GAIN * 5 / 6)
    assert all(slot.mean == pytest.approx(-SLOT_GAIN / 6) for slot in found.slots[1:])
    assert found.within_variance == pytest.approx(SLOT_GAIN**2 / 6)  # variance of one 1 among five 0, ddof 1
    assert found.between_variance == pytest.approx(3.5 - found.within_variance / 6)  # of 0 … 5, ddof 1
    assert (found.tau, found.top1) == (pytest.approx(1.0), 1.0)  # the gain is less than one item is worth


def test_a_preference_that_decides(engine: Engine) -> None:
    found = position_bias(Planted(engine, 10.0, worth=0.001), asked(), permutations=5)
    assert found.order_share > 0.99
    assert found.top1 == 0.0  # another item stands first in every order
    assert found.tau < 0.5


def test_slots_have_intervals(engine: Engine) -> None:
    """The label read-out's means differ between requests, and shorter requests lack the last slots."""
    found = position_bias(engine, [*asked(3), *asked(1, candidates=4)], permutations=3)
    assert [slot.num_requests for slot in found.slots] == [4] * 4 + [3] * 2
    assert all(slot.low < slot.mean < slot.high for slot in found.slots)
    alone = position_bias(engine, asked(1), permutations=3)
    assert all(math.isnan(slot.low) and math.isfinite(slot.mean) for slot in alone.slots)


def test_orders_cost_their_fresh_tokens(engine: Engine) -> None:
    requests = asked(2, level="blocks")
    cold = position_bias(engine, requests, permutations=4)
    warm = position_bias(engine, requests, permutations=4)
    receipt = engine.rank(requests[0]).receipt
    assert cold.full_tokens == warm.full_tokens
    assert warm.fresh_tokens == 5 * sum(engine.rank(request).receipt.num_fresh for request in requests)
    assert warm.fresh_tokens < cold.fresh_tokens < warm.fresh_tokens + 2 * receipt.num_tokens
    # what order does to the scores is the same, whether blocks were there or not
    assert cold.within_variance == pytest.approx(warm.within_variance, rel=1e-3)


def test_options_win_over_the_requests(engine: Engine) -> None:
    options = tiny.request(2, readout="likelihood", level="full").options
    done: list[int] = []
    found = position_bias(engine, asked(2), 1, 0, options, on_request=done.append)
    assert (found.readout, found.level, found.num_requests, found.num_orders) == ("likelihood", "full", 2, 2)
    assert found.fresh_tokens == found.full_tokens
    assert done == [1, 2]


@pytest.mark.parametrize("requests", [[], asked(1, candidates=1)])
def test_what_cannot_be_probed(engine: Engine, requests: list[RankRequest]) -> None:
    with pytest.raises(RequestError, match="two or more candidates"):
        position_bias(engine, requests)


def test_one_order_is_not_enough(engine: Engine) -> None:
    with pytest.raises(RequestError, match="one or more permutations"):
        position_bias(engine, asked(1), permutations=0)
