"""A catalogue that changes while it is read."""

from __future__ import annotations

import pytest

from rcllm.core.ranking import Item, ItemId
from rcllm.data.live import LiveCatalogue
from rcllm.errors import UnknownItemError


def item(item_id: str, title: str = "x") -> Item:
    return Item(ItemId(item_id), {"title": title})


def test_items_come_are_replaced_and_go() -> None:
    before = {ItemId("a"): item("a"), ItemId("b"): item("b")}
    live = LiveCatalogue(before)
    assert live.put([item("b", "new"), item("c")]) == 1
    assert [*live] == ["a", "b", "c"]
    assert live[ItemId("b")].fields == {"title": "new"}
    live.remove([ItemId("a"), ItemId("a")])
    assert (len(live), ItemId("a") in live, live.get(ItemId("a"))) == (2, False, None)
    assert before[ItemId("b")].fields == {"title": "x"}, "what it began with is never changed"


def test_a_wrong_removal_changes_nothing() -> None:
    live = LiveCatalogue({ItemId("lamp"): item("lamp")})
    with pytest.raises(UnknownItemError, match="Did you mean 'lamp'"):
        live.remove([ItemId("lamp"), ItemId("lmap")])
    with pytest.raises(UnknownItemError):
        live[ItemId("lmap")]
    assert [*live] == ["lamp"]


def test_an_iteration_sees_the_ids_as_they_were() -> None:
    live = LiveCatalogue({ItemId(f"i{n}"): item(f"i{n}") for n in range(5)})
    seen = []
    for item_id in live:
        seen.append(item_id)
        live.put([item(f"new {item_id}")])
    assert seen == [f"i{n}" for n in range(5)]
