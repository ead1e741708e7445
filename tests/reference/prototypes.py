"""The slow, obvious twin of `rcllm.prototypes` (`lsh`, `lookup`): fp64, one word and one pair at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Word = tuple[int, int]  # token id, position bucket


def embed(matrix: npt.NDArray[np.float32], word: Word) -> npt.NDArray[np.float64]:
    """The token's row at unit length; pair i of its dimensions is turned by bucket · 10000^(-2i/d)."""
    token_id, bucket = word
    row = matrix[token_id].astype(np.float64)
    row = row / math.sqrt(sum(value * value for value in row))
    half = len(row) // 2
    turned = np.empty_like(row)
    for i in range(half):
        point = complex(row[i], row[half + i]) * np.exp(1j * bucket * 10_000.0 ** (-2 * i / len(row)))
        turned[i], turned[half + i] = point.real, point.imag
    return turned


def nearest(matrix: npt.NDArray[np.float32], prototypes: Sequence[Word], word: Word) -> tuple[int, float]:
    """The prototype with the greatest cosine to `word`, of all, and that cosine."""
    point = embed(matrix, word)
    cosines = [float(point @ embed(matrix, prototype)) for prototype in prototypes]
    best = max(range(len(cosines)), key=cosines.__getitem__)
    return best, cosines[best]
