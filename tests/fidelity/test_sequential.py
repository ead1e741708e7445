"""The tests of a mean: against their slow twin, and what they promise of false alarms and delays."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rcllm.fidelity.sequential import FloatArray, MeanTest, Side, e_values, stakes, still_to_come
from tests.reference.sequential import e_value

BOUND, ALPHA = 0.05, 0.001


def losses(mean: float, shape: tuple[int, ...], *, seed: int, coarse: bool = False) -> FloatArray:
    """Independent losses: all or nothing where `coarse`, else of a beta distribution."""
    draw = np.random.default_rng(seed)
    return (draw.random(shape) < mean).astype(float) if coarse else draw.beta(20 * mean, 20 * (1 - mean), shape)


@pytest.mark.parametrize("side", ["above", "below"])
@pytest.mark.parametrize("coarse", [False, True])
def test_equal_to_all_starts_played_anew(side: Side, coarse: bool) -> None:
    """exact, up to rounding"""
    stream = losses(0.1, (60,), seed=3, coarse=coarse)
    test = MeanTest(BOUND, side, ALPHA)
    vectorised = e_values(stream[None], BOUND, side)[0]
    for i, loss in enumerate(stream):
        test.observe(float(loss))
        wanted = e_value(stream[: i + 1].tolist(), BOUND, above=side == "above")
        assert test.e_value == pytest.approx(wanted, rel=1e-9)
        assert vectorised[i] == pytest.approx(wanted, rel=1e-9)
    assert test.num_samples == 60
    assert test.mean_loss == pytest.approx(stream.mean())
    assert test.recent_loss == pytest.approx(stream[-20:].mean())


@pytest.mark.parametrize("side", ["above", "below"])
def test_a_fair_game(side: Side) -> None:
    """At the bound itself the expected e-value stays 1: all outcomes of 5 coins, weighted by their probability."""
    expected = 0.0
    for outcome in range(2**5):
        coins = [float(outcome >> i & 1) for i in range(5)]
        chance = math.prod(BOUND if coin else 1 - BOUND for coin in coins)
        expected += chance * float(e_values(np.array([coins]), BOUND, side)[0, -1])
    assert expected == pytest.approx(1.0)


@pytest.mark.parametrize("side", ["above", "below"])
def test_no_loss_bankrupts(side: Side) -> None:
    gains = [1 + stakes(BOUND, side) * (loss - BOUND) for loss in (0.0, 1.0)]
    assert np.min(gains) > 0


def test_start_weights_sum_to_one() -> None:
    assert still_to_come(0) == 1.0
    weights = -np.diff([still_to_come(i) for i in range(1000)])
    assert (weights > 0).all()
    assert weights.sum() + still_to_come(999) == pytest.approx(1.0)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("side", ["above", "below"])
def test_false_alarms_are_as_rare_as_promised(side: Side, coarse: bool) -> None:
    """2,000 streams of 1,000 losses with their mean at the bound, the worst case of the null: at most 5 % ever alarm.

    Three standard errors of a share of 5 % are 1.5 %.
    """
    found = e_values(losses(BOUND, (2000, 1000), seed=5, coarse=coarse), BOUND, side)
    assert (found.max(axis=1) >= 1 / 0.05).mean() <= 0.05 + 0.015


def test_the_null_may_depend_on_the_past() -> None:
    """Losses that rise after good luck and fall after bad, but never above the bound in expectation."""
    draw = np.random.default_rng(2)
    streams = np.zeros((2000, 400))
    for i in range(400):
        chance = np.where(streams[:, :i].sum(axis=1) > BOUND * i, 0.5 * BOUND, BOUND)
        streams[:, i] = draw.random(2000) < chance
    assert (e_values(streams, BOUND, "above").max(axis=1) >= 1 / 0.05).mean() <= 0.05 + 0.015


def test_no_false_alarm_in_ten_thousand_clean_samples() -> None:
    """100 streams, mean 0.045 under a target of 0.05."""
    assert e_values(losses(0.045, (100, 10_000), seed=1), BOUND, "above").max() < 1 / ALPHA


@pytest.mark.parametrize(
    ("num_clean", "drifted", "coarse", "at_most"),
    [
        (0, 0.25, False, 15),
        (0, 0.10, False, 60),
        (10_000, 0.50, False, 15),
        (10_000, 0.25, False, 25),
        (10_000, 0.10, False, 100),
        (10_000, 0.25, True, 300),  # all or nothing: the least that a loss can tell
    ],
)
def test_a_late_drift_is_found_within(num_clean: int, drifted: float, coarse: bool, at_most: int) -> None:
    """Samples from the change of the mean (0.04 before) to the alarm at α = 0.001, over 50 streams."""
    clean = losses(0.04, (50, num_clean), seed=7, coarse=coarse)
    streams = np.concatenate([clean, losses(drifted, (50, at_most), seed=8, coarse=coarse)], axis=1)
    alarms = e_values(streams, BOUND, "above") >= 1 / ALPHA
    assert not alarms[:, :num_clean].any()
    assert alarms.any(axis=1).all()


def test_a_mean_below_the_bound_is_found() -> None:
    """Losses of mean 0.01 are told from 0.03 within 400 samples at α = 0.01, and those of 0.03 are not in 2,000."""
    assert (e_values(losses(0.01, (50, 400), seed=1), 0.03, "below") >= 100).any(axis=1).all()
    assert not (e_values(losses(0.03, (50, 2000), seed=1), 0.03, "below") >= 100).any()


def test_capital_never_overflows() -> None:
    test = MeanTest(BOUND, "above", ALPHA)
    assert [test.observe(1.0) for _ in range(500)][-1]
    assert math.isfinite(test.e_value)


def test_reset_forgets() -> None:
    test, untouched = MeanTest(BOUND, "above", ALPHA), MeanTest(BOUND, "above", ALPHA)
    test.observe(1.0)
    test.reset()
    assert math.isnan(test.mean_loss)
    for tested in (test, untouched):
        tested.observe(0.2)
    assert (test.e_value, test.num_samples) == (untouched.e_value, 1)


@pytest.mark.parametrize("loss", [-0.1, 1.1, math.nan])
def test_losses_are_bounded(loss: float) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        MeanTest(BOUND, "above", ALPHA).observe(loss)


@pytest.mark.parametrize(("bound", "alpha"), [(0.0, 0.1), (1.0, 0.1), (0.5, 0.0), (0.5, 1.0)])
def test_bounds_are_checked(bound: float, alpha: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        MeanTest(bound, "above", alpha)
