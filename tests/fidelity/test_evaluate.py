"""Records from a tiny engine: the engine's own answers, once each, with their exact cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rcllm.core.ranking import Level, Prompt, RankOptions, RankRequest, RankResponse, Selection
from rcllm.engine.engine import Engine
from rcllm.fidelity.evaluate import evaluate, evaluate_timed, record_key, request_flops, with_context
from rcllm.fidelity.records import RecordFile
from rcllm.reuse.plan import plan
from tests.engine import tiny

REQUESTS = [
    replace(tiny.request(tuple(range(n, n + 5)), (30 + n, 31), user=f"u{n}", name=f"r{n}"), positive=tiny.IDS[n + 1])
    for n in range(7)
]
OPTIONS = [RankOptions(level=Level.parse(level)) for level in ("full", "exact", "blocks", "tail(0.4)")]


class Counting:
    """Counts what an engine is asked."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        rank_batch = engine.rank_batch

        def counted(requests: Sequence[RankRequest]) -> list[RankResponse]:
            self.count += len(requests)
            return rank_batch(requests)

        monkeypatch.setattr(engine, "rank_batch", counted)


@pytest.mark.parametrize("batch", [1, 3])
def test_records_are_the_engines_answers(engine: Engine, batch: int) -> None:
    told: list[int] = []
    found = evaluate(engine, REQUESTS, OPTIONS, RecordFile(), batch=batch, on_records=told.append)
    assert sum(told) == len(REQUESTS) * len(OPTIONS)
    for options, records in found.items():
        for request, record in zip(REQUESTS, records, strict=True):
            response = engine.rank(replace(request, user_id=None, options=options))
            assert record.scores == pytest.approx(response.scores, abs=1e-4)
            assert record.positive == 1
            assert (record.num_tokens, record.num_fresh) == (response.receipt.num_tokens, response.receipt.num_fresh)
            assert record.seconds is None


def test_what_is_kept_is_not_computed_again(engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = Counting(engine, monkeypatch)
    path = tmp_path / "records.jsonl"
    with RecordFile(path) as kept:
        first = evaluate(engine, REQUESTS[:4], OPTIONS, kept)
    assert asked.count == 16
    with RecordFile(path) as kept:
        again = evaluate(engine, REQUESTS, OPTIONS, kept)
    assert asked.count == 28, "three new requests under four options"
    assert all(again[options][:4] == first[options] for options in OPTIONS)


def test_equal_requests_are_asked_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Counting(engine, monkeypatch)
    found = evaluate(engine, [REQUESTS[0], replace(REQUESTS[0], request_id="again")], OPTIONS[:1], RecordFile())
    assert asked.count == 1
    assert len(found[OPTIONS[0]]) == 2


def test_times_are_of_a_warm_cache(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = RecordFile()
    asked = Counting(engine, monkeypatch)
    found = evaluate_timed(engine, REQUESTS[:3], OPTIONS, kept)
    assert all(record.seconds is not None and record.seconds > 0 for records in found.values() for record in records)
    # once per request and options; the first of each options, and a second time where blocks were missing, on top
    assert 12 + 4 < asked.count <= 12 + 4 + 6
    before = asked.count
    assert evaluate_timed(engine, REQUESTS[:3], OPTIONS, kept) == found
    assert asked.count == before


def test_a_record_is_found_under_what_it_depends_on(engine: Engine) -> None:
    request, blocks = REQUESTS[0], OPTIONS[2]
    mean = with_context(engine, "mean(2)", REQUESTS[3:])
    other_mean = with_context(engine, "mean(2)", REQUESTS[4:])
    keys = [
        record_key(one, request, "fingerprint", options, machine)
        for one in (engine, mean, other_mean, tiny.fresh(tiny.TORCH))
        for options in (blocks, replace(blocks, label_place="before"))
        for machine in ("", "this one")
    ]
    assert len(set(keys)) == 16
    full = [record_key(one, request, "fingerprint", OPTIONS[0]) for one in (engine, mean)]
    assert full[0] == full[1], "full recompute has no canonical context"


def test_contexts_share_model_and_pool(engine: Engine) -> None:
    other = with_context(engine, "mean(2)", REQUESTS)
    assert (other.decoder, other.pool) == (engine.decoder, engine.pool)
    built = tiny.build(samples=tuple(REQUESTS), context="mean(2)")
    asked = replace(REQUESTS[0], user_id=None)
    assert other.rank(asked).scores == pytest.approx(built.rank(asked).scores, abs=1e-5)
    assert other.rank(asked).scores != pytest.approx(engine.rank(asked).scores, abs=1e-5)


def counted_pairs(prompt: Prompt, fresh: set[tuple[int, int]]) -> int:
    """(query, key) pairs of the fresh tokens, one by one."""
    pairs = 0
    for block, offset in fresh:
        seen = [j for j in range(len(prompt.blocks)) if prompt.sees[block, j]]
        pairs += offset + 1 + sum(len(prompt.blocks[j]) for j in seen)
    return pairs


@pytest.mark.parametrize("readout", ["label", "likelihood", "pointwise"])
@pytest.mark.parametrize("level", ["full", "exact", "blocks", "linked(3)", "tail(0.4)"])
def test_flops_count_every_visible_pair(engine: Engine, level: str, readout: str) -> None:
    asked = tiny.request(6, (30, 31, 32), user=None, level=level, readout=readout)
    prompt, spec = engine.prompter.build(asked), engine.decoder.spec
    fresh = {
        (piece.block, offset)
        for piece in plan(prompt, prompt.options.level, lambda key: False).pieces
        if piece.key is None
        for offset in range(piece.start, piece.stop)
    }
    reads = {(read.block, read.offset) for read in prompt.reads} if readout == "likelihood" else ()
    expected = len(fresh) * spec.linear_flops_per_token + len(reads) * spec.head_flops_per_read
    expected += spec.attention_flops(counted_pairs(prompt, fresh))
    found = request_flops(prompt, engine.rank(asked).receipt, spec)
    within = 0.02 if "(" in level else 1e-9  # tokens of a block that is fresh in part count at its middle
    assert found == pytest.approx(expected, rel=within)


def test_flops_of_choosing_count(engine: Engine) -> None:
    def flops(policy: str, level: str = "corrected(0.3, 0.3)") -> float:
        asked = tiny.request(6, (30, 31, 32), user=None, level=level, selection=Selection(policy))  # type: ignore[arg-type]
        return request_flops(engine.prompter.build(asked), engine.rank(asked).receipt, engine.decoder.spec)

    chosen, full, blocks = flops("first"), flops("first", "full"), flops("first", "blocks")
    layers = engine.decoder.spec.num_layers
    assert flops("rcllm") == pytest.approx(chosen + (full - chosen) / layers, rel=0.02)
    assert flops("two_pass") == pytest.approx(chosen + blocks, rel=0.05)
