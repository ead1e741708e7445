"""Item vectors from who touched what: items that the same users touch, soon after one another, lie close.

A truncated SVD of the shifted positive pointwise mutual information of pairs of items within a window of a user's
history (Levy & Goldberg 2014). Knows nothing of text. Invariant: sees the histories that it is given and no others, so
that vectors made from training users tell nothing of the users that a model is evaluated on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse.linalg import svds

from rcllm.core.ranking import IntArray
from rcllm.drafts.lightgcn import unit_rows

FloatArray = npt.NDArray[np.float32]


def cooccurrence(histories: Sequence[Sequence[int]], num_items: int, window: int) -> sparse.csr_array:
    """[items, items], symmetric: over all pairs at most `window` apart, the sum of 1 / distance."""
    rows, columns, weights = [], [], []
    for history in histories:
        items = np.asarray(history, dtype=np.int64)
        for apart in range(1, min(window, len(items) - 1) + 1):
            rows.append(items[apart:])
            columns.append(items[:-apart])
            weights.append(np.full(len(items) - apart, 1.0 / apart))
    if not rows:
        return sparse.csr_array((num_items, num_items))
    at = (np.concatenate(rows), np.concatenate(columns))
    table = sparse.coo_array((np.concatenate(weights), at), shape=(num_items, num_items)).tocsr()
    table = table + table.T
    table.setdiag(0)
    table.eliminate_zeros()
    return sparse.csr_array(table)


def collaborative_vectors(
    histories: Sequence[Sequence[int]], num_items: int, dimensions: int = 64, window: int = 5, seed: int = 0
) -> FloatArray:
    """[items, dimensions], rows of length one, or zero for items that nobody touched together with another."""
    counts = cooccurrence(histories, num_items, window)
    dimensions = min(dimensions, num_items - 2)
    if counts.nnz == 0 or dimensions < 1:
        return np.zeros((num_items, max(dimensions, 1)), dtype=np.float32)
    information = _positive_information(counts)
    start = np.random.default_rng(seed).standard_normal(num_items)
    left, values, _ = svds(information, k=dimensions, v0=start)
    vectors = left[:, ::-1] * np.sqrt(np.maximum(values[::-1], 0.0))
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(dimensions)])  # which an SVD leaves open
    return unit_rows(vectors * np.where(signs == 0, 1, signs))


def code_vectors(vectors: FloatArray, codes: IntArray, sizes: Sequence[int]) -> list[FloatArray]:
    """Per level [codes, d]: the mean of the vectors of the items that have a code, less what the levels before say."""
    rest, means = vectors - vectors.mean(axis=0), []
    for level, size in enumerate(sizes):
        column = codes[:, level]
        members = sparse.csr_array(
            (np.ones(len(column), np.float32), column, np.arange(len(column) + 1)), (len(column), size)
        )
        means.append(np.asarray((members.T @ rest) / np.maximum(members.sum(axis=0), 1.0)[:, None], dtype=np.float32))
        rest = rest - means[-1][column]
    return means


def _positive_information(counts: sparse.csr_array) -> Any:
    """max(0, log p(i, j) / (p(i) p(j))), with p(j) to the power of 0.75 as word2vec smooths its contexts."""
    table = counts.tocoo()
    first, second = counts.sum(axis=1), counts.sum(axis=0)
    smooth = second**0.75 / (second**0.75).sum()
    information = np.log(table.data / (first[table.row] * smooth[table.col]))
    positive = sparse.coo_array((np.maximum(information, 0.0), (table.row, table.col)), shape=counts.shape).tocsr()
    positive.eliminate_zeros()
    return positive
