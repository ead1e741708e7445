"""Figures from records whose answers are known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from rcllm.fidelity.measures import QUALITY
from rcllm.fidelity.records import Record
from rcllm.fidelity.summary import compare, summarise, timing


def record(number: int, scores: tuple[float, ...], positive: int | None = 0, **changed: float | None) -> Record:
    return replace(Record(f"r{number}", scores, positive, 100, 20, 5.0), **changed)  # type: ignore[arg-type]


FULL = [record(n, (3.0, 2.0, 1.0), num_fresh=100, flops=20.0) for n in range(30)]


def test_the_same_scores_lose_nothing() -> None:
    found = summarise([record(n, (3.0, 2.0, 1.0)) for n in range(30)], FULL)
    assert found.num_requests == 30
    assert found.measures["tau"].mean == found.measures["top1"].mean == pytest.approx(1.0)
    assert found.measures["max_shift"].mean == 0.0
    assert all(found.deltas[name].low == found.deltas[name].high == 0.0 for name in QUALITY)
    assert (found.prompt_tokens, found.fresh_tokens, found.flops, found.flops_saved) == (100, 20, 5.0, 0.75)


def test_a_third_of_the_requests_loses_the_first_place() -> None:
    some = [record(n, (2.0, 3.0, 1.0) if n % 3 == 0 else (3.0, 2.0, 1.0)) for n in range(30)]
    found = summarise(some, FULL)
    loss = (1 / math.log2(3) - 1) / 3
    assert found.deltas["ndcg10"].mean == pytest.approx(loss)
    assert found.deltas["ndcg10"].low < loss < found.deltas["ndcg10"].high < 0
    assert found.deltas["hr1"].mean == pytest.approx(-1 / 3)
    assert found.deltas["hr3"].mean == 0.0
    assert found.measures["mrr"].mean == pytest.approx(1 - 1 / 6)
    assert found.measures["tau"].mean == pytest.approx(1 - 2 / 9)
    assert found.measures["top1"].mean == pytest.approx(2 / 3)
    assert found.measures["max_shift"].mean == pytest.approx(1 / 3)


def test_unknown_positives_and_constant_scores_are_not_counted() -> None:
    some = [record(n, (3.0, 2.0, 1.0) if n else (1.0, 1.0, 1.0), None if n % 2 else 0) for n in range(30)]
    full = [replace(reference, positive=one.positive) for reference, one in zip(FULL, some, strict=True)]
    found = summarise(some, full)
    assert found.measures["ndcg10"].count == found.deltas["ndcg10"].count == 15
    assert (found.measures["tau"].count, found.measures["top1"].count) == (29, 30)
    nobody = summarise([replace(one, positive=None) for one in some], [replace(one, positive=None) for one in full])
    assert math.isnan(nobody.deltas["ndcg10"].low)
    assert not math.isnan(nobody.measures["tau"].low)


def test_requests_must_be_the_same() -> None:
    with pytest.raises(ValueError, match="equal requests"):
        summarise(FULL[:3], FULL[1:4])
    with pytest.raises(ValueError, match="equal requests"):
        summarise([], [])


def test_compare_pairs_by_position() -> None:
    worse = [record(n, (1.0, 2.0, 3.0)) for n in range(30)]
    assert compare(worse, FULL)["ndcg10"].high == pytest.approx(0.5 - 1.0)
    assert compare(FULL, worse)["mrr"].low == pytest.approx(1 - 1 / 3)


def test_times_are_medians() -> None:
    def timed(*ms: float) -> list[Record]:
        return [replace(FULL[i], seconds=value / 1e3) for i, value in enumerate(ms)]

    found = timing(timed(1, 2, 90), timed(10, 20, 30), timed(4, 4, 4))
    assert (found.num_requests, found.ttft_ms) == (3, pytest.approx(2.0))
    assert (found.speedup_full, found.speedup_exact) == (pytest.approx(10.0), pytest.approx(2.0))
    assert math.isnan(timing(FULL, timed(1), timed(1)).ttft_ms)
    assert np.isnan(timing(timed(1), FULL, timed(1)).speedup_full)
