"""Levels against each other: `exact` is `full`, a full budget is `full`, and a part of it is in between.

KV is kept in fp32 here unless a test says otherwise; tolerance 1e-4 on log-probabilities and logits.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from rcllm.core.receipts import BlockKind
from rcllm.engine.engine import Engine
from tests.engine import tiny

TOLERANCE = 1e-4
LABEL: list[dict[str, Any]] = [
    {"readout": "label", "layout": layout, "label_place": place, "parallel": parallel, "history": history}
    for layout, place, parallel, history in itertools.product(
        ("history_first", "items_first"), ("before", "after"), (False, True), ("shared", "chain")
    )
]
OTHERS: list[dict[str, Any]] = [
    {"readout": readout, "history": history}
    for readout, history in itertools.product(("pointwise", "likelihood"), ("shared", "chain"))
]
ids = pytest.mark.parametrize("shape", LABEL + OTHERS, ids=lambda s: "-".join(map(str, s.values())))


def error(engine: Engine, level: str, **options: Any) -> float:
    """Largest difference of a score from `full`, on an empty cache and again on a warm one."""
    asked = tiny.request(6, (30, 31, 32, 33), **options)
    full = np.array(engine.rank(tiny.asking(asked, level="full")).scores)
    runs = [np.array(engine.rank(tiny.asking(asked, level=level)).scores) for _ in range(2)]
    if level != "exact" and asked.options is not None and asked.options.history == "shared":
        assert np.array_equal(runs[0], runs[1]), "exact: what is in the cache does not change an answer"
    return float(max(np.abs(run - full).max() for run in runs))


@ids
@pytest.mark.parametrize("level", ["exact", "linked(10000)", "tail(1.0)"])
def test_exact_and_a_full_budget_equal_full_cold_and_warm(
    any_engine: Engine, level: str, shape: dict[str, Any]
) -> None:
    """close"""
    assert error(any_engine, level, **shape) < TOLERANCE


@ids
def test_no_budget_is_blocks(engine: Engine, shape: dict[str, Any]) -> None:
    """exact: the plans are the same"""
    engine.rank(tiny.request(level="blocks", **shape))  # leaves the user's chain, where there is one
    scores = [engine.rank(tiny.request(level=level, **shape)).scores for level in ("blocks", "linked(0)", "tail(0)")]
    assert scores[0] == scores[1] == scores[2]


@pytest.mark.parametrize("rungs", [[f"linked({k})" for k in (0, 6, 14, 40)], [f"tail({r})" for r in (0, 0.5, 0.9, 1)]])
def test_the_error_falls_as_the_budget_grows(engine: Engine, rungs: list[str]) -> None:
    """approximate: on average over requests, from no budget to a full one; at full budget it is gone"""
    means = []
    for level in rungs:
        errors = []
        for start in range(12):
            asked = tiny.request(tuple(range(start, start + 5)), (30 + start, 31, 32))
            full, got = (engine.rank(tiny.asking(asked, level=name)).scores for name in ("full", level))
            errors.append(np.abs(np.array(full) - np.array(got)).mean())
        means.append(float(np.mean(errors)))
    print(dict(zip(rungs, means, strict=True)))
    assert means[0] > 0.02, "reuse on a random model costs something, else this test sees nothing"
    assert means[-1] < TOLERANCE
    assert min(means[1:-1]) < means[0]
    assert means[-2] < means[0]


@pytest.mark.parametrize("readout", ["pointwise", "likelihood"])
def test_isolated_candidates_lose_nothing_but_the_users_part(any_engine: Engine, readout: str) -> None:
    """close: with a history of the user's own, `likelihood` at `blocks` is exact, since its candidates are fresh; and
    `pointwise` reads whole items, yet never another candidate's."""
    asked = tiny.request(5, history="chain", readout=readout)
    blocks, full = (any_engine.rank(tiny.asking(asked, level=level)) for level in ("blocks", "full"))
    if readout == "likelihood":
        assert np.allclose(blocks.scores, full.scores, atol=TOLERANCE)
    else:
        items = [b for b in blocks.receipt.blocks if b.kind is BlockKind.ITEM]
        assert all(b.num_fresh == 0 for b in items)
        assert not np.allclose(blocks.scores, full.scores, atol=TOLERANCE)


