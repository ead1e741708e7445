"""Plans: bytes by hand, the fewest nodes that meet the target, and reasons where none do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rcllm.core.requests import Level
from rcllm.errors import ConfigError
from rcllm.sim.options import PlanOptions
from rcllm.sim.plan import Plan, expected_hit_rate, memory, node_hours_per_million, plan, variants

ASKED = PlanOptions(items=200_000, qps=60.0, slo_ms=150.0, semantic_history=True, requests=600)
PER_TOKEN = 147_456  # Qwen3-8B in 16 bits


@pytest.fixture(scope="module")
def found() -> Plan:
    return plan(ASKED)


def test_memory_by_hand() -> None:
    """A million items of 100 tokens are 14.7 TB in 16 bits; on 20 nodes with room, each once and the rest hot."""
    options = PlanOptions(items=1_000_000, qps=1.0, slo_ms=1e3, memory_gb=1000.0, semantic_history=True)
    found = memory(options, 20, "bf16")
    assert found.instruction == 207 * PER_TOKEN
    assert found.prototypes == 100_000 * PER_TOKEN
    assert found.total == pytest.approx(1e12, rel=1e-3)
    assert found.evicted_share == 0.0
    assert found.hot + 20 * found.shard == pytest.approx(1_000_000 * 100 * PER_TOKEN, rel=1e-4)


def test_what_does_not_fit_is_told() -> None:
    options = PlanOptions(items=1_000_000, qps=1.0, slo_ms=1e3, memory_gb=500.0, history_gb=0.0)
    found = memory(options, 10, "bf16")
    catalogue = 1_000_000 * 100 * PER_TOKEN
    room = 500e9 - 207 * PER_TOKEN
    hot = 1000 * 100 * PER_TOKEN
    assert found.evicted_share == pytest.approx(1 - (hot + 10 * (room - hot)) / catalogue, abs=1e-4)
    assert memory(options, 10, "int8").evicted_share < found.evicted_share < memory(options, 10, "fp32").evicted_share


def test_a_dtype_of_half_the_bytes_takes_half() -> None:
    """int8 has a scale of 2 bytes for 16 values beside them."""
    options = PlanOptions(items=10_000, qps=1.0, slo_ms=1e3, memory_gb=1e6, semantic_history=True)
    sizes = {name: memory(options, 4, name).total for name in ("fp32", "fp16", "bf16", "int8")}
    assert sizes["fp32"] == pytest.approx(2 * sizes["bf16"])
    assert sizes["int8"] == pytest.approx(sizes["bf16"] * (16 + 2) / 32)
    assert sizes["fp16"] == sizes["bf16"]


def test_without_a_need_to_divide_every_node_holds_all() -> None:
    options = replace(ASKED, items=1000, topics=1000)
    assert expected_hit_rate(options, 1) == pytest.approx(1.0)
    assert expected_hit_rate(options, 8) == pytest.approx(1.0)


def test_hours_by_hand() -> None:
    assert node_hours_per_million(36, 1000.0) == 10.0


def test_the_plan_is_the_fewest_nodes_that_meet_the_target(found: Plan) -> None:
    assert found.nodes is not None
    assert found.best is not None
    assert found.best.at_percentile_ms <= ASKED.slo_ms
    assert [trial.nodes for trial in found.trials] == sorted({trial.nodes for trial in found.trials})
    assert all(not trial.meets for trial in found.trials if trial.nodes < found.nodes)
    assert max((trial.nodes for trial in found.trials if trial.nodes < found.nodes), default=0) >= found.nodes - 2
    assert found.ttft is not None
    assert len(found.ttft) == 540
    assert found.floor_ms < found.best.summary.ttft_p50_ms


def test_the_same_plan_from_a_guess_in_fewer_trials(found: Plan) -> None:
    assert found.nodes is not None
    near = plan(ASKED, near=found.nodes)
    assert near.nodes == found.nodes
    assert len(near.trials) <= len(found.trials)
    far = plan(ASKED, near=4 * found.nodes)
    assert far.nodes is not None
    assert found.nodes <= far.nodes <= found.nodes + max(1, found.nodes // 50)


def test_what_is_overloaded_is_not_simulated_to_its_end() -> None:
    """As little as one request more than may be late has waited too long, and the rest is left."""
    found = plan(replace(ASKED, qps=400.0, max_nodes=2))
    assert found.trials
    for trial in found.trials:
        assert trial.overloaded
        assert not trial.meets
        assert trial.summary.num_requests < 540 // 2
        assert trial.at_percentile_ms > ASKED.slo_ms


def test_the_cost_is_told_where_there_is_a_price(found: Plan) -> None:
    assert found.cost_per_million is None
    assert found.nodes is not None
    priced = replace(found, options=replace(ASKED, price_per_hour=3.0))
    assert priced.cost_per_million == pytest.approx(found.nodes * 1e6 / 60 / 3600 * 3.0)


def test_more_load_takes_no_fewer_nodes(found: Plan) -> None:
    changed = variants(ASKED)
    assert {(each.items, each.qps) for each in changed.values()} == {
        (100_000, 60.0),
        (400_000, 60.0),
        (200_000, 30.0),
        (200_000, 120.0),
    }
    double = plan(changed["double the load"])
    assert (found.nodes or 0) <= (double.nodes or 0)


def test_a_target_below_one_pass_is_told_at_once() -> None:
    found = plan(replace(ASKED, slo_ms=20.0))
    assert (found.nodes, found.trials, found.node_hours_per_million) == (None, (), None)
    assert "alone on a node takes 2" in found.why
    full = plan(replace(ASKED, level=Level("full")))
    assert "alone on a node takes" in full.why


def test_where_more_nodes_do_not_help_the_reason_is_told() -> None:
    tight = replace(ASKED, memory_gb=40.0, prototypes=0, slo_ms=60.0)
    found = plan(tight)
    assert found.nodes is None
    assert "more memory per node helps" in found.why


def test_no_more_than_max_nodes_are_tried() -> None:
    found = plan(replace(ASKED, max_nodes=2, qps=400.0))
    assert found.nodes is None
    assert max(trial.nodes for trial in found.trials) == 2
    assert "--max-nodes" in found.why


def test_strata_that_fill_a_node_are_refused() -> None:
    with pytest.raises(ConfigError, match="--memory-gb 10 is taken by"):
        plan(replace(ASKED, memory_gb=10.0))
