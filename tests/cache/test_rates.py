"""Fetch or compute: by rates that are learned, remembered, and never without hope."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rcllm.cache.below import Below
from rcllm.cache.lookup import Located, Lookup
from rcllm.cache.rates import Rate, Rates
from rcllm.core.ranking import ContentKey
from rcllm.store.codec import encode
from rcllm.store.contract import Found, Stored
from rcllm.store.memory import MemoryStore

A, B, C = (ContentKey(bytes([n]) * 32) for n in range(3))


@given(st.lists(st.tuples(st.floats(1, 1e9), st.floats(1e-6, 10)), min_size=1, max_size=50))
def test_a_rate_lies_between_those_that_were_seen(seen: list[tuple[float, float]]) -> None:
    rate = Rate(5.0)
    for amount, seconds in seen:
        rate.saw(amount, seconds)
    each = [amount / seconds for amount, seconds in seen]
    assert min(each) * (1 - 1e-9) <= rate.per_s <= max(each) * (1 + 1e-9)


def test_a_rate_follows_what_changed() -> None:
    rate = Rate(1.0)
    for _ in range(100):
        rate.saw(100.0, 1.0)
    for _ in range(60):
        rate.saw(10.0, 1.0)
    assert rate.per_s == pytest.approx(10.0, rel=0.05)
    assert rate.ms(10.0) == pytest.approx(1000.0, rel=0.05)


def test_nothing_is_learned_from_nothing() -> None:
    rate = Rate(3.0)
    for amount, seconds in ((0.0, 1.0), (1.0, 0.0)):
        rate.saw(amount, seconds)
    assert (rate.per_s, rate.timed_s) == (3.0, 0.0)


def test_what_is_passed_over_is_tried_again() -> None:
    rate = Rate(1e9)
    rate.saw(1e3, 1.0)  # one bad moment
    steps = 0
    while rate.per_s < 1e6:
        rate.hope()
        steps += 1
    assert steps < 1000


def test_a_block_is_read_where_that_is_sooner() -> None:
    lookup = Lookup({A: Located("disk", 10, 1.0), B: Located("shared", 10, 9.0), C: Located("device", 10, 0.0)}, 4)
    against = lookup.against({A: 5.0, B: 5.0, C: 5.0})
    assert [key in against for key in (A, B, C)] == [True, False, True]
    assert (against.dear, against.erasures) == (frozenset({B}), 4)
    assert lookup.against({A: 5.0}) is lookup


def test_rates_are_remembered_where_they_were_measured(tmp_path: Path) -> None:
    rates, path = Rates(), tmp_path / "rates.json"
    rates.bytes_of["disk"].saw(4e9, 2.0)
    rates.save(path)
    again = Rates()
    again.load(path)
    assert again.bytes_of["disk"].per_s == 2e9
    assert again.bytes_of["shared"].per_s == Rates().bytes_of["shared"].per_s
    assert "disk 2.00 GB/s," in again.told()
    assert "shared 0.10 GB/s (a first guess)" in again.told()
    assert rates.told() == again.told()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"disk_bytes_per_s": "fast"}', '{"disk_bytes_per_s": -1}', "\udcff"])
def test_a_file_that_says_nothing_useful_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rates.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    rates = Rates()
    rates.load(path)
    assert rates.told() == Rates().told()


def test_what_a_look_up_takes_belongs_to_the_read_that_follows() -> None:
    """A regression: a cold disk looked 13 times as fast as it was, since its look-up had brought the pages in."""
    now = [0.0]

    class Slow(MemoryStore):
        def lookup_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Found]:
            now[0] += 1.0
            return super().lookup_many(keys)

    store, rates = Slow(1 << 20), Rates()
    data = encode(torch.zeros(1, 2, 1, 4, 2))
    store.put_many({A: Stored(data, 1.0, None)})
    below = Below(store, "", rates, lambda: now[0])
    below.lookup_many([A])
    below.read_many([A])
    assert rates.bytes_of["host"].per_s == pytest.approx(1 * 2 * 1 * 4 * 2 * 4 / 1.0)
