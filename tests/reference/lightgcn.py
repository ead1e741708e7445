"""The slow, obvious twin of `rcllm.drafts.lightgcn`: dense matrices and a full SVD."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def item_cosines(
    histories: Sequence[Sequence[int]], num_items: int, dimensions: int, layers: int
) -> npt.NDArray[np.float64]:
    """[items, items]: cosines between item vectors (the vectors themselves are defined up to signs)."""
    touched = np.zeros((len(histories), num_items))
    for user, items in enumerate(histories):
        for item in items:
            touched[user, item] = 1.0
    normal = np.zeros_like(touched)
    for user, item in zip(*np.nonzero(touched), strict=True):
        normal[user, item] = 1 / np.sqrt(touched[user].sum() * touched[:, item].sum())
    _, values, right = np.linalg.svd(normal, full_matrices=False)
    items = right[:dimensions].T * np.sqrt(values[:dimensions])
    total = items.copy()
    for _ in range(layers):
        items = normal.T @ (normal @ items)  # from items to users and back
        total += items
    lengths = np.linalg.norm(total, axis=1, keepdims=True)
    total = total / np.where(lengths > 1e-6, lengths, np.inf)
    return np.asarray(total @ total.T)
