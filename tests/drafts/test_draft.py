"""Draft trees: the merge of continuations, prompt lookup, and what a pool's drafter proposes."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcllm.drafts.draft import EMPTY, DraftTree, Growing, NoDrafter, PromptLookup, occurrences
from rcllm.drafts.draft_tree import END, Continuations, merge
from rcllm.drafts.pool_drafter import DraftOptions, PoolDrafter
from rcllm.drafts.suffix_pool import SuffixPool
from tests.reference import suffix as slow

TOKENS = st.integers(0, 3)
ROWS = st.lists(st.tuples(st.lists(TOKENS, max_size=5), st.integers(1, 9)), min_size=1, max_size=12)


def paths(tree: DraftTree) -> dict[tuple[int, ...], float]:
    found: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.token_ids.tolist(), tree.parents.tolist(), strict=True):
        found.append((*found[parent], token))
    return dict(zip(found[1:], tree.weights.tolist(), strict=True))


def continuations(rows: list[tuple[list[int], int]], branch: int = 5) -> Continuations:
    windows = [window + [END] * (branch - len(window)) for window, _ in rows]
    return Continuations(np.array(windows, np.int32), np.array([evidence for _, evidence in rows], np.float64))


@given(ROWS, st.integers(1, 40), st.sampled_from([0.5, 2.0]), st.randoms(use_true_random=False))
def test_a_tree_is_the_best_nodes_of_the_trie(
    rows: list[tuple[list[int], int]], most: int, doubt: float, rng: random.Random
) -> None:
    """close, 1e-6: weights are float32"""
    tree = merge(continuations(rows), most, doubt)
    tree.check()
    wanted = slow.tree([(tuple(window), float(evidence)) for window, evidence in rows], most, doubt)
    found = paths(tree)
    assert sorted(found.values(), reverse=True) == pytest.approx(list(wanted.values()), abs=1e-6)
    everything = slow.tree([(tuple(window), float(evidence)) for window, evidence in rows], 1000, doubt)
    assert found == pytest.approx({path: everything[path] for path in found}, abs=1e-6)
    rng.shuffle(rows)
    assert paths(merge(continuations(rows), most, doubt)) == pytest.approx(found)


@given(ROWS, st.integers(1, 10))
def test_the_first_nodes_are_the_smaller_tree(rows: list[tuple[list[int], int]], most: int) -> None:
    whole = merge(continuations(rows), 100, 1.0)
    first = DraftTree(whole.token_ids[:most], whole.parents[:most], whole.weights[:most])
    assert paths(first) == paths(merge(continuations(rows), most, 1.0))
    first.check()
    assert whole.depths.tolist() == [len(path) for path in paths(whole)]


def test_nothing_merges_to_an_empty_tree() -> None:
    assert len(merge(continuations([([], 1)]), 8, 1.0)) == 0
    assert len(merge(Continuations(np.empty((0, 4), np.int32), np.empty(0)), 8, 1.0)) == 0
    assert len(merge(continuations([([1], 1)]), 0, 1.0)) == 0
    assert NoDrafter().draft([1, 2, 1], 8) is EMPTY


@given(st.lists(TOKENS, min_size=1, max_size=30), st.integers(1, 4), st.integers(1, 12), st.integers(1, 12))
def test_prompt_lookup_copies_as_hugging_face_does(tokens: list[int], ngram: int, branch: int, most: int) -> None:
    """exact"""
    tree = PromptLookup(ngram, branch).draft(tokens, most)
    tree.check()
    assert tree.token_ids.tolist() == slow.prompt_lookup(tokens, ngram, min(branch, most))
    assert tree.parents.tolist() == list(range(len(tree)))


@given(st.lists(TOKENS, max_size=30), st.integers(1, 3))
def test_occurrences_are_all_earlier_ones(tokens: list[int], n: int) -> None:
    wanted = [i for i in range(n, len(tokens)) if tokens[i - n : i] == tokens[-n:]]
    assert occurrences(np.array(tokens, np.int32), n).tolist() == wanted


def test_a_growing_sequence_converts_only_what_is_new() -> None:
    growing, tokens = Growing(), list(range(10))
    for stop in (3, 3, 10):
        assert growing.extended(tokens[:stop]).tolist() == tokens[:stop]
    assert growing.extended([*tokens, *range(1000)]).tolist() == [*tokens, *range(1000)]


# ---- a pool's drafter -----------------------------------------------------------------------------------------------

PROMPT = (90, 91, 92, 93, 94)
ANSWER = (10, 11, 12, 13, 14, 15, 16, 17)


def test_a_known_answer_is_drafted_from_its_first_word() -> None:
    """The end of the prompt is learned with the answer. Once from the overlay, once from the index."""
    pool = SuffixPool.create("m")
    first = PoolDrafter(pool, PROMPT)
    assert len(first.draft(PROMPT, 64)) == 0
    first.observe(ANSWER)
    first.finish()
    for _ in ("overlay", "index"):
        drafter = PoolDrafter(pool, PROMPT)
        for done in range(len(ANSWER)):
            tree = drafter.draft(PROMPT + ANSWER[:done], 64)
            tree.check()
            assert ANSWER[done:] in paths(tree)
        assert len(drafter.draft(PROMPT + ANSWER, 64)) == 0
        pool.compact()


def test_a_running_answer_drafts_for_its_neighbours_in_the_batch() -> None:
    pool = SuffixPool.create("m")
    ahead, behind = PoolDrafter(pool, PROMPT, "u1"), PoolDrafter(pool, PROMPT, "u2")
    ahead.observe(ANSWER[:4])
    assert ANSWER[:4] in paths(behind.draft(PROMPT, 64))
    ahead.observe(ANSWER[4:])
    assert ANSWER in paths(behind.draft(PROMPT, 64))


def test_what_the_prompt_says_is_drafted_from_an_empty_pool() -> None:
    drafter = PoolDrafter(SuffixPool.create("m"), PROMPT)
    assert ANSWER[2:6] in paths(drafter.draft((*ANSWER, *PROMPT, 10, 11), 64))


def test_more_frequent_continuations_weigh_more_and_limits_hold() -> None:
    pool = SuffixPool.create("m")
    for follow in (1, 1, 1, 2, 2, 3):
        pool.learn([7, 8, follow, *range(20, 50)])
    pool.compact()
    drafter = PoolDrafter(pool, PROMPT, options=DraftOptions(branch=5))
    tree = drafter.draft((*PROMPT, 7, 8), 64)
    weights = paths(tree)
    assert weights[1,] > weights[2,] > weights[3,]
    assert max(map(len, weights)) == 5
    assert len(drafter.draft((*PROMPT, 7, 8), 4)) == 4


def test_two_tokens_that_agree_are_preferred_to_one() -> None:
    pool = SuffixPool.create("m")
    for answer in ([5, 8, 1], [6, 8, 2], [7, 8, 3]):
        pool.learn(answer)
    pool.compact()
    weights = paths(PoolDrafter(pool, PROMPT).draft((*PROMPT, 6, 8), 64))
    assert weights[2,] > max(weights[1,], weights[3,])
    assert set(paths(PoolDrafter(pool, PROMPT).draft((*PROMPT, 50, 8), 64))) == {(1,), (2,), (3,)}


# ---- privacy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("opted_out", ["by the pool", "by the user", "later"])
def test_a_private_answer_drafts_for_its_owner_alone(compacted: bool, opted_out: str) -> None:
    pool = SuffixPool.create("m", "own" if opted_out == "by the pool" else "all")
    writer = PoolDrafter(pool, PROMPT, "alice", private=opted_out == "by the user")
    writer.observe(ANSWER)
    if opted_out == "later":
        assert ANSWER[2:] in paths(PoolDrafter(pool, PROMPT, "bob").draft((*PROMPT, 10, 11), 64))
        pool.withdraw(["alice"])
    assert not len(PoolDrafter(pool, PROMPT, "bob").draft((*PROMPT, 10, 11), 64)), "while it is written"
    writer.finish()
    if compacted:
        pool.compact()
    for other in ("bob", None):
        assert not len(PoolDrafter(pool, PROMPT, other).draft((*PROMPT, 10, 11), 64))
    assert ANSWER[2:] in paths(PoolDrafter(pool, PROMPT, "alice").draft((*PROMPT, 10, 11), 64))


def test_texts_about_items_draft_for_everybody_where_users_keep_theirs() -> None:
    pool = SuffixPool.create("m", "own")
    pool.learn(ANSWER)
    assert ANSWER[2:] in paths(PoolDrafter(pool, PROMPT, "bob").draft((*PROMPT, 10, 11), 64))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.booleans(), st.booleans()), min_size=1, max_size=8))
def test_no_drafter_proposes_a_token_that_only_a_private_text_of_another_holds(
    written: list[tuple[str, bool, bool]],
) -> None:
    """Each answer has a token of its own after the common [1, 2]."""
    pool = SuffixPool.create("m")
    for number, (owner, private, compacted) in enumerate(written):
        pool.learn([1, 2, 100 + number, 3], owner, private=private)
        if compacted:
            pool.compact()
    for reader in ("a", "b", "c"):
        tree = PoolDrafter(pool, PROMPT, reader).draft((*PROMPT, 1, 2), 200)
        wanted = {100 + i for i, (owner, private, _) in enumerate(written) if not private or owner == reader}
        found = {token for token in tree.token_ids.tolist() if token >= 100}
        assert found <= wanted
        assert bool(found) == bool(wanted)


def test_a_prompt_shorter_than_the_lead_is_learned_whole() -> None:
    pool = SuffixPool.create("m")
    drafter = PoolDrafter(pool, (90, 91, 92), options=DraftOptions(lead=4))
    drafter.observe(ANSWER)
    drafter.finish()
    assert [answer.token_ids.tolist() for answer in pool.answers()] == [[90, 91, 92, *ANSWER]]
