"""Requests made from a data set, to try placements where no log of requests is at hand.

Knows nothing of nodes. Invariant: what a placement is made from and what it is judged by share no user (split `user`)
or no moment (split `time`); the source of candidates sees the first part alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rcllm.cluster.candidates import SOURCES
from rcllm.cluster.options import TrialConfig
from rcllm.cluster.statistics import IntArray, Requests, incidence, ragged
from rcllm.core.ranking import Interaction, ItemId, UserId
from rcllm.data import Dataset, histories, split_of
from rcllm.errors import DataError


@dataclass(frozen=True, slots=True)
class Trial:
    """Requests of the past, to make a placement from, and held-out ones to judge it by."""

    item_ids: tuple[ItemId, ...]
    past: Requests
    held_out: Requests


@dataclass(frozen=True, slots=True)
class _Cases:
    """Whole histories to learn candidates from, and histories as they were when requests came."""

    training: Sequence[Sequence[int]]
    past: Sequence[Sequence[int]]
    held_out: Sequence[Sequence[int]]


def make_trial(dataset: Dataset, config: TrialConfig) -> Trial:
    """Requests of `config.candidates` items each. Raises DataError where nothing is left on one side."""
    item_ids = tuple(dataset.catalogue)
    numbers = {item_id: number for number, item_id in enumerate(item_ids)}
    rows = histories(dataset.interactions)
    cases = (_by_user if config.split == "user" else _by_time)(rows, numbers, config)
    if not cases.past or not cases.held_out:
        raise DataError(
            f"{dataset.name}: split by {config.split}, there are {len(cases.past):,} requests to learn from and "
            f"{len(cases.held_out):,} to judge by; a user needs 3 events or more. Give more data, or split otherwise"
        )
    touched = incidence(ragged([np.unique(np.array(items, np.int64)) for items in cases.training]), len(item_ids))
    find, random = SOURCES[config.source](touched.astype(np.float64)), np.random.default_rng(config.seed)

    def asked(found: Sequence[Sequence[int]]) -> Requests:
        return find(ragged([_last(items, config.history) for items in found]), config.candidates, random)

    return Trial(item_ids, asked(cases.past), asked(cases.held_out))


def _last(items: Sequence[int], count: int) -> IntArray:
    return np.unique(np.array(items[-count:], dtype=np.int64))


def _by_user(
    rows: Mapping[UserId, Sequence[Interaction]], numbers: Mapping[ItemId, int], config: TrialConfig
) -> _Cases:
    """Four users in five train; the others make a request each, before their last event."""
    named = {user: [numbers[row.item_id] for row in events] for user, events in rows.items()}
    training = [items for user, items in named.items() if split_of(user) == "train"]
    others = [items for user, items in named.items() if split_of(user) != "train"]
    past = [items[:-back] for back in range(1, config.per_user + 1) for items in training if len(items) - back >= 2]
    return _Cases(training, past, [items[:-1] for items in others if len(items) > 2])


def _by_time(
    rows: Mapping[UserId, Sequence[Interaction]], numbers: Mapping[ItemId, int], config: TrialConfig
) -> _Cases:
    """What was before a moment trains; the first new event after it is a request of its user. Needs a clock."""
    times = [row.timestamp for events in rows.values() for row in events]
    moment = float(np.quantile(times, 1.0 - config.time_share)) if times else 0.0
    training, past, held_out = [], [], []
    for events in rows.values():
        items = [numbers[row.item_id] for row in events]
        num_before = sum(row.timestamp < moment for row in events)
        if num_before:
            training.append(items[:num_before])
        past += [items[: num_before - back] for back in range(1, config.per_user + 1) if num_before - back >= 2]
        if 2 <= num_before < len(items):
            held_out.append(items[:num_before])
    return _Cases(training, past, held_out)
