"""A cache in int8: every job and level near what it answers beside fp32, and what depends on no rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rcllm.cache.pool import Pool
from rcllm.core.decoding import GenerateOptions, GenerateRequest, OpenRequest, Speculation
from rcllm.core.ranking import Event, Level, Selection, UserId
from rcllm.decode.beam_kv import SCRAP, beam_group, joined
from rcllm.engine.engine import Engine
from rcllm.engine.jobs.generate import Generator
from rcllm.engine.jobs.sequences import SequenceKV
from rcllm.errors import answered
from rcllm.model.decoder import Pass
from rcllm.model.kv_int8 import quantise, widen
from rcllm.prototypes.build import PrototypeBuilder
from rcllm.prototypes.config import PrototypeConfig
from rcllm.store.memory import MemoryStore
from tests.engine import tiny
from tests.engine.opening import opened
from tests.engine.test_semantic_history import EVENTS, OTHERS, with_pool

FAMILIES = (tiny.NATIVE, tiny.TORCH)
BOUND = 0.1  # on log-probabilities and logits; fp16 stays within 0.02, bf16 within 0.15


def int8(family: str = tiny.NATIVE, **options: Any) -> Engine:
    return tiny.fresh(family, kv_dtype="int8", **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("level", tiny.LEVELS)
def test_scores_at_every_level_are_near_those_beside_fp32(family: str, level: str) -> None:
    """approximate; on an empty cache, and on a warm one"""
    shifts = []
    for shape in tiny.SHAPES:
        asked = tiny.request(6, (30, 31, 32), level=level, **shape)
        wide, narrow = tiny.fresh(family), int8(family)
        for _ in range(2):
            shifts.append(np.abs(np.subtract(wide.rank(asked).scores, narrow.rank(asked).scores)).max())
        narrow.pool.check()
    print(f"{level}: mean shift {np.mean(shifts):.1e}, max {max(shifts):.1e}")
    assert max(shifts) < BOUND
    assert (max(shifts) == 0) == (level == "full")


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_is_full_within_the_rounding_of_the_prefix(family: str) -> None:
    """close: `exact` reads the instruction and the user's history from the cache, as kept"""
    engine = int8(family)
    asked = tiny.request(6, (30, 31, 32, 33), level="exact")
    full = engine.rank(tiny.asking(asked, level="full")).scores
    errors = [np.abs(np.subtract(engine.rank(asked).scores, full)).max() for _ in range(3)]
    print(f"exact against full: {[f'{error:.1e}' for error in errors]}")
    assert 0 < errors[-1] < BOUND
    assert errors[1] == errors[2]


@pytest.mark.parametrize("level", ["blocks", "linked(4)", "tail(0.3)", "corrected(0.3,0.3)"])
@pytest.mark.parametrize("readout", ["label", "pointwise", "likelihood"])
def test_a_batch_gives_the_bits_of_each_alone(level: str, readout: str) -> None:
    """exact: once the blocks are there, a request reads the same levels whatever else is in its pass"""
    engine = int8()
    requests = [
        tiny.request((i, i + 1, i + 7), (30 + i, 31), user=f"u{i}", name=f"r{i}", level=level, readout=readout)
        for i in range(6)
    ]
    for request in requests:
        engine.rank(request)
    alone = [engine.rank(request).scores for request in requests]
    together = [response.scores for response in answered(engine.rank_batch(requests))]
    assert together == alone


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_cached_does_not_change_an_answer(family: str) -> None:
    """exact: the request that publishes a block reads what was kept of it, as every later one does"""
    engine = int8(family)
    asked = tiny.request(6, (30, 31, 32))
    assert engine.rank(asked).scores == engine.rank(asked).scores


def test_bytes_are_counted_as_they_lie_in_the_pool() -> None:
    """28 % of fp32: a level of one byte for every value, and a scale of two for every 16."""
    engine, wide = int8(), tiny.fresh()
    spec = engine.decoder.spec
    asked = tiny.request(6, (30, 31, 32))
    receipt = engine.rank(asked).receipt
    wide.rank(asked)
    per_token = spec.kv_bytes_per_token(1)
    assert per_token == spec.kv_bytes_per_token(4) * 9 // 32
    assert engine.stats().num_bytes == receipt.num_computed * per_token
    assert engine.stats().num_bytes * 32 == wide.stats().num_bytes * 9
    assert receipt.kv_bytes_read == receipt.num_reused * per_token
    assert receipt.kv_bytes_copied == 0
    assert all(block.kv.dtype == torch.int8 for block in engine.pool._blocks.values())


