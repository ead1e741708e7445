"""How often training users chose an item, as a field of its text: what a shop shows as its number of ratings.

Knows nothing of prompts. Invariant: counts come from the training users of the common split alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from rcllm.core.ranking import Interaction, Item, ItemId
from rcllm.data.catalogue import Catalogue
from rcllm.data.dataset import Dataset
from rcllm.data.neighbours import FIELD as NEIGHBOURS
from rcllm.data.neighbours import with_neighbours
from rcllm.data.requests import split_of

FIELD = "chosen"


def with_popularity(dataset: Dataset) -> Dataset:
    """The data set with a field `chosen` for every item, whatever template will show it."""
    return replace(dataset, catalogue=with_chosen(dataset.catalogue, dataset.interactions))


def with_made_fields(catalogue: Mapping[ItemId, Item], shown: Collection[str]) -> Mapping[ItemId, Item]:
    """The catalogue with what is `shown`, no item has, and can be made of the interactions that it knows."""
    if not isinstance(catalogue, Catalogue) or not (interactions := catalogue.interactions):
        return catalogue
    for name, make in _MAKERS.items():
        if name in shown and not any(item.fields.get(name) for item in catalogue.values()):
            catalogue = make(catalogue, interactions).knowing(interactions)
    return catalogue


def with_chosen(catalogue: Mapping[ItemId, Item], interactions: Iterable[Interaction]) -> Catalogue:
    """Every item with its number of training interactions, down to a power of two, as its field `chosen`.

    Rounded, so that the text (and with it the cached KV) of an item changes only when its popularity doubles.
    """
    counts = Counter(row.item_id for row in interactions if split_of(row.user_id) == "train")
    return Catalogue(
        Item(item.item_id, {**item.fields, FIELD: str(_rounded(counts[item.item_id]))}, item.volatile)
        for item in catalogue.values()
    )


_MAKERS: Mapping[str, Callable[[Mapping[ItemId, Item], Sequence[Interaction]], Catalogue]] = {
    FIELD: with_chosen,
    NEIGHBOURS: with_neighbours,
}


def _rounded(count: int) -> int:
    return 1 << (count.bit_length() - 1) if count else 0
