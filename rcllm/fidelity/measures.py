"""How good a ranking is, and how close one scoring of a list is to another.

Knows nothing of engines, levels or requests, and never imports torch. Invariant: ties break by candidate order, as in
the engine; a measure that is not defined for its input is NaN, never a number that looks like agreement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Scores = Sequence[float] | npt.NDArray[np.float64]
NDCG_AT, HR_AT = (1, 5, 10, 20), (1, 3, 5, 10)
QUALITY = (*(f"ndcg{k}" for k in NDCG_AT), *(f"hr{k}" for k in HR_AT), "mrr")


@dataclass(frozen=True, slots=True)
class Agreement:
    """How close the scores of one list of candidates are to reference scores of the same list."""

    tau: float  # Kendall's tau-b, -1 to 1; NaN where either side ranks nothing
    top1: bool  # the same candidate is best
    max_shift: float  # largest |score - reference score|, in the scores' own unit


def agreement(reference_scores: Scores, scores: Scores) -> Agreement:
    """Compares `scores` with `reference_scores`, candidate by candidate.

    tau-b = (C - D) / sqrt((C + D + T_r)(C + D + T_s)) with C concordant and D discordant pairs, T_r and T_s pairs tied
    on one side alone (Kendall 1945, "The treatment of ties in ranking problems"). It is NaN for a single candidate and
    where all scores of a side are equal: there is no order to agree on. Raises ValueError for lists of unequal or no
    length.
    """
    reference, other = np.asarray(reference_scores, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if reference.shape != other.shape or reference.ndim != 1 or not len(reference):
        raise ValueError(f"expected two lists of equal length ≥ 1, got shapes {reference.shape} and {other.shape}")
    ranked = np.ptp(reference) > 0 and np.ptp(other) > 0  # also guards scipy, which warns about constant input
    tau = float(stats.kendalltau(reference, other, variant="b").statistic) if ranked else math.nan
    return Agreement(tau, bool(reference.argmax() == other.argmax()), float(np.abs(reference - other).max()))


def ndcg(order: Sequence[int], positive_index: int, k: int) -> float:
    """NDCG@k with one relevant candidate: 1 / log2(1 + rank) if its rank is at most k, else 0.

    With one relevant item the ideal DCG is 1 (Järvelin and Kekäläinen 2002). `order`: candidate indices, best first.
    """
    rank = _rank(order, positive_index)
    return 1.0 / math.log2(1 + rank) if rank <= k else 0.0


def hit_rate(order: Sequence[int], positive_index: int, k: int) -> float:
    """HR@k with one relevant candidate: 1 if its rank is at most k, else 0."""
    return float(_rank(order, positive_index) <= k)


def reciprocal_rank(order: Sequence[int], positive_index: int) -> float:
    """1 / rank of the relevant candidate; its mean over requests is MRR."""
    return 1.0 / _rank(order, positive_index)


def quality(order: Sequence[int], positive_index: int) -> tuple[float, ...]:
    """One value per name of QUALITY: NDCG@k, HR@k and the reciprocal rank."""
    gains = [ndcg(order, positive_index, k) for k in NDCG_AT]
    hits = [hit_rate(order, positive_index, k) for k in HR_AT]
    return (*gains, *hits, reciprocal_rank(order, positive_index))


def chance_ndcg(num_candidates: int, k: int) -> float:
    """Expected NDCG@k of a random order with one relevant candidate among `num_candidates`.

    Every rank is equally likely, so it is (1 / n) · sum over r = 1 … min(k, n) of 1 / log2(1 + r): exact, no sampling.
    """
    if num_candidates < 1:
        raise ValueError(f"expected one or more candidates, got {num_candidates}")
    return sum(1.0 / math.log2(1 + rank) for rank in range(1, min(k, num_candidates) + 1)) / num_candidates


def _rank(order: Sequence[int], positive_index: int) -> int:
    """From 1. Raises ValueError where the order lacks the candidate."""
    return list(order).index(positive_index) + 1
