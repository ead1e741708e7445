"""Bootstrap intervals against scipy's, and what they promise on cases with a known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from rcllm.fidelity import intervals
from rcllm.fidelity.intervals import bootstrap


@pytest.mark.parametrize("shape", ["normal", "skewed", "rare"])
@pytest.mark.parametrize("count", [25, 400])
def test_close_to_scipy(shape: str, count: int) -> None:
    rng = np.random.default_rng(3)
    draws = {"normal": rng.normal(size=count), "skewed": rng.exponential(size=count), "rare": rng.random(count) < 0.15}
    values = np.asarray(draws[shape], dtype=np.float64)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="BCa", rng=rng).confidence_interval
    (ours,) = bootstrap(values[:, None], seed=0)
    width = theirs.high - theirs.low
    assert ours.mean == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.08 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.08 * width)


def test_holds_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    found = bootstrap(rng.normal(0.3, 1.0, size=(60, 400)), seed=1)  # 400 samples of 60
    share = np.mean([interval.low <= 0.3 <= interval.high for interval in found])
    assert 0.91 <= share <= 0.98


def test_columns_are_paired() -> None:
    rng = np.random.default_rng(1)
    full = rng.normal(size=200)
    near = full - 0.01 + 0.001 * rng.normal(size=200)
    one, other, difference = bootstrap(np.stack([full, near, near - full], axis=1), seed=0)
    assert one.low < other.mean < one.high, "apart, they cannot be told from each other"
    assert difference.high < 0, "paired, they can"


def test_undefined_values_are_left_out_and_counted() -> None:
    rng = np.random.default_rng(2)
    known = rng.normal(size=80)
    holes = np.concatenate([known, np.full(40, math.nan)])
    table = np.stack([holes, np.full(120, math.nan), np.r_[1.0, np.full(119, math.nan)]], axis=1)
    some, none, one = bootstrap(table, seed=0)
    (alone,) = bootstrap(known[:, None], seed=0)
    assert (some.mean, some.count) == (pytest.approx(known.mean()), 80)
    assert some.high - some.low == pytest.approx(alone.high - alone.low, rel=0.15)
    assert none.count == 0
    assert all(math.isnan(value) for value in (none.mean, none.low, none.high))
    assert (one.mean, one.count) == (1.0, 1)
    assert math.isnan(one.low), "one value tells no spread"


@pytest.mark.parametrize("value", [0.0, 1.0, -0.37])
def test_equal_values_have_no_spread(value: float) -> None:
    (found,) = bootstrap(np.full((50, 1), value), seed=0)
    assert (found.low, found.high) == (pytest.approx(value), pytest.approx(value))
    assert found.low == found.high


def test_the_seed_decides() -> None:
    values = np.random.default_rng(5).normal(size=(40, 1))
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1) != bootstrap(values, seed=2)


def test_many_rows_are_resampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(6).normal(size=(50, 1))
    (whole,) = bootstrap(values, seed=0)
    monkeypatch.setattr(intervals, "_CELLS", 50 * 7)
    (parts,) = bootstrap(values, seed=0)
    assert parts.low == pytest.approx(whole.low, abs=0.05)
    assert parts.high == pytest.approx(whole.high, abs=0.05)
