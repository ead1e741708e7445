"""Statistics, placements and requests that tests draw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from rcllm.cluster.placement import Placement, Room
from rcllm.cluster.statistics import Requests, Statistics, collect, ragged
from rcllm.core.ranking import ItemId


def names(count: int) -> tuple[ItemId, ...]:
    return tuple(ItemId(f"i{number}") for number in range(count))


def statistics_of(rows: Sequence[Sequence[int]], sizes: Sequence[int]) -> Statistics:
    return collect(ragged(rows), names(len(sizes)), sizes)


def clustered(num_groups: int, group: int, requests: int, seed: int = 0, size: int = 5) -> tuple[Requests, int]:
    """Requests that draw `size` items from one group each, now and then one from elsewhere; and how many items."""
    random = np.random.default_rng(seed)
    num_items = num_groups * group
    rows = []
    for _ in range(requests):
        items = random.choice(group, size, replace=False) + group * random.integers(num_groups)
        items[0] = random.integers(num_items) if random.random() < 0.2 else items[0]
        rows.append(np.unique(items))
    return ragged(rows), num_items


@st.composite
def logs(draw: st.DrawFn) -> Statistics:
    """Few items of different sizes, and any requests for them; some items may never be asked for."""
    num_items = draw(st.integers(1, 24))
    rows = draw(st.lists(st.sets(st.integers(0, num_items - 1), min_size=1, max_size=6), max_size=30))
    sizes = draw(st.lists(st.integers(1, 9), min_size=num_items, max_size=num_items))
    return statistics_of([sorted(row) for row in rows], sizes)


def placement_of(
    owner: Sequence[int], halos: Sequence[Sequence[int]], node_bytes: int, replicated: Sequence[int] = ()
) -> Placement:
    """Items of one byte."""
    mask = np.zeros(len(owner), np.bool_)
    mask[list(replicated)] = True
    return Placement(
        names(len(owner)),
        np.ones(len(owner), np.int64),
        Room(len(halos), node_bytes),
        mask,
        np.zeros(len(owner), np.bool_),
        np.array(owner, np.int64),
        tuple(np.array(halo, np.int64) for halo in halos),
        "by hand",
    )
