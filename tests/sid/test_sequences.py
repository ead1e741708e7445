"""Batches of token sequences."""

from dataclasses import replace

import numpy as np

from rcllm.sid.config import SequenceConfig
from rcllm.sid.sequences import Sequences
from rcllm.sid.vocabulary import Vocabulary
from tests.sid.toys import SIZES, TRAIN, toy_codes

PLAIN = SequenceConfig(max_items=8, batch_tokens=64, skip=0.0, shuffle=0.0)


def _sequences() -> Sequences:
    return Sequences.of(Vocabulary(SIZES), toy_codes())


def _rows(batches: list[np.ndarray]) -> list[list[int]]:
    return [[int(token) for token in row if token] for batch in batches for row in batch]


def test_every_history_once_within_the_token_budget() -> None:
    made = _sequences()
    batches = made.epoch(TRAIN, PLAIN, 0, 0)
    assert max(batch.size for batch in batches) <= PLAIN.batch_tokens
    assert sorted(_rows(batches)) == sorted(made.sequence(history).tolist() for history in TRAIN)
    long = made.epoch([list(range(12))], replace(PLAIN, batch_tokens=2), 0, 0)
    assert [batch.shape for batch in long] == [(1, 1 + 9 * 3)]  # one alone may exceed it


def test_epochs_differ_and_repeat() -> None:
    made, mixed = _sequences(), SequenceConfig(max_items=4, batch_tokens=64, skip=0.3, shuffle=0.5)
    first, again, second = (made.epoch(TRAIN, mixed, 7, epoch) for epoch in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert _rows(first) != _rows(second)
    assert max(map(len, _rows(first))) <= 1 + 5 * 3


def test_validation_takes_the_ends_as_they_are() -> None:
    made = _sequences()
    batches = made.last([list(range(12)), [3]], replace(PLAIN, max_items=2, skip=0.9, shuffle=1.0))
    assert _rows(batches) == [made.sequence([9, 10, 11]).tolist()]
