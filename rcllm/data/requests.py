"""Makes paper-shaped requests from a data set: a history, the item that followed, and items that did not.

Knows nothing of prompts or models. Invariant: a request depends on its user's rows, the catalogue, the training
users, the options and the seed alone: not on the process, the platform, or how many other requests are made.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from blake3 import blake3

from rcllm.core.ranking import Event, Interaction, ItemId, Negatives, RankRequest, UserId
from rcllm.data.dataset import Dataset
from rcllm.data.interactions import histories
from rcllm.data.negatives import SAMPLERS, NegativePool, Wanted, draw_negatives
from rcllm.data.text import did_you_mean
from rcllm.errors import ConfigError, DataError

Split = Literal["train", "validation", "test"]


def split_of(user_id: UserId) -> Split:
    """80 % of users train, 10 % validation, 10 % test, by blake3 of the user id: the same split everywhere."""
    tenth = int.from_bytes(blake3(user_id.encode("utf-8")).digest()[:8], "big") % 10
    return "train" if tenth < 8 else "validation" if tenth == 8 else "test"


def training_histories(
    by_user: Mapping[UserId, Sequence[Interaction]], catalogue: Container[ItemId], without: Collection[UserId] = ()
) -> dict[UserId, tuple[ItemId, ...]]:
    """What each training user chose of the catalogue, oldest first; nothing of the users of `without`.

    `by_user`: as `histories` gives them.
    """
    left = frozenset(without)
    return {
        user: tuple(row.item_id for row in rows if row.item_id in catalogue)
        for user, rows in by_user.items()
        if split_of(user) == "train" and user not in left
    }


def told_unknown(interactions: Collection[Interaction], catalogue: Container[ItemId]) -> str:
    """What to say of the rows that `training_histories` leaves out for their item; empty where there are none."""
    if not (unknown := sum(row.item_id not in catalogue for row in interactions)):
        return ""
    return (
        f"{unknown:,} of {len(interactions):,} interactions are with items that the catalogue lacks, and count for "
        "nothing in what is made of interactions"
    )


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the requests have in common."""

    num_candidates: int
    num_history: int
    negatives: Negatives
    split: Split
    seed: int
    review_history: bool


def build_requests(
    dataset: Dataset,
    count: int | None = None,
    num_candidates: int = 20,
    num_history: int = 10,
    negatives: Negatives = "uniform",
    split: Split = "test",
    seed: int = 0,
    targets_per_user: int = 1,
    *,
    min_history: int = 2,
    review_history: bool = False,
) -> list[RankRequest]:
    """One request per target: one positive among `num_candidates`, and the `num_history` events before it.

    The targets are those of the last `targets_per_user` items of each user that are new to the user and have
    `min_history` events before them; negatives are items that the user never touched, at any time. `count` requests
    (None: all there are) come from users in an order drawn by `seed`, every user's last target first. With
    `review_history` an event is the user's own review where there is one. Raises DataError where the data do not hold
    that many requests or candidates.
    """
    shape = _Shape(num_candidates, num_history, negatives, split, seed, review_history)
    _check(shape, targets_per_user, min_history)
    by_user = histories(dataset.interactions)
    if review_history and not any(row.text for row in dataset.interactions):
        raise DataError(f"{dataset.name}: review_history needs review texts, and no interaction has one")
    pool = _pool(dataset, by_user)
    users = sorted((user for user in by_user if split_of(user) == split), key=lambda user: _hash(seed, user))
    targets = [
        (by_user[user], len(by_user[user]) - back)
        for back in range(1, targets_per_user + 1)
        for user in users
        if len(by_user[user]) - back >= min_history and is_new(by_user[user], len(by_user[user]) - back)
    ]
    if count is not None and count > len(targets):
        raise DataError(
            f"{dataset.name}: expected {count:,} requests, but the split {split!r} has {len(targets):,} targets that "
            f"are new to their user, with {min_history} or more events before them; ask for fewer requests, for "
            f"shorter histories, or for more targets of each user (now {targets_per_user})"
        )
    return [_request(pool, history, at, shape) for history, at in targets[:count]]


def is_new(history: Sequence[Interaction], at: int) -> bool:
    """Whether the user had not chosen `history[at]` before: of all candidates it alone could stand in the history."""
    return all(row.item_id != history[at].item_id for row in history[:at])


def _check(shape: _Shape, targets_per_user: int, min_history: int) -> None:
    if shape.negatives not in SAMPLERS:
        known, hint = ", ".join(SAMPLERS), did_you_mean(shape.negatives, SAMPLERS)
        raise ConfigError(f"expected negatives to be one of {known}, got {shape.negatives!r}.{hint}")
    if shape.split not in get_args(Split):
        raise ConfigError(f"expected split to be one of {', '.join(get_args(Split))}, got {shape.split!r}")
    if shape.num_candidates < 1 or shape.num_history < 0 or targets_per_user < 1 or min_history < 0 or shape.seed < 0:
        raise ConfigError(
            "expected num_candidates and targets_per_user ≥ 1, num_history, min_history and seed ≥ 0, got "
            f"{shape.num_candidates}, {targets_per_user}, {shape.num_history}, {min_history} and {shape.seed}"
        )


def _pool(dataset: Dataset, by_user: Mapping[UserId, Sequence[Interaction]]) -> NegativePool:
    for row in dataset.interactions:
        if row.item_id not in dataset.catalogue:
            raise DataError(
                f"{dataset.name}: user {row.user_id!r} touched item {row.item_id!r}, which the catalogue lacks; "
                "leave such rows out of the interactions, or add the item to the catalogue"
            )
    return NegativePool.of(dataset.catalogue, training_histories(by_user, dataset.catalogue).values())


def _request(pool: NegativePool, history: tuple[Interaction, ...], at: int, shape: _Shape) -> RankRequest:
    """The request whose positive is `history[at]`."""
    target, user_id = history[at], history[at].user_id
    before = history[max(0, at - shape.num_history) : at] if shape.num_history else ()
    rng = np.random.default_rng([shape.seed, _hash(shape.seed, user_id), at])
    banned = sorted({pool.numbers[row.item_id] for row in history})
    wanted = Wanted(
        shape.num_candidates - 1,
        np.array(banned, dtype=np.int64),
        np.array([pool.numbers[row.item_id] for row in before], dtype=np.int64),
    )
    drawn = draw_negatives(pool, shape.negatives, wanted, rng)
    if len(drawn) < wanted.count:
        raise DataError(
            f"expected {wanted.count} items that user {user_id!r} never touched, got {len(drawn)} in a catalogue of "
            f"{len(pool.item_ids)}; ask for fewer candidates"
        )
    candidates = (target.item_id, *(pool.item_ids[number] for number in drawn))
    return RankRequest(
        request_id=f"{shape.split}-{user_id}-{at}",
        candidates=tuple(candidates[slot] for slot in rng.permutation(len(candidates))),
        history=tuple(_event(row, shape.review_history) for row in before),
        user_id=user_id,
        positive=target.item_id,
    )


def _event(row: Interaction, review_history: bool) -> Event:
    return Event(text=row.text) if review_history and row.text else Event(item_id=row.item_id)


def _hash(seed: int, user_id: UserId) -> int:
    return int.from_bytes(blake3(f"{seed} {user_id}".encode()).digest()[:8], "big")


def named_items(requests: Iterable[RankRequest]) -> list[ItemId]:
    """Every item that the requests name, as a candidate or an event, once."""
    named = (
        item_id
        for request in requests
        for item_id in (*request.candidates, *(e.item_id for e in request.history if e.item_id is not None))
    )
    return list(dict.fromkeys(named))
