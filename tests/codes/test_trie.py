"""The trie against a set of prefixes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rcllm.codes.trie import Trie
from rcllm.core.ranking import IntArray

Codes = tuple[int, ...]


@st.composite
def shapes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Codes]]:
    """Sizes of levels, and code sequences, several of which may be equal, in order."""
    sizes = tuple(draw(st.lists(st.integers(1, 5), min_size=2, max_size=6)))
    code = st.tuples(*(st.integers(0, size - 1) for size in sizes))
    return sizes, sorted(draw(st.lists(code, max_size=40)))


def _trie(sizes: tuple[int, ...], rows: list[Codes]) -> Trie:
    return Trie.of_sorted(np.array(rows, np.int32).reshape(len(rows), len(sizes)), sizes)


def _walk(trie: Trie) -> list[list[Codes]]:
    """Prefixes of all nodes, per level, by stepping from each level to the next."""
    prefixes: list[list[Codes]] = [[()]]
    for level in range(trie.num_levels):
        nodes: IntArray = np.arange(len(prefixes[level]), dtype=np.int32)
        children = trie.children(level, nodes)
        assert children.nodes.tolist() == list(range(len(children.nodes)))
        pairs = zip(children.parents.tolist(), children.codes.tolist(), strict=True)
        prefixes.append([(*prefixes[level][parent], code) for parent, code in pairs])
    return prefixes


@given(shapes())
@settings(deadline=None)
def test_nodes_are_the_prefixes_in_order(shape: tuple[tuple[int, ...], list[Codes]]) -> None:
    sizes, rows = shape
    trie = _trie(sizes, rows)
    wanted = [
        sorted({row[:level] for row in rows} | ({()} if level == 0 else set())) for level in range(len(sizes) + 1)
    ]
    assert _walk(trie) == wanted
    assert trie.num_nodes == tuple(len(level) for level in wanted)
    for level, prefixes in enumerate(wanted):
        below = [[row for row in rows if row[:level] == prefix] for prefix in prefixes]
        assert np.diff(trie.span[level]).tolist() == [len(some) for some in below]
        places = np.arange(len(rows))
        assert trie.above(level, places).tolist() == [prefixes.index(row[:level]) for row in rows]


@given(shapes(), st.data())
@settings(deadline=None)
def test_children_of_some_nodes(shape: tuple[tuple[int, ...], list[Codes]], data: st.DataObject) -> None:
    """Any nodes in any order, also twice, and only those children that are alive."""
    sizes, rows = shape
    trie = _trie(sizes, rows)
    prefixes = _walk(trie)
    level = data.draw(st.integers(0, len(sizes) - 1))
    if not prefixes[level]:
        return
    nodes = data.draw(st.lists(st.integers(0, len(prefixes[level]) - 1), max_size=10))
    count = len(prefixes[level + 1])
    alive = data.draw(st.none() | st.lists(st.booleans(), min_size=count, max_size=count))
    mask = None if alive is None else np.array(alive, np.bool_)
    children = trie.children(level, np.array(nodes, np.int32), mask)
    every = [
        [child for child, prefix in enumerate(prefixes[level + 1]) if prefix[:level] == prefixes[level][node]]
        for node in nodes
    ]
    left = [[child for child in some if alive is None or alive[child]] for some in every]
    got = np.split(children.nodes, children.first[1:-1]) if nodes else []
    assert [some.tolist() for some in got] == left
    assert children.codes.tolist() == [prefixes[level + 1][child][-1] for some in left for child in some]
    assert children.parents.tolist() == [row for row, some in enumerate(left) for _ in some]
    assert children.num_dead == sum(map(len, every)) - sum(map(len, left))


@given(shapes(), st.data())
@settings(deadline=None)
def test_locate_finds_leaves_and_where_others_would_be(
    shape: tuple[tuple[int, ...], list[Codes]], data: st.DataObject
) -> None:
    sizes, rows = shape
    code = st.tuples(*(st.integers(0, size - 1) for size in sizes))
    asked = data.draw(st.lists(code, max_size=8)) + rows
    located = _trie(sizes, rows).locate(np.array(asked, np.int32).reshape(len(asked), len(sizes)))
    leaves = sorted(set(rows))
    for sequence, found, leaf, place in zip(asked, located.found, located.leaves, located.places, strict=True):
        assert found == (sequence in leaves)
        assert not found or leaves[leaf] == sequence
        assert place == sum(row <= sequence for row in rows)
