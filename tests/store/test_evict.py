"""GreedyDual-Size on hand-made cases."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rcllm.core.ranking import ContentKey
from rcllm.store.evict import GreedyDual

A, B, C, D = (ContentKey(name) for name in (b"a", b"b", b"c", b"d"))


def victims(order: GreedyDual, pinned: tuple[ContentKey, ...] = ()) -> list[ContentKey]:
    gone = []
    while (victim := order.pop(pinned)) is not None:
        gone.append(victim)
    return gone


def filled(**costs: float) -> GreedyDual:
    order = GreedyDual()
    for name, cost in costs.items():
        order.touch(ContentKey(name.encode()), cost)
    return order


def test_the_cheapest_per_byte_goes_first() -> None:
    assert victims(filled(a=3.0, b=1.0, c=2.0)) == [B, C, A]


def test_equal_costs_go_in_order_of_last_use() -> None:
    order = filled(a=1.0, b=1.0, c=1.0)
    order.touch(A, 1.0)
    assert victims(order) == [B, C, A]


def test_what_is_not_used_ages() -> None:
    """b costs 5 to recompute, and yet goes before a block of cost 3 that came after the clock had risen to 4."""
    order = filled(a=4.0, b=5.0)
    assert order.pop(()) == A  # the clock is 4
    order.touch(C, 3.0)  # priority 7
    order.touch(D, 0.5)  # priority 4.5
    assert victims(order) == [D, B, C]


def test_a_use_lifts_a_block_over_the_clock() -> None:
    order = filled(a=4.0, b=5.0, c=4.5)
    assert order.pop(()) == A
    order.touch(C, 4.5)  # 8.5 now
    assert victims(order) == [B, C]


def test_pinned_blocks_stay_and_keep_their_place() -> None:
    order = filled(a=1.0, b=2.0, c=3.0)
    assert victims(order, (A, C)) == [B]
    order.check({A, C})
    assert victims(order) == [], "until they are released"
    order.release(C)
    order.release(A)
    order.check({A, C})
    assert victims(order) == [A, C]


def test_a_use_while_pinned_counts() -> None:
    order = filled(a=1.0, b=2.0, c=3.0)
    assert victims(order, (A, C)) == [B]  # the clock is 2
    order.touch(A, 1.5)  # 3.5 now, beyond C
    order.release(C)
    order.release(A)
    order.check({A, C})
    assert victims(order) == [C, A]


def test_what_is_forgotten_is_no_victim_and_may_come_back() -> None:
    order = filled(a=1.0, b=2.0)
    order.forget(A)
    order.forget(A)
    order.touch(A, 9.0)
    assert victims(order) == [B, A]


@given(st.lists(st.tuples(st.sampled_from(["touch", "forget", "pin", "unpin", "pop"]), st.integers(0, 5)), max_size=60))
def test_victims_are_those_of_looking_at_every_rank(steps: list[tuple[str, int]]) -> None:
    """exact"""
    order, ranks, pinned, clock, uses = GreedyDual(), dict[ContentKey, tuple[float, int]](), set[ContentKey](), 0.0, 0
    for what, number in steps:
        key = ContentKey(bytes([number]))
        if what == "touch":
            uses += 1
            ranks[key] = (clock + number, uses)
            order.touch(key, float(number))
        elif what == "forget":
            ranks.pop(key, None)
            order.forget(key)
        elif what == "pin":
            pinned.add(key)
        elif what == "unpin" and key in pinned:
            pinned.remove(key)
            order.release(key)
        elif what == "pop":
            wanted = min((each for each in ranks if each not in pinned), key=ranks.__getitem__, default=None)
            assert order.pop(pinned) == wanted
            clock = ranks.pop(wanted)[0] if wanted is not None else clock
        order.check(set(ranks))


def test_many_uses_do_not_grow_the_heap_without_bound() -> None:
    order = filled(a=1.0, b=2.0)
    for _ in range(10_000):
        order.touch(A, 1.0)
    assert len(order._heap) < 200
    order.check({A, B})
