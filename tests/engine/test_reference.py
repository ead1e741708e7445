"""The engine against its slow twin, a dense fp64 computation: close, 1e-4 on scores (log-probabilities and logits)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rcllm.core.ranking import Level, Prompt, RankRequest, TokenIds
from rcllm.core.receipts import BlockKind
from rcllm.engine.engine import Engine
from rcllm.reuse.plan import plan
from tests.engine import tiny
from tests.reference.full_model import FullModel

TOLERANCE = 1e-4
SHAPES = [
    {"layout": layout, "label_place": place, "parallel": parallel}
    for layout, place, parallel in itertools.product(
        ("history_first", "items_first"), ("before", "after"), (False, True)
    )
] + [{"readout": readout} for readout in ("pointwise", "likelihood")]


@functools.cache
def twin(family: str) -> FullModel:
    return FullModel(tiny.model_folder(family))


def family_of(engine: Engine) -> str:
    return tiny.NATIVE if engine.decoder.spec.family == tiny.NATIVE else tiny.TORCH


def contexts(engine: Engine, prompt: Prompt) -> dict[int, Sequence[TokenIds]]:
    """Per block of the prompt, what stands before it where its KV is computed."""
    named = engine.prompter.contexts[prompt.options.layout]
    return {i: named[b.kind].variants if b.kind in named else ((),) for i, b in enumerate(prompt.blocks)}


def expected(engine: Engine, request: RankRequest, level: str) -> list[float]:
    prompt = engine.prompter.build(request)
    planned = plan(prompt, Level.parse(level), lambda key: False)
    return twin(family_of(engine)).scores(prompt, planned, contexts(engine, prompt))


def assert_close(scores: Sequence[float], wanted: Sequence[float]) -> None:
    errors = np.abs(np.array(scores) - np.array(wanted))
    print(f"max error {errors.max():.2e}, mean {errors.mean():.2e}")
    assert errors.max() < TOLERANCE


def test_the_torch_and_native_paths_are_both_taken() -> None:
    assert tiny.fresh(tiny.NATIVE).decoder.kernels is not None, "the tiny model should fit the compiled kernels"
    assert tiny.fresh(tiny.TORCH).decoder.kernels is None


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("level", ["full", "blocks", "linked(3)", "tail(0.3)"])
def test_every_level_computes_what_the_dense_twin_computes(
    any_engine: Engine, shape: dict[str, Any], level: str
) -> None:
    """close; `full` is the whole prompt, the others read blocks that were computed in their canonical context."""
    asked = tiny.request((0, 1, 7, 58, 5), (30, 31, 32), level=level, **shape)
    assert_close(any_engine.rank(asked).scores, expected(any_engine, asked, level))


@pytest.mark.parametrize("context", ["none", "bos", "typical", "mean(2)"])
@pytest.mark.parametrize("layout", ["history_first", "items_first"])
def test_blocks_are_read_as_they_are_in_every_canonical_context(context: str, layout: str) -> None:
    samples = (tiny.request(4, (40, 41)), tiny.request((9, 8, 7), (50, 51, 52)))
    engine = tiny.build(context=context, samples=samples)
    asked = tiny.request((0, 1, 7), level="blocks", layout=layout)
    assert_close(engine.rank(asked).scores, expected(engine, asked, "blocks"))


@pytest.mark.parametrize("attention", ["gather", "segmented"])
@pytest.mark.parametrize("family", [tiny.NATIVE, tiny.TORCH])
def test_every_attention_backend_computes_the_same(family: str, attention: str) -> None:
    engine = tiny.build(family, attention=attention)
    asked = tiny.request((0, 1, 7), level="linked(3)", parallel=True)
    response = engine.rank(asked)
    assert response.receipt.backend == attention
    assert (response.receipt.kv_bytes_copied > 0) == (attention == "gather")
    assert_close(response.scores, expected(engine, asked, "linked(3)"))


def test_labels_of_several_tokens_are_scored_along_their_trie(any_engine: Engine) -> None:
    asked = tiny.request(40, (30, 31), level="full", parallel=True)
    prompt = any_engine.prompter.build(asked)
    assert len({len(label) for label in prompt.label_ids}) > 1, "some numbers are one token and some are two"
    assert_close(any_engine.rank(asked).scores, expected(any_engine, asked, "full"))


def test_without_history_and_with_one_candidate(any_engine: Engine) -> None:
    for readout in ("label", "pointwise", "likelihood"):
        asked = tiny.request((3,), (), level="full", readout=readout)
        assert_close(any_engine.rank(asked).scores, expected(any_engine, asked, "full"))


def test_a_warm_chain_is_the_dense_prefix(any_engine: Engine) -> None:
    """close: history that is read from the user's chain equals history that is computed."""
    asked = tiny.request(level="exact")
    any_engine.rank(asked)
    warm = any_engine.rank(asked)
    history = [b for b in warm.receipt.blocks if b.kind is BlockKind.HISTORY]
    assert all(b.source == "device" and b.num_fresh == 0 for b in history)
    assert_close(warm.scores, expected(any_engine, asked, "full"))
