"""When the guard's monitor steps, where to, and when it must not. Losses alone, no engine."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rcllm.core.ranking import Level
from rcllm.errors import ConfigError
from rcllm.fidelity.monitor import DriftMonitor, GuardEvent, GuardPolicy, rank_loss

LADDER = tuple(map(Level.parse, ("blocks", "tail(0.2)", "exact")))
POLICY = GuardPolicy(LADDER, target=0.05, margin=0.02, dwell=300)


def drive(
    monitor: DriftMonitor, loss: float | None, cheaper: float | None = None, most: int = 5000
) -> GuardEvent | None:
    """The same losses again and again, until something happens."""
    for i in range(most):
        if event := monitor.observe(loss, cheaper, float(i)):
            return event
    return None


def test_the_first_rung() -> None:
    monitor = DriftMonitor(POLICY, "any")
    assert (monitor.level, monitor.cheaper) == (LADDER[0], None)
    started = DriftMonitor(replace(POLICY, start=1), "any")
    assert (started.level, started.cheaper) == (LADDER[1], LADDER[0])


def test_drift_climbs_rung_by_rung() -> None:
    monitor = DriftMonitor(POLICY, "some kind")
    first = drive(monitor, 0.4)
    assert first is not None
    assert (first.requests, first.kind, first.from_level, first.to_level) == (
        "some kind",
        "trip",
        *map(str, LADDER[:2]),
    )
    assert first.mean_loss == pytest.approx(0.4)
    assert first.num_samples == first.time_s + 1 <= 10
    assert first.e_value >= 1 / POLICY.alpha
    second = drive(monitor, 0.4)
    assert second is not None
    assert (second.kind, second.to_level, second.num_samples) == ("trip", "exact", first.num_samples)
    last = drive(monitor, 0.4)
    assert last is not None
    assert (last.kind, last.from_level, last.to_level) == ("no_rung_left", "exact", "exact")
    assert monitor.level == LADDER[-1]


def test_a_loss_at_the_target_is_fine() -> None:
    assert drive(DriftMonitor(POLICY, "any"), POLICY.target, most=10_000) is None


def test_back_after_evidence_and_dwell() -> None:
    monitor = DriftMonitor(replace(POLICY, start=1), "any")
    back = drive(monitor, 0.0, 0.0)
    assert back is not None
    assert (back.kind, back.from_level, back.to_level) == ("step_back", "tail(0.2)", "blocks")
    assert back.num_samples == POLICY.dwell  # evidence came before
    assert back.mean_loss == 0.0
    soon = drive(DriftMonitor(replace(POLICY, start=1, dwell=0), "any"), 0.0, 0.0)
    assert soon is not None
    assert 50 < soon.num_samples < POLICY.dwell
    assert soon.e_value >= 1 / POLICY.alpha_back


@pytest.mark.parametrize("cheaper", [POLICY.target - POLICY.margin, POLICY.target - 0.001, POLICY.target + 0.001])
def test_no_way_back_within_the_margin(cheaper: float) -> None:
    """Hysteresis: a level that lies between target - margin and target is kept when in use, and not taken up anew."""
    assert drive(DriftMonitor(replace(POLICY, start=1, dwell=0), "any"), 0.0, cheaper, most=5000) is None


def test_a_level_at_the_edge_does_not_flap() -> None:
    """Noisy losses whose means lie on either side of the target: one trip, and no step back in 10,000 samples."""
    draw = np.random.default_rng(0)
    monitor = DriftMonitor(POLICY, "any")
    events: list[GuardEvent] = []
    for i in range(10_000):
        edge = float(draw.beta(1.6, 18.4))  # mean 0.08
        losses = (edge, None) if monitor.cheaper is None else (0.01, edge)
        if event := monitor.observe(*losses, float(i)):
            events.append(event)
    assert [event.kind for event in events] == ["trip"]


def test_there_and_back_when_the_drift_ends() -> None:
    monitor = DriftMonitor(POLICY, "any")
    kinds = []
    for i in range(2000):
        blocks, tail = (0.4, 0.01) if i < 200 else (0.005, 0.005)
        losses = (blocks, None) if monitor.level == LADDER[0] else (tail, blocks)
        if event := monitor.observe(*losses, float(i)):
            kinds.append(event.kind)
    assert kinds == ["trip", "step_back"]
    assert monitor.level == LADDER[0]


def test_missing_losses_are_no_evidence() -> None:
    monitor = DriftMonitor(replace(POLICY, start=1, dwell=0), "any")
    assert drive(monitor, None, None, most=1000) is None
    assert (monitor.drift.num_samples, monitor.recovery.num_samples) == (0, 0)
    assert math.isnan(monitor.drift.mean_loss)


@pytest.mark.parametrize(
    ("full", "served", "wanted"),
    [
        ([3.0, 2.0, 1.0], [30.0, 20.0, 10.0], 0.0),
        ([3.0, 2.0, 1.0], [1.0, 2.0, 3.0], 1.0),
        ([4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 1.0, 2.0], 1 / 6),  # one of six pairs
        ([3.0, 2.0, 1.0], [1.0, 1.0, 1.0], 0.5),  # the order is lost
        ([3.0, 2.0, 1.0], [1.0, math.nan, 1.0], 1.0),
        ([3.0, 2.0, 1.0], [1.0, math.inf, 2.0], 1.0),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], None),  # nothing to lose
        ([1.0], [2.0], None),
        ([1.0, math.nan], [2.0, 1.0], None),
    ],
)
def test_loss_of_a_ranking(full: list[float], served: list[float], wanted: float | None) -> None:
    assert rank_loss(full, served) == (None if wanted is None else pytest.approx(wanted))


@pytest.mark.parametrize(
    "wrong",
    [
        {"ladder": ()},
        {"ladder": (Level("auto"),)},
        {"start": 3},
        {"margin": 0.0},
        {"margin": 0.05},
        {"target": 1.0},
        {"alpha": 0.0},
        {"alpha_back": 1.0},
        {"dwell": -1},
    ],
)
def test_policies_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(POLICY, **wrong)
