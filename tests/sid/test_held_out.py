"""What a decoder is worth beside what costs nothing: figures that are recomputed here by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rcllm.sid.held_out import Case, Comparison, Worth, advice, cases_of, compare_held_out

TRAIN = [[0, 1, 2], [0, 1, 3], [0, 1], [4, 5]]
NUM_ITEMS = 20


def _nobody(case: Case) -> list[int]:
    return []


def _found(model: object = _nobody, held_out: list[list[int]] | None = None, max_items: int = 9) -> Comparison:
    found = compare_held_out(model, _nobody, TRAIN, held_out or [[1, 0], [4, 5]], NUM_ITEMS, max_items)  # type: ignore[arg-type]
    assert found is not None
    return found


def test_popularity_leaves_out_what_the_user_has_seen() -> None:
    popularity = _found().popularity  # 0 and 1 have 3 users, 2 to 5 have one
    # after [1], item 0 is first; after [4], item 5 is fifth of 0 1 2 3 5
    assert popularity.recall == 1.0
    assert popularity.ndcg == pytest.approx((1.0 + 1 / math.log2(1 + 5)) / 2)


def test_item_knn_adds_up_cosines_over_the_history() -> None:
    knn = _found(held_out=[[4, 5], [2, 3]]).item_knn
    # 4 and 5 have one and the same user: cosine 1. Item 2's neighbours are 0 and 1, with 1/√3; 3 is tied with the rest
    # at 0, and of these (3 4 5 …) it is the first in the catalogue: rank 3
    assert knn.recall == 1.0
    assert knn.ndcg == pytest.approx((1.0 + 1 / math.log2(1 + 3)) / 2)


def test_all_ways_read_the_same_end_of_a_history() -> None:
    seen: list[tuple[int, ...]] = []

    def model(case: Case) -> list[int]:
        seen.append(case.history)
        return []

    long = _found(model, [[2, 9, 8, 4, 5]], max_items=1)
    assert long.item_knn.ndcg == 1.0  # 4 alone is read, and 5 is its neighbour
    assert seen == [(2, 9, 8, 4)]


def test_a_guess_is_the_mean_over_all_orders() -> None:
    guess = _found(held_out=[[0, 1, 2, 3]]).guess
    rng, gains, hits = np.random.default_rng(0), [], []
    left = [item for item in range(NUM_ITEMS) if item not in (0, 1, 2)]
    for _ in range(20_000):
        rank = list(rng.permutation(left)).index(3) + 1
        hits.append(rank <= 10)
        gains.append(1 / math.log2(1 + rank) if rank <= 10 else 0.0)
    assert guess.recall == pytest.approx(10 / 17)
    assert guess.recall == pytest.approx(np.mean(hits), abs=0.02)
    assert guess.ndcg == pytest.approx(np.mean(gains), abs=0.01)


def test_a_catalogue_of_few_items_is_all_in_the_first_ten() -> None:
    found = compare_held_out(_nobody, _nobody, [[0, 1]], [[0, 1]], 3, 5)
    assert found is not None
    assert found.guess.recall == 1.0
    assert found.guess.ndcg == pytest.approx((1.0 + 1 / math.log2(3)) / 2)


def test_the_model_is_measured_on_its_first_ten() -> None:
    def model(case: Case) -> list[int]:
        return [19, 18, case.target] if case.history == (1,) else [*range(6, 16), case.target]

    found = _found(model)
    assert found.model == Worth(0.5, 1 / math.log2(4) / 2)
    assert found.alone == Worth(0.0, 0.0)


def test_users_whose_target_is_not_new_are_left_out_and_counted() -> None:
    cases, num_left_out = cases_of([[0, 1, 0], [3], [], [1, 2]])
    assert (cases, num_left_out) == ([Case((1,), 2)], 1)
    assert compare_held_out(_nobody, _nobody, TRAIN, [[0, 0], [3]], NUM_ITEMS, 5) is None
    assert len(cases_of([[n, n + 1] for n in range(900)])[0]) == 500


def test_nobody_learnt_anything() -> None:
    found = compare_held_out(_nobody, _nobody, [], [[0, 1]], NUM_ITEMS, 5)
    assert found is not None
    assert found.popularity.ndcg == found.item_knn.ndcg == 1.0  # all tied: 1 is the first that the user has not seen


def _comparison(ndcg: float) -> Comparison:
    ways = (Worth(0.1, value) for value in (ndcg, 0.3, 0.02, 0.05, 0.2))
    return Comparison(10, 0, *ways)


@pytest.mark.parametrize(
    ("ndcg", "worse"),
    [
        (0.01, ["a guess", "popularity", "item-kNN"]),
        (0.05, ["popularity", "item-kNN"]),
        (0.1, ["item-kNN"]),
        (0.3, []),
    ],
)
def test_what_the_model_does_not_beat(ndcg: float, worse: list[str]) -> None:
    assert _comparison(ndcg).worse_than() == worse


def test_advice_names_what_is_the_matter_and_nothing_else() -> None:
    assert "it learnt from 48" in " ".join(advice(48, 10.0, still_better=False))
    assert "more --epochs" in " ".join(advice(5000, 10.0, still_better=True))
    assert "without --size" in " ".join(advice(5000, 1.2, still_better=False))
    assert len(advice(48, 1.0, still_better=True)) == 3
    (other,) = advice(5000, 10.0, still_better=False)
    assert "--seed" in other