@pytest.mark.parametrize(("kv_dtype", "bound"), [("fp16", 0.02), ("bf16", 0.15)])
@pytest.mark.parametrize("family", [tiny.NATIVE, tiny.TORCH])
def test_kv_in_16_bits_shifts_scores_a_little(family: str, kv_dtype: str, bound: float) -> None:
    """approximate"""
    shifts = []
    for readout in ("label", "pointwise", "likelihood"):
        asked = tiny.request(6, readout=readout)
        wide, narrow = (tiny.fresh(family, kv_dtype=dtype).rank(asked).scores for dtype in ("fp32", kv_dtype))
        shifts.append(float(np.abs(np.array(wide) - np.array(narrow)).max()))
    print(f"{kv_dtype}: max shifts {shifts}")
    assert 0 < max(shifts) < bound


def test_a_models_blocks_mask_decides_the_level() -> None:
    """exact: whatever level is asked, and the receipt says so"""
    engine = tiny.build(mask="blocks")
    plain = tiny.fresh()
    asked = tiny.request()
    wanted = plain.rank(tiny.asking(asked, level="blocks")).scores
    for level in ("full", "exact", "linked(4)", "tail(0.5)", "corrected(0.3, 0.3)", "blocks"):
        response = engine.rank(tiny.asking(asked, level=level))
        assert response.scores == wanted
        assert response.receipt.level == level
        assert any("mask" in note for note in response.receipt.notes)
        assert all(b.num_fresh == 0 for b in response.receipt.blocks if b.kind is BlockKind.ITEM)


def poisoned(engine: Engine) -> Engine:
    """With noise in every published block: whatever reads the cache answers something else."""
    for block in engine.pool._blocks.values():
        block.kv.normal_()
    return engine


@pytest.mark.parametrize("family", [tiny.NATIVE, tiny.TORCH])
@pytest.mark.parametrize("shape", [{}, {"readout": "pointwise"}, {"layout": "items_first"}, {"history": "chain"}])
def test_full_under_a_blocks_mask_is_an_independent_oracle_for_blocks(family: str, shape: dict[str, Any]) -> None:
    """close: every block is computed anew, into a pool of its own; what is cached is neither read nor written"""
    engine = tiny.build(family, mask="blocks")
    asked = tiny.request(6, (30, 31, "my words"), **shape)
    cold = engine.rank(tiny.asking(asked, level="full"))
    assert engine.stats().num_blocks == 0
    blocks = engine.rank(tiny.asking(asked, level="blocks"))
    assert np.abs(np.array(cold.scores) - np.array(blocks.scores)).max() < 1e-5
    held = {key: block.kv.clone() for key, block in poisoned(engine).pool._blocks.items()}
    for level in ("full", "exact"):
        again = engine.rank(tiny.asking(asked, level=level))
        assert np.abs(np.array(again.scores) - np.array(blocks.scores)).max() < 1e-5
        assert again.receipt.num_computed >= again.receipt.num_reused > 0
        assert all(b.source in ("computed", "fresh") for b in again.receipt.blocks)
        assert any("computed anew" in note for note in again.receipt.notes)
    assert not np.allclose(engine.rank(tiny.asking(asked, level="blocks")).scores, blocks.scores, atol=1e-2)
    assert all(torch.equal(engine.pool._blocks[key].kv, kv) for key, kv in held.items())


def test_full_under_a_blocks_mask_shows_what_16_bit_kv_costs() -> None:
    """approximate: `full` keeps the compute dtype, `blocks` reads 16 bits"""
    wide, narrow = (tiny.build(mask="blocks", kv_dtype=dtype) for dtype in ("fp32", "fp16"))
    asked = tiny.request(6)
    full = [np.array(engine.rank(tiny.asking(asked, level="full")).scores) for engine in (wide, narrow)]
    assert np.allclose(*full, atol=1e-5)
    assert 1e-6 < np.abs(full[1] - np.array(narrow.rank(asked).scores)).max() < 0.02


def test_a_batch_of_full_and_blocks_under_a_blocks_mask() -> None:
    engine = tiny.build(mask="blocks")
    levels = ("full", "blocks", "exact", "tail(0.2)")
    requests = [tiny.request((i, i + 1), name=f"r{i}", level=levels[i % 4]) for i in range(8)]
    for got, asked in zip(engine.rank_batch(requests), requests, strict=True):
        assert got.request_id == asked.request_id
        wanted = tiny.fresh().rank(tiny.asking(asked, level="blocks"))
        assert np.allclose(got.scores, wanted.scores, atol=1e-5)


def test_the_cache_never_decides_the_answer_at_blocks(engine: Engine) -> None:
    """exact: a regression. The user's exact chain, left by a request at `exact`, was read in place of shared events."""
    asked = tiny.request(level="blocks")
    cold = engine.rank(asked).scores
    engine.rank(tiny.asking(asked, level="exact"))
    engine.rank(tiny.asking(asked, history="chain"))
    assert engine.rank(asked).scores == cold
