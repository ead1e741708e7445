"""What past requests say about items: how often each was asked for, and which are asked for together.

Knows nothing of nodes. Invariant: the log is read once and never held; what is kept of it is bounded (the neighbours of
each item, and a uniform sample of requests). Items are numbered in the order of `item_ids`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rcllm.core.ranking import ItemId

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Requests:
    """The items of many requests: those of request i are `items[starts[i] : starts[i + 1]]`, each once."""

    starts: IntArray  # [requests + 1]
    items: IntArray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> IntArray:
        return self.items[self.starts[number] : self.starts[number + 1]]


@dataclass(frozen=True, slots=True)
class Statistics:
    """All that a placement is made from."""

    item_ids: tuple[ItemId, ...]
    num_bytes: IntArray  # [items] of the KV of each
    heat: FloatArray  # [items] requests that held it
    near: Any  # sparse [items, items], symmetric: requests that held both, for the top neighbours of each
    sample: Requests  # a uniform sample of the requests
    num_requests: int  # that were read

    @property
    def num_items(self) -> int:
        return len(self.item_ids)
