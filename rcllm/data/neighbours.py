"""What else those who chose an item chose, as a field of its text: what a reader cannot know from titles.

The text of an item is computed once and read ever after, so that these words cost a request nothing. Knows nothing of
prompts. Invariant: lists come from training users alone; a list that stands gives way only to one that is clearly
better, so that new interactions change few texts, and with them few cached blocks. Of every pair in a list of
interactions, at least `min_users` users chose both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from rcllm.core.enrichment import NeighbourConfig
from rcllm.core.ranking import Interaction, Item, ItemId, UserId
from rcllm.data.catalogue import Catalogue
from rcllm.data.interactions import histories
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
        alike = partial(_alike_by_users, knn, number, config.min_users)
        new = sum(value for _, value in found)
        lists[item_id] = _kept(before.get(item_id, ()), made[item_id], new, alike, pool, config)
    by_text = tuple(item_id for item_id, near in lists.items() if not near) if len(vectors) else ()
    for item_id in by_text:
        near = _likeness_in_text(pool, vectors, pool.numbers[item_id])
        made[item_id] = _nearest(pool, near, config.count)
        alike = partial(_total, near)
        new = alike([pool.numbers[other] for other in made[item_id]])
        lists[item_id] = _kept(before.get(item_id, ()), made[item_id], new, alike, pool, config)
    texts = {i: text for i, near in lists.items() if (text := neighbour_text(catalogue, near, config.words))}
    there = [item_id for item_id in before if item_id in lists]
    return Neighbours(
        lists,
        by_text,
        sum(lists[item_id] != before[item_id] for item_id in there),
        sum(made[item_id] != before[item_id] for item_id in there),
        texts,
    )


def _kept(
    stood: tuple[ItemId, ...],
    made: tuple[ItemId, ...],
    new: float,
    alike: Callable[[Sequence[int]], float],
    pool: NegativePool,
    config: NeighbourConfig,
) -> tuple[ItemId, ...]:
    """The list that stood, where it is as long as the new one, all its items are there, and it is hardly less alike.

    `alike`: how much the items of these numbers are, together; -inf of a list that must go. `new`: of the new one.
    """
    if not made or len(stood) < len(made) or any(item_id not in pool.numbers for item_id in stood):
        return made
    return stood if new <= (1 + config.margin) * alike([pool.numbers[item_id] for item_id in stood]) else made


def _alike_by_users(knn: ItemKnn, number: int, min_users: int, others: Sequence[int]) -> float:
    """-inf where too few chose one of the pairs."""
    enough = knn.num_users_of_both(number, others).min() >= min_users
    return float(knn.scores([number], others).sum()) if enough else -math.inf


def _likeness_in_text(pool: NegativePool, vectors: Vectors, number: int) -> Vectors:
    """[items]: cosines with one item; -inf for itself, and for items that no training user chose."""
    near: Vectors = vectors @ vectors[number]
    near[pool.popularity == 0] = -np.inf
    near[number] = -np.inf
    return near


def _nearest(pool: NegativePool, near: Vectors, count: int) -> tuple[ItemId, ...]:
    best = np.argsort(-near, kind="stable")[:count]
    return tuple(pool.item_ids[int(other)] for other in best if near[other] > -np.inf)


def _total(near: Vectors, others: Sequence[int]) -> float:
    return float(sum(near[other] for other in others))


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
    training = training_histories(histories(interactions), catalogue, without)
    return put(catalogue, FIELD, find_neighbours(catalogue, training.values(), config or NeighbourConfig()).texts)


def put(catalogue: Mapping[ItemId, Item], name: str, texts: Mapping[ItemId, str]) -> Catalogue:
    """The catalogue with a field of that name in place of any other, where there is a text for it."""
    items = []
    for item in catalogue.values():
        kept = {key: value for key, value in item.fields.items() if key != name}
        more = {name: texts[item.item_id]} if texts.get(item.item_id) else {}
        items.append(Item(item.item_id, kept | more, item.volatile))
    return Catalogue(items)
