"""Decides, from losses alone, when a reuse level has drifted from full recompute and which rung to use instead.

Knows nothing of engines, threads or clocks, and never imports torch. Invariant: a step towards `exact` needs evidence
that the loss of the level in use exceeds the target. A step back needs evidence, gathered since the last step, that the
loss of the cheaper level is below the target by a margin. Both are valid whenever one looks (sequential.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from rcllm.core.ranking import Level, RankOptions
from rcllm.errors import ConfigError
from rcllm.fidelity.measures import Scores, agreement
from rcllm.fidelity.sequential import MeanTest

_NO_ORDER = 0.5  # the loss at τ = 0
Rungs = Mapping[Level, RankOptions]  # the levels of one kind of requests, cheapest first, and how each is asked for


@dataclass(frozen=True, slots=True)
class GuardPolicy:
    """When to step, and along which ladder."""

    ladder: tuple[Level, ...]  # cheapest first, up to `exact`, or `full` for when prefix caching itself may go wrong
    start: int = 0  # the rung that calibration chose; cheaper ones are tried by shadows before they serve
    target: float = 0.05  # highest mean loss that is fine; the loss is (1 - τ) / 2, so 0.05 is τ = 0.9
    alpha: float = 0.001  # chance that a level within the target is ever left, each time that it is taken up
    margin: float = 0.02  # a cheaper level must lose less than target - margin
    alpha_back: float = 0.01  # chance of stepping back to a level that loses more than that
    dwell: int = 200  # shadowed requests after a step before one may step back

    def __post_init__(self) -> None:
        if not self.ladder or Level("auto") in self.ladder:
            names = ", ".join(map(str, self.ladder)) or "none"
            raise ConfigError(f"the guard's ladder must name reuse levels, cheapest first, and not auto; got {names}")
        if not 0 <= self.start < len(self.ladder):
            raise ConfigError(f"start must be a rung of the ladder, 0 to {len(self.ladder) - 1}, got {self.start}")
        if not 0.0 < self.margin < self.target < 1.0:
            raise ConfigError(f"expected 0 < margin < target < 1, got margin {self.margin} and target {self.target}")
        if not (0.0 < self.alpha < 1.0 and 0.0 < self.alpha_back < 1.0 and self.dwell >= 0):
            raise ConfigError(
                f"expected alpha and alpha_back between 0 and 1 and dwell ≥ 0, got {self.alpha}, {self.alpha_back} and "
                f"{self.dwell}"
            )

    def rungs(self, options: RankOptions) -> Rungs:
        """The ladder, for requests with these options."""
        return {level: replace(options, level=level) for level in self.ladder}

    def along(self, ladder: tuple[Level, ...]) -> GuardPolicy:
        """The same on another ladder."""
        return replace(self, ladder=ladder, start=min(self.start, len(ladder) - 1))


@dataclass(frozen=True, slots=True)
class GuardEvent:
    """One step along the ladder, or the want of one."""

    time_s: float  # seconds since 1970
    requests: str  # the kind of requests it holds for
    kind: Literal["trip", "step_back", "no_rung_left"]  # no_rung_left: the most exact level itself has drifted
    from_level: str
    to_level: str
    e_value: float  # the evidence, at least 1/α
    num_samples: int  # shadowed requests behind it, since the step before
    mean_loss: float  # over them, of the level that is left, or of the one that is stepped back to
    recent_loss: float  # over the last 20 of them


class DriftMonitor:
    """The rung in use for one kind of requests. Not thread-safe, but `level` may be read from any thread."""

    def __init__(self, policy: GuardPolicy, requests: str) -> None:
        self._policy, self.requests = policy, requests
        self.drift = MeanTest(policy.target, "above", policy.alpha)
        self.recovery = MeanTest(policy.target - policy.margin, "below", policy.alpha_back)
        self.rung = policy.start
        self._since_step = 0

    @property
    def level(self) -> Level:
        """The reuse level that requests are served with now."""
        return self._policy.ladder[self.rung]

    @property
    def can_step(self) -> bool:
        """Whether there is another level; without one, there is nothing to guard."""
        return len(self.ladder) > 1

    @property
    def ladder(self) -> tuple[Level, ...]:
        """Cheapest first."""
        return self._policy.ladder

    @property
    def cheaper(self) -> Level | None:
        """To shadow beside it; None at the cheapest rung."""
        return self._policy.ladder[self.rung - 1] if self.rung else None

    def has_left(self, level: Level) -> bool:
        """Whether the level is on the ladder, and cheaper than the one in use."""
        return level in self.ladder[: self.rung]

    def observe(self, loss: float | None, cheaper_loss: float | None, time_s: float) -> GuardEvent | None:
        """Takes one request's losses of `level` and `cheaper`, None where there is none; the step that follows."""
        self._since_step += 1
        if loss is not None and self.drift.observe(loss):
            more_exact = min(self.rung + 1, len(self._policy.ladder) - 1)
            return self._step("trip" if more_exact > self.rung else "no_rung_left", more_exact, self.drift, time_s)
        recovered = cheaper_loss is not None and self.cheaper is not None and self.recovery.observe(cheaper_loss)
        if recovered and self._since_step >= self._policy.dwell:
            return self._step("step_back", self.rung - 1, self.recovery, time_s)
        return None

    def _step(
        self, kind: Literal["trip", "step_back", "no_rung_left"], rung: int, test: MeanTest, time_s: float
    ) -> GuardEvent:
        levels = str(self.level), str(self._policy.ladder[rung])
        losses = test.mean_loss, test.recent_loss
        event = GuardEvent(time_s, self.requests, kind, *levels, test.e_value, test.num_samples, *losses)
        self.rung, self._since_step = rung, 0
        self.drift.reset()
        self.recovery.reset()
        return event


def rank_loss(full_scores: Scores, scores: Scores) -> float | None:
    """(1 - τ) / 2 in [0, 1], with Kendall's τ-b of `scores` with those of full recompute.

    None where full recompute ranks nothing (one candidate, all equal): there is nothing to lose. Where it does but
    `scores` are all equal, the order is lost and the loss is that of τ = 0; where they are not finite, it is 1.
    """
    if len(full_scores) < 2 or not np.isfinite(full_scores).all() or np.ptp(full_scores) == 0:
        return None
    if not np.isfinite(scores).all():
        return 1.0
    tau = agreement(full_scores, scores).tau
    return _NO_ORDER if math.isnan(tau) else min(1.0, max(0.0, (1.0 - tau) / 2.0))
