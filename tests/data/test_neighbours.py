"""Neighbours as a field: whose they are, when a list changes, and what stands in for interactions."""

from __future__ import annotations

import numpy as np

from rcllm.core.enrichment import NeighbourConfig
from rcllm.core.ranking import Interaction, Item, ItemId, UserId
from rcllm.data import Catalogue, split_of
from rcllm.data.neighbours import FIELD, find_neighbours, neighbour_text, with_neighbours
from rcllm.data.popularity import with_made_fields
from tests.data.test_scores import HELD_OUT, TRAINING

CONFIG = NeighbourConfig(count=2, words=2, shrinkage=0.0, min_users=1, margin=0.2)
ITEMS = Catalogue(Item(ItemId(f"i{n}"), {"title": f"The great thing, number {n}"}) for n in range(6))


def _histories(*pairs: str) -> list[list[ItemId]]:
    return [[ItemId(f"i{n}") for n in pair] for pair in pairs]


def test_the_most_alike_come_first_and_few_users_say_little() -> None:
    chosen = _histories("01", "01", "02", "3")
    assert find_neighbours(ITEMS, chosen, CONFIG).lists["i0"] == ("i1", "i2")
    strict = NeighbourConfig(count=2, shrinkage=0.0, min_users=2)
    found = find_neighbours(ITEMS, chosen, strict)
    assert found.lists["i0"] == ("i1",)
    assert found.num_without == 4


def test_a_list_stays_until_another_is_clearly_better() -> None:
    before = find_neighbours(ITEMS, _histories("01", "01", "02", "02", "03"), CONFIG).lists
    assert before["i0"] == ("i1", "i2")
    a_little = find_neighbours(ITEMS, _histories("01", "01", "02", "02", "03", "03", "03"), CONFIG, before)
    assert a_little.num_would_change > a_little.num_changed == 0
    clearly = find_neighbours(ITEMS, _histories("01", "02", "03", *["04"] * 5, *["05"] * 5), CONFIG, before)
    assert clearly.lists["i0"] == ("i4", "i5")
    assert clearly.num_changed == 1 + sum(clearly.lists[i] != before[i] for i in before if i != "i0")


def test_a_list_with_an_item_that_is_gone_is_made_anew() -> None:
    before = {ItemId("i0"): (ItemId("gone"), ItemId("i1"))}
    found = find_neighbours(ITEMS, _histories("01", "02"), CONFIG, before)
    assert found.lists["i0"] == ("i1", "i2")
    assert found.num_changed == 1


def test_an_item_without_interactions_gets_those_nearest_in_text() -> None:
    vectors = np.eye(6, dtype=np.float32)
    vectors[5] = vectors[1]
    found = find_neighbours(ITEMS, _histories("01", "02"), CONFIG, vectors=vectors)
    assert found.lists["i5"][0] == "i1"
    assert set(found.by_text) == {"i3", "i4", "i5"}
    assert all(near in ("i0", "i1", "i2") for near in found.lists["i3"]), "of what somebody chose"


def test_the_text_is_first_words_of_titles() -> None:
    assert neighbour_text(ITEMS, (ItemId("i1"), ItemId("i2")), 3) == "The great thing; The great thing"


def test_training_users_alone_count_and_some_can_be_left_out() -> None:
    def rows(user: UserId) -> list[Interaction]:
        return [Interaction(user, ItemId(f"i{n}"), float(n)) for n in range(2)]

    assert split_of(HELD_OUT) == "test"
    log = [*rows(HELD_OUT), *rows(UserId(HELD_OUT + "x"))]
    training = [row for user in TRAINING[:3] for row in rows(user)]
    config = NeighbourConfig(min_users=2)
    assert FIELD not in with_neighbours(ITEMS, [*rows(HELD_OUT)], config)["i0"].fields
    assert FIELD in with_neighbours(ITEMS, [*log, *training], config)[ItemId("i0")].fields
    assert FIELD not in with_neighbours(ITEMS, training, config, TRAINING[:2])[ItemId("i0")].fields


def test_the_field_is_made_where_a_template_shows_it() -> None:
    training = [Interaction(user, ItemId(f"i{n}"), float(n)) for user in TRAINING[:3] for n in range(2)]
    known = ITEMS.knowing(training)
    made = with_made_fields(known, ["chosen", FIELD])
    assert {"chosen", FIELD} <= made[ItemId("i0")].fields.keys()
    assert isinstance(made, Catalogue)
    assert made.interactions == training, "of which other fields are made later"
    assert with_made_fields(known, ["title"]) is known


def test_nearest_in_text_are_looked_at_each_time_and_stand_by_the_same_rule() -> None:
    """A regression: a list that was made of texts stood for ever, and counted as one of interactions."""
    vectors = np.eye(6, dtype=np.float32)
    vectors[5] = vectors[1]
    chosen = _histories("01", "02")
    before = find_neighbours(ITEMS, chosen, CONFIG, vectors=vectors)
    again = find_neighbours(ITEMS, chosen, CONFIG, before.lists, vectors)
    assert (again.by_text, again.num_changed, again.num_would_change) == (before.by_text, 0, 0)
    vectors[5] = 0.989 * vectors[1] + 0.15 * vectors[2]
    hardly = find_neighbours(ITEMS, chosen, CONFIG, before.lists, vectors)
    assert hardly.lists["i5"] == before.lists["i5"]
    assert (hardly.num_changed, hardly.num_would_change) == (0, 1)
    vectors[5] = vectors[2]
    assert find_neighbours(ITEMS, chosen, CONFIG, before.lists, vectors).lists["i5"][0] == "i2"
    assert find_neighbours(ITEMS, chosen, CONFIG, before.lists).lists["i5"] == (), "where no text is looked at"


def test_a_list_with_a_pair_that_too_few_chose_is_made_anew() -> None:
    strict = NeighbourConfig(count=2, shrinkage=0.0, min_users=2, margin=9.0)
    before = find_neighbours(ITEMS, _histories("01", "01", "02", "02"), strict).lists
    assert before["i0"] == ("i1", "i2")
    fewer = find_neighbours(ITEMS, _histories("01", "01", "02"), strict, before)
    assert fewer.lists["i0"] == ("i1",)
