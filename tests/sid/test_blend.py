"""The share of item-kNN: what is chosen, against a search over all of it by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from rcllm.codes.knn import Knn
from rcllm.config import Config, ModelConfig
from rcllm.core.decoding import RecommendRequest
from rcllm.core.ranking import Event, ItemId
from rcllm.sid.blend import NEAREST, SHARES, Searched, blended, nearest
from rcllm.sid.held_out import Case, gain
from rcllm.sid.load import load_recommender
from rcllm.sid.model_folder import load_knn
from rcllm.sid.recommend import HeldOut, add_knn
from rcllm.sid.train import CodeTrainer
from tests.reference.item_knn import likeness
from tests.sid.toys import HELD_OUT, IDS, NUM_ITEMS, QUICK, TRAIN, toy_index


def test_likeness_is_that_of_item_knn_and_of_none_to_itself() -> None:
    knn, users = nearest(TRAIN, IDS), [set(history) for history in TRAIN]
    expected = [[0.0 if i == j else likeness(users, i, j, 5.0) for j in range(NUM_ITEMS)] for i in range(NUM_ITEMS)]
    np.testing.assert_allclose(knn.likeness.toarray(), expected, rtol=1e-6)
    assert knn.item_ids == IDS
    assert knn.share == 0.0


def test_only_the_nearest_are_kept() -> None:
    many = [ItemId(str(n)) for n in range(NEAREST + 50)]
    rows = nearest([list(range(len(many)))], many).likeness
    assert set(np.diff(rows.indptr).tolist()) == {NEAREST}


def _searched(history: tuple[int, ...], target: int, *found: int) -> Searched:
    scores = {IDS[item]: math.log(0.5) - place for place, item in enumerate(found)}
    return Searched(tuple(IDS[item] for item in history), IDS[target], scores)


def test_a_decoder_that_is_right_gets_all_the_say() -> None:
    right = [_searched((n, n + 1), n + 2, n + 2, n + 3) for n in range(8)]
    assert blended(nearest(TRAIN, IDS), toy_index(), right).share == 0.0


def test_a_decoder_that_is_wrong_gets_little() -> None:
    """Its list is full of others, among which item-kNN puts the right one first."""
    wrong = [_searched((n,), n + 1, *((n + far) % NUM_ITEMS for far in (5, 6, 7))) for n in range(1, 9)]
    found = blended(nearest(TRAIN, IDS), toy_index(), wrong)
    assert found.share > 0.0
    assert _mean(found, wrong) == max(_mean(replace(found, share=share), wrong) for share in SHARES)


def _mean(knn: Knn, searched: list[Searched]) -> float:
    """By probabilities that are added up."""
    gains = []
    for each in searched:
        allowed = toy_index().allowed(deny=each.history)
        shares = knn.shares(each.history, toy_index(), allowed, len(each.found))
        both = {
            item: (1 - knn.share) * math.exp(each.found.get(item, -math.inf)) + knn.share * shares.get(item, 0.0)
            for item in [*each.found, *(item for item in shares if item not in each.found)]
            if item in each.found or knn.share
        }
        gains.append(gain(sorted(both, key=lambda item: -both[item]), each.target))
    return float(np.mean(gains))


def test_nobody_to_ask_leaves_the_decoder_alone() -> None:
    assert blended(nearest(TRAIN, IDS), toy_index(), []).share == 0.0


def test_a_share_is_chosen_for_the_histories_that_are_served(tmp_path: Path) -> None:
    """The decoder reads their ends, item-kNN its own window of them, in training and afterwards."""
    CodeTrainer(toy_index(), TRAIN, HELD_OUT, QUICK, tmp_path).run(max_steps=30)
    history = tuple(n % 5 for n in range(30))
    [searched] = HeldOut(tmp_path, IDS).searched([Case(history, 7)])
    recommender = load_recommender(Config(model=ModelConfig(path=str(tmp_path))))
    asked = RecommendRequest("r", tuple(Event(IDS[n]) for n in history), n=64, beam=64, knn=0.0, deny=tuple(IDS[:5]))
    served = recommender.recommend(asked)
    assert tuple(searched.found) == served.items
    assert searched.history == tuple(IDS[n] for n in history)
    assert served.receipt.num_tokens == 1 + QUICK.sequences.max_items * 3 + 1
    assert "the last 6 of 30 events" in served.receipt.notes[0]


def test_a_folder_gets_it_and_serves_it(tmp_path: Path) -> None:
    CodeTrainer(toy_index(), TRAIN, HELD_OUT, QUICK, tmp_path).run(max_steps=30)
    assert load_knn(tmp_path) is None
    knn = add_knn(tmp_path, TRAIN, HELD_OUT)
    found = load_knn(tmp_path)
    assert found is not None
    assert (found.share, found.item_ids) == (knn.share, IDS)
    assert (found.likeness != knn.likeness).nnz == 0
    recommender = load_recommender(Config(model=ModelConfig(path=str(tmp_path))))
    asked = RecommendRequest("r", (Event(IDS[3]), Event(IDS[4])), n=3, knn=0.5)
    assert recommender.recommend(asked).receipt.knn == 0.5
