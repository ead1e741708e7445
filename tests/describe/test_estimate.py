"""The dry run: what is counted, what is measured, and what a job of other rows would cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest

from rcllm.core.ranking import Event
from rcllm.describe.estimate import cost_per_million, estimate, hours_per_million
from rcllm.describe.job import Answer
from rcllm.describe.options import DescribeOptions
from rcllm.describe.profiles import Profile, Reject
from rcllm.errors import ConfigError, DataError, PromptTooLongError
from tests.describe.fake_writer import FakeWriter

OPTIONS = DescribeOptions(batch=2, max_tokens=5)


class Counter(FakeWriter):
    """Answers every profile with five tokens; prompts have ten tokens per event, and a hundred are too many."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[str]] = []
        self.seeds: list[int] = []

    def num_prompt_tokens(self, profile: Profile) -> int:
        if (tokens := 10 * len(profile.events)) > 100:
            raise PromptTooLongError(f"{tokens} tokens")
        return tokens

    def write(self, profiles: Sequence[Profile], seeds: Sequence[int]) -> Iterator[tuple[int, Answer]]:
        self.asked.append([profile.name for profile in profiles])
        self.seeds += seeds
        for place in range(len(profiles)):
            yield place, Answer("text", "length", 5, 10, 1)


def profiles(*num_events: int) -> list[Profile | Reject]:
    return [Profile(n + 1, f"u{n}", (Event(text="a lamp"),) * size) for n, size in enumerate(num_events)]


def clock(*seconds: float) -> Callable[[], float]:
    ticks = iter(seconds)
    return lambda: next(ticks)


def test_the_first_batch_does_not_count() -> None:
    writer = Counter()
    found = estimate(profiles(*[1] * 20), writer, OPTIONS, clock=clock(0.0, 2.0))
    assert writer.asked == [["u0", "u1"], ["u2", "u3", "u4", "u5"]]
    assert (found.rate.num_profiles, found.rate.num_tokens) == (4, 20)
    assert (found.seconds, found.answer_tokens) == (20 * 0.5, 20 * 5)
    assert len(set(writer.seeds)) == 6, "each row has a seed of its own"


def test_a_file_of_one_batch_is_measured_all_the_same() -> None:
    found = estimate(profiles(1, 3), Counter(), OPTIONS, clock=clock(0.0, 1.0))
    assert (found.rate.num_profiles, found.prompt_tokens, found.seconds) == (2, 40, 1.0)


def test_a_prompt_that_is_too_long_is_a_row_that_cannot_be_used() -> None:
    rows = profiles(1, 11, 2)
    found = estimate(rows, Counter(), OPTIONS, clock=clock(0.0, 1.0))
    assert (found.num_profiles, found.num_rejects, found.prompt_tokens) == (2, 1, 30)
    assert found.first_reject == Reject(2, "u1", "110 tokens")


def test_a_limit_ends_the_reading() -> None:
    def rows() -> Iterator[Profile | Reject]:
        yield from profiles(1, 1, 1)
        raise AssertionError("read beyond the limit")

    found = estimate(rows(), Counter(), replace(OPTIONS, limit=3), clock=clock(0.0, 1.0))
    assert found.num_profiles == 3


@pytest.mark.parametrize("rows", [[], [Reject(1, None, "no history"), Reject(2, None, "no history")]])
def test_no_row_that_can_be_used(rows: list[Profile | Reject]) -> None:
    with pytest.raises(DataError, match=f"nothing to describe in the input: {len(rows)} rows"):
        estimate(rows, Counter(), OPTIONS)


def test_options_are_checked_before_a_row_is_read() -> None:
    def rows() -> Iterator[Profile | Reject]:
        raise AssertionError("read")
        yield

    with pytest.raises(ConfigError, match="batch must be at least 1, got 0"):
        estimate(rows(), Counter(), replace(OPTIONS, batch=0))


def test_a_million_rows() -> None:
    assert hours_per_million(3.6) == pytest.approx(1000.0)
    assert cost_per_million(3.6, price_per_hour=2.0) == pytest.approx(2000.0)
