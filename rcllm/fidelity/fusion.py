"""Late fusion: one ranking from two scores, with one weight that validation requests choose.

The plain way to use a score that a team already has, and what every richer way must beat. Knows nothing of engines, and
never imports torch. Invariant: whoever chooses the weight sees no request that is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rcllm.core.ranking import order
from rcllm.fidelity.measures import Scores, ndcg

FloatArray = npt.NDArray[np.float64]
WEIGHTS = tuple(round(0.05 * step, 2) for step in range(21))


@dataclass(frozen=True, slots=True)
class Scored:
    """One request, scored in two ways."""

    first: Scores
    second: Scores
    positive: int  # the candidate that the user chose


def fused(first: Scores, second: Scores, weight: float) -> FloatArray:
    """(1 - weight) · z(first) + weight · z(second), with z the standard score among the request's candidates."""
    return (1.0 - weight) * _standard(first) + weight * _standard(second)


def gains(asked: Sequence[Scored], weight: float) -> list[float]:
    """NDCG@10 of each request."""
    return [ndcg(order(fused(each.first, each.second, weight).tolist()), each.positive, 10) for each in asked]


def best_weight(validation: Sequence[Scored]) -> float:
    """The weight of WEIGHTS with the highest mean NDCG@10; of equal ones that nearest to one half."""
    return max(WEIGHTS, key=lambda weight: (round(float(np.mean(gains(validation, weight))), 9), -abs(weight - 0.5)))


def _standard(scores: Scores) -> FloatArray:
    """Mean zero and deviation one; zeros where all scores are equal."""
    values = np.asarray(scores, dtype=np.float64)
    spread = float(values.std())
    return (values - values.mean()) / spread if spread > 0 else np.zeros(len(values))
