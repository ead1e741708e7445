"""The slow twin of `rcllm.fidelity.sequential`: every start's capital is played anew, from its own first sample."""

from __future__ import annotations

import math
from collections.abc import Sequence

SHARES = (0.99, 0.8, 0.6, 0.4, 0.25, 0.12, 0.06, 0.03)


def e_value(losses: Sequence[float], bound: float, *, above: bool) -> float:
    """The evidence after all of `losses`: a weighted mean over starts and stakes, each a product over its samples."""
    total, weights = 0.0, 0.0
    for start in range(1, len(losses) + 1):
        weight = 1 / math.log2(start + 1) - 1 / math.log2(start + 2)
        weights += weight
        for share in SHARES:
            stake = share / bound if above else share / (1 - bound)
            capital = 1.0
            for loss in losses[start - 1 :]:
                capital *= 1 + stake * (loss - bound if above else bound - loss)
            total += weight * capital / len(SHARES)
    return total + (1 - weights)
