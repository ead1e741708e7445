"""Item-kNN: how alike items are by who chose both, and what that says of candidates after a history.

The one place that knows the measure: cosines of the items' users (Sarwar et al. 2001, "Item-based collaborative
filtering"), shrunk where few users chose both (Bell & Koren 2007). Items are numbers. Invariant: it sees the users that
it is given and no others, and can leave one of them out, so that nobody is scored by what they themselves chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
_NOBODY: tuple[int, ...] = ()


@dataclass(frozen=True)
class ItemKnn:
    """Likeness of two items: n / √(a·b) · n / (n + shrinkage), where n users chose both, a and b users each."""

    together: Any  # sparse [items, items], symmetric: users that chose both; on the diagonal, those that chose it
    popularity: IntArray  # [items]
    shrinkage: float = 0.0

    @classmethod
    def of(cls, touched: Any, shrinkage: float = 0.0) -> ItemKnn:
        """`touched`: sparse [users, items], 1 where the user chose the item."""
        counted = sparse.csr_array(touched).astype(np.int64)
        return cls(sparse.csr_array(counted.T @ counted), np.asarray(counted.sum(axis=0)).astype(np.int64), shrinkage)

    @cached_property
    def likeness(self) -> Any:
        """Sparse [items, items]; 1 on the diagonal of an item that anybody chose, without shrinkage."""
        counts = self.together.tocoo()
        values = self._likeness(counts.data.astype(np.float64), *(self.popularity[at] for at in counts.coords))
        return sparse.csr_array((values, counts.coords), shape=counts.shape)

    def scores(
        self, history: Sequence[int], candidates: Sequence[int], left_out: Sequence[int] = _NOBODY
    ) -> FloatArray:
        """[candidates]: the sum of each one's likeness to the events of `history`, of which repeats count again.

        `left_out`: all that one of the users chose, who then counts for nothing.
        """
        if not len(history):
            return np.zeros(len(candidates))
        if not len(left_out):
            near = self.likeness[np.asarray(history)][:, np.asarray(candidates)]
            return np.asarray(near.sum(axis=0), dtype=np.float64)
        counts = self.together[np.asarray(history)][:, np.asarray(candidates)].toarray().astype(np.float64)
        of_history, of_candidates = np.isin(history, left_out), np.isin(candidates, left_out)
        counts -= of_history[:, None] & of_candidates
        of_both = (self.popularity[history] - of_history)[:, None], self.popularity[candidates] - of_candidates
        return np.asarray(self._likeness(counts, *of_both).sum(axis=0), dtype=np.float64)

    def all_scores(self, history: Sequence[int]) -> FloatArray:
        """[items]: the same of the whole catalogue."""
        if not len(history):
            return np.zeros(len(self.popularity))
        return np.asarray(self.likeness[np.asarray(history)].sum(axis=0), dtype=np.float64)

    def neighbours(self, item: int, count: int, min_users: int = 1) -> list[tuple[int, float]]:
        """The most alike items and how alike, of those that `min_users` chose beside it; ties go to the earlier."""
        row = self.together[[item]]
        enough = (row.data >= min_users) & (row.indices != item)
        others, counts = row.indices[enough], row.data[enough].astype(np.float64)
        values = self._likeness(counts, self.popularity[[item]], self.popularity[others])
        best = np.lexsort((others, -values))[:count]
        return [(int(others[at]), float(values[at])) for at in best]

    def num_users_of_both(self, item: int, others: Sequence[int]) -> IntArray:
        """[others]: how many users chose each of them and the item."""
        both: IntArray = self.together[[item]][:, np.asarray(others)].toarray()[0]
        return both

    def _likeness(self, counts: FloatArray, first: IntArray, second: IntArray) -> FloatArray:
        cosines: FloatArray = counts / np.sqrt(np.maximum(first, 1) * np.maximum(second, 1))
        if not self.shrinkage:
            return cosines
        shrunk: FloatArray = cosines * counts / (counts + self.shrinkage)
        return shrunk
