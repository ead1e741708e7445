"""What knowledge is worth: known answers on made-up clicks, and no leak from targets or held-out users."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rcllm.core.ranking import Interaction, Item, ItemId, UserId
from rcllm.data import Catalogue, Dataset, split_of
from rcllm.describe.clicks import Clicks, ClicksConfig, make_clicks
from rcllm.describe.quality import Knowledge, compare, worth
from rcllm.errors import DataError

_CONFIG = ClicksConfig(users=120, items=40, targets=3, negatives=4, least_history=4)
_GENRES = ("drama", "comedy", "war", "crime")


def _dataset(num_users: int = 400) -> Dataset:
    """48 items of four genres in turns; user n likes genre n mod 4, as later choices tell, not earlier ones."""
    rng = np.random.default_rng(0)
    items = [Item(ItemId(f"i{n}"), {"title": f"title {n}"}) for n in range(48)]
    rows = []
    for n in range(num_users):
        past = rng.choice(48, 8, replace=False)
        liked = [item for item in rng.permutation(range(n % 4, 48, 4)) if item not in past][:4]
        for time, item in enumerate([*past, *liked]):
            rows.append(Interaction(UserId(f"u{n}"), ItemId(f"i{item}"), float(time)))
    return Dataset("made-up", Catalogue(items), tuple(rows))


@pytest.fixture(scope="module")
def clicks() -> Clicks:
    return make_clicks(_dataset(), _CONFIG)


def test_no_history_holds_a_target_and_no_negative_was_touched(clicks: Clicks) -> None:
    data = _dataset()
    touched: dict[str, set[str]] = {}
    for row in data.interactions:
        touched.setdefault(row.user_id, set()).add(row.item_id)
    assert len(clicks.users) == len(clicks.user_ids) * _CONFIG.targets * (1 + _CONFIG.negatives)
    for user, item, clicked in zip(clicks.users, clicks.items, clicks.clicked, strict=True):
        assert (clicks.item_ids[item] in touched[clicks.user_ids[user]]) == clicked
        assert not clicked or clicks.item_ids[item] not in clicks.histories[user]
    assert (np.bincount(clicks.users[clicks.clicked]) == _CONFIG.targets).all()
    away = [split_of(user) != "train" for user in clicks.user_ids]
    assert clicks.held_out.tolist() == away
    assert 0 < sum(away) <= 0.4 * _CONFIG.users


def test_features_do_not_see_held_out_users(clicks: Clicks) -> None:
    data = _dataset()
    home = [row for row in data.interactions if split_of(row.user_id) == "train"]
    others = {user for user, away in zip(clicks.user_ids, clicks.held_out, strict=True) if away}
    swapped = [
        replace(row, item_id=ItemId(f"i{(int(row.item_id[1:]) + 1) % 48}")) if row.user_id in others else row
        for row in data.interactions
    ]
    changed = make_clicks(replace(data, interactions=tuple(swapped)), _CONFIG)
    mine = [clicks.user_ids.index(row.user_id) for row in home if row.user_id in clicks.user_ids]
    for user in set(mine):
        now = changed.user_ids.index(clicks.user_ids[user])
        assert changed.histories[now] == clicks.histories[user]
        np.testing.assert_array_equal(changed.features[changed.users == now], clicks.features[clicks.users == user])


def test_knowledge_that_tells_the_taste_is_worth_much_and_noise_nothing(clicks: Clicks) -> None:
    basis = np.eye(16, dtype=np.float32)
    kinds = np.array([int(item[1:]) % 4 for item in clicks.item_ids])
    tastes = np.array([int(user[1:]) % 4 for user in clicks.user_ids])
    rng = np.random.default_rng(1)

    def noisy(rows: np.ndarray) -> np.ndarray:
        with_noise = rows + rng.normal(0, 0.05, rows.shape).astype(np.float32)
        return with_noise / np.linalg.norm(with_noise, axis=1, keepdims=True)

    told = Knowledge(noisy(basis[tastes]), noisy(basis[kinds]))
    noise = Knowledge(noisy(0 * basis[tastes]), noisy(0 * basis[kinds]))
    # users and items speak of the same in other words: only products of components relate them
    foreign = Knowledge(noisy(basis[tastes]), noisy(basis[8 + kinds]))
    ways = {name: worth(clicks, each) for name, each in _named(told, noise, foreign).items()}
    gains = compare(ways, "without")
    assert gains["told"][0].low > 0.2
    assert gains["foreign"][0].low > 0.2
    assert gains["told"][1].high < 0
    assert gains["noise"][0].low < 0.02
    assert ways["told"].auc > 0.85
    assert abs(ways["without"].gauc.mean - 0.5) < 0.1
    assert ways["told"].gauc.count == clicks.held_out.sum()


def _named(told: Knowledge, noise: Knowledge, foreign: Knowledge) -> dict[str, Knowledge | None]:
    return {"without": None, "told": told, "noise": noise, "foreign": foreign}


def test_the_same_knowledge_differs_by_nothing(clicks: Clicks) -> None:
    way = worth(clicks, None)
    auc, loss = way.gain_over(worth(clicks, None))
    assert (auc.mean, auc.low, auc.high, loss.mean) == (0.0, 0.0, 0.0, 0.0)


def test_too_little_data() -> None:
    with pytest.raises(DataError, match="expected training and held-out users"):
        make_clicks(_dataset(1), _CONFIG)
