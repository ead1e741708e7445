"""Click data in which knowledge can prove its worth: users, items, who chose what, and features without any text model.

Never imports torch, and knows nothing of how knowledge is written. Invariant: nobody's history holds one of their own
targets, and what features count (popularity, co-occurrence) comes from the histories of training users alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from rcllm.core.ranking import BoolArray, ItemId, UserId
from rcllm.data import Dataset, histories, split_of
from rcllm.data.negatives import NegativePool, Wanted, draw_negatives
from rcllm.errors import DataError

FloatArray = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]
_GENRES = ("genres", "categories")  # fields whose words say what an item is


@dataclass(frozen=True, slots=True)
class ClicksConfig:
    users: int = 500
    held_out_share: float = 0.4  # of the users, at most: they are of the validation and test splits
    items: int = 400  # the most popular ones: pairs are made of these, and these alone need knowledge
    targets: int = 5  # the last ones of a user
    negatives: int = 4  # for each target, in proportion to popularity
    least_history: int = 5
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Clicks:
    user_ids: tuple[UserId, ...]
    histories: tuple[tuple[ItemId, ...], ...]  # of each user, oldest first, before the targets
    held_out: BoolArray  # [users]
    item_ids: tuple[ItemId, ...]
    users: Numbers  # [pairs], index of the user
    items: Numbers  # [pairs], index of the item
    clicked: BoolArray  # [pairs]
    features: FloatArray  # [pairs, 5]: popularity, mean and largest co-occurrence with the history, genres, its length


def make_clicks(dataset: Dataset, config: ClicksConfig) -> Clicks:
    """Raises DataError where the data hold no training or no held-out user with enough events."""
    touched = {user: [row.item_id for row in rows] for user, rows in histories(dataset.interactions).items()}
    training = [items for user, items in touched.items() if split_of(user) == "train"]
    pool = NegativePool.of(dataset.catalogue, training)
    popular = np.sort(np.argsort(-pool.popularity, kind="stable")[: config.items])
    item_ids = tuple(pool.item_ids[number] for number in popular)
    place = {item_id: index for index, item_id in enumerate(item_ids)}
    users = _users(touched, place, config)
    held_out = np.array([split_of(user) != "train" for user in users], dtype=np.bool_)
    if not len(users) or held_out.all() or not held_out.any():
        raise DataError(
            f"{dataset.name}: expected training and held-out users with {config.targets} targets among the "
            f"{len(item_ids)} most popular items and {config.least_history} events before, got {(~held_out).sum()} and "
            f"{held_out.sum()}"
        )
    split = [_split(touched[user], place, config.targets) for user in users]
    pairs = [
        (index, item, clicked)
        for index, user in enumerate(users)
        for item, clicked in _pairs(user, split[index][1], touched[user], pool, place, config)
    ]
    at = np.array([(user, item) for user, item, _ in pairs], dtype=np.int64)
    past = tuple(tuple(history) for history, _ in split)
    features = _features(dataset, item_ids, past, held_out, at)
    clicked = np.array([each for _, _, each in pairs], dtype=np.bool_)
    return Clicks(tuple(users), past, held_out, item_ids, at[:, 0], at[:, 1], clicked, features)


def _users(touched: dict[UserId, list[ItemId]], place: dict[ItemId, int], config: ClicksConfig) -> list[UserId]:
    """In an order drawn by the seed, with no more held-out users than their share."""
    order = sorted(touched, key=lambda user: blake3(f"{config.seed} {user}".encode()).digest())
    enough = [user for user in order if _enough(_split(touched[user], place, config.targets), config)]
    away = [user for user in enough if split_of(user) != "train"][: int(config.users * config.held_out_share)]
    home = [user for user in enough if split_of(user) == "train"][: config.users - len(away)]
    return home + away


def _enough(split: tuple[list[ItemId], list[ItemId]], config: ClicksConfig) -> bool:
    return len(split[1]) == config.targets and len(split[0]) >= config.least_history


def _split(items: Sequence[ItemId], place: dict[ItemId, int], targets: int) -> tuple[list[ItemId], list[ItemId]]:
    """The history before the first target, and the targets: the last items that pairs are made of."""
    at = [index for index, item in enumerate(items) if item in place][-targets:]
    chosen = [items[index] for index in at]
    return [item for item in items[: at[0]] if item not in chosen] if at else [], chosen


def _pairs(
    user: UserId,
    targets: Sequence[ItemId],
    touched: Sequence[ItemId],
    pool: NegativePool,
    place: dict[ItemId, int],
    config: ClicksConfig,
) -> list[tuple[int, bool]]:
    rng = np.random.default_rng([config.seed, int.from_bytes(blake3(user.encode()).digest()[:8], "big")])
    never = [number for number, item_id in enumerate(pool.item_ids) if item_id not in place]
    banned = np.array(never + [pool.numbers[item] for item in touched], dtype=np.int64)
    wanted = Wanted(config.negatives * len(targets), banned, np.empty(0, np.int64))
    drawn = draw_negatives(pool, "popularity", wanted, rng)
    return [(place[item], True) for item in targets] + [(place[pool.item_ids[number]], False) for number in drawn]


def _features(
    dataset: Dataset,
    item_ids: Sequence[ItemId],
    past: Sequence[Sequence[ItemId]],
    held_out: BoolArray,
    pairs: Numbers,
) -> FloatArray:
    numbers = {item_id: number for number, item_id in enumerate(dataset.catalogue)}
    seen = np.zeros((len(past), len(numbers)))
    for user, items in enumerate(past):
        seen[user, [numbers[item] for item in items]] = 1.0
    of = np.array([numbers[item] for item in item_ids])
    known = seen[~held_out]
    popularity = known.sum(axis=0)
    together = known.T[of] @ known  # [items, all items]: training users who have both
    norms = np.sqrt(np.maximum(popularity, 1.0))
    cosine = together / norms[of][:, None] / norms[None, :]
    cosine[np.arange(len(of)), of] = 0.0
    genres = _genres(dataset)
    taste = seen @ genres  # [users, words]
    taste /= np.maximum(np.linalg.norm(taste, axis=1, keepdims=True), 1e-9)
    kind = genres[of] / np.maximum(np.linalg.norm(genres[of], axis=1, keepdims=True), 1e-9)
    user, item = pairs.T
    near = cosine[item] * seen[user]  # [pairs, all items]
    lengths = seen.sum(axis=1)
    columns = [
        np.log1p(popularity[of[item]]),
        near.sum(axis=1) / lengths[user],
        near.max(axis=1),
        (taste[user] * kind[item]).sum(axis=1),
        np.log1p(lengths[user]),
    ]
    return np.stack(columns, axis=1)


def _genres(dataset: Dataset) -> FloatArray:
    """[all items, words]: 1 where an item's genres or categories hold the word."""
    words = [
        {word for field in _GENRES for word in item.fields.get(field, "").replace(",", " ").lower().split()}
        for item in dataset.catalogue.values()
    ]
    column = {word: index for index, word in enumerate(sorted(set().union(*words)))}
    table = np.zeros((len(words), max(1, len(column))))
    for row, each in enumerate(words):
        table[row, [column[word] for word in each]] = 1.0
    return table
