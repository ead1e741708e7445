"""RcLLM's evaluation as the benchmark sets it up: the stated shapes, the solved hit rates, the shape of Fig. 8."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks.simulate_setup import SHAPES, SWEEPS, Assumptions, Bench
from rcllm.sim.workload import generate


@pytest.mark.parametrize("name", SHAPES)
def test_prompts_have_the_stated_lengths(name: str) -> None:
    tokens = [each.tokens for each in generate(Bench(SHAPES[name]).workload, 4000, 0)]
    totals = np.array([each.total for each in tokens])
    assert 2200 <= np.median(totals) <= 3000
    assert 3500 <= np.percentile(totals, 90) <= 4900
    assert 0.66 <= sum(sum(each.items) for each in tokens) / totals.sum() <= 0.82
    assert 0.11 <= sum(each.history for each in tokens) / totals.sum() <= 0.26


@pytest.mark.parametrize("name", SHAPES)
def test_hit_rates_are_those_that_locality_was_solved_for(name: str) -> None:
    for nodes, share in SHAPES[name].hits:
        found = Bench(SHAPES[name], nodes=nodes, requests=3000).rcllm("hit_only").summary.hit_rate
        assert found == pytest.approx(share, abs=0.02)


def test_every_sweep_changes_an_assumption() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(Assumptions)}
    assert set(SWEEPS) <= set(fields)
    assert not [name for name, values in SWEEPS.items() if fields[name] in values]
    assert set(fields) - set(SWEEPS) == {"alpha"}, "beta is the weight that counts: their ratio decides"


def test_the_shape_of_fig_8() -> None:
    """One node queues and gains most; from 20 nodes on the gain hardly changes."""
    gains = {}
    for nodes in (1, 20, 100):
        bench = Bench(SHAPES["amazon"], nodes=nodes, requests=2500)
        cached, reused = bench.prefix_cache().summary, bench.rcllm().summary
        gains[nodes] = max(
            getattr(cached, f"ttft_{name}_ms") / getattr(reused, f"ttft_{name}_ms") for name in ("p50", "p90", "p99")
        )
    assert gains[1] > 1.3 * gains[20]
    assert gains[20] == pytest.approx(gains[100], rel=0.06)
    assert gains[1] == pytest.approx(3.02, rel=0.2)
