"""From records to figures: the measures of a configuration with their intervals, its differences from full recompute,
and what it costs.

Knows nothing of engines and never imports torch. Invariant: everything is paired, request by request; a measure that
is not defined for a request is left out of its mean, and its interval says over how many requests it is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rcllm.core.ranking import order
from rcllm.fidelity.intervals import FloatArray, Interval, bootstrap
from rcllm.fidelity.measures import QUALITY, agreement, quality
from rcllm.fidelity.records import Record

CLOSENESS = ("tau", "top1", "max_shift")  # of the scores, against full recompute's


@dataclass(frozen=True, slots=True)
class Timing:
    """Time to the scores, one request at a time on a warm cache; NaN where a side was not timed."""

    num_requests: int
    ttft_ms: float  # median
    speedup_full: float  # median of full recompute over this median
    speedup_exact: float  # median of prefix caching over this median


@dataclass(frozen=True, slots=True)
class Summary:
    """What one configuration did over all requests: quality, agreement, cost."""

    num_requests: int
    measures: Mapping[str, Interval]  # QUALITY where the positive is known, and CLOSENESS
    deltas: Mapping[str, Interval]  # QUALITY minus full recompute's, paired
    prompt_tokens: float  # median
    fresh_tokens: float  # median
    flops: float  # mean per request
    flops_saved: float  # share of full recompute's
    timing: Timing | None = None


def summarise(records: Sequence[Record], reference: Sequence[Record], *, seed: int = 0) -> Summary:
    """Holds `records` against `reference`, the same requests in the same order, recomputed in full.

    Raises ValueError where the requests differ, or there are none.
    """
    if not records or [record.request for record in records] != [record.request for record in reference]:
        raise ValueError(f"expected records of equal requests, got {len(records)} and {len(reference)}")
    own, full = _quality(records), _quality(reference)
    close = [agreement(a.scores, b.scores) for a, b in zip(reference, records, strict=True)]
    columns = np.array([[found.tau, float(found.top1), found.max_shift] for found in close])
    found = bootstrap(np.hstack([own, own - full, columns]), seed=seed)
    count = len(QUALITY)
    flops = statistics.mean(record.flops for record in records)
    return Summary(
        num_requests=len(records),
        measures=dict(zip((*QUALITY, *CLOSENESS), found[:count] + found[2 * count :], strict=True)),
        deltas=dict(zip(QUALITY, found[count : 2 * count], strict=True)),
        prompt_tokens=statistics.median(record.num_tokens for record in records),
        fresh_tokens=statistics.median(record.num_fresh for record in records),
        flops=flops,
        flops_saved=1 - flops / statistics.mean(record.flops for record in reference),
    )


def compare(records: Sequence[Record], others: Sequence[Record], *, seed: int = 0) -> Mapping[str, Interval]:
    """QUALITY of `records` minus that of `others`, paired by position: two configurations on the same requests."""
    return dict(zip(QUALITY, bootstrap(_quality(records) - _quality(others), seed=seed), strict=True))


def timing(records: Sequence[Record], full: Sequence[Record], exact: Sequence[Record]) -> Timing:
    """Medians of requests that were timed; those of one configuration are compared with the others' of the same run."""
    own, all_fresh, prefix = (_median_ms(some) for some in (records, full, exact))
    return Timing(sum(record.seconds is not None for record in records), own, all_fresh / own, prefix / own)


def _quality(records: Sequence[Record]) -> FloatArray:
    """[requests, QUALITY]; NaN where no positive is known."""
    unknown = (math.nan,) * len(QUALITY)
    rows = [unknown if r.positive is None else quality(order(r.scores), r.positive) for r in records]
    return np.array(rows, dtype=np.float64)


def _median_ms(records: Sequence[Record]) -> float:
    seconds = [record.seconds for record in records if record.seconds is not None]
    return statistics.median(seconds) * 1e3 if seconds else math.nan
