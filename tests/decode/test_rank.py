"""Read-outs on prompts built by hand, and the order of scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rcllm.core.ranking import Item, ItemId, TokenIds, order
from rcllm.decode import rank as read_outs
from rcllm.engine.engine import Engine
from rcllm.engine.jobs import rank
from rcllm.engine.jobs.bias import RunningMean, centre
from rcllm.errors import answered
from tests.engine import tiny


def slow_log_probs(engine: Engine, before: TokenIds, labels: tuple[TokenIds, ...]) -> list[float]:
    """Chain rule, one whole prompt per label token: log p of each token among those that labels continue with."""
    values = []
    for label in labels:
        total = 0.0
        for i, token in enumerate(label):
            logits = engine.decoder.full_logits((*before, *label[:i]))[-1].double()
            rivals = sorted({other[i] for other in labels if other[:i] == label[:i]})
            total += float(torch.log_softmax(logits[rivals], 0)[rivals.index(token)])
        values.append(total)
    return values


@pytest.mark.parametrize("layout", ["history_first", "items_first"])
@pytest.mark.parametrize("count", [1, 2, 26, 27, 34])
def test_label_scores_are_the_chain_rule_over_plain_prompts(any_engine: Engine, layout: str, count: int) -> None:
    """close, 1e-4"""
    asked = tiny.request(count, (40,), layout=layout, level="full")
    prompt = any_engine.prompter.build(asked)
    question = max(i for i, b in enumerate(prompt.blocks) if b.kind == "question")
    before = tuple(token for block in prompt.blocks[: question + 1] for token in block.token_ids)
    scores = any_engine.rank(asked).scores
    assert math.isclose(sum(map(math.exp, scores)), 1.0, abs_tol=1e-6)
    assert np.allclose(scores, slow_log_probs(any_engine, before, prompt.label_ids), atol=1e-4)


@pytest.mark.parametrize("level", ["blocks", "linked(4)", "exact"])
@pytest.mark.parametrize("count", [26, 27, 60, 120])
def test_label_probabilities_sum_to_one_at_every_level(
    any_engine: Engine, level: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [ItemId(f"n{i}") for i in range(count)]
    texts = {name: Item(name, {"title": f"lamp {i}"}) for i, name in enumerate(names)}
    monkeypatch.setattr(any_engine.prompter, "catalogue", dict(any_engine.prompter.catalogue) | texts)
    asked = replace(tiny.request(1, (40,), level=level, parallel=True), candidates=tuple(names))
    assert math.isclose(sum(map(math.exp, any_engine.rank(asked).scores)), 1.0, abs_tol=1e-6)


def test_likelihood_is_the_mean_over_plain_prompts(any_engine: Engine) -> None:
    """close, 1e-4: instruction, history, head and one title, as one sequence"""
    asked = tiny.request((0, 3, 58), readout="likelihood", level="full")
    prompt = any_engine.prompter.build(asked)
    head = next(i for i, b in enumerate(prompt.blocks) if b.kind == "question")
    before = tuple(token for block in prompt.blocks[: head + 1] for token in block.token_ids)
    for slot, score in enumerate(any_engine.rank(asked).scores):
        title = tuple(read.token_ids[0] for read in prompt.reads if read.slot == slot)
        logits = any_engine.decoder.full_logits((*before, *title)).log_softmax(-1)
        picked = [float(logits[len(before) - 1 + i, token]) for i, token in enumerate(title)]
        assert math.isclose(score, sum(picked) / len(picked), abs_tol=1e-4)


def test_pointwise_is_yes_minus_no_over_plain_prompts(any_engine: Engine) -> None:
    """close, 1e-4"""
    asked = tiny.request((0, 3, 58), readout="pointwise", level="full")
    prompt = any_engine.prompter.build(asked)
    common = tuple(token for b in prompt.blocks if b.slot is None for token in b.token_ids)
    for slot, score in enumerate(any_engine.rank(asked).scores):
        own = tuple(token for b in prompt.blocks if b.slot == slot for token in b.token_ids)
        logits = any_engine.decoder.full_logits((*common, *own))[-1]
        yes, no = (logits[any_engine.prompter.tokenizer.encode(word)[0]] for word in (" yes", " no"))
        assert math.isclose(score, float(yes - no), abs_tol=1e-4)


def test_a_batch_of_all_read_outs_is_read_in_one_copy_before_which_receipts_are_made(
    any_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device computes while receipts are made; each prompt has the scores of its own read-out."""
    requests = [
        tiny.request((i, i + 1, i + 5), (30 + i,), user=f"u{i}", name=f"r{i}", readout=readout, level="blocks")
        for i, readout in enumerate(["likelihood", "label", "pointwise", "label", "likelihood"])
    ]
    alone = [any_engine.rank(asked).scores for asked in requests]
    order, receipt = list[str](), rank._receipt

    def copied(values: torch.Tensor) -> Callable[[], torch.Tensor]:
        order.append("launched")
        return lambda: (order.append("waited"), values)[1]

    monkeypatch.setattr(read_outs, "download", copied)
    monkeypatch.setattr(rank, "_receipt", lambda *args: (order.append("receipt"), receipt(*args))[1])
    together = answered(any_engine.rank_batch(requests))
    assert order == ["launched"] + ["receipt"] * len(requests) + ["waited"]
    for response, scores, asked in zip(together, alone, requests, strict=True):
        assert np.allclose(response.scores, scores, atol=1e-5)
        assert response.request_id == asked.request_id


@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, -1e300]), max_size=12))
def test_order_is_by_score_and_ties_by_candidate(scores: list[float]) -> None:
    assert order(scores) == tuple(sorted(range(len(scores)), key=lambda i: (-scores[i], i)))


def test_a_running_mean_is_of_earlier_requests_and_uniform_before_the_first() -> None:
    mean = RunningMean(2)
    assert np.allclose(mean.then_add(np.array([1.0, 3.0])), -math.log(2))
    assert mean.then_add(np.array([3.0, 5.0])).tolist() == [1.0, 3.0]
    assert mean.then_add(np.array([0.0, 0.0])).tolist() == [2.0, 4.0]


def test_a_uniform_prior_corrects_nothing() -> None:
    assert np.allclose(centre(np.full(4, -math.log(4))), 0.0)
