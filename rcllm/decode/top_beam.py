"""The best `beam` of all children of all beams, without sorting them, and beams that move inside their buffer.

Knows nothing of tries or models. Invariant: the result is that of a full stable sort by falling score, then rising flat
index, ties and infinities included; it comes by rising index, so that parents never fall.
Source: xGR (arXiv 2512.11529), early sorting termination and in-place reorder.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rcllm.decode.finite import not_numbers

FloatArray = npt.NDArray[np.float32]
_HEADS_PER_BEAM = 4  # more heads find a closer bound, and take longer to choose from


@dataclass(frozen=True, slots=True)
class TopBeam:
    """The survivors, by rising flat index."""

    indices: npt.NDArray[np.int64]  # [at most beam]
    scores: FloatArray  # parent's plus child's
    num_skipped: int  # candidates that were never looked at again after the bound was known


def top_beam(parent_scores: FloatArray, first: npt.NDArray[np.int64], child_scores: FloatArray, beam: int) -> TopBeam:
    """The `beam` highest of parent_scores [rows] + child_scores [children], in fp32.

    Children of row i are first[i] to first[i + 1]; first [rows + 1]. Raises ModelError where a score is not a number.

    A k-way merge of sorted children stops as soon as no head can still enter. Here the children are dealt into a few
    times `beam` lists, whose heads are found without sorting. The beam-th best head is a bound: that many candidates
    reach it, and whatever stays below it cannot enter. Only the rest, mostly little more than `beam`, is selected from.
    """
    scores = child_scores + np.repeat(parent_scores, np.diff(first))
    indices: npt.NDArray[np.int64] | None = None  # None: all
    num_heads = _HEADS_PER_BEAM * beam
    while len(rest := scores if indices is None else scores[indices]) > 2 * num_heads:
        heads = _heads(rest, num_heads)
        reached = np.flatnonzero(rest >= _nth_best(heads, beam))
        indices = reached if indices is None else indices[reached]
        if len(reached) > len(rest) // 2:  # ties, or all the best together in a few lists
            break
    rest = scores if indices is None else scores[indices]
    if np.isnan(rest).any():
        raise not_numbers()
    if len(rest) > beam:
        kept = _select(rest, beam)
        indices = kept if indices is None else indices[kept]
    elif indices is None:
        indices = np.arange(len(scores))
    return TopBeam(indices, scores[indices], len(scores) - len(rest))


def _heads(scores: FloatArray, num_heads: int) -> FloatArray:
    """The best of each of `num_heads` lists: list j has the scores j, j + num_heads, …, but for a few at the end."""
    length = len(scores) // num_heads
    heads: FloatArray = scores[: length * num_heads].reshape(length, num_heads).max(axis=0)
    if np.isnan(heads).any() or np.isnan(scores[length * num_heads :]).any():
        raise not_numbers()
    return heads


def _nth_best(scores: FloatArray, n: int) -> np.float32:
    bound: np.float32 = np.partition(scores, len(scores) - n)[len(scores) - n]
    return bound


def _select(scores: FloatArray, beam: int) -> npt.NDArray[np.int64]:
    """Rising indices of the `beam` best; of those that equal the last one, the first."""
    last = _nth_best(scores, beam)
    chosen = scores > last
    equal = np.flatnonzero(scores == last)
    chosen[equal[: beam - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen)
