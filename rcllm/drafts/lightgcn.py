"""Item vectors from who touched what, in which items of the same users lie close; a user lies amid their items.

Linear LightGCN (SIGIR'20, without its training): the leading singular vectors of the symmetrically normalised
interaction matrix, propagated from items over users to items and averaged over the layers. Knows nothing of texts
or groups. Invariant: equal interactions and seed give equal vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse.linalg import svds

Vectors = npt.NDArray[np.float32]  # [rows, dimensions]

_LAYERS = 1  # more find held-out links of sparse logs better, and those of dense ones worse
_NOISE = 1e-6  # length of an item's vector that is rounding error
_TINY = 1e-12  # length of any vector that is


def interaction_matrix(histories: Sequence[Sequence[int]], num_items: int) -> sparse.csr_array:
    """[users, items]: 1 where the user touched the item."""
    lengths = [len(history) for history in histories]
    rows = np.repeat(np.arange(len(histories)), lengths)
    columns = np.concatenate([np.empty(0, np.int64), *(np.asarray(history, np.int64) for history in histories)])
    table = sparse.coo_array((np.ones(len(rows), np.float32), (rows, columns)), (len(histories), num_items)).tocsr()
    table.sum_duplicates()
    table.data[:] = 1.0
    return sparse.csr_array(table)


def item_vectors(touched: sparse.csr_array, dimensions: int = 64, seed: int = 0) -> Vectors:
    """[items, dimensions], rows of length one; zero for an item of which nothing is known. Fewer dimensions where the
    matrix has no more."""
    dimensions = min(dimensions, min(touched.shape) - 1)
    if dimensions < 1 or not touched.nnz:
        return np.zeros((touched.shape[1], 1), np.float32)
    normal = _scaled(touched.sum(axis=1)) @ touched @ _scaled(touched.sum(axis=0))
    start = np.random.default_rng(seed).standard_normal(min(touched.shape))
    _, values, right = svds(normal.astype(np.float64), k=dimensions, v0=start)
    right *= np.sign(right[np.arange(dimensions), np.abs(right).argmax(axis=1)])[:, None]  # an SVD leaves signs open
    layers = sum(values ** (2 * layer) for layer in range(_LAYERS + 1)) / (_LAYERS + 1)
    vectors: Vectors = right.T * np.sqrt(values) * layers
    vectors[np.linalg.norm(vectors, axis=1) < _NOISE] = 0.0
    return unit_rows(vectors)


def user_vector(items: Sequence[int], vectors: Vectors) -> Vectors:
    """[dimensions]: the direction of the mean of the items' vectors, so that new users need no training."""
    mean: Vectors = unit_rows(vectors[list(items)].sum(axis=0, keepdims=True))[0]
    return mean


def numbered(histories: Mapping[str, Sequence[str]]) -> tuple[list[str], list[list[int]]]:
    """Item ids by number, sorted; and the histories in numbers."""
    item_ids = sorted({item for history in histories.values() for item in history})
    number = {item: i for i, item in enumerate(item_ids)}
    return item_ids, [[number[item] for item in history] for history in histories.values()]


def unit_rows(rows: npt.ArrayLike) -> Vectors:
    """Rows of length one; rows of zeros, or of rounding error, stay."""
    table = np.asarray(rows, dtype=np.float32)
    lengths = np.linalg.norm(table, axis=1, keepdims=True)
    return np.asarray(table / np.where(lengths > _TINY, lengths, 1.0), dtype=np.float32)


def _scaled(degrees: npt.NDArray[np.float32]) -> sparse.dia_array:
    return sparse.diags_array(1.0 / np.sqrt(np.maximum(degrees, 1.0)))
