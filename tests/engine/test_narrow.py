"""Engines whose products are in bf16 or int8: near fp32 at every level, exact in what does not touch the rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rcllm.core.ranking import Item, ItemId
from rcllm.engine.engine import Engine
from rcllm.errors import answered
from tests.engine import tiny
from tests.engine.test_batches import mixed

BOUND = 0.15  # on log-probabilities and logits of tiny random models

per_dtype = pytest.mark.parametrize("dtype", ["bf16", "int8"])


def narrow(dtype: str, kv_dtype: str = "fp32") -> Engine:
    engine = tiny.fresh(**tiny.computing_in(dtype), kv_dtype=kv_dtype)
    if engine.decoder.kernels is None:
        pytest.skip("no C++ compiler on this machine")
    return engine


@per_dtype
@pytest.mark.parametrize("level", tiny.LEVELS)
def test_scores_at_every_level_are_near_those_of_fp32(level: str, dtype: str) -> None:
    """approximate; on an empty cache, and on a warm one"""
    shifts = []
    for shape in tiny.SHAPES:
        asked = tiny.request(6, (30, 31, 32), level=level, **shape)
        engines = tiny.fresh(), narrow(dtype, "bf16")
        for _ in range(2):
            shifts.append(np.abs(np.subtract(*(engine.rank(asked).scores for engine in engines))).max())
    print(f"{dtype}, {level}: mean shift {np.mean(shifts):.1e}, max {max(shifts):.1e}")
    assert 0 < max(shifts) < BOUND


@per_dtype
@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16"])
def test_a_batch_changes_nothing(kv_dtype: str, dtype: str) -> None:
    """Exact but for the read-out of labels and logsumexp in torch, whose kernels go by the number of rows: 1e-5."""
    requests = mixed(14)
    alone = [narrow(dtype, kv_dtype).rank(request) for request in requests]
    together = answered(narrow(dtype, kv_dtype).rank_batch(requests))
    for got, wanted in zip(together, alone, strict=True):
        np.testing.assert_allclose(got.scores, wanted.scores, atol=1e-5)


@per_dtype
@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_exact_equals_full_beside_kv_that_nothing_rounds(shape: dict[str, Any], dtype: str) -> None:
    """A key that is turned back to its block and on again may fall to the other side of a tie: close, not exact."""
    engine = narrow(dtype)
    full, exact = (tiny.request(6, (30, 31, 32), level=level, **shape) for level in ("full", "exact"))
    engine.rank(exact)
    error = np.abs(np.subtract(engine.rank(exact).scores, narrow(dtype).rank(full).scores)).max()
    print(f"max {error:.1e}")
    assert error < 0.05


@per_dtype
def test_items_that_change_are_as_in_an_engine_built_anew(dtype: str) -> None:
    changed = Item(ItemId("i1"), {"title": "a blue lamp with a long new name"})
    asked = tiny.request(5)
    engine = narrow(dtype)
    engine.rank(asked)
    engine.upsert_items([changed])
    anew = tiny.fresh(**tiny.computing_in(dtype), items={**tiny.catalogue(), changed.item_id: changed})
    np.testing.assert_allclose(engine.rank(asked).scores, anew.rank(asked).scores, atol=1e-5)


def test_what_is_made_by_other_products_is_never_read_or_believed() -> None:
    """Both keep weights in int8, and KV in bf16."""
    ours, other = (tiny.fresh(dtype=dtype, weights="int8", kv_dtype="bf16") for dtype in ("int8", "bf16"))
    assert ours.prompter.namespace != other.prompter.namespace
    assert ours.identity.differences(other.identity) == ("dtype int8 instead of bf16",)
