"""From logits to tokens: draws have the right distribution, and depend on nothing but their row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from rcllm.core.decoding import Speculation
from rcllm.decode.sample import Draw, drawn, judge, likeliest, uniform
from rcllm.drafts.draft import DraftTree
from tests.reference.generate import distribution

VOCAB = 12


def _logits(rows: int, seed: int, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def test_the_likeliest_token_is_the_largest_logit() -> None:
    logits = _logits(5, 0)
    assert likeliest(logits) == np.argmax(logits.numpy(), axis=1).tolist()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.5, 0.8), (1.0, 0.3)])
def test_draws_have_the_distribution_of_the_model(temperature: float, top_p: float) -> None:
    logits, number = _logits(1, 3), 4000
    draws = [Draw(temperature, top_p, uniform(11, place)) for place in range(number)]
    counts = np.bincount(drawn(logits.expand(number, -1), draws), minlength=VOCAB)
    expected = distribution(logits[0], temperature, top_p) * number
    assert counts[expected == 0].sum() == 0
    some = expected > 0
    assert some.sum() == 1 or chisquare(counts[some], expected[some]).pvalue > 0.001


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1000),
    st.floats(0.05, 3.0),
    st.floats(0.05, 1.0),
    st.one_of(st.floats(0.0, 1.0, exclude_max=True), st.just(np.nextafter(1.0, 0.0))),
)
def test_a_draw_is_in_the_nucleus_and_the_same_in_any_batch(seed: int, t: float, top_p: float, number: float) -> None:
    logits = _logits(3, seed, vocab=300)
    one = drawn(logits[1:2], [Draw(t, top_p, number)])[0]
    many = drawn(logits, [Draw(0.3, 0.2, 0.5), Draw(t, top_p, number), Draw(2.0, 1.0, 0.9)])
    assert many[1] == one
    chances = distribution(logits[1], t, top_p + 1e-6)
    assert chances[one] > 0
    assert distribution(logits[1], t, 1.0)[one] > 0


def test_a_low_temperature_is_greedy() -> None:
    logits = _logits(4, 5)
    assert drawn(logits, [Draw(1e-3, 1.0, 0.999)] * 4) == likeliest(logits)


def test_random_numbers_depend_on_seed_and_place_alone() -> None:
    assert uniform(3, 7) == uniform(3, 7)
    numbers = {uniform(seed, place) for seed in range(20) for place in range(20)}
    assert len(numbers) == 400
    assert all(0 <= number < 1 for number in numbers)


def test_ranks_and_probabilities_of_drafted_tokens() -> None:
    logits = _logits(4, 8)
    order = np.argsort(-logits.numpy(), axis=1)
    parents = np.array([0, 0, 1, 2], np.int32)
    tokens = np.array([order[0, 0], order[0, 2], order[1, 1], order[2, 4]], np.int32)
    tree = DraftTree(tokens, parents, np.ones(4, np.float32))
    judged = judge(logits, likeliest(logits), tree, Speculation("relaxed", 3, 0.0))
    assert judged.ranks.tolist() == [0, 2, 1, 3]
    chances = torch.softmax(logits, dim=-1).numpy()
    for node in (1, 2):
        assert judged.probabilities[node] == pytest.approx(chances[parents[node], tokens[node]], rel=1e-5)
        assert judged.most_probable[node] == pytest.approx(chances[parents[node]].max(), rel=1e-5)
    assert np.isnan(judged.probabilities[[0, 3]]).all()  # their rank alone decides
    ratio = float(chances[0, order[0, 2]] / chances[0, order[0, 0]])
    for p, rank in ((ratio * 0.99, 2), (ratio * 1.01, 3)):  # too improbable, whatever the rest of the vocabulary
        assert judge(logits, likeliest(logits), tree, Speculation("relaxed", 3, p)).ranks[1] == rank


def test_of_equally_likely_tokens_one_is_the_first() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0]])
    targets = likeliest(logits)
    tree = DraftTree(np.array([1, 2], np.int32), np.zeros(2, np.int32), np.ones(2, np.float32))
    assert sorted(judge(logits, targets, tree, Speculation("relaxed", 2, 0.0)).ranks.tolist()) == [0, 1]
