"""Counting of requests against slow twins; memory stays bounded, and what is forgotten is told."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcllm.cluster.statistics import CollectConfig, Collector, collect, incidence, ragged
from rcllm.errors import DataError
from tests.cluster.made import clustered, names
from tests.reference import placement as slow

rows = st.lists(st.sets(st.integers(0, 9), min_size=1, max_size=5).map(sorted), max_size=30)


@given(rows, st.integers(1, 4), st.integers(1, 7))
def test_pairs_and_heat_equal_the_slow_twin(requests: list[list[int]], neighbours: int, chunk: int) -> None:
    config = CollectConfig(max_neighbours=neighbours, chunk=chunk)
    found = collect(ragged(requests), names(10), [1] * 10, config)
    expected = slow.top_neighbours(slow.count_pairs(requests), neighbours)
    table = found.near.tocoo()
    pairs = zip(table.row.tolist(), table.col.tolist(), table.data.tolist(), strict=True)
    assert {(one, other): weight for one, other, weight in pairs} == expected
    assert found.heat.tolist() == [sum(item in request for request in requests) for item in range(10)]
    assert found.num_requests == len(requests) == len(found.sample)


def test_repeats_within_a_request_count_once() -> None:
    found = collect(ragged([[1, 1, 2]]), names(3), [1, 1, 1])
    assert found.heat.tolist() == [0, 1, 1]
    assert found.near.toarray()[1].tolist() == [0, 0, 1]


def test_the_sample_is_bounded_uniform_and_repeatable() -> None:
    requests = ragged([[number] for number in range(1000)])
    config = CollectConfig(max_sample=100, chunk=64)
    first, again = (collect(requests, names(1000), [1] * 1000, config).sample for _ in range(2))
    assert len(first) == 100
    assert (first.items == again.items).all()
    assert 350 < first.items.mean() < 650, "not the first ones, nor the last"


def test_memory_is_bounded_and_what_was_forgotten_is_told() -> None:
    random = np.random.default_rng(0)
    collector = Collector(CollectConfig(max_neighbours=1, chunk=50))
    for _ in range(400):
        collector.add(random.choice(200, 20, replace=False))
    found = collector.finish(names(200), [1] * 200)
    assert collector.num_pruned > 0
    assert found.near.nnz <= 2 * 200
    clear, num_items = clustered(4, 5, 50)
    roomy = Collector()
    for place in range(len(clear)):
        roomy.add(clear[place])
    roomy.finish(names(num_items), [1] * num_items)
    assert roomy.num_pruned == 0


@pytest.mark.parametrize("sizes", [[1, 0], [1], [[1], [2]]])
def test_sizes_are_checked(sizes: object) -> None:
    with pytest.raises(DataError, match="expected one size of 1 byte or more for each of 2 items"):
        collect(ragged([[0, 1]]), names(2), sizes)  # type: ignore[arg-type]


def test_nothing_was_asked_for() -> None:
    found = collect(ragged([]), names(2), [1, 1])
    assert (found.num_requests, found.near.nnz, found.heat.sum()) == (0, 0, 0)


def test_incidence() -> None:
    assert incidence(ragged([[0, 2], [], [1]]), 3).toarray().tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
