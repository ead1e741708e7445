"""The measures against values worked out by hand, and against scikit-learn's."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from sklearn.metrics import label_ranking_average_precision_score, ndcg_score, top_k_accuracy_score

from rcllm.core.ranking import order
from rcllm.fidelity.measures import (
    HR_AT,
    NDCG_AT,
    QUALITY,
    agreement,
    chance_ndcg,
    hit_rate,
    ndcg,
    quality,
    reciprocal_rank,
)


def test_the_same_scores_agree() -> None:
    found = agreement([0.1, 0.5, 0.3], [0.1, 0.5, 0.3])
    assert found.tau == pytest.approx(1.0)
    assert (found.top1, found.max_shift) == (True, 0.0)


def test_reversed_scores_disagree() -> None:
    found = agreement([1.0, 2.0, 3.0], [3.0, 2.0, 1.0])
    assert found.tau == pytest.approx(-1.0)
    assert (found.top1, found.max_shift) == (False, 2.0)


def test_one_swap_of_four() -> None:
    # 6 pairs, 5 concordant and 1 discordant
    assert agreement([4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 1.0, 2.0]).tau == pytest.approx(4 / 6)


def test_ties_on_one_side() -> None:
    # pairs: (0,1) tied on the right, (0,2) and (1,2) concordant: 2 / sqrt(3 · 2)
    assert agreement([3.0, 2.0, 1.0], [2.0, 2.0, 1.0]).tau == pytest.approx(2 / math.sqrt(6))


def test_top1_breaks_ties_by_candidate_order() -> None:
    assert agreement([1.0, 1.0, 0.0], [2.0, 1.0, 0.0]).top1
    assert not agreement([1.0, 1.0, 0.0], [1.0, 2.0, 0.0]).top1


@pytest.mark.parametrize(("reference", "scores"), [([1.0], [2.0]), ([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [3.0, 3.0])])
def test_tau_is_nan_where_nothing_is_ranked(reference: list[float], scores: list[float]) -> None:
    assert math.isnan(agreement(reference, scores).tau)


@pytest.mark.parametrize(("reference", "scores"), [([], []), ([1.0], [1.0, 2.0])])
def test_lists_must_match(reference: list[float], scores: list[float]) -> None:
    with pytest.raises(ValueError, match="equal length"):
        agreement(reference, scores)


def test_measures_of_one_order() -> None:
    order = [2, 0, 3, 1]  # candidate 3 has rank 3
    assert ndcg(order, 3, 10) == pytest.approx(1 / math.log2(4)) == pytest.approx(0.5)
    assert ndcg(order, 2, 1) == 1.0
    assert ndcg(order, 3, 2) == 0.0
    assert (hit_rate(order, 3, 3), hit_rate(order, 3, 2)) == (1.0, 0.0)
    assert reciprocal_rank(order, 3) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="7"):
        ndcg(order, 7, 10)


@pytest.mark.parametrize(("num_candidates", "k"), [(1, 10), (4, 2), (4, 10), (5, 5)])
def test_chance_is_the_mean_over_all_orders(num_candidates: int, k: int) -> None:
    orders = list(itertools.permutations(range(num_candidates)))
    assert chance_ndcg(num_candidates, k) == pytest.approx(sum(ndcg(order, 0, k) for order in orders) / len(orders))


def test_chance_by_hand() -> None:
    assert chance_ndcg(2, 1) == 0.5
    with pytest.raises(ValueError, match="one or more"):
        chance_ndcg(0, 10)


def test_quality_equals_scikit_learn() -> None:
    """With one relevant candidate, label-ranking average precision is the reciprocal rank, top-k accuracy HR@k."""
    rng = np.random.default_rng(0)
    scores, positives = rng.normal(size=(200, 30)), rng.integers(0, 30, 200)
    ours = np.array([quality(order(row), at) for row, at in zip(scores, positives, strict=True)]).mean(axis=0)
    relevant = np.eye(30)[positives]
    theirs = [ndcg_score(relevant, scores, k=k) for k in NDCG_AT]
    theirs += [top_k_accuracy_score(positives, scores, k=k, labels=range(30)) for k in HR_AT]
    theirs.append(label_ranking_average_precision_score(relevant, scores))
    assert dict(zip(QUALITY, ours, strict=True)) == pytest.approx(dict(zip(QUALITY, theirs, strict=True)))


def test_tau_counts_pairs() -> None:
    """tau-b by its definition, over all pairs, on scores with many ties."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        one, other = rng.integers(0, 5, (2, 12)).astype(float)
        signs = [(np.sign(one[i] - one[j]), np.sign(other[i] - other[j])) for i in range(12) for j in range(i)]
        agree = sum(a * b for a, b in signs)
        norm = math.sqrt(sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs))
        assert agreement(one, other).tau == pytest.approx(agree / norm)
