"""How alike the items are that share a code, compared with items at random: what codes are worth to a model.

Knows nothing of how codes were found. Invariant: the figures are means over all pairs, not over a sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Likeness:
    """Mean cosine of the vectors of two different items. Vectors are taken from the mean of all items."""

    shared: float  # items with the same code; NaN where no two items share one
    random: float  # any two items; NaN for a single item


def likeness(vectors: npt.NDArray[np.floating], codes: npt.NDArray[np.integer]) -> Likeness:
    """`vectors` [items, d], centred; `codes` [items]: one code each."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    unit = vectors / np.where(lengths > 1e-12, lengths, 1.0)
    return Likeness(_mean_cosine(unit, codes), _mean_cosine(unit, np.zeros_like(codes)))


def _mean_cosine(unit: npt.NDArray[np.float64], codes: npt.NDArray[np.integer]) -> float:
    """Over pairs with one code: |sum of a code's rows|² counts each of its pairs twice, and each row with itself."""
    rows = len(codes)
    counts = np.bincount(codes)
    if not (pairs := int((counts * (counts - 1)).sum())):
        return math.nan
    members = sparse.csr_array((np.ones(rows), codes, np.arange(rows + 1)), (rows, len(counts)))
    twice = float(((members.T @ unit) ** 2).sum()) - float((unit**2).sum())
    return twice / pairs
