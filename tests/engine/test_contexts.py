"""Canonical contexts: all run, each has keys of its own, and the mean over prompts is the mean of their KVs."""

from __future__ import annotations

import pytest
import torch

from rcllm.core.ranking import ContentKey, RankRequest
from rcllm.core.receipts import BlockKind
from rcllm.engine.engine import Engine
from rcllm.engine.warming import WarmProgress
from rcllm.errors import ConfigError
from tests.engine import tiny

SAMPLES = (tiny.request(4, (40, 41)), tiny.request((9, 8, 7), (50, 51, 52)))
CONTEXTS = ("none", "bos", "instruction", "typical", "mean(2)")


def kv_of_items(engine: Engine, asked: RankRequest) -> dict[str | None, torch.Tensor]:
    engine.rank(asked)
    keys = {
        b.owner: b.key for b in engine.prompter.build(asked).blocks if b.kind in (BlockKind.ITEM, BlockKind.HISTORY)
    }
    return {owner: engine.pool._blocks[key].kv for owner, key in keys.items() if key}


@pytest.mark.parametrize("layout", ["history_first", "items_first"])
def test_the_mean_context_gives_the_mean_of_the_kvs(layout: str) -> None:
    """close, 1e-5: K and V of every layer"""
    asked = tiny.request((0, 1, 7), layout=layout)
    singles = [kv_of_items(tiny.build(context="typical", samples=(sample,)), asked) for sample in SAMPLES]
    mean = kv_of_items(tiny.build(context="mean(2)", samples=SAMPLES), asked)
    assert mean.keys() == singles[0].keys()
    for owner, kv in mean.items():
        wanted = (singles[0][owner] + singles[1][owner]) / 2
        error = (kv - wanted).abs()
        print(f"{owner}: max error {error.max():.1e}, mean {error.mean():.1e}")
        assert error.max() < 1e-5
        assert (singles[0][owner] - singles[1][owner]).abs().max() > 1e-2, "the contexts differ"


def test_every_context_has_keys_and_scores_of_its_own() -> None:
    keys: list[ContentKey | None] = []
    scores = set()
    for context in CONTEXTS:
        engine = tiny.build(context=context, samples=SAMPLES)
        asked = tiny.request((0, 1))
        keys += [b.key for b in engine.prompter.build(asked).blocks if b.kind is BlockKind.ITEM]
        response = engine.rank(asked)
        assert response.receipt.context == context
        scores.add(response.scores)
    # without a begin-of-sequence token, `bos` is the instruction's first token: still another context than nothing
    assert len(set(keys)) == 2 * len(CONTEXTS)
    assert len(scores) == len(CONTEXTS)


def test_a_sampled_context_wants_samples_with_a_history() -> None:
    for samples in ((), SAMPLES[:1], (tiny.request(3, ()), tiny.request(3, ()))):
        with pytest.raises(ConfigError, match=r"mean\(2\).*2 real requests.*samples"):
            tiny.build(context="mean(2)", samples=samples)


def test_warming_covers_what_requests_ask_for() -> None:
    for context in CONTEXTS:
        engine = tiny.build(context=context, samples=SAMPLES)
        seen: list[WarmProgress] = []
        progress = engine.warm(tiny.IDS[:40], on_progress=seen.append)
        assert (progress.done_blocks, progress.computed_tokens) == (seen[-1].done_blocks, seen[-1].computed_tokens)
        assert progress.done_blocks == progress.total_blocks == 80
        assert not progress.full
        assert engine.rank(tiny.request(6)).receipt.num_computed == 0, "the instruction is warm too"
        again = engine.warm(tiny.IDS[:40])
        assert (again.done_blocks, again.computed_tokens) == (80, 0)


def test_warming_stops_when_the_pool_is_full_and_serving_goes_on() -> None:
    engine = tiny.fresh(pool_tokens=900)
    progress = engine.warm()
    assert progress.full
    assert progress.done_blocks < progress.total_blocks
    assert engine.stats().evictions == 0
    assert engine.rank(tiny.request(6)).scores == tiny.fresh().rank(tiny.request(6)).scores
    engine.pool.check()