def test_corrected_counts_the_bytes_that_it_compared() -> None:
    engine = int8()
    receipt = engine.rank(tiny.request(level="corrected(.3,.3)", selection=Selection(check_layer=1))).receipt
    per_layer = engine.decoder.spec.kv_bytes_per_token(1) // engine.decoder.spec.num_layers
    assert receipt.kv_bytes_read % per_layer == 0
    assert receipt.kv_bytes_read > receipt.num_reused * per_layer


@pytest.mark.parametrize("policy", ["rcllm", "k_difference", "question", "two_pass", "static", "tail"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_policy_reads_int8_and_a_full_budget_is_full(family: str, policy: Any) -> None:
    """approximate: at full budget only the instruction is read"""
    engine = int8(family)
    chosen = Selection(policy, check_layer=int(policy == "k_difference"))
    full = engine.rank(tiny.request(level="full")).scores
    some, all_of_it = (
        engine.rank(tiny.request(level=level, selection=chosen)).scores
        for level in ("corrected(.3,.3)", "corrected(1,1)")
    )
    assert np.isfinite(some).all()
    assert np.abs(np.subtract(all_of_it, full)).max() < BOUND


def test_a_block_that_was_evicted_comes_back_to_the_bit() -> None:
    """exact: what a store gives back is copied in as it is, never quantised again"""
    spilling, roomy = int8(pool_tokens=130, store=MemoryStore(1 << 24)), int8()
    first, second = tiny.request((0, 1, 2, 3)), tiny.request((10, 11, 12, 13), (40, 41))
    wanted = [roomy.rank(request).scores for request in (first, second)]
    assert [spilling.rank(request).scores for request in (first, second)] == wanted
    again = spilling.rank(first)
    assert "host" in {block.source for block in again.receipt.blocks}
    assert again.scores == wanted[0]
    spilling.pool.check()


def test_a_pool_of_int8_holds_over_three_times_the_blocks_of_fp32() -> None:
    budget = tiny.fresh().decoder.spec.kv_bytes_per_token(4) * 300
    counts = []
    for dtype in (torch.float32, torch.int8):
        plain = tiny.fresh()
        pool = Pool(budget, dtype, plain.decoder.device)
        engine = Engine(plain.config, plain.decoder, plain.prompter, pool, plain.model_id)
        for start in range(0, 60, 4):
            engine.rank(tiny.request((start, start + 1, start + 2, start + 3), ()))
        assert engine.stats().num_bytes <= budget
        counts.append(engine.stats().num_blocks)
    assert counts[1] > 3 * counts[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_under_a_blocks_mask_full_shows_what_int8_costs(family: str) -> None:
    """approximate: `full` computes every block anew and keeps the compute dtype"""
    wide, narrow = (tiny.build(family, mask="blocks", kv_dtype=dtype) for dtype in ("fp32", "int8"))
    asked = tiny.request(6)
    full = [engine.rank(tiny.asking(asked, level="full")).scores for engine in (wide, narrow)]
    assert np.allclose(*full, atol=1e-5)
    assert 1e-6 < np.abs(np.subtract(full[1], narrow.rank(asked).scores)).max() < BOUND


def test_under_a_blocks_mask_full_is_batched_by_what_it_computes() -> None:
    """A regression: requests that fit together in int8 were computed together in fp32, and all of them failed."""
    asked = [tiny.request(numbers, (), name=str(numbers), level="full") for numbers in ((0, 1, 2), (4, 5, 6))]
    blocks = [tiny.fresh().prompter.build(request).blocks for request in asked]
    shared = len(tiny.fresh().prompter.instructions["history_first"])
    both = [sum(len(block) for block in some if block.key is not None) for some in blocks]
    made = int8(pool_tokens=max(both) * 32 // 9 + 8)  # of fp32 it holds one of them
    assert 2 * (sum(both) - shared) <= made.pool.budget // made.kv_bytes_per_token, "both by the bytes of int8"
    config = replace(made.config, model=replace(made.config.model, mask="blocks"))
    engine = Engine(config, made.decoder, made.prompter, made.pool, made.model_id)
    alone = [engine.rank(request).scores for request in asked]
    assert [response.scores for response in answered(engine.rank_batch(asked))] == alone


def test_keys_of_int8_are_their_own() -> None:
    namespaces = {tiny.build(kv_dtype=dtype).prompter.namespace for dtype in ("fp32", "fp16", "bf16", "int8")}
    assert len(namespaces) == 4


# ---- decoding -------------------------------------------------------------------------------------------------------


def _opening(name: str, *events: int) -> OpenRequest:
    return OpenRequest(name, tuple(Event(tiny.IDS[i]) for i in events), UserId("u1"), Level.parse("exact"))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_open_prompt_goes_on_in_the_compute_dtype(family: str) -> None:
    """close: a sequence's buffer has the widened values of what it was filled from, keys turned to their places"""
    engine = int8(family)
    decoder = engine.decoder
    for _ in range(2):  # the second time instruction and history are cached, in int8
        [found] = opened(engine, [_opening("a", 1, 2, 3)])
        tokens = engine.prompter.build_open(_opening("a", 1, 2, 3)).token_ids
        buffer = SequenceKV(decoder, len(tokens) + 4)
        buffer.fill(found.segments, decoder.rope)
        assert buffer.kv.dtype == decoder.dtype
        expected = decoder.full_logits([*tokens, 7])[-1]
        for segments in (found.segments, (buffer.segment,)):
            work = Pass(torch.tensor([7]), torch.tensor([found.end]), [beam_group(segments, 1)], torch.tensor([0]))
            assert torch.allclose(decoder.logits(decoder.forward(work).hidden)[0], expected, atol=BOUND)
    assert torch.int8 in {segment.kv.dtype for segment in found.segments}


def test_scraps_in_int8_are_joined_in_the_compute_dtype() -> None:
    engine = int8()
    [found] = opened(engine, [_opening("a", 1, 2, 3)])
    [found] = opened(engine, [_opening("a", 1, 2, 3)])
    assert sum(map(len, found.segments)) < SCRAP * len(found.segments), "else there is nothing to join"
    [whole] = joined(found.segments, engine.decoder.rope, engine.decoder.dtype)
    assert whole.kv.dtype == engine.decoder.dtype
    first = next(segment for segment in found.segments if segment.kv.dtype == torch.int8 and segment.base == 0)
    part = widen(first.kv)[:, 1, :, first.start : first.stop]  # values are not turned
    assert torch.equal(whole.kv[:, 1, :, : len(first)], part)


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_beside_int8_are_the_same_alone_and_together(family: str) -> None:
    """exact, on the compiled kernels; elsewhere each is a text of full length"""
    engine = int8(family)
    asked = [
        GenerateRequest(
            f"r{i}",
            tuple(Event(tiny.IDS[j]) for j in range(1 + i)),
            UserId(f"u{i}"),
            GenerateOptions(max_tokens=8, speculation=Speculation("none")),
        )
        for i in range(3)
    ]
    generator = Generator(engine)
    for request in asked:
        answered(engine.run(generator, [request]))
    alone = [answered(engine.run(generator, [request]))[0].token_ids for request in asked]
    together = [answer.token_ids for answer in answered(engine.run(generator, asked))]
    assert [len(tokens) for tokens in together] == [len(tokens) for tokens in alone]
    if family == tiny.NATIVE:
        assert together == alone


# ---- the semantic pool ----------------------------------------------------------------------------------------------


def test_prototypes_are_kept_in_fp16_beside_a_pool_in_int8(tmp_path: Path) -> None:
    """Their KV is a sum of rows, and is read beside blocks in int8 by the same kernels."""
    engine = with_pool(int8(), tmp_path / "pool", OTHERS)
    assert engine.prototypes is not None
    assert engine.prototypes.header.dtype == "fp16"
    asked = tiny.request(6, EVENTS, history="semantic")
    wide = with_pool(tiny.fresh(), tmp_path / "wide", OTHERS)
    got, wanted = engine.rank(asked), wide.rank(asked)
    assert "semantic" in {block.source for block in got.receipt.blocks}
    assert np.abs(np.subtract(got.scores, wanted.scores)).max() < BOUND


def test_a_builder_given_int8_makes_fp16(tmp_path: Path) -> None:
    engine = int8()
    builder = PrototypeBuilder(
        engine.decoder, engine.prompter, PrototypeConfig(), tmp_path / "pool", model_id="m", kv_dtype=torch.int8
    )
    assert builder.kv_dtype == torch.float16


# ---- what is no number ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_block_with_no_number_in_it_is_an_error_of_its_request_alone(bad: float) -> None:
    engine = int8()
    asked = [tiny.request((0, 1), (), name="bad"), tiny.request((2, 3), (), name="good")]
    for request in asked:
        engine.rank(request)
    key = next(b.key for b in engine.prompter.build(asked[0]).blocks if b.owner is not None and "i0" in b.owner)
    assert key is not None
    wide = widen(engine.pool._blocks[key].kv)
    wide[..., 3] = bad
    engine.pool._blocks[key] = replace(engine.pool._blocks[key], kv=quantise(wide))
    bad_answer, good_answer = engine.rank_batch(asked)
    assert isinstance(bad_answer, Exception)
    assert np.isfinite(good_answer.scores).all()
