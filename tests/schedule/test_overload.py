"""A bounded queue: who is taken in, who is told to come again, and when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcllm.config import ScheduleConfig
from rcllm.schedule.overload import refusal, too_late
from rcllm.schedule.work import Queue

OFF = ScheduleConfig()
LIMITED = ScheduleConfig(max_waiting=10, max_wait_ms=500.0)


@pytest.mark.parametrize(
    ("queue", "running_ms", "retry_after_s"),
    [
        pytest.param(Queue(), 0.0, None, id="nobody"),
        pytest.param(Queue(9, 9, 1, 400.0), 100.0, None, id="one-place-left"),
        pytest.param(Queue(10, 10, 1, 400.0), 10.0, 0.05, id="full: the next place comes in 10 + 40 ms"),
        pytest.param(Queue(10, 0, 2, 40.0), 0.0, None, id="full-of-others"),
        pytest.param(Queue(14, 4, 2, 160.0), 0.0, None, id="less-than-its-part"),
        pytest.param(Queue(14, 5, 2, 450.0), 30.0, 0.12, id="its-part"),
        pytest.param(Queue(300, 1, 300, 40.0), 0.0, 0.05, id="a-part-is-one-at-least"),
        pytest.param(Queue(9, 9, 1, 400.0), 101.0, 0.05, id="too-long"),
        pytest.param(Queue(3, 3, 1, 2500.0), 0.0, 2.0, id="much-too-long"),
        pytest.param(Queue(), 900.0, None, id="a-long-pass-runs-and-nobody-waits"),
    ],
)
def test_who_is_taken_in(queue: Queue, running_ms: float, retry_after_s: float | None) -> None:
    found = refusal(LIMITED, queue, running_ms)
    assert (found is None) == (retry_after_s is None)
    if found is not None:
        assert found.retry_after_s == pytest.approx(retry_after_s)
        assert "schedule.max_wait" in str(found)


queues = st.builds(
    Queue, st.integers(0, 10_000), st.integers(0, 10_000), st.integers(1, 100), st.floats(0, 1e7), st.integers(0, 10**6)
)


@given(queues, st.floats(0, 1e5))
def test_by_default_nobody_is_refused(queue: Queue, running_ms: float) -> None:
    assert refusal(OFF, queue, running_ms) is None


def test_what_would_be_in_time_without_the_others_is_told_how_long_to_wait() -> None:
    assert too_late(300.0, 900.0, 100.0).retry_after_s == pytest.approx(0.7)
    assert "take 100, more than the 300" in str(too_late(300.0, 900.0, 100.0))
