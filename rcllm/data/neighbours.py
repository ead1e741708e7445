"""What else those who chose an item chose, as a field of its text: what a reader cannot know from titles.

The text of an item is computed once and read ever after, so that these words cost a request nothing. Knows nothing of
prompts. Invariant: lists come from training users alone; a list that stands gives way only to one that is clearly
better, so that new interactions change few texts, and with them few cached blocks. Of every pair in a list of
interactions, at least `min_users` users chose both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from rcllm.core.enrichment import NeighbourConfig
from rcllm.core.ranking import Interaction, Item, ItemId, UserId
from rcllm.data.catalogue import Catalogue
from rcllm.data.item_knn import ItemKnn
from rcllm.data.negatives import NegativePool
from rcllm.data.requests import training_histories

FIELD, TITLE = "neighbours", "title"
Lists = Mapping[ItemId, tuple[ItemId, ...]]  # item → its neighbours, best first
_NONE_BEFORE: Lists = MappingProxyType({})
Vectors = npt.NDArray[np.float32]
_NO_FLOATS: Vectors = np.zeros((0, 0), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The lists, and where they come from."""

    lists: Lists
    by_text: tuple[ItemId, ...] = ()  # items whose neighbours are the nearest in text, for want of interactions
    # of the items that were there before
    num_changed: int = 0
    num_would_change: int = 0  # if every list were made anew
    texts: Mapping[ItemId, str] = field(default_factory=dict)  # item → the field

    @property
    def num_without(self) -> int:
        return sum(not near for near in self.lists.values())


def find_neighbours(
    catalogue: Mapping[ItemId, Item],
    histories_of: Iterable[Sequence[ItemId]],
    config: NeighbourConfig,
    before: Lists = _NONE_BEFORE,
    vectors: Vectors = _NO_FLOATS,
) -> Neighbours:
    """`histories_of`: what each training user chose; `before`: the lists as they stood.

    `vectors`: [items, d] embeddings of the texts, of length one, for items without neighbours; none are made without.
    """
    pool = NegativePool.of(catalogue, histories_of)
    knn = ItemKnn.of(pool.touched, config.shrinkage)
    made, lists = {}, {}
    for item_id, number in pool.numbers.items():
        found = knn.neighbours(number, config.count, config.min_users)
        made[item_id] = tuple(pool.item_ids[other] for other, _ in found)
        stood = before.get(item_id, ())
        lists[item_id] = stood if _stands(stood, found, number, pool, knn, config) else made[item_id]
    by_text = tuple(item_id for item_id, near in lists.items() if not near) if len(vectors) else ()
    for item_id in by_text:
        near = _likeness_in_text(pool, vectors, pool.numbers[item_id])
        made[item_id] = _nearest(pool, near, config.count)
        stood = before.get(item_id, ())
        lists[item_id] = stood if _stands_in_text(stood, made[item_id], near, pool, config) else made[item_id]
    texts = {i: text for i, near in lists.items() if (text := neighbour_text(catalogue, near, config.words))}
    there = [item_id for item_id in before if item_id in lists]
    return Neighbours(
        lists,
        by_text,
        sum(lists[item_id] != before[item_id] for item_id in there),
        sum(made[item_id] != before[item_id] for item_id in there),
        texts,
    )


def _stands(
    stood: Sequence[ItemId],
    found: Sequence[tuple[int, float]],
    number: int,
    pool: NegativePool,
    knn: ItemKnn,
    config: NeighbourConfig,
) -> bool:
    """Whether a list is kept: it is of interactions as the new one and as long, and it is hardly less alike."""
    if not found or len(stood) < len(found) or any(item_id not in pool.numbers for item_id in stood):
        return False
    others = [pool.numbers[item_id] for item_id in stood]
    if knn.num_users_of_both(number, others).min() < config.min_users:
        return False
    old = float(knn.scores([number], others).sum())
    new = sum(value for _, value in found)
    return bool(new <= (1 + config.margin) * old)


def _likeness_in_text(pool: NegativePool, vectors: Vectors, number: int) -> Vectors:
    """[items]: cosines with one item; -inf for itself, and for items that no training user chose."""
    near: Vectors = vectors @ vectors[number]
    near[pool.popularity == 0] = -np.inf
    near[number] = -np.inf
    return near


def _nearest(pool: NegativePool, near: Vectors, count: int) -> tuple[ItemId, ...]:
    best = np.argsort(-near, kind="stable")[:count]
    return tuple(pool.item_ids[int(other)] for other in best if near[other] > -np.inf)


def _stands_in_text(
    stood: Sequence[ItemId], made: Sequence[ItemId], near: Vectors, pool: NegativePool, config: NeighbourConfig
) -> bool:
    """Whether a list by text is kept, by the same rule. -inf of an item that nobody chooses any more lets it go."""
    if len(stood) < len(made) or any(item_id not in pool.numbers for item_id in stood):
        return False
    old, new = (float(sum(near[pool.numbers[item_id]] for item_id in some)) for some in (stood, made))
    return bool(new <= (1 + config.margin) * old)


def neighbour_text(catalogue: Mapping[ItemId, Item], near: Sequence[ItemId], words: int) -> str:
    """The first words of the neighbours' titles. A neighbour without a title is left out."""
    titles = (catalogue[item_id].fields.get(TITLE, "").split()[:words] for item_id in near)
    return "; ".join(" ".join(title).rstrip(",;:.-") for title in titles if title)


def with_neighbours(
    catalogue: Mapping[ItemId, Item],
    interactions: Iterable[Interaction],
    config: NeighbourConfig | None = None,
    without: Collection[UserId] = (),
) -> Catalogue:
    """Every item with the field `neighbours`, from training users other than those of `without`."""
    training = training_histories(interactions, catalogue, without)
    return put(catalogue, FIELD, find_neighbours(catalogue, training.values(), config or NeighbourConfig()).texts)


def put(catalogue: Mapping[ItemId, Item], name: str, texts: Mapping[ItemId, str]) -> Catalogue:
    """The catalogue with a field of that name in place of any other, where there is a text for it."""
    items = []
    for item in catalogue.values():
        kept = {key: value for key, value in item.fields.items() if key != name}
        more = {name: texts[item.item_id]} if texts.get(item.item_id) else {}
        items.append(Item(item.item_id, kept | more, item.volatile))
    return Catalogue(items)
