"""Prototypes of the semantic pool: embeddings, clusters, look-up against an exhaustive search, what is always fresh."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcllm.core.ranking import Block, Borrowed, ContentKey, Level, Matches, Prompt, RankOptions
from rcllm.core.receipts import BlockKind
from rcllm.errors import ConfigError
from rcllm.prompt.template import Template
from rcllm.prompt.tokenizer import Tokenizer
from rcllm.prototypes.lookup import Matcher, PrototypeIndex, always_fresh
from rcllm.prototypes.lsh import Floats, Ints, Lsh, Rows, Words, choose, embed
from rcllm.reuse.plan import plan
from tests.engine import tiny
from tests.reference import prototypes as reference

WIDTH, VOCAB = 32, 60
THRESHOLD = 0.9


@functools.cache
def matrix(seed: int = 0) -> Floats:
    """Random embeddings of all lengths, in which each odd token is close to the even one before it."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(VOCAB, WIDTH)) * rng.uniform(0.1, 5, size=(VOCAB, 1))
    rows[1::2] = rows[::2] * 2 + rng.normal(size=(VOCAB // 2, WIDTH)) * 0.05
    return rows.astype(np.float32)


def rows_of(values: Floats) -> Rows:
    return lambda token_ids: values[token_ids]


def words(pairs: list[tuple[int, int]]) -> Words:
    tokens, buckets = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return Words(tokens, buckets)


def counted(seed: int, size: int) -> tuple[Words, Ints]:
    """Distinct words, ordered by code, and how often each was seen."""
    rng = np.random.default_rng(seed)
    codes = words([(t, b) for t in range(VOCAB) for b in range(8)]).codes
    chosen = np.sort(rng.choice(codes, size, replace=False))
    return Words.of_codes(chosen), rng.integers(1, 50, size)


def pairs_of(some: Words) -> list[tuple[int, int]]:
    return list(zip(some.token_ids.tolist(), some.buckets.tolist(), strict=True))


def index_of(seed: int = 0, size: int = 120, most: int = 1000, tables: int = 8, bits: int = 6) -> PrototypeIndex:
    some, counts = counted(seed, size)
    lsh = Lsh.of(WIDTH, tables, bits, seed)
    made = choose(rows_of(matrix()), some, counts, lsh, THRESHOLD, most)
    return PrototypeIndex(made.words, made.covered, lsh, rows_of(matrix()))


# ---- embeddings -----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, VOCAB - 1), st.integers(0, 3000)), min_size=1, max_size=8))
def test_embeddings_equal_the_reference(pairs: list[tuple[int, int]]) -> None:
    got = embed(rows_of(matrix()), words(pairs))
    np.testing.assert_allclose(got, [reference.embed(matrix(), pair) for pair in pairs], atol=1e-5)


def test_cosine_depends_on_the_distance_of_buckets_alone_and_falls_with_it() -> None:
    points = embed(rows_of(matrix()), words([(4, 0), (4, 1), (4, 2), (4, 10), (4, 11)]))
    assert points[0] @ points[1] == pytest.approx(points[3] @ points[4], abs=1e-5)
    assert 1.0 > points[0] @ points[1] > points[0] @ points[2] > points[0] @ points[3]


def test_codes_name_words() -> None:
    some = words([(3, 0), (3, 1), (4, 0)])
    assert np.array_equal(Words.of_codes(some.codes).token_ids, some.token_ids)
    assert np.all(np.diff(some.codes) > 0)


def test_signatures_do_not_depend_on_the_rest_of_the_call() -> None:
    some, _ = counted(1, 100)
    lsh = Lsh.of(WIDTH, 4, 10, seed=3)
    together = lsh.signatures(rows_of(matrix()), some)
    apart = [lsh.signatures(rows_of(matrix()), some[i : i + 1])[:, 0] for i in range(len(some))]
    assert together.shape == (4, 100)
    assert (together != np.stack(apart, axis=1)).mean() < 0.001  # a point on a plane may fall to either side


# ---- clusters -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 20), st.integers(1, 100), st.integers(1, 8), st.integers(1, 10))
def test_every_word_is_stood_for_when_there_is_room(seed: int, size: int, tables: int, bits: int) -> None:
    some, counts = counted(seed, size)
    lsh = Lsh.of(WIDTH, tables, bits, seed)
    made = choose(rows_of(matrix()), some, counts, lsh, THRESHOLD, size)
    assert made.covered.sum() == counts.sum()
    assert np.all(np.diff(made.words.codes) > 0)
    assert set(made.words.codes) <= set(some.codes)
    prototypes = pairs_of(made.words)
    for pair in pairs_of(some):
        assert reference.nearest(matrix(), prototypes, pair)[1] >= THRESHOLD - 1e-5


def test_the_member_nearest_to_the_centroid_is_canonical() -> None:
    values = np.zeros((3, WIDTH), np.float32)
    values[:, 0], values[:, 1] = 1.0, (0.0, 0.1, 0.25)  # one direction and two beside it
    lsh = Lsh(np.full((WIDTH, 1, 1), -1.0, np.float32))  # one bucket
    some = words([(0, 0), (1, 0), (2, 0)])
    made = choose(rows_of(values), some, np.array([1, 1, 1]), lsh, THRESHOLD, 10)
    assert pairs_of(made.words) == [(1, 0)]
    assert made.covered.tolist() == [3]
    made = choose(rows_of(values), some, np.array([1, 1, 100]), lsh, THRESHOLD, 10)
    assert pairs_of(made.words) == [(2, 0)]  # counts draw the centroid


def test_what_stands_for_most_tokens_is_kept() -> None:
    some, counts = counted(0, 150)
    lsh = Lsh.of(WIDTH, 4, 8, 0)
    whole = choose(rows_of(matrix()), some, counts, lsh, THRESHOLD, 1000)
    few = choose(rows_of(matrix()), some, counts, lsh, THRESHOLD, 10)
    assert sorted(few.covered.tolist()) == sorted(whole.covered.tolist())[-10:]


# ---- look-up --------------------------------------------------------------------------------------------------------


def test_a_prototype_finds_itself() -> None:
    index = index_of()
    found, cosine = index.nearest(index.words)
    assert found.tolist() == list(range(len(index)))
    assert np.all(cosine == 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_the_lookup_never_beats_the_exhaustive_search_and_rarely_misses(seed: int) -> None:
    index = index_of(seed, most=60)
    prototypes = pairs_of(index.words)
    asked, _ = counted(seed + 100, 100)
    found, cosine = index.nearest(asked)
    hits = misses = 0
    for word, prototype, near in zip(pairs_of(asked), found.tolist(), cosine.tolist(), strict=True):
        best, best_cosine = reference.nearest(matrix(), prototypes, word)
        assert near <= best_cosine + 1e-5
        if near > 0:
            own = reference.embed(matrix(), word) @ reference.embed(matrix(), prototypes[prototype])
            assert near == pytest.approx(own, abs=1e-5)
        if best_cosine >= 0.95:
            hits += prototype == best or near == pytest.approx(best_cosine, abs=1e-5)
            misses += near < best_cosine - 1e-5
    assert misses <= 0.1 * (hits + misses)


def test_more_tables_find_more() -> None:
    asked, _ = counted(7, 300)
    found = [(index_of(tables=tables, bits=12, size=200).nearest(asked)[1] >= THRESHOLD).sum() for tables in (1, 16)]
    assert found[0] < found[1]


def test_nothing_asked_and_nothing_there() -> None:
    nothing = words([])
    assert len(index_of().nearest(nothing)[0]) == 0
    empty = PrototypeIndex(nothing, np.empty(0, np.int64), Lsh.of(WIDTH, 2, 4, 0), rows_of(matrix()))
    assert empty.nearest(words([(1, 1)]))[1].tolist() == [0.0]


def test_tokens_that_are_always_fresh_are_never_matched() -> None:
    index = index_of()
    fresh = np.zeros(VOCAB, bool)
    fresh[::3] = True
    matcher = Matcher(index, fresh, bucket_width=4, threshold=THRESHOLD)
    tokens = tuple(range(VOCAB))
    found = matcher.match(tokens, 5)
    assert not found.reused[fresh].any()
    assert found.reused.any()
    assert np.all(found.cosine[found.reused] >= THRESHOLD)
    assert np.all((found.cosine < THRESHOLD) | found.reused)
    for i in np.flatnonzero(found.reused).tolist():
        near = reference.embed(matrix(), (tokens[i], (5 + i) // 4)) @ reference.embed(
            matrix(), pairs_of(index.words)[found.prototype[i]]
        )
        assert near == pytest.approx(found.cosine[i], abs=1e-5)


# ---- plans ----------------------------------------------------------------------------------------------------------


def key(name: str) -> ContentKey:
    return ContentKey(name.encode())


def with_history(sizes: list[int]) -> Prompt:
    """Instruction, a chained history of these sizes, one item, the question."""
    blocks = [Block(BlockKind.INSTRUCTION, (1,) * 4, 0, key=key("i"), chain_key=key("i"))]
    blocks += [Block(BlockKind.HISTORY, (2,) * n, 0, chain_key=key(f"c{i}")) for i, n in enumerate(sizes, 1)]
    blocks += [Block(BlockKind.ITEM, (3,) * 5, 0, "item", key("item")), Block(BlockKind.QUESTION, (4,) * 3, 0)]
    return Prompt("r", tuple(blocks), np.tri(len(blocks), k=-1, dtype=bool), (), 1, (), RankOptions(history="semantic"))


def lent(index: int, reused: list[bool]) -> Borrowed:
    nothing = np.zeros(len(reused))
    matches = Matches(np.array(reused), nothing.astype(np.int64), nothing.astype(np.float32))
    return Borrowed(key(f"s{index}"), matches)


@dataclass
class Every(Container[ContentKey]):
    """Has every key that begins so."""

    start: bytes = b""

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and key.startswith(self.start)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=4), st.booleans())
def test_matched_tokens_are_read_and_the_others_are_fresh(reused: list[list[bool]], cached: bool) -> None:
    prompt = with_history([len(part) for part in reused])
    borrowed = {i: lent(i, part) for i, part in enumerate(reused, 1) if any(part)}
    made = plan(prompt, Level("blocks"), Every(b"c") if cached else (), borrowed)
    tiled = [(p.block, token) for p in made.pieces for token in range(p.start, p.stop)]
    assert tiled == [(b, token) for b, block in enumerate(prompt.blocks) for token in range(len(block))]
    for i, loan in borrowed.items():
        read = [p.key for p in made.pieces if p.block == i for _ in range(len(p))]
        assert read == [loan.key if there else None for there in loan.matches.reused]
    first = min(borrowed, default=len(prompt.blocks))
    assert all(i < first for i in made.publish), "what follows approximate KV is not published as exact"
    assert not any(p.key and p.key == prompt.blocks[p.block].chain_key for p in made.pieces if p.block >= first)


@pytest.mark.parametrize("level", ["full", "exact"])
def test_exact_levels_borrow_nothing(level: str) -> None:
    prompt = with_history([3, 2])
    borrowed = {1: lent(1, [True, False, True])}
    for cached in (True, False):
        with_loan = plan(prompt, Level.parse(level), Every(b"") if cached else (), borrowed)
        assert with_loan == plan(prompt, Level.parse(level), Every(b"") if cached else ())


def test_budgets_are_spent_on_what_is_borrowed_too() -> None:
    prompt = with_history([4, 3])
    borrowed = {1: lent(1, [True, True, False, True]), 2: lent(2, [False, True, True])}
    linked = plan(prompt, Level.parse("linked(2)"), (), borrowed)
    assert [(p.start, p.stop, p.key) for p in linked.pieces if p.block == 1] == [
        (0, 2, None),
        (2, 3, None),
        (3, 4, key("s1")),
    ]
    tail = plan(prompt, Level.parse("tail(1.0)"), (), borrowed)
    assert all(p.key is None for p in tail.pieces if p.block > 0)


# ---- which tokens are fresh -----------------------------------------------------------------------------------------


def tokenizer_and_template() -> tuple[Tokenizer, Template]:
    return Tokenizer.load(tiny.model_folder()), Template.load(str(tiny.template_path()))


def test_numbers_ids_delimiters_and_field_names_are_always_fresh() -> None:
    tokenizer, template = tokenizer_and_template()
    fresh = always_fresh(tokenizer, template)
    kinds: dict[str, Callable[[str], bool]] = {
        "digits": lambda text: any(c.isdigit() for c in text),
        "marks": lambda text: not any(c.isalnum() for c in text),
        "words": lambda text: text.strip().isalpha(),
    }
    by_kind = {
        kind: [i for i in range(tokenizer.vocab_size) if says(tokenizer.decode([i]))] for kind, says in kinds.items()
    }
    assert all(by_kind.values()), "the vocabulary has each kind"
    assert fresh[by_kind["digits"]].all()
    assert fresh[by_kind["marks"]].all()
    assert not fresh[by_kind["words"]].all()
    assert fresh[list(tokenizer.encode("\n- "))].all()


def test_field_names_of_the_template_are_fresh(tmp_path: Path) -> None:
    tokenizer, _ = tokenizer_and_template()
    path = tmp_path / "named.toml"
    path.write_text(tiny.TEMPLATE.replace('event = ["\\n- {title}"]', 'event = ["\\n- {title}", " | brand: {brand}"]'))
    fresh = always_fresh(tokenizer, Template.load(str(path)))
    assert fresh[list(tokenizer.encode(" | brand: "))].all()


def test_the_pattern_of_fresh_tokens_can_be_chosen() -> None:
    tokenizer, template = tokenizer_and_template()
    letters = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) == "a"]
    assert letters
    assert not always_fresh(tokenizer, template)[letters].any()
    assert always_fresh(tokenizer, template, "a")[letters].all()
    with pytest.raises(ConfigError, match="is not one"):
        always_fresh(tokenizer, template, "(")


def test_looking_up_never_imports_torch() -> None:
    code = "import sys, rcllm.prototypes.lsh, rcllm.prototypes.lookup; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
