"""Events come in their defined order, and time does not go back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcllm.sim.loop import EventKind, Loop


def test_events_at_one_moment_go_by_their_kind_and_then_by_when_they_were_scheduled() -> None:
    loop, seen = Loop(), list[str]()
    for kind in reversed(EventKind):
        for turn in ("first", "second"):
            loop.at(1.0, kind, seen.append, f"{kind.name} {turn}")
    loop.run()
    assert seen == [f"{kind.name} {turn}" for kind in EventKind for turn in ("first", "second")]


def test_the_order_of_kinds_is_the_one_that_is_documented() -> None:
    names = "NODE PASS_END FETCHED UPDATE VIEW ARRIVAL PASS_START"
    assert [kind.name for kind in sorted(EventKind)] == names.split()


def test_an_event_may_schedule_another_at_the_same_moment() -> None:
    loop, seen = Loop(), list[float]()
    loop.at(2.0, EventKind.ARRIVAL, lambda _: loop.at(2.0, EventKind.NODE, lambda _: seen.append(loop.now)))
    loop.run()
    assert seen == [2.0]
    assert (loop.is_empty, loop.num_events) == (True, 2)


def test_time_does_not_go_back() -> None:
    loop = Loop()
    loop.at(2.0, EventKind.ARRIVAL, lambda _: None)
    loop.run()
    with pytest.raises(AssertionError, match="scheduled at 2"):
        loop.at(1.0, EventKind.ARRIVAL, lambda _: None)


def test_a_run_stops_where_it_is_told_to() -> None:
    loop, seen = Loop(), list[int]()
    for time in (1, 2, 3):
        loop.at(time, EventKind.ARRIVAL, seen.append, time)
    loop.run(until_s=2)
    assert seen == [1, 2]


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(list(EventKind))), max_size=40))
def test_any_schedule_runs_sorted(events: list[tuple[int, EventKind]]) -> None:
    loop, seen = Loop(), list[tuple[int, int, int]]()
    for number, (time, kind) in enumerate(events):
        loop.at(time, kind, seen.append, (time, int(kind), number))
    loop.run()
    assert seen == sorted(seen)
    assert len(seen) == len(events)
