"""The cost model: it learns any machine from its passes, whatever it assumed first."""

from __future__ import annotations

import math
import statistics
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcllm.schedule.cost import CostModel, Demand, Rates

FIRST = Rates.first(row_flops=2 * 135e6, pair_flops=4 * 30 * 576)
TRUE = Rates(5.0, 3.0, 1.1, 2e-7, 1.5e-4)  # of a machine unlike the one that is assumed
demands = st.builds(
    Demand,
    passes=st.just(1.0),
    rows=st.floats(1, 4000),
    missing=st.floats(0, 4000),
    kv_bytes=st.floats(0, 1e8),
    pairs=st.floats(0, 1e7),
)


def passes(count: int, seed: int = 0) -> list[Demand]:
    """Rankings at `blocks`, some with missing blocks, a few at `exact`."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        tokens, exact = float(draw.integers(1500, 4000)), draw.random() < 0.2
        rows = tokens if exact else float(draw.integers(60, 140))
        missing = 0.0 if exact or draw.random() < 0.5 else float(draw.integers(0, 1500))
        found.append(Demand(1.0, rows, missing, (tokens - rows) * 23_040, rows * tokens / 2))
    return found


def true_ms(demand: Demand, rates: Rates = TRUE) -> float:
    return float(rates.array() @ demand.array())


def errors(model: CostModel, some: list[Demand], rates: Rates = TRUE) -> list[float]:
    return [abs(model.ms(each) / true_ms(each, rates) - 1) for each in some]


def test_before_any_pass_an_estimate_is_the_roofline() -> None:
    rows = Demand(passes=1.0, rows=100.0)
    assert CostModel(FIRST).ms(rows) == pytest.approx(2.0 + 100 * 2 * 135e6 / 50e6)
    assert math.isnan(CostModel(FIRST).stats().median_error)


def test_after_twenty_passes_of_another_machine_estimates_are_close() -> None:
    """Times have 10 % of noise, and every tenth pass is held up tenfold; held against times without either."""
    model, draw = CostModel(FIRST), np.random.default_rng(1)
    for number, demand in enumerate(passes(20)):
        held_up = 10.0 if number % 10 == 9 else 1.0
        model.observe(demand, true_ms(demand) * held_up * float(draw.lognormal(0.0, 0.1)))
    assert statistics.median(errors(model, passes(100, seed=2))) < 0.15
    assert model.stats().num_passes == 20


def test_a_machine_that_becomes_busy_is_noticed_at_once_and_forgotten_as_soon() -> None:
    model = CostModel(FIRST)
    for demand in passes(64):
        model.observe(demand, true_ms(demand))
    assert statistics.median(errors(model, passes(50, seed=3))) < 0.05
    for demand in passes(6, seed=4):
        model.observe(demand, 3 * true_ms(demand))
    tripled = Rates(*(3 * TRUE.array()))
    assert statistics.median(errors(model, passes(50, seed=3), tripled)) < 0.2
    for demand in passes(40, seed=5):
        model.observe(demand, true_ms(demand))
    assert statistics.median(errors(model, passes(50, seed=3))) < 0.15


def test_what_no_pass_has_shown_moves_with_what_they_have() -> None:
    """A machine ten times as fast is not believed to compute missing blocks slowly because none was missing so far."""
    model, fast = CostModel(FIRST), Rates(*(FIRST.array() / 10))
    for demand in passes(30):
        seen = Demand(demand.passes, demand.rows, 0.0, demand.kv_bytes, demand.pairs)
        model.observe(seen, true_ms(seen, fast))
    assert model.ms(Demand(missing=1000.0)) == pytest.approx(true_ms(Demand(missing=1000.0), fast), rel=0.1)


@given(
    ran=st.lists(st.tuples(demands, st.floats(0, 1e5)), max_size=80),
    one=demands,
    other=demands,
)
def test_estimates_are_finite_add_up_and_grow_with_what_is_asked(
    ran: list[tuple[Demand, float]], one: Demand, other: Demand
) -> None:
    model = CostModel(FIRST)
    for demand, ms in ran:
        model.observe(demand, ms)
    both = model.ms(one + other)
    assert math.isfinite(both)
    assert both == pytest.approx(model.ms(one) + model.ms(other), rel=1e-6)
    assert both >= model.ms(one) >= 0


def test_learning_takes_less_than_a_pass() -> None:
    """The figure is printed; only what no busy machine explains fails."""
    model, took = CostModel(FIRST), []
    for demand in passes(200):
        start = time.perf_counter()
        model.observe(demand, true_ms(demand))
        took.append(time.perf_counter() - start)
    print(f"median {statistics.median(took) * 1e6:.0f} µs a pass")
    assert statistics.median(took) < 0.02
