"""Anytime-valid tests of the mean of a bounded loss, for a change that may come at any time.

A bettor stakes on each loss against the null hypothesis; capital of 1/α is evidence at level α, whenever one looks.
Knows nothing of what is lost. Invariant: under the null the capital (the e-value) is a nonnegative supermartingale that
starts at 1, so the chance that it ever reaches 1/α is at most α (Ville's inequality).
"""

from __future__ import annotations

import math
from collections import deque
from typing import Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Side = Literal["above", "below"]

# Shares of the largest stake that cannot bankrupt. No single one is good against every change; their mean capital is
# within a factor of 8 of the best, which costs ln 8 = 2.1 nats once.
_SHARES = np.array([0.99, 0.8, 0.6, 0.4, 0.25, 0.12, 0.06, 0.03])
_RECENT = 20  # losses in `recent_loss`
_RICHEST = 1e200  # capital is cut here, far beyond any 1/α, so that it never overflows; cutting keeps the invariant


class MeanTest:
    """Tests whether the mean of losses in [0, 1] is, from some sample on, `side` (above or below) of `bound`.

    Null hypothesis: given the past, the expected loss is never on that side of `bound`. Nothing else is assumed: the
    losses need be neither independent nor identically distributed. With d = loss - bound (negated for "below"), stakes
    λ_k below the one that could bankrupt (1 / bound, or 1 / (1 - bound)) and starts j = 1, 2, … of weight w_j,

        e_t = sum_j w_j · mean_k prod_{s = j … t} (1 + λ_k d_s),        a start that is still to come has capital 1.

    Each product is the betting capital of Waudby-Smith and Ramdas (2024), "Estimating means of bounded random variables
    by betting", JRSS-B 86(1), section 4. Starting one at every sample is the e-detector of Shin, Ramdas and Rinaldo
    (2024), "E-detectors", NEJSDS 2(2); there the starts have equal weights, which bounds the mean time between false
    alarms. Here the weights sum to 1, so the sum is an e-process and the chance of any false alarm, ever, is at most α.
    The price is the logarithm of the weight: w_j ≈ ln 2 / (j · ln² j), 14 nats at j = 10,000.
    """

    def __init__(self, bound: float, side: Side, alpha: float) -> None:
        if not (0.0 < bound < 1.0 and 0.0 < alpha < 1.0):
            raise ValueError(f"expected bound and alpha between 0 and 1, got {bound} and {alpha}")
        self.bound, self.side, self.alpha = bound, side, alpha
        self._stakes = stakes(bound, side)
        self.reset()

    def reset(self) -> None:
        """Forgets all samples; α holds anew from here."""
        self.num_samples, self._sum, self.e_value = 0, 0.0, 1.0
        self._capital = np.zeros(len(_SHARES))
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def observe(self, loss: float) -> bool:
        """Takes one loss; whether the evidence has reached 1/α. Raises ValueError outside [0, 1]."""
        if not 0.0 <= loss <= 1.0:
            raise ValueError(f"expected a loss in [0, 1], got {loss}")
        self.num_samples += 1
        self._sum += loss
        self._recent.append(loss)
        self._capital = _play(self._capital, self._stakes, np.asarray(loss - self.bound), self.num_samples)
        self.e_value = float(self._capital.mean()) + still_to_come(self.num_samples)
        return self.e_value >= 1.0 / self.alpha

    @property
    def mean_loss(self) -> float:
        """Over all samples since the start; NaN before the first."""
        return self._sum / self.num_samples if self.num_samples else math.nan

    @property
    def recent_loss(self) -> float:
        """Mean of the last 20 samples, for people: what a change that came late looks like. NaN before the first."""
        return sum(self._recent) / len(self._recent) if self._recent else math.nan


def e_values(losses: FloatArray, bound: float, side: Side) -> FloatArray:
    """What `MeanTest.e_value` is after each loss, for many streams at once: [streams, samples] to the same shape."""
    capital = np.zeros((len(losses), len(_SHARES)))
    found = np.empty(losses.shape)
    for i, column in enumerate(losses.T):
        capital = _play(capital, stakes(bound, side), column[:, None] - bound, i + 1)
        found[:, i] = capital.mean(axis=-1) + still_to_come(i + 1)
    return found


def stakes(bound: float, side: Side) -> FloatArray:
    """The λ_k, signed so that 1 + λ_k · (loss - bound) is the gain: positive against "above". Shape [stakes]."""
    return _SHARES / bound if side == "above" else -_SHARES / (1.0 - bound)


def still_to_come(num_samples: int) -> float:
    """Total weight of the starts after `num_samples`: 1 at 0, falling to 0. Start j has weight f(j - 1) - f(j)."""
    return 1.0 / math.log2(2 + num_samples)


def _play(capital: FloatArray, signed_stakes: FloatArray, deviation: FloatArray, num_samples: int) -> FloatArray:
    """One round for all starts so far, whose capital of one stake is kept as a sum: [..., stakes]."""
    started = still_to_come(num_samples - 1) - still_to_come(num_samples)
    return np.minimum((capital + started) * (1.0 + signed_stakes * deviation), _RICHEST)
