"""Any request gives scores or an RcllmError, and leaves the cache whole and unpinned."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rcllm.core.ranking import (
    Event,
    ItemId,
    Level,
    Policy,
    RankOptions,
    RankRequest,
    RankResponse,
    Reduction,
    Selection,
    UserId,
)
from rcllm.engine.engine import Engine
from rcllm.errors import RcllmError, UnknownItemError
from rcllm.store.memory import MemoryStore
from tests.conftest import assert_no_pins
from tests.engine import tiny

any_text = st.one_of(
    st.text(max_size=20),
    st.text(st.characters(), max_size=8),  # half surrogate pairs included
    st.sampled_from(["", " ", "\0", "<|im_end|>", "{title}", "{", "long words " * 300, "\ud800", "👩‍👩‍👧‍👦"]),
)
MANY = {ItemId(f"m{i}"): replace(tiny.catalogue()[tiny.IDS[i % 60]], item_id=ItemId(f"m{i}")) for i in range(500)}
item_ids = st.sampled_from(tiny.IDS)
strange_ids = st.one_of(item_ids, any_text.map(ItemId))
events = st.one_of(
    item_ids.map(Event),
    any_text.map(lambda text: Event(text=text)),
    st.sampled_from([Event(), Event(ItemId("i1"), "both"), Event(ItemId("unknown"))]),
)
levels = st.one_of(
    st.sampled_from(["full", "exact", "blocks"]).map(Level.parse),
    st.integers(0, 60).map(lambda k: Level("linked", k)),
    st.floats(0, 1).map(lambda share: Level("tail", share)),
    st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda shares: Level("corrected", *shares)),
)
selections = st.builds(
    Selection,
    policy=st.sampled_from(get_args(Policy)),
    divergence=st.sampled_from([0.0, 0.5, 1.0]),
    reduction=st.sampled_from(get_args(Reduction)),
    window=st.sampled_from([0, 0, 3, 1000]),
    check_layer=st.sampled_from([0, 1, 1, 2]),
)
options = st.builds(
    RankOptions,
    level=levels,
    readout=st.sampled_from(["label", "pointwise", "likelihood"]),
    layout=st.sampled_from(["history_first", "history_first", "items_first"]),
    label_place=st.sampled_from(["before", "after"]),
    parallel=st.booleans(),
    bias=st.sampled_from(["none", "none", "none", "content_free", "running_mean"]),
    history=st.sampled_from(["chain", "shared"]),
    selection=selections,
)
few = st.lists(item_ids, min_size=1, max_size=12, unique=True)
candidates = st.one_of(
    few,
    few,
    few,
    st.lists(strange_ids, max_size=4),
    st.integers(13, 60).map(lambda n: list(tiny.IDS[:n])),
)
requests = st.builds(
    RankRequest,
    st.text(max_size=4),
    candidates.map(tuple),
    st.lists(events, max_size=5).map(tuple),
    st.one_of(st.none(), st.sampled_from(["u1", "u2", ""]), any_text).map(lambda u: None if u is None else UserId(u)),
    st.dictionaries(
        item_ids, st.dictionaries(st.sampled_from(["price", "stock", "x"]), any_text, max_size=2), max_size=3
    ),
    options=st.one_of(st.none(), options, options, options),
)
many = st.builds(
    RankRequest,
    st.just("many"),
    st.integers(100, 500).map(lambda n: tuple(MANY)[:n]),
    options=st.builds(
        RankOptions,
        level=st.sampled_from(["blocks", "linked(2)", "exact", "corrected(.1)"]).map(Level.parse),
        readout=st.sampled_from(["label", "pointwise", "likelihood"]),
        parallel=st.just(True),
    ),
)
QUIET: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def served() -> Engine:
    """One engine for all examples, so that they meet each other's leavings; with a tier below, and little room."""
    return tiny.fresh(pool_tokens=2500, store=MemoryStore(1 << 20), items={**tiny.catalogue(), **MANY})


def answer(engine: Engine, request: RankRequest) -> None:
    try:
        response = engine.rank(request)
    except RcllmError:
        pass
    else:
        assert response.request_id == request.request_id
        assert len(response.scores) == len(request.candidates)
        assert all(math.isfinite(score) for score in response.scores)
        wanted = sorted(range(len(response.scores)), key=lambda i: (-response.scores[i], i))
        assert list(response.order) == wanted
        assert response.receipt.num_fresh + response.receipt.num_reused == response.receipt.num_tokens
    assert_no_pins(engine)


@settings(max_examples=100, **QUIET)
@given(request=requests)
def test_a_hundred_strange_requests(served: Engine, request: RankRequest) -> None:
    answer(served, request)


@settings(max_examples=8, **QUIET)
@given(request=many)
def test_requests_of_up_to_500_candidates(served: Engine, request: RankRequest) -> None:
    answer(served, request)


@pytest.mark.slow
@settings(max_examples=1000, **QUIET)
@given(request=st.one_of(*[requests] * 9, many))
def test_a_thousand_strange_requests(served: Engine, request: RankRequest) -> None:
    answer(served, request)


@settings(max_examples=20, **QUIET)
@given(batch=st.lists(requests, max_size=5))
def test_a_batch_with_a_wrong_request_changes_nothing(served: Engine, batch: list[RankRequest]) -> None:
    wrong = RankRequest("wrong", (ItemId("no such item"),))
    *others, last = served.rank_batch([*batch, wrong])
    assert isinstance(last, UnknownItemError), "it fails alone"
    for request, outcome in zip(batch, others, strict=True):
        alone = served.rank_batch([request])[0]
        assert type(outcome) is type(alone)
        if isinstance(outcome, RankResponse) and isinstance(alone, RankResponse):
            assert np.allclose(outcome.scores, alone.scores, atol=1e-4) or asks_running_mean(request)
    assert_no_pins(served)


def asks_running_mean(request: RankRequest) -> bool:
    """Such scores depend on earlier requests by design."""
    return request.options is not None and request.options.bias == "running_mean"


def test_good_requests_are_answered_not_refused(served: Engine) -> None:
    """The strategies above must not hide behind errors: every valid combination of options gives scores."""
    for readout, place, parallel, history, level, layout in itertools.product(
        ("label", "pointwise", "likelihood"), ("before", "after"), (False, True), ("chain", "shared"),
        ("full", "exact", "blocks", "linked(3)", "tail(0.2)", "corrected(.3,.3)"), ("history_first", "items_first"),
    ):  # fmt: skip
        if layout == "items_first" and readout != "label":
            continue
        for bias in ("none", "content_free", "running_mean") if readout == "label" else ("none",):
            asked = tiny.request(
                (1, 3, 58), (58, 2), level=level, readout=readout, label_place=place, parallel=parallel,
                history=history, layout=layout, bias=bias,
            )  # fmt: skip
            assert all(map(math.isfinite, served.rank(asked).scores))
