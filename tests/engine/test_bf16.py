"""An engine whose products are in bf16: near fp32 at every level, and exact in all that does not touch the rounding."""

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


def bf16(kv_dtype: str = "fp32") -> Engine:
    engine = tiny.fresh(dtype="bf16", kv_dtype=kv_dtype)
    if engine.decoder.kernels is None:
        pytest.skip("no C++ compiler on this machine")
    return engine


@pytest.mark.parametrize("level", tiny.LEVELS)
def test_scores_at_every_level_are_near_those_of_fp32(level: str) -> None:
    """approximate; on an empty cache, and on a warm one"""
    shifts = []
    for shape in tiny.SHAPES:
        asked = tiny.request(6, (30, 31, 32), level=level, **shape)
        wide, narrow = tiny.fresh(), bf16("bf16")
        for _ in range(2):
            shifts.append(np.abs(np.subtract(wide.rank(asked).scores, narrow.rank(asked).scores)).max())
    print(f"{level}: mean shift {np.mean(shifts):.1e}, max {max(shifts):.1e}")
    assert 0 < max(shifts) < BOUND


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16"])
def test_a_batch_changes_nothing(kv_dtype: str) -> None:
    """Exact but for the read-out of labels and logsumexp in torch, whose kernels go by the number of rows: 1e-5."""
    requests = mixed(14)
    alone = [bf16(kv_dtype).rank(request) for request in requests]
    together = answered(bf16(kv_dtype).rank_batch(requests))
    for got, wanted in zip(together, alone, strict=True):
        np.testing.assert_allclose(got.scores, wanted.scores, atol=1e-5)


@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_exact_equals_full_beside_kv_that_nothing_rounds(shape: dict[str, Any]) -> None:
    """A key that is turned back to its block and on again may fall to the other side of a tie: close, not exact."""
    engine = bf16()
    full, exact = (tiny.request(6, (30, 31, 32), level=level, **shape) for level in ("full", "exact"))
    engine.rank(exact)
    error = np.abs(np.subtract(engine.rank(exact).scores, bf16().rank(full).scores)).max()
    print(f"max {error:.1e}")
    assert error < 0.05


def test_items_that_change_are_as_in_an_engine_built_anew() -> None:
    changed = Item(ItemId("i1"), {"title": "a blue lamp with a long new name"})
    asked = tiny.request(5)
    engine = bf16()
    engine.rank(asked)
    engine.upsert_items([changed])
    anew = tiny.fresh(dtype="bf16", items={**tiny.catalogue(), changed.item_id: changed})
    np.testing.assert_allclose(engine.rank(asked).scores, anew.rank(asked).scores, atol=1e-5)
