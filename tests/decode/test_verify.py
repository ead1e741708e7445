"""Verification of draft trees: strict is plain decoding, whatever the tree; relaxed is the longest acceptable path."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rcllm.core.decoding import Speculation
from rcllm.decode.verify import Judged, accept, accept_relaxed, ancestors, subtree
from rcllm.drafts.draft import EMPTY, DraftTree
from tests.reference.generate import longest_acceptable, path_of

VOCAB = 3


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    """Up to 14 nodes, no two children of one parent with the same token."""
    n = draw(st.integers(0, 14))
    parents, tokens, taken = list[int](), list[int](), set[tuple[int, int]]()
    for row in range(1, n + 1):
        parent, token = draw(st.integers(0, row - 1)), draw(st.integers(0, VOCAB - 1))
        if (parent, token) in taken or parent > len(parents):
            continue
        taken.add((parent, token))
        parents.append(parent)
        tokens.append(token)
    weights = np.ones(len(parents), np.float32)
    return DraftTree(np.array(tokens, np.int32), np.array(parents, np.int32), weights)


def _tokens(tree: DraftTree, row: int) -> tuple[int, ...]:
    return tuple(int(tree.token_ids[each - 1]) for each in path_of(tree, row))


def _model(seed: int, tokens: tuple[int, ...]) -> int:
    """A deterministic model of a language of three tokens."""
    return hash((seed, tokens)) % VOCAB


@given(trees(), st.integers(0, 10_000))
def test_accepted_tokens_are_those_of_plain_decoding(tree: DraftTree, seed: int) -> None:
    targets = [_model(seed, _tokens(tree, row)) for row in range(len(tree) + 1)]
    found = accept(tree, targets)
    plain: tuple[int, ...] = ()
    for _ in found.token_ids:
        plain = (*plain, _model(seed, plain))
    assert found.token_ids == plain
    assert len(found.rows) == len(plain) - 1
    assert [_tokens(tree, row) for row in found.rows] == [plain[: i + 1] for i in range(len(found.rows))]
    assert plain not in {_tokens(tree, row) for row in range(len(tree) + 1)}, "a longer path would have been right"


@given(trees(), st.data(), st.integers(1, 3), st.floats(0, 1))
def test_the_relaxed_path_is_the_longest_of_acceptable_nodes(
    tree: DraftTree, data: st.DataObject, k: int, p: float
) -> None:
    n = len(tree)
    orders = [data.draw(st.permutations(range(VOCAB))) for _ in range(n + 1)]  # likeliest first, after each row
    ranks = [orders[parent].index(token) for parent, token in zip(tree.parents, tree.token_ids, strict=True)]
    chances = data.draw(st.lists(st.floats(0, 1, width=32), min_size=n, max_size=n))
    judged = Judged(np.array(ranks, np.int32), np.array(chances, np.float32), np.full(n, 0.5, np.float32))
    targets = [order[0] for order in orders]
    answer = data.draw(st.lists(st.integers(0, VOCAB - 1), max_size=16))
    found = accept_relaxed(tree, targets, judged, Speculation("relaxed", k, p), answer)
    phrases = [(*answer, *_tokens(tree, row))[-4:] for row in range(1, n + 1)]
    new = [all(tuple(answer[at : at + 4]) != phrase for at in range(len(answer) - 3)) for phrase in phrases]
    within = [rank < k and np.float32(c) > p for rank, c in zip(ranks, chances, strict=True)]
    acceptable = [rank == 0 or (fits and fresh) for rank, fits, fresh in zip(ranks, within, new, strict=True)]
    path = longest_acceptable(tree, ranks, acceptable)
    assert list(found.rows) == path
    last = path[-1] if path else 0
    assert found.token_ids == (*_tokens(tree, last), targets[last])
    diverging = [(len(answer) + depth, row - 1) for depth, row in enumerate(path) if ranks[row - 1]]
    assert [each.position for each in found.divergences] == [position for position, _ in diverging]
    for each, (_, node) in zip(found.divergences, diverging, strict=True):
        assert (each.token_id, each.argmax_id) == (tree.token_ids[node], targets[tree.parents[node]])
        assert each.probability == np.float32(chances[node])


@given(trees(), st.integers(0, 10_000))
def test_relaxed_with_rank_one_is_strict(tree: DraftTree, seed: int) -> None:
    targets = [_model(seed, _tokens(tree, row)) for row in range(len(tree) + 1)]
    ranks = [int(token != targets[parent]) for parent, token in zip(tree.parents, tree.token_ids, strict=True)]
    sure = np.ones(len(tree), np.float32)
    judged = Judged(np.array(ranks, np.int32), sure, sure)
    assert accept_relaxed(tree, targets, judged, Speculation("relaxed", 1, 0.0), []) == accept(tree, targets)


@given(trees())
def test_a_row_sees_its_way_to_the_root(tree: DraftTree) -> None:
    sees = ancestors(tree)
    for row in range(1, len(tree) + 1):
        assert set(np.flatnonzero(sees[row])) == {0, *path_of(tree, row)[:-1]}
    assert not sees[0].any()


@given(trees(), st.data())
def test_a_subtree_keeps_its_paths(tree: DraftTree, data: st.DataObject) -> None:
    wanted = data.draw(st.sets(st.integers(0, len(tree)), max_size=4))
    nodes = np.array(sorted({row - 1 for each in wanted for row in path_of(tree, each)}), np.int32)
    found = subtree(tree, nodes)
    assert [_tokens(found, i + 1) for i in range(len(nodes))] == [_tokens(tree, node + 1) for node in nodes]


def test_an_empty_tree_gives_the_models_own_token() -> None:
    assert accept(EMPTY, [7]).token_ids == (7,)
