"""The catalogue, its filters and its epochs, against scans over dicts."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcllm.codes.allowed import Allowed
from rcllm.codes.index import CodeIndex, LiveCodes
from rcllm.codes.updates import Update, merged
from rcllm.core.ranking import IntArray, ItemId
from rcllm.decode.top_beam import top_beam
from rcllm.errors import DataError, RcllmError, UnknownItemError
from tests.reference.code_index import Codes, SlowCodes

SIZES = (3, 4, 3)
IDS = [ItemId(f"i{number}") for number in range(24)]
CODES = st.tuples(*(st.integers(0, size - 1) for size in SIZES))
SOME = st.sets(st.sampled_from(IDS), max_size=8)
ITEMS = st.dictionaries(st.sampled_from(IDS), CODES, max_size=16)


def _code_index(items: dict[ItemId, Codes]) -> CodeIndex:
    codes = np.array(list(items.values()), np.int32).reshape(len(items), len(SIZES))
    return CodeIndex.build(codes, tuple(items), SIZES)


def _ids(*names: str) -> list[ItemId]:
    return [ItemId(name) for name in names]


def _prefixes(code_index: CodeIndex, level: int) -> list[Codes]:
    """Of the nodes of a level, from the items below."""
    places = code_index.trie.span[level][:-1] if code_index.num_items else np.zeros(0, np.int32)
    return [tuple(code_index.codes[item, :level].tolist()) for item in code_index.shelf.order[places]]


def _items_of(code_index: CodeIndex, code: Sequence[int]) -> list[int]:
    """The numbers of all items with these codes, by a look-up in the trie."""
    located = code_index.trie.locate(np.array([code], np.int32))
    assert located.found.all()
    items: list[int] = code_index.items_of(int(located.leaves[0])).tolist()
    return items


def _walk(code_index: CodeIndex, allowed: Allowed | None, rng: random.Random) -> ItemId | None:
    """Any way down the trie, and any allowed item at its end; None where there is no way."""
    node: IntArray = np.zeros(1, np.int32)
    for level in range(code_index.num_levels):
        children = code_index.trie.children(level, node, None if allowed is None else allowed.nodes[level + 1])
        if not len(children.nodes):
            assert level == 0, "a node that is alive leads to an item"
            return None
        node = children.nodes[[rng.randrange(len(children.nodes))]]
    numbers = code_index.items_of(int(node[0]))
    live = numbers if allowed is None else numbers[allowed.items[numbers]]
    assert len(live), "a leaf that is alive has an item"
    return code_index.item_ids[rng.choice(live.tolist())]


def _agree(code_index: CodeIndex, slow: SlowCodes) -> None:
    codes = dict(zip(code_index.item_ids, map(tuple, code_index.codes.tolist()), strict=True))
    assert codes == slow.items
    assert {item for item, on in zip(code_index.item_ids, code_index.enabled, strict=True) if not on} == slow.disabled
    by_code: dict[Codes, list[ItemId]] = {}
    for item_id in code_index.item_ids:
        by_code.setdefault(slow.items[item_id], []).append(item_id)
    for code, items in by_code.items():
        assert [code_index.item_ids[number] for number in _items_of(code_index, code)] == items
    assert code_index.trie.num_nodes[-1] == len(by_code)
    assert all((code_index.number_of(item_id) is not None) == (item_id in slow.items) for item_id in IDS)
    _check_filter(code_index, code_index.allowed(), slow, slow.allowed(None, ()))


def _check_filter(code_index: CodeIndex, allowed: Allowed | None, slow: SlowCodes, wanted: set[ItemId]) -> None:
    if allowed is None:
        assert wanted == slow.items.keys()
        return
    assert {code_index.item_ids[number] for number in np.flatnonzero(allowed.items)} == wanted
    assert allowed.num_items == len(wanted)
    for level in range(1, code_index.num_levels + 1):
        alive = [prefix for prefix, on in zip(_prefixes(code_index, level), allowed.nodes[level], strict=True) if on]
        assert alive == sorted(slow.prefixes(level, wanted))
    assert allowed.nodes[0].tolist() == [bool(wanted)]


# ---- building --------------------------------------------------------------------------------------------------------


@given(ITEMS)
@settings(deadline=None)
def test_holds_what_it_was_built_of(items: dict[ItemId, Codes]) -> None:
    code_index = _code_index(items)
    _agree(code_index, SlowCodes(dict(items)))
    assert code_index.item_ids == tuple(items)
    assert code_index.allowed() is None
    assert code_index.stats().num_collided == sum(list(items.values()).count(code) > 1 for code in items.values())


@given(st.integers(2, 6), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_any_number_of_levels(num_levels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = tuple(rng.integers(1, 9000, num_levels).tolist())
    codes = rng.integers(0, np.minimum(sizes, 5), (20, num_levels)).astype(np.int32)
    code_index = CodeIndex.build(codes, [ItemId(str(number)) for number in range(20)], sizes)
    assert code_index.num_levels == num_levels
    for number, row in enumerate(codes.tolist()):
        assert number in _items_of(code_index, row)


def test_statistics() -> None:
    code_index = _code_index({IDS[0]: (0, 1, 2), IDS[1]: (0, 1, 2), IDS[2]: (0, 2, 0), IDS[3]: (2, 0, 0)})
    stats = code_index.changed(Update(enabled={IDS[1]: False})).stats()
    assert stats.nodes_per_level == (1, 2, 3, 3)
    assert (stats.num_items, stats.num_leaves, stats.num_collided, stats.max_items_per_leaf) == (4, 3, 2, 2)
    assert (stats.num_disabled, stats.epoch) == (1, 1)
    assert stats.num_bytes > code_index.stats().num_bytes > 0


@pytest.mark.parametrize(
    ("codes", "ids", "sizes", "message"),
    [
        ([[0, 0], [0, 5]], ("a", "b"), (2, 5), r"item 'b': expected a code from 0 to 4 at level 1, got 5"),
        ([[0, 0], [-1, 0]], ("a", "b"), (2, 5), r"item 'b': .* at level 0, got -1"),
        ([[0, 0], [1, 1]], ("a", "a"), (2, 5), "got item 'a' twice"),
        ([[0, 0], [1, 1]], ("a",), (2, 5), "each of 1 items, got 2 rows"),
        ([[0, 0, 0]], ("a",), (2, 5), "a code for each level"),
        ([[0.5, 0.5]], ("a",), (2, 5), "whole numbers"),
        ([[0]], ("a",), (2,), "2 to 6 levels"),
        ([[0] * 7], ("a",), (2,) * 7, "2 to 6 levels"),
        ([[0, 0]], ("a",), (2, 0), "at least one code"),
    ],
)
def test_what_cannot_be_a_catalogue_is_refused(
    codes: list[list[int]], ids: Sequence[str], sizes: tuple[int, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        CodeIndex.build(np.array(codes), _ids(*ids), sizes)


# ---- filters ---------------------------------------------------------------------------------------------------------


@given(ITEMS, SOME, st.none() | SOME, SOME, st.integers(0, 1000))
@settings(deadline=None)
def test_filters_equal_a_scan(
    items: dict[ItemId, Codes], disabled: set[ItemId], allow: set[ItemId] | None, deny: set[ItemId], seed: int
) -> None:
    slow = SlowCodes(dict(items), disabled & items.keys())
    code_index = _code_index(items).changed(Update(enabled=dict.fromkeys(disabled, False)))
    wanted = slow.allowed(allow, deny)
    allowed = code_index.allowed(None if allow is None else sorted(allow), sorted(deny))
    _check_filter(code_index, allowed, slow, wanted)
    rng = random.Random(seed)
    for _ in range(10):  # zero invalid items: every way down ends at an allowed one
        found = _walk(code_index, allowed, rng)
        assert (found in wanted) if wanted else (found is None)


@given(ITEMS, SOME, st.integers(1, 4), st.integers(0, 1000))
@settings(deadline=None)
def test_a_beam_finds_only_allowed_items_and_a_wide_one_all(
    items: dict[ItemId, Codes], deny: set[ItemId], narrow: int, seed: int
) -> None:
    code_index = _code_index(items)
    wanted = items.keys() - deny
    allowed = code_index.allowed(deny=sorted(deny))
    rng = np.random.default_rng(seed)
    for beam in (narrow, 64):
        nodes, scores = np.zeros(1, np.int32), np.zeros(1, np.float32)
        for level in range(code_index.num_levels):
            children = code_index.trie.children(level, nodes, None if allowed is None else allowed.nodes[level + 1])
            given_scores = rng.choice([-1.0, -2.0, -np.inf], len(children.nodes)).astype(np.float32)
            best = top_beam(scores, children.first, given_scores, beam)
            nodes, scores = children.nodes[best.indices], best.scores
        numbers = [number for leaf in nodes.tolist() for number in code_index.items_of(leaf).tolist()]
        found = [code_index.item_ids[number] for number in numbers if allowed is None or allowed.items[number]]
        assert len(set(found)) == len(found)
        assert set(found) <= wanted
        assert beam == narrow or set(found) == wanted


@given(ITEMS, SOME)
@settings(deadline=None)
def test_a_filter_does_not_change_others(items: dict[ItemId, Codes], deny: set[ItemId]) -> None:
    slow = SlowCodes(dict(items), {next(iter(items))} if items else set())
    code_index = _code_index(items).changed(Update(enabled=dict.fromkeys(slow.disabled, False)))
    code_index.allowed(deny=sorted(deny))
    code_index.allowed(allow=sorted(deny))
    _agree(code_index, slow)


# ---- epochs ----------------------------------------------------------------------------------------------------------


@st.composite
def updates(draw: st.DrawFn) -> Update:
    return Update(frozenset(draw(SOME)), draw(ITEMS), draw(st.dictionaries(st.sampled_from(IDS), st.booleans())))


@given(ITEMS, st.lists(updates(), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_changed_epochs_equal_those_built_anew(items: dict[ItemId, Codes], changes: list[Update]) -> None:
    slow, code_index = SlowCodes(dict(items)), _code_index(items)
    together = []
    for change in changes:
        fit = Update(change.remove | change.add.keys(), change.add, change.enabled)
        together.append(fit)
        slow.apply(fit)
        last, code_index = code_index, code_index.changed(fit)
        assert code_index.epoch == last.epoch + 1
        _agree(code_index, slow)
    anew = CodeIndex.build(code_index.codes, code_index.item_ids, SIZES)
    assert anew.shelf.order.tolist() == code_index.shelf.order.tolist()
    for one, other in zip(
        (*anew.trie.first, *anew.trie.code, *anew.trie.span),
        (*code_index.trie.first, *code_index.trie.code, *code_index.trie.span),
        strict=True,
    ):
        assert one.tolist() == other.tolist()
    _agree(_code_index(items).changed(merged(together)), slow)


def test_live_changes_come_in_order() -> None:
    live = LiveCodes(_code_index({IDS[0]: (0, 0, 0), IDS[1]: (1, 1, 1)}))
    before = live.epoch()
    live.add({IDS[2]: (2, 3, 2)})
    live.disable([IDS[2]])
    live.remove([IDS[0]])
    live.add({IDS[0]: (0, 0, 1)})
    live.disable([IDS[1]])
    live.enable([IDS[1]])
    after = live.flush()
    assert live.epoch() is after
    _agree(after, SlowCodes({IDS[0]: (0, 0, 1), IDS[1]: (1, 1, 1), IDS[2]: (2, 3, 2)}, {IDS[2]}))
    _agree(before, SlowCodes({IDS[0]: (0, 0, 0), IDS[1]: (1, 1, 1)}))
    assert 1 <= after.epoch - before.epoch <= 6


@given(ITEMS, st.lists(updates(), max_size=4))
@settings(max_examples=30, deadline=None)
def test_live_changes_equal_a_scan_of_those_that_were_accepted(
    items: dict[ItemId, Codes], changes: list[Update]
) -> None:
    slow, live = SlowCodes(dict(items)), LiveCodes(_code_index(items))
    for change in changes:
        try:
            live.apply(change)
        except (DataError, UnknownItemError):
            continue
        slow.apply(change)
    _agree(live.flush(), slow)


def test_an_item_gets_other_codes_in_one_epoch() -> None:
    live = LiveCodes(_code_index({IDS[0]: (0, 0, 0)}))
    live.apply(Update(remove=frozenset(IDS[:1]), add={IDS[0]: (2, 2, 2)}))
    assert live.flush().codes.tolist() == [[2, 2, 2]]
    assert live.epoch().epoch == 1


def test_names_of_items_that_are_gone_do_not_pile_up() -> None:
    code_index = _code_index({IDS[0]: (0, 0, 0), IDS[1]: (1, 1, 1)})
    first = code_index
    for round_ in range(20):
        change = Update(frozenset([ItemId(f"n{round_ - 1}")]), {ItemId(f"n{round_}"): (2, 2, 2)})
        code_index = code_index.changed(change)
    assert code_index.item_ids == (*IDS[:2], "n19")
    assert first.item_ids == IDS[:2]
    assert len(code_index.item_ids._names.all) <= 2 * code_index.num_items + 1


def test_two_epochs_may_come_from_one() -> None:
    code_index = _code_index({IDS[0]: (0, 0, 0)})
    one, other = (code_index.changed(Update(add={item_id: (1, 1, 1)})) for item_id in IDS[1:3])
    assert (one.item_ids, other.item_ids) == ([IDS[0], IDS[1]], [IDS[0], IDS[2]])
    assert one.number_of(IDS[2]) is None


def test_wrong_changes_are_refused_and_change_nothing() -> None:
    live = LiveCodes(_code_index({IDS[0]: (0, 0, 0)}))
    for change in (live.remove, live.disable, live.enable):
        with pytest.raises(UnknownItemError, match="no item 'i5' to"):
            change([IDS[0], IDS[5]])
    with pytest.raises(DataError, match="'i0' again"):
        live.add({IDS[0]: (0, 0, 1)})
    with pytest.raises(DataError, match="from 0 to 3 at level 1, got 4"):
        live.add({IDS[1]: (0, 4, 0)})
    with pytest.raises(DataError, match="'i1': expected 3 codes, got 2"):
        live.add({IDS[1]: (0, 0)})
    with pytest.raises(UnknownItemError, match="'i0' to enable"):
        live.apply(Update(remove=frozenset(IDS[:1]), enabled={IDS[0]: True}))
    live.remove([IDS[0]])
    with pytest.raises(UnknownItemError):  # although it is still in the epoch, perhaps
        live.remove([IDS[0]])
    assert live.flush().num_items == 0
    assert live.epoch().epoch == 1


def test_a_change_that_fails_is_told_and_made_later(monkeypatch: pytest.MonkeyPatch) -> None:
    live = LiveCodes(_code_index({IDS[0]: (0, 0, 0)}))

    def fail(*_: object) -> CodeIndex:
        raise MemoryError("none left")

    with monkeypatch.context() as patched:
        patched.setattr(CodeIndex, "changed", fail)
        live.add({IDS[1]: (1, 0, 0)})
        with pytest.raises(RcllmError, match="none left"):
            live.flush()
    assert live.epoch().num_items == 1
    live.disable([IDS[0]])
    assert live.flush().item_ids == (IDS[0], IDS[1])


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_readers_see_whole_epochs_while_writers_change_them() -> None:
    """Pairs of items are added, removed and disabled together: a reader never sees half a pair, nor a broken trie."""
    codes = np.random.default_rng(0).integers(0, SIZES, (40, 3)).astype(np.int32)
    live = LiveCodes(CodeIndex.build(codes, [ItemId(f"base{number}") for number in range(40)], SIZES))
    done, problems = threading.Event(), []

    def write(writer: int) -> None:
        rng = random.Random(writer)
        for round_ in range(60):
            pair = _ids(f"left{writer}-{round_}", f"right{writer}-{round_}")
            live.add({item_id: tuple(rng.randrange(size) for size in SIZES) for item_id in pair})
            if rng.random() < 0.5:
                live.disable(pair)
            if rng.random() < 0.5:
                live.remove(pair)

    def read(reader: int) -> None:
        rng, last = random.Random(reader), 0
        try:
            while not done.is_set():
                code_index = live.epoch()
                assert code_index.epoch >= last
                last = code_index.epoch
                on = dict(zip(code_index.item_ids, code_index.enabled.tolist(), strict=True))
                for item_id, value in on.items():
                    if item_id.startswith("left"):
                        assert on[ItemId(item_id.replace("left", "right"))] == value
                found = _walk(code_index, code_index.allowed(deny=[ItemId("base0")]), rng)
                assert found is not None
                assert on[found]
                assert found != "base0"
        except BaseException as error:
            problems.append(error)

    readers = [threading.Thread(target=read, args=(number,)) for number in range(3)]
    writers = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for thread in (*readers, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    code_index = live.flush()
    done.set()
    for thread in readers:
        thread.join()
    assert not problems, problems
    assert code_index.num_items >= 40
    anew = CodeIndex.build(code_index.codes, code_index.item_ids, SIZES)
    assert anew.shelf.order.tolist() == code_index.shelf.order.tolist()
