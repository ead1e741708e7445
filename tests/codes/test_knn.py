"""Item-kNN beside a decoder: against dense sums over the whole catalogue, and probabilities added up one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from rcllm.codes.index import CodeIndex
from rcllm.codes.knn import Knn, mixed
from rcllm.codes.updates import Update
from rcllm.core.ranking import ItemId

NUM_ITEMS = 30
IDS = tuple(ItemId(f"i{n}") for n in range(NUM_ITEMS))
STRANGER = ItemId("nobody chose it")


def _index() -> CodeIndex:
    codes = np.stack(np.divmod(np.arange(NUM_ITEMS), 6), axis=1).astype(np.int32)
    return CodeIndex.build(codes, IDS, (5, 6))


def _knn() -> Knn:
    dense = np.random.default_rng(0).random((NUM_ITEMS, NUM_ITEMS)).astype(np.float32)
    dense[dense < 0.6] = 0.0
    np.fill_diagonal(dense, 0.0)
    dense[7] = 0.0
    return Knn(IDS, sparse.csr_array(dense), 0.5)


def _expected(knn: Knn, history: list[int], live: list[int]) -> dict[ItemId, float]:
    sums = sum(knn.likeness.toarray()[item] / place for place, item in enumerate(reversed(history), 1))
    return {IDS[i]: sums[i] / sums[live].sum() for i in live if sums[i] > 0}


def test_an_item_has_its_share_of_the_summed_likeness() -> None:
    knn, everything = _knn(), list(range(NUM_ITEMS))
    found = knn.shares([IDS[1], IDS[4], IDS[4]], _index(), None, 100)
    assert found == pytest.approx(_expected(knn, [1, 4, 4], everything))
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert sum(found.values()) == pytest.approx(1.0)


def test_only_the_end_of_a_history_is_read_and_strangers_take_a_place_in_it() -> None:
    knn, history = _knn(), [IDS[n % 7] for n in range(50)]
    assert knn.shares([IDS[9], *history], _index(), None, 100) == knn.shares(history, _index(), None, 100)
    far = knn.shares([IDS[1], STRANGER, IDS[2]], _index(), None, 100)
    assert far == pytest.approx(_weighted(knn, {1: 1 / 3, 2: 1.0}))
    assert knn.shares([IDS[2], STRANGER], _index(), None, 100) == pytest.approx(_weighted(knn, {2: 1.0}))


def _weighted(knn: Knn, weights: dict[int, float]) -> dict[ItemId, float]:
    sums = sum(knn.likeness.toarray()[item] * weight for item, weight in weights.items())
    return {IDS[i]: each / sums.sum() for i, each in enumerate(sums) if each > 0}


def test_only_items_that_may_come_have_a_share() -> None:
    knn, index = _knn(), _index().changed(Update(remove=frozenset(IDS[10:14]), enabled={IDS[20]: False}))
    denied = [IDS[5], IDS[6]]
    live = [i for i in range(NUM_ITEMS) if not 10 <= i < 14 and i not in (5, 6, 20)]
    found = knn.shares([IDS[1], IDS[2]], index, index.allowed(deny=denied), 100)
    assert found == pytest.approx(_expected(knn, [1, 2], live))
    best = knn.shares([IDS[1], IDS[2]], index, index.allowed(deny=denied), 4)
    assert list(best.items()) == list(found.items())[:4]


@pytest.mark.parametrize("history", [[], [STRANGER], [IDS[7]]])
def test_a_history_that_says_nothing_gives_no_shares(history: list[ItemId]) -> None:
    assert _knn().shares(history, _index(), None, 10) == {}
    assert _knn().shares([IDS[1]], _index(), _index().allowed(allow=()), 10) == {}


_SHARES = st.dictionaries(st.sampled_from(IDS), st.floats(1e-6, 1.0), max_size=12)


@given(found=_SHARES, shares=_SHARES, share=st.floats(0.01, 0.99), n=st.integers(1, 30))
def test_a_mixture_adds_probabilities(
    found: dict[ItemId, float], shares: dict[ItemId, float], share: float, n: int
) -> None:
    items, scores = mixed({i: math.log(p) for i, p in found.items()}, shares, share, n)
    expected = {i: (1 - share) * found.get(i, 0.0) + share * shares.get(i, 0.0) for i in {*found, *shares}}
    assert [math.exp(score) for score in scores] == pytest.approx(sorted(expected.values(), reverse=True)[:n])
    assert [math.exp(score) for score in scores] == pytest.approx([expected[i] for i in items])


def test_what_the_beams_found_comes_first_among_equals() -> None:
    items, _ = mixed({IDS[2]: math.log(0.5)}, {IDS[1]: 0.5}, 0.5, 2)
    assert items == (IDS[2], IDS[1])


def test_a_share_too_small_for_a_number_gives_scores() -> None:
    items, scores = mixed({IDS[0]: math.log(0.5)}, {IDS[1]: 1e-3}, 1e-323, 2)
    assert items == (IDS[0], IDS[1])
    assert scores[1] == pytest.approx(math.log(1e-323) + math.log(1e-3))


def test_a_score_too_small_for_a_probability_keeps_its_place() -> None:
    items, scores = mixed({IDS[0]: -900.0, IDS[1]: -950.0}, {IDS[2]: 0.1}, 0.5, 3)
    assert items == (IDS[2], IDS[0], IDS[1])
    assert scores[1] == pytest.approx(-900 + math.log(0.5))
