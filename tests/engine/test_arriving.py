"""Answers from blocks that are still on their way: those of any other engine, bit for bit, however late copies are.

The pool is one tensor in pages, as on a GPU, over host memory in an arena; its lanes copy nothing before it is waited
for. Exact on the compiled kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from rcllm.cache.held import Blocks
from rcllm.core.ranking import Policy, RankRequest
from rcllm.engine.engine import Engine
from rcllm.errors import ModelError, answered
from rcllm.model.arrivals import Arrivals
from rcllm.reuse.missing import user_owner
from rcllm.store.arena import Arena
from rcllm.store.tiered import Tiered
from tests.cache.lazily import Elsewhere, Lazily, lazy_lanes
from tests.conftest import assert_no_pins
from tests.engine import tiny
from tests.engine.test_corrected import selection
from tests.engine.test_interlude import Arrivals as Comings
from tests.engine.test_loop import generator, text_for, values

pytestmark = pytest.mark.usefixtures("one_compute_thread")
READ = (0, 1, 2, 7, 9)
ASKED = tiny.request(READ, (30, 31))
POLICIES: tuple[Policy, ...] = ("rcllm", "k_difference", "two_pass", "static")  # by what they look at before a pass


def late(rng: Random | None = None, *, kv_dtype: str = "fp32", pool_tokens: int = 4000, other_rows: int = 0) -> Engine:
    """An engine whose copies are late."""
    made = tiny.fresh(kv_dtype=kv_dtype, other_rows=other_rows)
    dtype = tiny.DTYPES[kv_dtype]
    per_token = made.decoder.spec.kv_bytes_per_token(dtype.itemsize)
    store = Tiered({}, arena=Arena(np.zeros(8000 * per_token, np.uint8), page_bytes=512), queue_bytes=1)
    budget, cpu = pool_tokens * per_token, torch.device("cpu")
    pool = Elsewhere(budget, dtype, cpu, store, page_bytes=1024, lanes=lazy_lanes(rng), clock=lambda: 0.0)
    pool.rates.bytes_of["host"].per_s = 1e18  # so that nothing is computed that could be read
    return Engine(made.config, made.decoder, made.prompter, pool, made.model_id)


def below(engine: Engine) -> Engine:
    """The same with all that it has cached in host memory alone."""
    engine.pool.settle()
    engine.pool.clear()
    return engine


def lane(engine: Engine) -> Lazily:
    found = engine.pool.lanes.up
    assert isinstance(found, Lazily)
    return found


def ranked(engine: Engine, asked: RankRequest) -> tuple[float, ...]:
    """Scores from host memory, after everything was computed once."""
    engine.rank(asked)
    response = below(engine).rank(asked)
    sources = {block.source for block in response.receipt.blocks}
    assert sources <= {"host", "fresh"}
    assert ("host" in sources) == (str(asked.options.level) != "full")  # type: ignore[union-attr]
    assert_no_pins(engine)
    return response.scores


@pytest.mark.parametrize("shape", tiny.SHAPES, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("level", tiny.LEVELS)
def test_every_level_and_shape(level: str, shape: dict[str, Any]) -> None:
    asked = tiny.request(READ, (30, 31), level=level, **shape)
    plain = tiny.fresh()
    plain.rank(asked)
    assert ranked(late(), asked) == plain.rank(asked).scores


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_looked_at_before_a_pass(policy: Policy) -> None:
    asked = tiny.asking(ASKED, level="corrected(0.3,0.3)", selection=selection(policy))
    plain = tiny.fresh()
    plain.rank(asked)
    assert ranked(late(), asked) == plain.rank(asked).scores


@pytest.mark.parametrize("kv_dtype", ["fp16", "bf16", "int8"])
def test_every_dtype(kv_dtype: str) -> None:
    plain = tiny.fresh(kv_dtype=kv_dtype)
    plain.rank(ASKED)
    assert ranked(late(kv_dtype=kv_dtype), ASKED) == plain.rank(ASKED).scores


def test_layers_wait_for_their_own_part_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = late()
    engine.rank(ASKED)
    up, left = lane(below(engine)), list[int]()
    run, mix = engine.decoder._run, engine.decoder._mix
    monkeypatch.setattr(engine.decoder, "_run", lambda *given: (left.append(up.num_left), run(*given))[1])
    monkeypatch.setattr(engine.decoder, "_mix", lambda *given: (left.append(up.num_left), mix(*given))[1])
    engine.rank(ASKED)
    assert left == [1, 0, 0], "of three layers, the first are one part, and the others the next"


def test_what_is_computed_runs_beside_what_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Items that nobody has are computed while the others are copied."""
    engine = late()
    engine.rank(ASKED)
    with engine.pool.hold() as held:
        below(engine)
        held.fetch([engine.prompter.instruction_block("history_first").key])
        _ = list(held.blocks.values())  # its context is there, as it is nearly always
        up, left = lane(engine), list[int]()
        compute = engine._prefill.materialiser.compute

        def computing(*given: Any) -> int:
            tokens = compute(*given)
            left.append(up.num_left)
            return tokens

        monkeypatch.setattr(engine._prefill.materialiser, "compute", computing)
        more = tiny.request((*READ, 11, 12), (30, 31))
        scores = engine.rank(more).scores
    assert left == [2]
    assert scores == tiny.fresh().rank(more).scores


def missing_wait_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(Arrivals, "wait", lambda *given: None)
    return "blocks"


