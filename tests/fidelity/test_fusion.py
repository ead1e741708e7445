"""Late fusion: its ends are the two scores, and the weight is the one that validation likes best."""

from __future__ import annotations

import numpy as np

from rcllm.core.ranking import order
from rcllm.fidelity.fusion import WEIGHTS, Scored, best_weight, fused, gains

RNG = np.random.default_rng(0)
ASKED = [Scored(RNG.normal(size=8), RNG.normal(size=8), int(RNG.integers(8))) for _ in range(40)]


def test_the_ends_are_the_two_orders() -> None:
    for each in ASKED:
        assert order(fused(each.first, each.second, 0.0)) == order(each.first)
        assert order(fused(each.first, each.second, 1.0)) == order(each.second)


def test_scale_and_place_of_a_score_do_not_matter() -> None:
    each = ASKED[0]
    moved = fused(100 * np.asarray(each.first) - 7, each.second, 0.3)
    np.testing.assert_allclose(moved, fused(each.first, each.second, 0.3))


def test_a_score_without_differences_says_nothing() -> None:
    assert order(fused([1.0, 1.0, 1.0], [0.1, 0.3, 0.2], 0.9).tolist()) == (1, 2, 0)


def test_the_best_weight_is_that_of_an_exhaustive_look() -> None:
    means = {weight: np.mean(gains(ASKED, weight)) for weight in WEIGHTS}
    assert means[best_weight(ASKED)] == max(means.values())
    helpful = [Scored(RNG.normal(size=8), np.eye(8)[n % 8], n % 8) for n in range(20)]
    assert np.mean(gains(helpful, best_weight(helpful))) == 1.0
