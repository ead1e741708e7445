"""Histories that grow at the end and lose their oldest event: answered as if built anew, and little is computed.

Close, 1e-5 for position-free events (row counts choose kernels), 1e-4 for chains.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rcllm.core.ranking import RankRequest, RankResponse, UserId
from rcllm.core.receipts import BlockKind
from rcllm.engine.engine import Engine
from tests.engine import tiny

EVENTS: tuple[int | str, ...] = (30, "my first words", 32, "what I said then", 34)
NEW: tuple[int | str, ...] = ("words of today", 35)


def anew(asked: RankRequest, family: str) -> RankResponse:
    return tiny.fresh(family).rank(asked)


def family_of(engine: Engine) -> str:
    return tiny.NATIVE if engine.decoder.kernels else tiny.TORCH


def num_tokens(engine: Engine, asked: RankRequest) -> list[int]:
    return [len(b) for b in engine.prompter.build(asked).blocks if b.kind is BlockKind.HISTORY]


def num_fresh_history(response: RankResponse) -> list[int]:
    return [b.num_fresh for b in response.receipt.blocks if b.kind is BlockKind.HISTORY]


SHAPES: list[dict[str, Any]] = [
    {"layout": "history_first"},
    {"layout": "items_first", "parallel": True},
    {"readout": "pointwise"},
    {"readout": "likelihood"},
    {"level": "linked(3)"},
    {"level": "corrected(.3,.3)"},
]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())))


@every_shape
@pytest.mark.parametrize("event", NEW)
def test_appending_an_event_computes_that_event_alone(
    any_engine: Engine, event: int | str, shape: dict[str, Any]
) -> None:
    any_engine.rank(tiny.request(4, EVENTS, **shape))
    longer = tiny.request(4, (*EVENTS, event), **shape)
    response = any_engine.rank(longer)
    assert response.receipt.num_computed == num_tokens(any_engine, longer)[-1]
    assert [b.source for b in response.receipt.blocks if b.kind is BlockKind.HISTORY] == ["device"] * 5 + ["computed"]
    assert np.allclose(response.scores, anew(longer, family_of(any_engine)).scores, atol=1e-5)


@every_shape
def test_dropping_the_oldest_event_computes_nothing(any_engine: Engine, shape: dict[str, Any]) -> None:
    """The others are read where they now stand: keys are position-free."""
    before = any_engine.rank(tiny.request(4, EVENTS, **shape))
    shorter = tiny.request(4, EVENTS[1:], **shape)
    response = any_engine.rank(shorter)
    assert response.receipt.num_computed == 0
    if "level" not in shape:
        assert sum(num_fresh_history(response)) == 0
        assert response.receipt.num_fresh == before.receipt.num_fresh
    assert np.allclose(response.scores, anew(shorter, family_of(any_engine)).scores, atol=1e-5)


def test_a_sliding_window_over_a_long_life(engine: Engine) -> None:
    """Append one, drop one, twenty times; each answer is that of building anew, and each event is computed once."""
    life = [f"day {i}" if i % 3 else i % 60 for i in range(25)]
    computed = 0
    for start in range(20):
        asked = tiny.request((1, 2), tuple(life[start : start + 5]))
        response = engine.rank(asked)
        computed += response.receipt.num_computed
        assert np.allclose(response.scores, anew(asked, tiny.NATIVE).scores, atol=1e-5)
    whole = tiny.request((1, 2), tuple(life[:24]))
    blocks = {b.key: len(b) for b in engine.prompter.build(whole).blocks if b.key is not None}
    assert computed == sum(blocks.values())


def test_without_a_user_own_words_are_fresh_and_leave_nothing(engine: Engine) -> None:
    asked = tiny.request(4, EVENTS, user=None)
    engine.rank(asked)
    response = engine.rank(asked)
    sizes = num_tokens(engine, asked)
    words = [isinstance(event, str) for event in EVENTS]
    assert num_fresh_history(response) == [size * own for size, own in zip(sizes, words, strict=True)]
    assert response.receipt.num_computed == 0
    assert not [key for key in engine.pool._blocks if (engine.pool._index[key].owner or "").startswith("user:")]


def test_own_words_of_another_user_are_computed_again(engine: Engine) -> None:
    engine.rank(tiny.request(4, EVENTS))
    other = engine.rank(replace(tiny.request(4, EVENTS), user_id=UserId("u2")))
    sizes = num_tokens(engine, tiny.request(4, EVENTS))
    assert other.receipt.num_computed == sizes[1] + sizes[3]


# ---- chains ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["exact", "blocks"])
@pytest.mark.parametrize("event", NEW)
def test_appending_to_a_chain_is_exact_and_computes_that_event_alone(
    any_engine: Engine, event: int | str, level: str
) -> None:
    any_engine.rank(tiny.request(4, EVENTS, history="chain", level=level))
    longer = tiny.request(4, (*EVENTS, event), history="chain", level=level)
    response = any_engine.rank(longer)
    assert num_fresh_history(response) == [0] * 5 + num_tokens(any_engine, longer)[-1:]
    assert response.receipt.num_computed == 0
    family = family_of(any_engine)
    assert np.allclose(response.scores, anew(longer, family).scores, atol=1e-4)
    exact = anew(tiny.asking(longer, level="full"), family)
    if level == "exact":
        assert np.allclose(response.scores, exact.scores, atol=1e-4)


def test_dropping_the_oldest_event_of_a_chain_computes_the_others_again(any_engine: Engine) -> None:
    """Each was computed after the one that is gone: reading it would be no prefix."""
    any_engine.rank(tiny.request(4, EVENTS, history="chain", level="exact"))
    shorter = tiny.request(4, EVENTS[1:], history="chain", level="exact")
    response = any_engine.rank(shorter)
    assert num_fresh_history(response) == num_tokens(any_engine, shorter)
    family = family_of(any_engine)
    assert np.allclose(response.scores, anew(tiny.asking(shorter, level="full"), family).scores, atol=1e-4)
    again = any_engine.rank(shorter)
    assert num_fresh_history(again) == [0] * 4
    assert np.allclose(again.scores, response.scores, atol=1e-4)