def missing_wait_of_a_look_up(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(Blocks, "__getitem__", lambda blocks, key: blocks._kv[key])
    return "corrected(0.3,0.3)"


def wait_for_the_layer_before(monkeypatch: pytest.MonkeyPatch) -> str:
    wait = Arrivals.wait
    monkeypatch.setattr(Arrivals, "wait", lambda arrivals, layer: wait(arrivals, layer - 1))
    return "blocks"


@pytest.mark.parametrize("broken", [missing_wait_of_a_pass, missing_wait_of_a_look_up, wait_for_the_layer_before])
def test_a_block_that_is_read_before_it_arrived_is_seen(
    broken: Callable[[pytest.MonkeyPatch], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests here can fail: what is read too early are no numbers."""
    engine = late()
    asked = tiny.asking(ASKED, level=broken(monkeypatch))
    expected = engine.rank(asked).scores
    [outcome] = below(engine).rank_batch([asked])
    assert isinstance(outcome, ModelError) or outcome.scores != expected


@pytest.mark.parametrize("seed", range(4))
def test_under_eviction_erasure_and_batches(seed: int) -> None:
    """Pages are used anew, moved and given back all the time, while copies end at any time."""
    rng = Random(seed)
    plain, engine = tiny.fresh(), late(rng, pool_tokens=330)
    for number in range(16):
        first = rng.choice((0, 5, 10, 15, 20))
        batch = [
            tiny.request(
                tuple(range(first + i, first + i + 5)),
                (rng.randrange(40), rng.randrange(40, 59)),
                user=f"u{rng.randrange(3)}",
                name=f"r{number}{i}",
                level=rng.choice(tiny.LEVELS[1:]),
            )
            for i in range(rng.randrange(1, 3))
        ]
        answers = [answered(each.rank_batch(batch)) for each in (engine, plain)]
        assert [a.scores for a in answers[0]] == [a.scores for a in answers[1]]
        if number % 4 == 3:
            for each in (engine, plain):
                each.erase_user(batch[0].user_id)  # type: ignore[arg-type]
            owner = user_owner(batch[0].user_id)
            assert owner not in engine.pool.owners()
        assert_no_pins(engine)
    assert engine.stats().evictions > 0
    assert engine.stats().hits["host"] > 0
    engine.close()


@pytest.mark.parametrize("broken", ["ready", "send"])
def test_copies_that_cannot_be_begun_are_computed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, expected = late(), tiny.fresh().rank(ASKED).scores
    engine.rank(ASKED)
    errors = below(engine).stats().store_errors

    def refuse(*given: object) -> object:
        raise RuntimeError("no memory, for a test")

    monkeypatch.setattr(lane(engine), broken, refuse)
    response = engine.rank(ASKED)
    assert response.scores == expected
    assert {block.source for block in response.receipt.blocks} <= {"computed", "fresh"}
    assert engine.stats().store_errors > errors
    assert_no_pins(engine)


def test_a_ranking_between_the_layers_of_a_pass_whose_blocks_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both read the same instruction, which the first of them brings up."""
    text = text_for("t", *range(20))
    alone = values(answered(generator(tiny.fresh()).generate([text]))[0]), tiny.fresh().rank(ASKED).scores
    engine = late(other_rows=1)
    engine.rank(ASKED)
    job = generator(engine)
    job.generate([text_for("s", *range(20))])
    comings, ranked = Comings(engine, monkeypatch), list[Any]()
    comings.call = lambda: ranked.append(engine.submit(engine.rank_job, ASKED))
    interrupted: Any = below(engine).submit(job, text)
    while engine.step():
        pass
    assert (values(interrupted.outcome), ranked[0].outcome.scores) == alone
    assert "host" in {block.source for block in ranked[0].outcome.receipt.blocks}
    assert_no_pins(engine)


def test_what_is_left_is_handed_down_when_nobody_waits() -> None:
    engine = late()
    ticket: Any = engine.submit(engine.rank_job, ASKED)
    assert engine.step()
    [tier] = engine.stats().tiers
    assert tier.num_blocks == 0, "copies are under way, and a ranking waits for none of them"
    assert not engine.step()
    assert ticket.done
    [tier] = engine.stats().tiers
    assert tier.num_blocks == engine.stats().num_blocks


def test_warming_beyond_the_pool_fills_host_memory() -> None:
    engine = late(pool_tokens=700)
    progress = engine.warm(tiny.IDS[:40])
    assert not progress.full
    engine.pool.settle()
    below(engine)
    response = engine.rank(ASKED)
    assert {block.source for block in response.receipt.blocks} <= {"host", "fresh"}
    assert response.scores == tiny.fresh().rank(ASKED).scores


@pytest.mark.parametrize("seed", range(3))
def test_blocks_of_the_next_pass_arrive_while_the_last_is_read(seed: int) -> None:
    engine, plain = late(Random(seed), pool_tokens=600), tiny.fresh()
    engine.loop._flies = True
    engine.loop.scheduler.limits = dataclasses.replace(engine.loop.scheduler.limits, rows=100)
    for level in ("blocks", "exact", "blocks"):
        batch = [tiny.request((i, i + 1, i + 9), (i, 31), name=f"r{i}", user=f"u{i}", level=level) for i in range(10)]
        assert [a.scores for a in answered(engine.rank_batch(batch))] == [plain.rank(each).scores for each in batch]
        engine.pool.clear()
    assert engine.stats().hits["host"] > 0
    assert_no_pins(engine)
