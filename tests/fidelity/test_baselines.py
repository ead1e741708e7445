"""What a ranker must beat knows the training users alone."""

from __future__ import annotations

import pytest

from rcllm.core.ranking import Event, Interaction, Item, ItemId, RankRequest, UserId
from rcllm.data import Catalogue, Dataset, split_of
from rcllm.fidelity.baselines import Neighbours, Popularity, training_pool

ITEMS = [ItemId(name) for name in "abcd"]


def users(split: str, count: int) -> list[UserId]:
    names = (UserId(f"u{number}") for number in range(1000))
    return [name for name, _ in zip((name for name in names if split_of(name) == split), range(count), strict=False)]


@pytest.fixture
def dataset() -> Dataset:
    """Two training users chose a and b, one b and c; ten held-out users chose d and a."""
    first, second, third = users("train", 3)
    chosen = {first: "ab", second: "ab", third: "bc"} | dict.fromkeys(users("test", 10), "da")
    pairs = [(user, item, place) for user, items in chosen.items() for place, item in enumerate(items)]
    rows = tuple(Interaction(user, ItemId(item), place) for user, item, place in pairs)
    return Dataset("four", Catalogue(Item(item, {"title": item}) for item in ITEMS), rows)


def test_popularity_counts_training_users(dataset: Dataset) -> None:
    request = RankRequest("r", tuple(ITEMS))
    assert Popularity(training_pool(dataset)).score(request).tolist() == [2, 3, 1, 0]


def test_item_knn_sums_likeness_to_the_history(dataset: Dataset) -> None:
    """a and b have two users in common, of two and three; c and b one, of one and three."""
    knn = Neighbours(training_pool(dataset))
    request = RankRequest("r", (ITEMS[0], ITEMS[2], ITEMS[3]), (Event(ITEMS[1]),))
    assert knn.score(request).tolist() == pytest.approx([2 / 6**0.5, 1 / 3**0.5, 0.0])
    everything = RankRequest("r", tuple(ITEMS), (Event(ITEMS[1]),))
    assert knn.score(everything).tolist() == pytest.approx([2 / 6**0.5, 1.0, 1 / 3**0.5, 0.0])
