"""Whoever reads a ledger, from whichever version, comes to what whoever made all changes has."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcllm.core.ranking import Item, ItemId, UserId
from rcllm.on_ray.ledger import Ledger
from rcllm.server.backend import Change, EraseUser, PutItems, RemoveItems, WarmItems

IDS = st.sampled_from([ItemId(name) for name in "abcd"])
PUTS = st.builds(
    lambda ids, text: PutItems(tuple(Item(item_id, {"title": text}) for item_id in ids)),
    st.sets(IDS, min_size=1),
    st.text(max_size=3),
)
REMOVALS = st.builds(lambda ids: RemoveItems(tuple(ids)), st.sets(IDS, min_size=1))
ERASURES = st.builds(EraseUser, st.sampled_from([UserId("u"), UserId("v")]), st.sampled_from(["", "shop"]))
CHANGES = st.lists(PUTS | REMOVALS | ERASURES, max_size=12)


class Replayed:
    """The slow twin: makes every change in its order."""

    def __init__(self) -> None:
        self.items: dict[ItemId, Item] = {ItemId("a"): Item(ItemId("a"), {"title": "of the file"})}
        self.erased: set[tuple[UserId, str]] = set()

    def make(self, change: Change) -> None:
        match change:
            case PutItems():
                self.items |= {item.item_id: item for item in change.items}
            case RemoveItems():
                self.items = {i: item for i, item in self.items.items() if i not in change.item_ids}
            case EraseUser():
                self.erased.add((change.user_id, change.tenant))


@given(CHANGES, st.data())
def test_a_page_brings_whoever_reads_it_up_to_date(changes: list[Change], data: st.DataObject) -> None:
    ledger, whole = Ledger(), Replayed()
    behind, at = Replayed(), data.draw(st.integers(0, len(changes)))
    for number, change in enumerate(changes):
        assert ledger.add(change) == number + 1
        whole.make(change)
        if number < at:
            behind.make(change)
    page = ledger.since(at)
    assert page.version == len(changes)
    for change in page.changes:
        behind.make(change)
    assert behind.items == whole.items
    assert behind.erased == whole.erased
    assert len(page.changes) <= 2 + 4, "of an item and a user the last change alone is kept"


@given(CHANGES)
def test_a_ledger_that_was_lost_takes_over_what_another_has(changes: list[Change]) -> None:
    ledger, anew = Ledger(), Ledger()
    for change in changes:
        ledger.add(change)
    anew.adopt(pickle.loads(pickle.dumps(ledger)))
    assert all(anew.since(version) == ledger.since(version) for version in range(len(changes) + 1))
    ledger.add(EraseUser(UserId("w")))
    assert anew.version == len(changes), "it is a copy"
    anew.adopt(Ledger())
    assert anew.version == len(changes), "less is not taken over"


def test_codes_stay_where_a_text_alone_changes() -> None:
    ledger, item = Ledger(), Item(ItemId("a"), {"title": "x"})
    ledger.add(PutItems((item,), {item.item_id: (1, 2)}))
    ledger.add(PutItems((Item(item.item_id, {"title": "y"}),)))
    (change,) = ledger.since(0).changes
    assert isinstance(change, PutItems)
    assert change.codes == {item.item_id: (1, 2)}


def test_what_nobody_has_to_know_later_is_not_kept() -> None:
    with pytest.raises(AssertionError):
        Ledger().add(WarmItems())
