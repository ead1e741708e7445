"""An engine whose pool is one tensor in pages, as on a GPU: its answers are those of any other pool, bit for bit."""

from __future__ import annotations

import pytest

from rcllm.cache.pool import Pool
from rcllm.engine.engine import Engine
from tests.conftest import assert_no_pins
from tests.engine import tiny


def paged(engine: Engine, pool_tokens: int, kv_dtype: str) -> Engine:
    budget = pool_tokens * engine.decoder.spec.kv_bytes_per_token(tiny.DTYPES[kv_dtype].itemsize)
    pool = Pool(budget, tiny.DTYPES[kv_dtype], engine.decoder.device, page_bytes=1024)
    return Engine(engine.config, engine.decoder, engine.prompter, pool, engine.model_id)


@pytest.mark.parametrize("kv_dtype", ["fp32", "int8"])
def test_rankings_under_eviction_equal_those_of_a_pool_without_pages(one_compute_thread: None, kv_dtype: str) -> None:
    plain = tiny.fresh(kv_dtype=kv_dtype)
    engine = paged(tiny.fresh(kv_dtype=kv_dtype), 700, kv_dtype)
    for number in range(12):
        first = 5 * number % 50
        asked = tiny.request(tuple(range(first, first + 6)), (number, number + 1), user=f"u{number % 3}", level="exact")
        for level in ("exact", "blocks"):
            answers = [each.rank(tiny.asking(asked, level=level)) for each in (engine, plain)]
            assert answers[0].scores == answers[1].scores
        if number % 4 == 3:
            engine.erase_user(asked.user_id)  # type: ignore[arg-type]
            plain.erase_user(asked.user_id)  # type: ignore[arg-type]
        assert_no_pins(engine)
    assert engine.stats().evictions > 0
