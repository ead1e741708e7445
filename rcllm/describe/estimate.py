"""What a describing job would take: rows and prompt tokens counted, time and price from a few measured answers.

Knows nothing of models. Invariant: writes no file. Prompts of the first rows are counted one by one, and the others are
taken to be like them; so are the answers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rcllm.describe.job import Rate, Writer, row_seed
from rcllm.describe.options import DescribeOptions, check_options
from rcllm.describe.profiles import Profile, Reject
from rcllm.errors import DataError, RequestError

_COUNTED = 10_000  # profiles whose prompt tokens are counted
_MEASURED_BATCHES = 2  # after one that does not count
_HOUR, _MILLION = 3600.0, 1_000_000


@dataclass(frozen=True, slots=True)
class Estimate:
    num_profiles: int
    num_rejects: int  # rows that cannot be read; too long prompts among the first rows count, too
    first_reject: Reject | None
    prompt_tokens: float  # of all profiles; exact where all of them were counted
    num_counted: int  # profiles whose prompt tokens were counted
    rate: Rate  # of the measured answers

    @property
    def seconds(self) -> float:
        return self.num_profiles * self.rate.seconds_per_profile

    @property
    def answer_tokens(self) -> float:
        return self.num_profiles * self.rate.num_tokens / max(1, self.rate.num_profiles)


def estimate(
    rows: Iterable[Profile | Reject],
    writer: Writer,
    options: DescribeOptions,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Estimate:
    """Reads all rows and answers the first batches. Raises ConfigError, DataError for no row that can be described."""
    check_options(options)
    sample: list[Profile] = []
    num_profiles = num_rejects = tokens = num_counted = 0
    first: Reject | None = None
    for row in rows:
        if isinstance(row, Profile) and num_counted < _COUNTED:
            try:
                tokens += writer.num_prompt_tokens(row)
                num_counted += 1
            except RequestError as error:
                row = Reject(row.row, row.name, str(error))
        if isinstance(row, Reject):
            num_rejects += 1
            first = first or row
            continue
        num_profiles += 1
        if len(sample) < (1 + _MEASURED_BATCHES) * options.batch:
            sample.append(row)
        if num_profiles == options.limit:
            break
    if not sample:
        raise DataError(f"there is nothing to describe in the input: {num_rejects:,} rows, none of which can be used")
    rate = _measured(sample, writer, options, clock)
    return Estimate(num_profiles, num_rejects, first, tokens / num_counted * num_profiles, num_counted, rate)


def cost_per_million(seconds_per_profile: float, price_per_hour: float) -> float:
    """In the currency of the price, for a million profiles on one such machine."""
    return seconds_per_profile * _MILLION / _HOUR * price_per_hour


def hours_per_million(seconds_per_profile: float) -> float:
    """How many hours one such machine needs for a million profiles."""
    return cost_per_million(seconds_per_profile, 1.0)


def _measured(sample: list[Profile], writer: Writer, options: DescribeOptions, clock: Callable[[], float]) -> Rate:
    batches = [sample[start : start + options.batch] for start in range(0, len(sample), options.batch)]
    seeds = [[row_seed(options.seed, profile.name) for profile in batch] for batch in batches]
    if len(batches) > 1:  # the first call computes the instruction and plans
        deque(writer.write(batches.pop(0), seeds.pop(0)), maxlen=0)
    rest = [profile for batch in batches for profile in batch], [seed for each in seeds for seed in each]
    start = clock()
    answers = [answer for _, answer in writer.write(*rest)]
    return Rate(len(answers), sum(answer.num_tokens for answer in answers), clock() - start)
