"""Levels are read and written; plans and prompts add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcllm.core.ranking import Block, Level, Piece, Plan, RankResponse
from rcllm.core.receipts import BlockKind
from rcllm.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("full", Level("full")),
        ("exact", Level("exact")),
        (" blocks ", Level("blocks")),
        ("linked", Level("linked", 16)),
        ("linked(4)", Level("linked", 4)),
        ("linked( 4 )", Level("linked", 4)),
        ("linked(0)", Level("linked", 0)),
        ("tail", Level("tail", 0.1)),
        ("tail(0.25)", Level("tail", 0.25)),
        ("tail(1)", Level("tail", 1.0)),
        ("corrected", Level("corrected", 0.3, 0.3)),
        ("corrected(.4)", Level("corrected", 0.4, 0.4)),
        ("corrected(0.4, 0.5)", Level("corrected", 0.4, 0.5)),
        ("auto", Level("auto")),
        (Level("exact"), Level("exact")),
    ],
)
def test_levels_are_read(text: str | Level, level: Level) -> None:
    assert Level.parse(text) == level


@pytest.mark.parametrize(
    "text",
    ["", "fast", "Exact", "exact(1)", "blocks()", "linked(-1)", "linked(1.5)", "linked(x)", "tail(1.1)", "tail(-0.1)",
     "tail(nan)", "tail(0.1", "linked(4) tail(0.1)", "corrected(1.1)", "corrected(0.1, -1)", "corrected(0.1, 0.2, 0.3)",
     "corrected(nan)", "corrected(x)", "auto(1)"],
)  # fmt: skip
def test_what_is_no_level_is_told_the_levels(text: str) -> None:
    known = r"unknown reuse level .*full.*exact, corrected\(.*tail\(r\).*linked\(k\).*blocks"
    with pytest.raises(ConfigError, match=known):
        Level.parse(text)


@given(
    st.one_of(
        st.sampled_from(["full", "exact", "blocks"]).map(Level.parse),
        st.integers(0, 10**6).map(lambda k: Level("linked", k)),
        st.floats(0, 1).map(lambda share: Level("tail", share)),
        st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda shares: Level("corrected", *shares)),
    )
)
def test_levels_survive_a_round_trip(level: Level) -> None:
    assert Level.parse(str(level)) == level


def test_sizes_add_up() -> None:
    plan = Plan((Piece(0, 0, 3, b"k", ""), Piece(1, 0, 2, None, ""), Piece(1, 2, 7, b"k", "")), ())  # type: ignore[arg-type]
    assert (plan.num_fresh, plan.num_reused) == (2, 8)
    assert len(Block(BlockKind.ITEM, (1, 2, 3), 7)) == 3


def test_a_ranking_lists_ids_best_first() -> None:
    response = RankResponse("r", ("a", "b", "c"), (0.0, 2.0, 1.0), (1, 2, 0), None)  # type: ignore[arg-type]
    assert response.ranking == ("b", "c", "a")
