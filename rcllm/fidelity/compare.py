"""Measures reuse levels against full recompute on real requests, one at a time and interleaved.

Knows nothing of terminals or files. Invariant: every figure of a row was measured in this run on the requests given.
All levels of a request run before the next request, in an order that rotates, so that a slow moment hits all alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rcllm.core.ranking import Level, RankOptions, RankRequest, RankResponse
from rcllm.engine.engine import Engine
from rcllm.errors import DataError
from rcllm.fidelity.measures import agreement, ndcg

TOP = 10  # NDCG@10
FULL, EXACT = Level("full"), Level("exact")


@dataclass(frozen=True, slots=True)
class LevelRow:
    """One level under one read-out, over all requests."""

    readout: str
    level: str
    num_requests: int
    prompt_tokens: float  # median
    fresh_tokens: float  # median
    ttft_p50_ms: float
    ttft_p90_ms: float
    speedup_full: float  # P50 of full recompute over this P50
    speedup_exact: float  # P50 of prefix caching over this P50
    tau: float  # mean Kendall τ with full recompute; NaN where no request ranks anything
    top1: float  # share of requests with the same best candidate as full recompute
    ndcg: float  # mean NDCG@10 of the item that the user did choose; NaN where no request knows it
    ndcg_error: float  # standard error of that mean
    tokens_computed: int  # of missing blocks, within the measured time: 0 where the cache was warm


@dataclass(frozen=True, slots=True)
class _Measured:
    response: RankResponse
    ms: float


def compare_levels(
    engine: Engine,
    requests: Sequence[RankRequest],
    levels: Sequence[Level],
    options: RankOptions,
    *,
    on_request: Callable[[int], None] = lambda done: None,
) -> list[LevelRow]:
    """One row per level; `full` and `exact` (prefix caching), which the others are held against, are always there.

    Users are left out once what is made for them is there, so that no request finds its own history from before: the
    prefix cache holds the instruction, as for a user who did something since the last visit. One unmeasured round comes
    first. Raises DataError where there is no request.
    """
    if not requests:
        raise DataError("there are no requests to measure: expected one or more")
    requests = [engine.prompter.completed(request) for request in requests]
    levels = list(dict.fromkeys([FULL, EXACT, *levels]))
    _round(engine, requests[0], levels, options)
    rounds: list[dict[Level, _Measured]] = []
    for done, request in enumerate(requests):
        turn = done % len(levels)
        rounds.append(_round(engine, request, [*levels[turn:], *levels[:turn]], options))
        on_request(done + 1)
    p50 = {level: _quantile([measured[level].ms for measured in rounds], 50) for level in levels}
    return [_row(requests, rounds, level, p50) for level in levels]


def _round(
    engine: Engine, request: RankRequest, levels: Sequence[Level], options: RankOptions
) -> dict[Level, _Measured]:
    measured: dict[Level, _Measured] = {}
    for level in levels:
        asked = replace(request, user_id=None, options=replace(options, level=level))
        start = time.perf_counter()
        response = engine.rank(asked)
        measured[level] = _Measured(response, (time.perf_counter() - start) * 1e3)
    return measured


def _row(
    requests: Sequence[RankRequest], rounds: Sequence[dict[Level, _Measured]], level: Level, p50: dict[Level, float]
) -> LevelRow:
    responses = [measured[level].response for measured in rounds]
    receipts = [response.receipt for response in responses]
    agreements = [agreement(m[FULL].response.scores, m[level].response.scores) for m in rounds]
    gains = [
        ndcg(response.order, request.candidates.index(request.positive), TOP)
        for request, response in zip(requests, responses, strict=True)
        if request.positive in request.candidates
    ]
    return LevelRow(
        readout=receipts[0].readout,
        level=str(level),
        num_requests=len(rounds),
        prompt_tokens=_quantile([receipt.num_tokens for receipt in receipts], 50),
        fresh_tokens=_quantile([receipt.num_fresh for receipt in receipts], 50),
        ttft_p50_ms=p50[level],
        ttft_p90_ms=_quantile([measured[level].ms for measured in rounds], 90),
        speedup_full=p50[FULL] / p50[level],
        speedup_exact=p50[EXACT] / p50[level],
        tau=_mean([found.tau for found in agreements if not math.isnan(found.tau)]),
        top1=_mean([float(found.top1) for found in agreements]),
        ndcg=_mean(gains),
        ndcg_error=float(np.std(gains, ddof=1) / math.sqrt(len(gains))) if len(gains) > 1 else math.nan,
        tokens_computed=sum(receipt.num_computed for receipt in receipts),
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _quantile(values: Sequence[float], percent: int) -> float:
    return float(np.percentile(values, percent))
