"""Item-kNN against a slow twin, and that a user who is left out counts for nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcllm.cluster.statistics import incidence, ragged
from rcllm.data.item_knn import ItemKnn
from tests.reference import item_knn as slow

NUM_ITEMS = 9
USERS = st.lists(st.sets(st.integers(0, NUM_ITEMS - 1), min_size=1).map(sorted), min_size=1, max_size=8)
ITEMS = st.lists(st.integers(0, NUM_ITEMS - 1), max_size=5)


def _knn(users: list[list[int]], shrinkage: float = 0.0) -> ItemKnn:
    return ItemKnn.of(incidence(ragged(users), NUM_ITEMS), shrinkage)


@settings(deadline=None)
@given(USERS, ITEMS, ITEMS, st.sampled_from([0.0, 2.5]))
def test_scores_equal_the_slow_twin(
    users: list[list[int]], history: list[int], candidates: list[int], shrinkage: float
) -> None:
    knn = _knn(users, shrinkage)
    expected = slow.scores(users, history, candidates, shrinkage)
    np.testing.assert_allclose(knn.scores(history, candidates), expected, atol=1e-12)
    np.testing.assert_allclose(knn.all_scores(history)[candidates], expected, atol=1e-12)


@settings(deadline=None)
@given(USERS, ITEMS, ITEMS, st.integers(0, 7), st.sampled_from([0.0, 2.5]))
def test_whoever_is_left_out_counts_for_nothing(
    users: list[list[int]], history: list[int], candidates: list[int], who: int, shrinkage: float
) -> None:
    who %= len(users)
    others = users[:who] + users[who + 1 :]
    found = _knn(users, shrinkage).scores(history, candidates, users[who])
    np.testing.assert_allclose(found, slow.scores(others, history, candidates, shrinkage), atol=1e-12)


def test_neighbours_are_the_most_alike_without_the_item_itself() -> None:
    knn = _knn([[0, 1], [0, 1], [0, 2], [3]])
    assert [item for item, _ in knn.neighbours(0, 5)] == [1, 2]
    assert knn.neighbours(0, 1)[0][1] == pytest.approx(2 / np.sqrt(3 * 2))
    assert [item for item, _ in knn.neighbours(0, 5, min_users=2)] == [1]
    assert knn.neighbours(3, 5) == []
