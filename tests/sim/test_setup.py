"""Options come together as they say, and what they mean is seen in the figures."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from rcllm.core.requests import ItemId, Level, RankRequest, UserId
from rcllm.errors import ConfigError, DataError
from rcllm.sim.options import PlacedBy, RunOptions, System, Workload
from rcllm.sim.outcome import Summary
from rcllm.sim.setup import failures_of, resolve, simulate, slow_of

SMALL = Workload(items=3000, topics=300, spread=0.001, qps=8.0, users=5000)
FEW = System(nodes=4, semantic_history=True, cache_gb=0.0, route="affinity")
RUN = RunOptions(requests=600)


def summary(workload: Workload = SMALL, run: RunOptions = RUN, **changed: object) -> Summary:
    return simulate(workload, replace(FEW, **changed), run).summary  # type: ignore[arg-type]


def test_equal_options_give_equal_figures() -> None:
    assert summary() == summary()
    assert summary(run=replace(RUN, seed=1)) != summary()


def test_levels_that_reuse_more_are_faster() -> None:
    levels = ("full", "exact", "corrected(0.3, 0.3)", "linked(16)", "blocks")
    found = [summary(level=Level.parse(level)).ttft_p50_ms for level in levels]
    assert found == sorted(found, reverse=True)
    assert found[1] / found[-1] > 4


@pytest.mark.parametrize(("mask", "level"), [("causal", "exact"), ("blocks", "blocks")])
def test_auto_is_what_the_engine_makes_of_it(mask: str, level: str) -> None:
    assert str(resolve(Level("auto"), mask)) == level  # type: ignore[arg-type]
    assert summary(level=Level("auto"), mask=mask) == summary(level=Level(level))  # type: ignore[arg-type]


def test_affinity_hits_more_than_load_alone_and_placement_by_topic_more_than_by_hash() -> None:
    by_topic = summary().hit_rate
    assert by_topic > summary(placement="hash").hit_rate + 0.2
    assert by_topic > summary(route="load_only").hit_rate + 0.2


@pytest.mark.parametrize("placement", [name for name in get_args(PlacedBy) if name != "hash"])
def test_a_placement_that_was_learnt_finds_the_topics(placement: PlacedBy) -> None:
    """METIS is not told of topics, and comes near the placement that is."""
    found = summary(placement=placement, past=15_000, copies=1.5)
    hashed = summary(placement="hash", copies=1.5)
    assert found.hit_rate > hashed.hit_rate + 0.15


def test_more_memory_holds_more() -> None:
    hits = [summary(copies=copies).hit_rate for copies in (0.5, 1.0, 3.0)]
    assert hits == sorted(hits)
    assert summary(copies=5.0).hit_rate == 1.0


def test_a_cache_of_histories_serves_users_who_come_again() -> None:
    """Least time goes where the history is."""
    workload, long = replace(SMALL, session=8.0, history_tokens=1500), replace(RUN, requests=3000)
    without, kept = (
        summary(workload, long, semantic_history=False, cache_gb=size, route="ttft") for size in (0.0, 100.0)
    )
    assert kept.computed_share < 0.5 * without.computed_share
    assert kept.ttft_p50_ms < 0.5 * without.ttft_p50_ms


def test_failures_are_read_and_told() -> None:
    system = replace(FEW, fail=("1@10-20", "2@15"), slow=("3@2.5",))
    assert [(each.node, each.at_s, each.back_s) for each in failures_of(system)] == [
        (1, 10.0, 20.0),
        (2, 15.0, float("inf")),
    ]
    assert slow_of(system) == ((3, 2.5),)
    found = summary(fail=("0@10-20", "1@10", "2@10", "3@10-15"))
    assert found.num_unanswered == 0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"fail": ("4@1",)}, "there is no node 4"),
        ({"fail": ("1@9-3",)}, "would be back before it fails"),
        ({"fail": ("1",)}, "expected NODE@SECOND"),
        ({"slow": ("1@0",)}, "expected NODE@TIMES"),
        ({"gpu": "a1000"}, "unknown GPU"),
        ({"model": "qwen2.5-72b"}, "more GPUs per node"),
    ],
)
def test_what_cannot_be_is_refused(changed: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        summary(**changed)


def test_a_learnt_placement_of_a_huge_catalogue_is_refused() -> None:
    with pytest.raises(ConfigError, match="take --placement topics"):
        summary(replace(SMALL, items=10**8), placement="halo")


def test_a_huge_catalogue_costs_no_memory_of_its_own() -> None:
    found = simulate(replace(SMALL, items=10**8, topics=10_000), replace(FEW, nodes=100), replace(RUN, requests=200))
    assert found.summary.num_requests == 180


# ---- a log ----------------------------------------------------------------------------------------------------------


def log(count: int = 400) -> list[RankRequest]:
    """Two kinds of users, whose candidates have nothing in common."""
    requests = []
    for number in range(count):
        kind = number % 2
        names = tuple(ItemId(f"{'ab'[kind]}{(number * 7 + step * 3) % 40}") for step in range(5))
        requests.append(RankRequest(f"r{number}", names, user_id=UserId(f"u{number % 30}")))
    return requests


def test_a_log_is_placed_by_its_first_half_and_replayed_from_its_second() -> None:
    system = replace(FEW, nodes=2, copies=1.2)
    run = simulate(SMALL, system, replace(RUN, requests=300), log())
    hashed = simulate(SMALL, replace(system, placement="hash"), replace(RUN, requests=300), log())
    assert run.summary.hit_rate > 0.95
    assert hashed.summary.hit_rate < run.summary.hit_rate - 0.1
    assert {each.num_items for each in run.outcome.answers} == {5}


@pytest.mark.parametrize(
    ("count", "placement", "why"),
    [
        (0, None, "the request log is empty"),
        (0, "hash", "the request log is empty"),
        (1, "halo", "two requests or more"),
    ],
)
def test_a_log_that_is_too_short_is_refused(count: int, placement: PlacedBy | None, why: str) -> None:
    with pytest.raises(DataError, match=why):
        simulate(SMALL, replace(FEW, placement=placement), RUN, log(count))


def test_one_request_is_replayed_where_nothing_is_learnt() -> None:
    run = simulate(SMALL, replace(FEW, placement="hash"), RunOptions(requests=10), log(1))
    assert {each.num_items for each in run.outcome.answers} == {5}


def test_a_log_has_no_topics() -> None:
    with pytest.raises(ConfigError, match="says nothing of topics"):
        simulate(SMALL, replace(FEW, placement="topics"), RUN, log(10))
