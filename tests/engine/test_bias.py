"""Corrections of the labels' own bias, and what the receipt says of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from rcllm.core.ranking import Item, ItemId, RankRequest
from rcllm.engine.engine import Engine
from tests.engine import tiny


def blank(engine: Engine, count: int, **options: Any) -> RankRequest:
    """A request whose candidates all read as the content-free ones do."""
    ids = tuple(ItemId(f"blank {i}") for i in range(count))
    engine.catalogue.put(Item(item_id, {}) for item_id in ids)
    asked = tiny.request(1, (), **options)
    return RankRequest("blank", ids, options=asked.options)


@pytest.mark.parametrize("layout", ["history_first", "items_first"])
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("count", [2, 5, 30])
def test_content_free_correction_makes_blank_candidates_equal(layout: str, parallel: bool, count: int) -> None:
    """close, 1e-4: what is scored is what the prior was made from"""
    engine = tiny.build()
    options: dict[str, Any] = {"layout": layout, "parallel": parallel, "level": "full"}
    raw = engine.rank(blank(engine, count, **options)).scores
    response = engine.rank(blank(engine, count, bias="content_free", **options))
    assert max(raw) - min(raw) > 0.005, "labels have a bias of their own"
    assert np.allclose(response.scores, -math.log(count), atol=1e-4)
    assert response.receipt.bias == "content_free"


def test_the_running_mean_is_that_of_the_requests_before(engine: Engine) -> None:
    requests = [tiny.request((i, i + 1, i + 2), level="full") for i in range(4)]
    raw = np.array([engine.rank(request).scores for request in requests])
    for i, request in enumerate(requests):
        response = engine.rank(tiny.asking(request, bias="running_mean"))
        wanted = raw[i] - raw[:i].mean(axis=0) - math.log(3) if i else raw[i]
        assert np.allclose(response.scores, wanted, atol=1e-5)
        assert any("running_mean" in note for note in response.receipt.notes)


def test_priors_are_kept_apart_by_what_they_depend_on(engine: Engine) -> None:
    """Other numbers of candidates, layouts and label places have other priors; levels too."""
    for request in (
        tiny.request(3, bias="content_free"),
        tiny.request(3, bias="content_free", level="exact"),
        tiny.request(4, bias="content_free"),
        tiny.request(3, bias="content_free", layout="items_first"),
        tiny.request(3, bias="content_free", label_place="before"),
    ):
        engine.rank(request)
    assert len(engine.rank_job._bias._priors) == 5
