"""From logits to tokens: draws have the right distribution, and depend on nothing but their row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from rcllm.decode.sample import Draw, drawn, from_nuclei_by_look, from_nuclei_unseen, uniform
from tests.reference.generate import distribution

VOCAB = 12


def _logits(rows: int, seed: int, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.5, 0.8), (1.0, 0.3)])
def test_draws_have_the_distribution_of_the_model(temperature: float, top_p: float) -> None:
    logits, number = _logits(1, 3), 4000
    draws = [Draw(temperature, top_p, uniform(11, place)) for place in range(number)]
    counts = np.bincount(drawn(logits.expand(number, -1), draws).numpy(), minlength=VOCAB)
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
    one = int(drawn(logits[1:2], [Draw(t, top_p, number)])[0])
    many = drawn(logits, [Draw(0.3, 0.2, 0.5), Draw(t, top_p, number), Draw(2.0, 1.0, 0.9)]).tolist()
    assert many[1] == one
    chances = distribution(logits[1], t, top_p + 1e-6)
    assert chances[one] > 0
    assert distribution(logits[1], t, 1.0 + 1e-6)[one] > 0, "a mass may round to 1 before all of it is there"


def test_a_low_temperature_is_greedy() -> None:
    logits = _logits(4, 5)
    assert drawn(logits, [Draw(1e-3, 1.0, 0.999)] * 4).tolist() == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("temperature", [1e-37, 1e-40, 5e-324])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_a_temperature_that_is_hardly_a_number_is_greedy(temperature: float, top_p: float) -> None:
    """A quotient that overflows is no number, and was a token that the vocabulary lacks."""
    logits = torch.cat([_logits(4, 5), _logits(1, 5) - 500, _logits(1, 5) * 1e-30])
    draws = [Draw(temperature, top_p, 0.999), Draw(1.0, top_p, 0.5), *[Draw(temperature, top_p, 0.0)] * 4]
    found = drawn(logits, draws).tolist()
    assert [*found[:1], *found[2:]] == [*logits.argmax(dim=-1)[:1].tolist(), *logits.argmax(dim=-1)[2:].tolist()]
    assert found[1:2] == drawn(logits[1:2], draws[1:2]).tolist()


def test_random_numbers_depend_on_seed_and_place_alone() -> None:
    assert uniform(3, 7) == uniform(3, 7)
    numbers = {uniform(seed, place) for seed in range(20) for place in range(20)}
    assert len(numbers) == 400
    assert all(0 <= number < 1 for number in numbers)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.lists(st.tuples(st.floats(0.01, 0.99), st.floats(0.0, 0.9999)), min_size=1, max_size=5))
def test_nuclei_that_nobody_looks_at_are_those_that_are_looked_at(seed: int, rows: list[tuple[float, float]]) -> None:
    """As on a GPU; with many equal probabilities, and sharp and flat rows."""
    logits = (_logits(len(rows), seed, vocab=400) * (1 + seed % 9)).round(decimals=seed % 3)
    probabilities = torch.softmax(logits, dim=-1)
    top_p, uniforms = torch.tensor(rows, dtype=torch.float64).unbind(1)
    expected = from_nuclei_by_look(probabilities, top_p, uniforms)
    assert from_nuclei_unseen(probabilities, top_p, uniforms).tolist() == expected.tolist()
