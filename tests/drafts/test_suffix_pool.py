"""The suffix index against a scan of all answers; the pool: learning, forgetting, merging, erasing, files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcllm.drafts.draft_tree import windows
from rcllm.drafts.suffix_index import (
    LONGEST,
    NOBODY,
    Header,
    PastAnswer,
    SuffixIndex,
    SuffixMatches,
    context_ranks,
    owner_key,
)
from rcllm.drafts.suffix_pool import DraftPoolLimits, SuffixPool
from rcllm.errors import ConfigError, DataError
from tests.reference import suffix as slow

HEADER = Header(1, "m", "all")
TOKENS = st.integers(0, 3)
ANSWERS = st.lists(st.lists(TOKENS, min_size=1, max_size=20), min_size=1, max_size=8, unique_by=tuple)
TAIL = st.lists(TOKENS, min_size=1, max_size=16)
Row = tuple[tuple[int, ...], int]


def index_of(answers: list[list[int]]) -> SuffixIndex:
    return SuffixIndex.build(HEADER, (PastAnswer(np.array(answer, np.int32)) for answer in answers))


def found_rows(index: SuffixIndex, matches: SuffixMatches) -> list[Row]:
    rows = windows(index.text, matches.places, 32).tolist()
    return sorted(
        (tuple(token for token in row if token >= 0), length)
        for row, length in zip(rows, matches.lengths.tolist(), strict=True)
    )


def find(index: SuffixIndex, tail: list[int], most: int = 1000) -> list[Row]:
    return found_rows(index, index.find(np.array(tail, np.int32), most))


@given(ANSWERS, TAIL)
def test_with_room_for_all_the_index_finds_what_a_scan_finds(answers: list[list[int]], tail: list[int]) -> None:
    """exact"""
    assert find(index_of(answers), tail) == sorted(slow.places(answers, tail, LONGEST))


@given(ANSWERS, TAIL, st.integers(1, 6))
def test_with_little_room_the_longest_matches_come_first(answers: list[list[int]], tail: list[int], most: int) -> None:
    rows, everything = find(index_of(answers), tail, most), slow.places(answers, tail, LONGEST)
    assert len(rows) <= most
    left = list(everything)
    for row in rows:
        left.remove(row)  # ValueError where a row was made up or stands twice
    lengths = sorted((length for _, length in everything), reverse=True)
    for length in range(2, LONGEST + 1):
        if 0 < sum(n >= length for n in lengths) <= most:  # so many fit: none of them is missing
            assert all(n < length for _, n in left)
    assert bool(rows) == bool(everything)
    if everything:
        assert max(n for _, n in rows) == lengths[0] or sum(n >= lengths[0] for n in lengths) > most


def test_one_common_token_is_no_match() -> None:
    index = index_of([[0, i, 0, i + 1, 0, i + 2] for i in range(1, 600, 3)])
    assert find(index, [700, 0]) == []
    assert len(find(index, [1, 0])) == 1
    assert len(find(index, [700, 5])) == 1


@given(st.lists(TOKENS, min_size=1, max_size=40), st.sampled_from([1, 2, 4, 16]))
def test_ranks_order_positions_by_the_tokens_before_them(tokens: list[int], depth: int) -> None:
    ranks = context_ranks(np.array(tokens, np.int32), depth).tolist()
    before = [tuple(tokens[max(0, i - depth + 1) : i + 1][::-1]) for i in range(len(tokens))]
    whole = [i for i in range(len(tokens)) if i + 1 >= depth]  # those with `depth` tokens before them
    for i in whole:
        for j in whole:
            assert (ranks[i] < ranks[j]) == (before[i] < before[j])


def test_token_ids_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="token ids below"):
        index_of([[1, 2**21]])


# ---- the pool -------------------------------------------------------------------------------------------------------


def texts(pool: SuffixPool) -> list[tuple[int, ...]]:
    return sorted(tuple(answer.token_ids.tolist()) for answer in pool.answers())


@given(ANSWERS, TAIL, st.integers(1, 4))
def test_the_overlay_finds_the_newest_places_that_a_scan_finds(
    answers: list[list[int]], tail: list[int], most: int
) -> None:
    """exact: the longest of 4, 2 and 1 tokens that match anywhere, and of those places the newest"""
    pool = SuffixPool.create("m")
    for answer in answers:
        pool.learn(answer)
    everything = slow.places(answers, tail, LONGEST)
    least = next((n for n in (4, 2, 1) if any(length >= n for _, length in everything)), 1)
    wanted = [row for row in everything if row[1] >= least][-most:]
    found = pool.find_recent(tail, 32, most)
    assert [(tuple(row.window), row.length) for row in found] == wanted


@settings(max_examples=30, deadline=None)
@given(ANSWERS, TAIL)
def test_saved_merged_and_learned_pools_are_one(
    tmp_path_factory: pytest.TempPathFactory, answers: list[list[int]], tail: list[int]
) -> None:
    path = tmp_path_factory.mktemp("pool") / "pool.safetensors"
    pools = [SuffixPool.create("m"), SuffixPool.create("m")]
    for i, answer in enumerate(answers):
        pools[i % 2].learn(answer, f"user {i}")
    pools[0].save(path)
    merged = SuffixPool.merge([SuffixPool.open(path, "m"), pools[1]])
    assert texts(merged) == sorted(map(tuple, answers))
    assert find(merged.index, tail) == sorted(slow.places(answers, tail, LONGEST))
    assert {answer.owner for answer in merged.answers()} == {owner_key(f"user {i}") for i in range(len(answers))}


def test_a_saved_pool_is_used_from_the_file_and_holds_no_user_id(tmp_path: Path) -> None:
    pool = SuffixPool.create("m")
    pool.learn([1, 2, 3, 4], "user-with-a-name")
    pool.save(tmp_path / "pool.safetensors")
    assert not pool.index.text.flags.writeable
    assert b"user-with-a-name" not in (tmp_path / "pool.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["pool.safetensors"]
    pool.learn([5, 6, 7], None)  # goes on after saving, and saves over the file that it maps
    pool.save(tmp_path / "pool.safetensors")
    assert texts(SuffixPool.open(tmp_path / "pool.safetensors", "m")) == [(1, 2, 3, 4), (5, 6, 7)]


def test_an_empty_pool_can_be_saved_and_asked(tmp_path: Path) -> None:
    SuffixPool.create("m", "own").save(tmp_path / "pool.safetensors")
    pool = SuffixPool.open(tmp_path / "pool.safetensors", "m")
    assert pool.sharing == "own"
    assert find(pool.index, [1, 2]) == []
    assert pool.num_tokens == 0


def test_equal_texts_of_one_owner_are_kept_once_and_count_more() -> None:
    pool = SuffixPool.create("m")
    for owner in ("a", "a", "b", None):
        pool.learn([1, 2, 3], owner)
    pool.compact()
    assert sorted((answer.owner, answer.weight) for answer in pool.answers()) == sorted(
        [(owner_key("a"), 2.0), (owner_key("b"), 1.0), (NOBODY, 1.0)]
    )


def test_running_answers_survive_a_compaction() -> None:
    pool = SuffixPool.create("m")
    running = pool.begin("a")
    pool.extend(running, [1, 2, 3])
    pool.learn([7, 8, 9])
    pool.compact()
    pool.extend(running, [4, 5])
    assert [row.window for row in pool.find_recent([1, 2], 8, 8)] == [[3, 4, 5]]
    pool.end(running)
    assert texts(pool) == [(1, 2, 3, 4, 5), (7, 8, 9)]


def test_a_full_overlay_is_sorted_into_the_index() -> None:
    pool = SuffixPool.create("m", limits=DraftPoolLimits(overlay_tokens=20))
    for i in range(30):
        pool.learn(range(10 * i, 10 * i + 10))
    assert pool.index.num_tokens > 0
    assert pool.num_tokens == 300
    assert len(texts(pool)) == 30


def test_at_capacity_older_and_rarer_answers_are_forgotten() -> None:
    limits = DraftPoolLimits(max_tokens=400, overlay_tokens=40)
    pool = SuffixPool.create("m", limits=limits)
    common = list(range(20))
    for i in range(200):
        pool.learn([*common, 1000 + i])
        pool.learn(range(2000 + 21 * i, 2000 + 21 * i + 21))  # shares nothing with any other
        assert pool.index.num_tokens <= limits.max_tokens
        assert pool.num_tokens <= limits.max_tokens + limits.max_tokens // 8 + 42
    kept = [text for text in texts(pool) if text[0] == 0]
    assert len(kept) > len(texts(pool)) - len(kept), "phrases that recur are kept longer"
    assert max(text[-1] for text in kept) == 1199
    assert min(text[-1] for text in kept) > 1050, "old ones make room"
    assert min(answer.weight for answer in pool.answers()) < 1.0


# ---- erasing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("private", [False, True])
def test_erasing_leaves_nothing_in_memory_nor_in_the_file(tmp_path: Path, private: bool) -> None:
    path = tmp_path / "pool.safetensors"
    secret, recent, other = [101, 102, 103, 104, 105], [201, 202, 203, 204], [301, 302, 303]
    pool = SuffixPool.create("m")
    pool.learn(secret, "alice", private=private)
    pool.learn(other, "bob")
    pool.save(path)
    pool = SuffixPool.open(path, "m")
    pool.learn(recent, "alice", private=private)
    running = pool.begin("alice", private=private)
    pool.extend(running, [401, 402, 403])
    pool.erase(["alice"])
    pool.extend(running, [404, 405])  # its request still runs
    pool.end(running)
    assert texts(pool) == [tuple(other)]
    assert pool.private_texts("alice") == []
    for tail in ([101, 102], [201, 202], [402, 403], [404]):
        assert not len(pool.index.find(np.array(tail, np.int32), 8).places)
        assert not pool.find_recent(tail, 8, 8)
    pool.save(path)
    stored = np.frombuffer(path.read_bytes()[: path.stat().st_size // 4 * 4], np.int32)
    assert not set(range(101, 106)) & set(stored.tolist())
    assert {301, 302, 303} <= set(stored.tolist()), "the test sees what is stored"
    assert owner_key("alice") not in path.read_bytes()
    assert owner_key("bob") in path.read_bytes()


# ---- files that do not fit ------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    pool = SuffixPool.create("m")
    pool.learn(range(50))
    pool.save(tmp_path / "pool.safetensors")
    return tmp_path / "pool.safetensors"


def test_a_pool_of_another_model_is_refused(saved: Path) -> None:
    with pytest.raises(ConfigError, match="made with model and tokenizer m, expected n"):
        SuffixPool.open(saved, "n")
    with pytest.raises(ConfigError, match="of one model"):
        SuffixPool.merge([SuffixPool.open(saved, "m"), SuffixPool.create("n")])


def test_a_pool_of_another_format_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes().replace(rb"\"version\": 1", rb"\"version\": 7"))
    with pytest.raises(ConfigError, match="has format 7, expected 1"):
        SuffixPool.open(saved, "m")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_torn_file_is_refused(saved: Path, kept: int) -> None:
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(DataError, match="not a whole draft pool"):
        SuffixPool.open(saved, "m")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is missing"):
        SuffixPool.open(tmp_path / "pool.safetensors", "m")
