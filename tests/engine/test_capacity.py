"""A cache that is too small makes requests slower, or is named in an error; it never changes an answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pytest

from rcllm.core.ranking import ContentKey
from rcllm.engine.engine import Engine
from rcllm.errors import CapacityError, ConfigError
from rcllm.store.contract import Found, Stored, TierStats
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
