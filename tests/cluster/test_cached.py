"""Caches beside a placement: least recently used first, within room, and known to routers."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from rcllm.cluster.cached import CachedHoldings
from rcllm.cluster.placement import PlacedHoldings
from rcllm.cluster.view import NOWHERE, Held, RoutedBlock
from tests.cluster.made import placement_of


def blocks(*items: int) -> tuple[RoutedBlock, ...]:
    return tuple(RoutedBlock(f"i{item}", 1, 1) for item in items)


def test_a_node_keeps_what_it_used_and_drops_the_oldest() -> None:
    """Node 0 owns item 0 and has room for two more."""
    holdings = CachedHoldings(PlacedHoldings.of(placement_of([0, 1, 1, 1], [[], []], 3)))
    holdings.served(0, blocks(0, 1, 2))
    assert holdings.held("i1") == Held((0, 1))
    holdings.served(0, blocks(1, 3))
    assert holdings.held("i2") == Held((1,)), "item 1 was used since, item 2 was not"
    assert holdings.held("i3") == Held((0, 1))
    assert holdings.bytes_of(0) == {"replicated": 0, "sharded": 1, "halo": 0, "cached": 2}
    holdings.check()


def test_what_is_placed_is_not_cached() -> None:
    holdings = CachedHoldings(PlacedHoldings.of(placement_of([0, 1, 1], [[1], []], 5, replicated=[2])))
    holdings.served(0, blocks(0, 1, 2))
    assert holdings.bytes_of(0)["cached"] == 0


def test_what_nobody_holds_is_kept_by_who_computed_it() -> None:
    holdings = CachedHoldings(PlacedHoldings.of(placement_of([0], [[], []], 2)))
    assert holdings.held("stranger") is NOWHERE
    holdings.served(1, (RoutedBlock("stranger", 2, 1),))
    assert holdings.held("stranger") == Held((1,))
    holdings.served(1, (RoutedBlock("too large", 3, 1),))
    assert holdings.held("too large") == NOWHERE


def test_a_lost_cache() -> None:
    holdings = CachedHoldings(PlacedHoldings.of(placement_of([0, 1], [[], []], 3)))
    holdings.served(0, blocks(1))
    holdings.drop(0)
    assert holdings.held("i1") == Held((1,))
    holdings.check()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.sets(st.integers(0, 9), max_size=4)), max_size=40))
def test_caches_fit_and_agree_with_what_is_told(served: list[tuple[int, set[int]]]) -> None:
    placement = placement_of([0, 0, 1, 1, 2, 2, 0, 1], [[2], [], []], 5)
    holdings = CachedHoldings(PlacedHoldings.of(placement))
    for node, items in served:
        holdings.served(node, blocks(*sorted(items)))
        holdings.check()
