"""Ranking with history "semantic": what the engine reads from the pool, what it says of it, and what it never keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rcllm.core.ranking import RankRequest, RankResponse
from rcllm.core.receipts import BlockKind
from rcllm.engine.engine import Engine
from rcllm.errors import ConfigError
from rcllm.prototypes.build import PrototypeBuilder
from rcllm.prototypes.config import PrototypeConfig
from rcllm.prototypes.pool import PrototypePool
from rcllm.prototypes.texts import token_runs
from tests.conftest import assert_no_pins
from tests.engine import tiny

EVENTS = (30, 31, "a blue lamp for tea", 32, 7)
OTHERS = [(30, 32, 31), (7, 8, 9, 10), (31, "old tea and a new chair"), (12, 40, 41), (32, 33, 34, 35)]


def with_pool(engine: Engine, path: Path, histories: list[tuple[int | str, ...]], **options: object) -> Engine:
    """The engine over a pool made from these histories alone."""
    config = replace(PrototypeConfig(prototypes=1000, bits=6, bucket_width=4), **options)  # type: ignore[arg-type]
    events = [tiny.request(1, history).history for history in histories]
    builder = PrototypeBuilder(
        engine.decoder, engine.prompter, config, path, model_id=engine.model_id, kv_dtype=engine.pool.dtype
    )
    builder.run(token_runs(engine.prompter, events, config.member_context), "histories")
    pool = PrototypePool.open(path, engine.decoder, engine.prompter.namespace)
    parts = engine.config, engine.decoder, engine.prompter, engine.pool, engine.model_id
    return Engine(*parts, prototypes=pool)


@pytest.fixture
def semantic(engine: Engine, tmp_path: Path) -> Engine:
    """An engine over a pool of other users' histories."""
    return with_pool(engine, tmp_path / "pool", OTHERS)


def asked(**options: object) -> RankRequest:
    return tiny.request(6, EVENTS, history="semantic", **options)


def history_of(response: RankResponse) -> list[str]:
    return [block.source for block in response.receipt.blocks if block.kind is BlockKind.HISTORY]


def test_a_pool_of_this_very_history_gives_what_the_users_own_chain_gives(any_engine: Engine, tmp_path: Path) -> None:
    """Each place is a bucket, so each token finds itself, in its own context: nothing is approximate but the items."""
    engine = with_pool(any_engine, tmp_path / "pool", [EVENTS], bucket_width=1, threshold=1.0)
    got, exact = engine.rank(asked()), engine.rank(tiny.asking(asked(), history="chain"))
    assert history_of(got) == ["semantic"] * len(EVENTS)
    assert got.receipt.num_reused > exact.receipt.num_reused
    np.testing.assert_allclose(got.scores, exact.scores, atol=2e-4)


def test_the_receipt_tells_what_came_from_the_pool(semantic: Engine) -> None:
    receipt = semantic.rank(asked()).receipt
    history = [block for block in receipt.blocks if block.kind is BlockKind.HISTORY]
    assert receipt.history == "semantic"
    found = [block for block in history if block.source == "semantic"]
    assert len(found) >= 3
    assert all(block.source == "fresh" and block.num_reused == 0 for block in history if block not in found)
    for block in found:
        assert block.num_reused > 0
        assert block.num_fresh > 0, "the delimiter at least"
        assert "from the semantic pool" in block.why
        assert "not in the semantic pool" in block.why
    assert sum(block.num_reused for block in receipt.blocks) == receipt.num_reused
    assert any("semantic pool" in note for note in receipt.notes)


def test_it_is_approximate_and_corrections_make_it_exact(semantic: Engine) -> None:
    full = np.array(semantic.rank(asked(level="full")).scores)
    errors = [
        np.abs(np.array(semantic.rank(asked(level=level)).scores) - full).max()
        for level in ("blocks", "corrected(1.0, 1.0)", "tail(1.0)")
    ]
    assert errors[0] > 1e-3
    assert errors[1] < 2e-4
    assert errors[2] < 2e-4


def test_correcting_the_history_alone_leaves_what_exact_items_miss(semantic: Engine) -> None:
    chain = semantic.rank(tiny.asking(asked(), history="chain")).scores
    corrected = semantic.rank(asked(level="corrected(0.0, 1.0)")).scores
    np.testing.assert_allclose(corrected, chain, atol=2e-4)


@pytest.mark.parametrize("policy", ["rcllm", "question", "two_pass", "first", "tail", "random"])
def test_every_policy_can_correct_it(semantic: Engine, policy: str) -> None:
    some = tiny.asking(asked(level="corrected(0.3, 0.5)"))
    assert some.options is not None
    selection = replace(some.options.selection, policy=policy)  # type: ignore[arg-type]
    answer = semantic.rank(replace(some, options=replace(some.options, selection=selection)))
    plain = semantic.rank(asked())
    assert answer.receipt.num_fresh > plain.receipt.num_fresh
    assert "semantic" in history_of(answer)


def test_policy_static_is_refused(semantic: Engine) -> None:
    some = asked(level="corrected(0.3, 0.5)")
    assert some.options is not None
    options = replace(some.options, selection=replace(some.options.selection, policy="static"))
    with pytest.raises(ConfigError, match="policy static"):
        semantic.rank(replace(some, options=options))


def test_nothing_approximate_is_kept(semantic: Engine) -> None:
    prompt = semantic.prompter.build(asked())
    semantic.rank(asked())
    kept = [block for block in prompt.blocks if block.kind is BlockKind.HISTORY and block.chain_key is not None]
    assert kept
    assert not any(
        (block.chain_key in semantic.pool.lookup_many([block.chain_key]))
        for block in kept
        if block.chain_key is not None
    )
    assert_no_pins(semantic)


def test_a_cached_chain_does_not_change_the_answer(semantic: Engine) -> None:
    before = semantic.rank(asked())
    chained = [semantic.rank(tiny.asking(asked(), history="chain")) for _ in range(2)]
    assert set(history_of(chained[1])) == {"device"}
    after = semantic.rank(asked())
    assert history_of(after) == history_of(before)
    np.testing.assert_allclose(after.scores, before.scores, atol=1e-5)


@pytest.mark.parametrize("level", ["full", "exact"])
def test_exact_levels_do_not_use_the_pool(semantic: Engine, level: str) -> None:
    got = semantic.rank(asked(level=level))
    assert "semantic" not in history_of(got)
    np.testing.assert_allclose(
        got.scores, semantic.rank(tiny.asking(asked(level="full"), history="chain")).scores, atol=2e-4
    )


def test_a_batch_is_answered_as_its_requests_are(semantic: Engine) -> None:
    requests = [
        asked(),
        tiny.request(4, (7, 8), history="semantic", user="u2"),
        tiny.request(5, EVENTS, history="chain", user="u3"),
        asked(),
    ]
    alone = [semantic.rank(request).scores for request in requests]
    for got, expected in zip(semantic.rank_batch(requests), alone, strict=True):
        np.testing.assert_allclose(got.scores, expected, atol=1e-4)


def test_without_a_pool_it_is_refused(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="needs a semantic pool"):
        engine.rank(asked())


def test_the_configuration_names_the_pool(engine: Engine, tmp_path: Path) -> None:
    with_pool(engine, tmp_path / "pool", OTHERS)
    built = tiny.build(semantic_pool=str(tmp_path / "pool"))
    assert "semantic" in history_of(built.rank(asked()))
    with pytest.raises(ConfigError, match="there is no semantic pool"):
        tiny.build(semantic_pool=str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="was built for model"):
        tiny.build(tiny.TORCH, semantic_pool=str(tmp_path / "pool"))
