"""How often training users chose an item, as a field of its text: what a shop shows as its number of ratings.

Knows nothing of prompts. Invariant: counts come from the training users of the common split alone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from rcllm.core.ranking import Item
from rcllm.data.catalogue import Catalogue
from rcllm.data.dataset import Dataset
from rcllm.data.requests import split_of

FIELD = "chosen"


def with_popularity(dataset: Dataset) -> Dataset:
    """The data set with a field `chosen` for every item: its number of training interactions, down to a power of two.

    Rounded, so that the text (and with it the cached KV) of an item changes only when its popularity doubles.
    """
    counts = Counter(row.item_id for row in dataset.interactions if split_of(row.user_id) == "train")
    items = (
        Item(item.item_id, {**item.fields, FIELD: str(_rounded(counts[item.item_id]))}, item.volatile)
        for item in dataset.catalogue.values()
    )
    return replace(dataset, catalogue=Catalogue(items))


def _rounded(count: int) -> int:
    return 1 << (count.bit_length() - 1) if count else 0
