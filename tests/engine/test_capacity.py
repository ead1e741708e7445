"""A cache that is too small makes requests slower, or is named in an error; it never changes an answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import psutil
import pytest

from rcllm.config import MIB
from rcllm.core.ranking import ContentKey
from rcllm.engine.build import make_pool
from rcllm.engine.engine import Engine
from rcllm.errors import CapacityError, ConfigError
from rcllm.store.contract import Found, Stored, TierStats
from rcllm.store.memory import MemoryStore
from rcllm.store.tiered import Tiered
from tests.conftest import assert_no_pins
from tests.engine import tiny


def sweep(engine: Engine) -> list[tuple[float, ...]]:
    """Twice over the whole catalogue."""
    return [
        engine.rank(tiny.request(tuple((start + i) % 60 for i in range(6)), (start % 60, 31))).scores
        for start in [*range(0, 60, 6)] * 2
    ]


def test_a_catalogue_larger_than_the_pool_is_served_with_equal_scores() -> None:
    """close, 1e-5: which blocks are computed together differs"""
    small, large = tiny.fresh(pool_tokens=350), tiny.fresh()
    assert np.allclose(sweep(small), sweep(large), atol=1e-5)
    assert small.stats().evictions > 20
    assert large.stats().evictions == 0
    assert small.stats().num_bytes <= small.stats().budget_bytes
    assert_no_pins(small)


@pytest.mark.parametrize("level", ["blocks", "linked(4)"])
def test_a_request_that_cannot_fit_is_told_why_and_the_next_is_served(level: str) -> None:
    engine = tiny.fresh(pool_tokens=200)
    wanted = engine.rank(tiny.request(3)).scores
    with pytest.raises(CapacityError, match=r"MB of KV do not fit.*cache\.memory_mb.*fewer candidates"):
        engine.rank(tiny.request(40, level=level, parallel=True))
    assert_no_pins(engine)
    assert engine.rank(tiny.request(3)).scores == wanted
    assert np.isfinite(engine.rank(tiny.request(40, level="full", parallel=True)).scores).all()


def test_history_that_does_not_fit_is_not_kept_and_the_request_is_served() -> None:
    engine = tiny.fresh(pool_tokens=len(tiny.fresh().prompter.instructions["history_first"]) + 3)
    asked = tiny.request(4, level="exact")
    for _ in range(2):
        assert np.allclose(engine.rank(asked).scores, tiny.fresh().rank(asked).scores, atol=1e-5)
    assert engine.stats().num_blocks == 1
    assert_no_pins(engine)


class BrokenStore:
    """Raises at everything."""

    def get_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Stored]:
        raise OSError("broken")

    def put_many(self, blocks: Mapping[ContentKey, Stored]) -> None:
        raise OSError("broken")

    def lookup_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Found]:
        raise OSError("broken")

    def delete_owner(self, owner: str) -> int:
        raise OSError("broken")

    def stats(self) -> Sequence[TierStats]:
        raise OSError("broken")

    def close(self) -> None:
        raise OSError("broken")


class LyingStore(BrokenStore):
    """Says that it has everything, and has nothing."""

    def lookup_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Found]:
        return dict.fromkeys(keys, Found("host", 1))


@pytest.mark.parametrize("store", [BrokenStore(), LyingStore()])
@pytest.mark.parametrize("level", ["blocks", "exact"])
def test_a_broken_tier_is_a_miss_that_is_counted(store: BrokenStore, level: str) -> None:
    engine = tiny.fresh(pool_tokens=250, store=store)
    for start in (0, 10, 20, 0):
        asked = tiny.request(tuple(range(start, start + 4)), (start, 31), level=level)
        assert np.allclose(engine.rank(asked).scores, tiny.fresh().rank(asked).scores, atol=1e-4)
    assert engine.stats().store_errors > 0
    assert_no_pins(engine)


def test_a_failing_erasure_is_not_silent() -> None:
    engine = tiny.fresh(store=BrokenStore())
    with pytest.raises(OSError, match="broken"):
        engine.erase_user("u1")  # type: ignore[arg-type]


def test_a_memory_budget_that_leaves_nothing_is_refused() -> None:
    """The message names a size that is enough, give or take what the process grows by meanwhile."""
    with pytest.raises(ConfigError, match=r"memory_mb = 1 is too small: .*Raise cache\.memory_mb") as refused:
        tiny.build(pool_mb=0, memory_mb=1)
    (enough,) = re.findall(r"to at least (\d+)", str(refused.value))
    tiny.build(pool_mb=0, memory_mb=int(enough) + 64)


def test_two_engines_of_a_process_share_its_memory() -> None:
    config = tiny.config(pool_mb=0, memory_mb=6000)
    small = Engine.build(tiny.catalogue(), config, share=1 / 8).pool
    large = Engine.build(tiny.catalogue(), config, beside=small).pool
    assert small.budget + large.budget + psutil.Process().memory_info().rss < 6000 * MIB
    assert small.budget == pytest.approx(large.budget / 7, rel=0.1)


def test_a_pool_leaves_room_for_the_tiers_in_memory() -> None:
    engine = tiny.build()
    config = replace(engine.config, cache=replace(engine.config.cache, pool_mb=0, memory_mb=8000))
    tiers = Tiered({"disk": MemoryStore(1)}, memory_bytes=200 * MIB, queue_bytes=100 * MIB)
    without, with_tiers = (make_pool(config, engine.decoder, store).budget for store in (None, tiers))
    assert without - with_tiers == pytest.approx(300 * MIB, abs=20 * MIB)
    beside = make_pool(config, engine.decoder, beside=make_pool(config, engine.decoder, tiers, share=0.5)).budget
    assert without - 300 * MIB - with_tiers * 0.5 == pytest.approx(beside, abs=20 * MIB)
