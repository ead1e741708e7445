"""The cluster under a virtual clock: cases computed by hand, and what holds whatever happens."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcllm.sim.cluster import Simulation
from rcllm.sim.node import PassRecord
from rcllm.sim.options import Workload
from rcllm.sim.outcome import Outcome, summarise
from rcllm.sim.spec import Failure
from rcllm.sim.workload import ItemUpdate, generate, updates
from tests.sim.small import FRESH, ITEM, KV_BYTES, PASS_S, placed, prefer, request, shortest_queue, spec

MISS_S = PASS_S + 0.01 * ITEM  # of a request with one item to build


def ttft(outcome: Outcome) -> dict[int, float]:
    return {each.number: pytest.approx(each.ttft_s) for each in outcome.answers}


# ---- by hand --------------------------------------------------------------------------------------------------------


def test_one_server_and_two_requests() -> None:
    """The second comes 0.5 s after the first and waits for it: 1.1 − 0.5 s, and its own pass."""
    outcome = Simulation(spec(), placed([0]), prefer(0)).run([request(0, 0.0), request(1, 0.5)])
    assert ttft(outcome) == {0: PASS_S, 1: PASS_S - 0.5 + PASS_S}
    assert outcome.answers[1].queue_s == pytest.approx(PASS_S - 0.5)
    assert outcome.busy_s == [pytest.approx(2 * PASS_S)]


def test_requests_that_come_at_one_moment_share_a_pass_where_it_has_room() -> None:
    asked = [request(0, 1.0), request(1, 1.0)]
    apart = Simulation(spec(), placed([0]), prefer(0)).run(asked)
    together = Simulation(spec(pass_rows=2 * FRESH), placed([0]), prefer(0)).run(asked)
    assert ttft(apart) == {0: PASS_S, 1: 2 * PASS_S}
    assert ttft(together) == {0: 1.0 + 0.02 * FRESH, 1: 1.0 + 0.02 * FRESH}


@pytest.mark.parametrize(("fetch_s", "expected", "fetched"), [(0.2, 0.2 + PASS_S, 1), (1.5, MISS_S, 0)])
def test_a_miss_is_fetched_or_computed_whichever_is_sooner(fetch_s: float, expected: float, fetched: int) -> None:
    """Computing an item takes 1 s more. Node 0 is asked, node 1 holds the item."""
    outcome = Simulation(spec(2, fetch_s=fetch_s), placed([], [0]), prefer(0, 1)).run([request(0, 0.0)])
    answer = outcome.answers[0]
    assert (answer.ttft_s, answer.num_fetched, answer.num_hits) == (pytest.approx(expected), fetched, 0)
    assert (answer.num_built, answer.num_reachable) == (0 if fetched else ITEM, 1)


def test_nothing_is_fetched_where_nobody_has_it_or_fetching_is_off() -> None:
    nowhere = Simulation(spec(2), placed([], []), prefer(0)).run([request(0, 0.0)])
    off = Simulation(spec(2, fetches=False), placed([], [0]), prefer(0)).run([request(0, 0.0)])
    assert ttft(nowhere) == ttft(off) == {0: MISS_S}


def test_nodes_of_one_machine_slow_each_other_down_while_both_compute() -> None:
    """Alone until 0.5 s; then both at a pace of 1.5, until the first has done its other 0.6 s at 1.4 s.

    By then the second has done 0.6 of its 1.1 s, and does the rest alone.
    """
    asked = [request(0, 0.0), request(1, 0.5)]
    crowded = spec(2, per_machine=2, crowding=0.5)
    outcome = Simulation(crowded, placed([0], [0]), shortest_queue).run(asked)
    assert ttft(outcome) == {0: 1.4, 1: 1.9 - 0.5}
    assert outcome.busy_s == [pytest.approx(1.4), pytest.approx(1.4)]
    apart = Simulation(spec(2, crowding=0.5), placed([0], [0]), shortest_queue).run(asked)
    assert ttft(apart) == {0: PASS_S, 1: PASS_S}


def test_what_comes_in_is_slowed_down_by_a_pass_as_well() -> None:
    """Of its 0.3 s, the second does 0.2 / 1.5 beside the pass of the first, which ends at 1.4 s, and then the rest."""
    crowded = spec(2, ingress_s=0.3, crowding=0.5, per_machine=2)
    outcome = Simulation(crowded, placed([0], [0]), prefer(0)).run([request(0, 0.0), request(1, 1.2)])
    assert ttft(outcome) == {0: 0.3 + PASS_S, 1: 0.2 + (0.3 - 0.2 / 1.5) + PASS_S}


def test_tasks_that_outnumber_the_cores_of_a_machine_share_them() -> None:
    """Both passes run from 0.3 s, each on a core; from 0.5 s what comes in for 0.3 s is a third task on two cores.

    Each then takes 1.5 times as long, until that is in at 0.95 s. The passes then have done 0.5 s of 1.1.
    """
    shared = spec(2, ingress_s=0.3, cores=2, per_machine=2)
    asked = [request(0, 0.0), request(1, 0.0), request(2, 0.5)]
    outcome = Simulation(shared, placed([0], [0]), shortest_queue).run(asked)
    assert ttft(outcome)[0] == ttft(outcome)[1] == pytest.approx(0.3 + 0.2 + 0.45 + (PASS_S - 0.2 - 0.3))


def test_an_answer_takes_its_time_to_be_told() -> None:
    asked = [request(0, 0.0), request(1, 0.0)]
    outcome = Simulation(spec(egress_s=0.4), placed([0]), prefer(0)).run(asked)
    assert ttft(outcome) == {0: PASS_S + 0.4, 1: 2 * PASS_S + 0.4}


def test_the_way_in_takes_its_time_and_nobodys_turn() -> None:
    """The second waits less for the first, for it is on its way meanwhile."""
    outcome = Simulation(spec(ingress_s=0.3), placed([0]), prefer(0)).run([request(0, 0.0), request(1, 0.5)])
    assert ttft(outcome) == {0: 0.3 + PASS_S, 1: 0.3 + 2 * PASS_S - 0.5}


def test_what_is_warm_is_there_before_the_first_request() -> None:
    simulation = Simulation(spec(), placed([]), prefer(0))
    simulation.warm(0, 0, ITEM)
    outcome = simulation.run([request(0, 0.0)])
    assert ttft(outcome) == {0: PASS_S}
    assert outcome.answers[0].num_hits == 1


def test_a_run_ends_when_enough_is_known() -> None:
    asked = [request(number, 0.0) for number in range(3)]
    simulation = Simulation(spec(), placed([0]), prefer(0), is_enough=lambda answered: answered.number == 1)
    outcome = simulation.run(asked)
    assert [each.number for each in outcome.answers] == [0, 1]
    assert outcome.num_unanswered == 1


def test_what_was_built_or_fetched_is_kept() -> None:
    asked = [request(0, 0.0), request(1, 10.0)]
    for fetch_s in (0.2, 1.5):
        simulation = Simulation(spec(2, fetch_s=fetch_s), placed([], [0]), prefer(0))
        outcome = simulation.run(asked)
        assert outcome.answers[1].ttft_s == pytest.approx(PASS_S)
        assert simulation.holdings.held(0).nodes == (0, 1)
    forgetful = Simulation(spec(cache_bytes=0), placed([]), prefer(0)).run(asked)
    assert forgetful.answers[1].ttft_s == pytest.approx(MISS_S)


def test_the_link_is_used_by_one_fetch_after_the_other() -> None:
    """Two requests with an item each: the second fetch ends at 0.4 s, when the first pass (0.2 … 1.3) runs."""
    asked = [request(0, 0.0, [0]), request(1, 0.0, [1])]
    outcome = Simulation(spec(2), placed([], [0, 1]), prefer(0)).run(asked)
    assert ttft(outcome) == {0: 0.2 + PASS_S, 1: 0.2 + 2 * PASS_S}
    assert outcome.answers[1].queue_s == pytest.approx(0.2 + PASS_S), "waiting for blocks is waiting"


def test_the_cache_evicts_within_its_budget() -> None:
    small = spec(cache_bytes=ITEM * KV_BYTES)
    simulation = Simulation(small, placed([]), prefer(0))
    outcome = simulation.run([request(n, 10.0 * n, [item]) for n, item in enumerate((1, 2, 1))])
    assert [each.ttft_s for each in outcome.answers] == pytest.approx([MISS_S] * 3)
    assert outcome.evictions == 2
    simulation.nodes[0].cache.check()
    assert simulation.holdings.held(2).nodes == ()


def test_a_failed_node_gives_its_requests_to_another() -> None:
    """Node 0 dies at 0.5 s with one request in its pass and one in its queue; node 1 begins both anew."""
    asked = [request(0, 0.0), request(1, 0.2)]
    simulation = Simulation(spec(2), placed([0], [0]), prefer(0, 1), failures=[Failure(0, 0.5)])
    outcome = simulation.run(asked)
    assert ttft(outcome) == {0: 0.5 + PASS_S, 1: 0.5 + 2 * PASS_S - 0.2}
    assert [(each.node, each.retries) for each in outcome.answers] == [(1, 1), (1, 1)]
    assert outcome.busy_s == [pytest.approx(0.5), pytest.approx(2 * PASS_S)]


def test_a_node_that_comes_back_has_lost_its_cache_and_reads_its_shard() -> None:
    holdings = placed([0], [])
    holdings = replace(holdings, by_node={0: {"sharded": 4_000_000_000}})  # two seconds of reading
    asked = [request(number, 10.0 * number) for number in range(4)]  # fails at 5, is back at 19, has its shard at 21
    simulation = Simulation(
        spec(2, cache_bytes=0, fetches=False), holdings, prefer(0), failures=[Failure(0, 5.0, back_s=19.0)]
    )
    outcome = simulation.run(asked)
    found = [each.ttft_s for each in sorted(outcome.answers, key=lambda each: each.number)]
    waited = 19.0 - 10.0 + MISS_S
    assert found == pytest.approx([PASS_S, waited, waited - 10.0 + MISS_S, PASS_S])


def test_without_any_node_requests_wait_or_stay_unanswered() -> None:
    asked = [request(0, 1.0), request(1, 2.0)]
    for back_s, answered in ((5.0, 2), (float("inf"), 0)):
        simulation = Simulation(spec(), placed([0]), prefer(0), failures=[Failure(0, 0.5, back_s)])
        outcome = simulation.run(asked)
        assert (len(outcome.answers), outcome.num_unanswered) == (answered, 2 - answered)


def test_an_updated_item_is_a_miss_until_its_owner_has_built_it() -> None:
    """The text changes at 1 s; the owner builds 100 tokens in 2 s; who comes at 1.5 s waits for that, and has it."""
    asked = [request(0, 1.5), request(1, 10.0)]
    simulation = Simulation(
        spec(cache_bytes=0), placed([0]), prefer(0), updates=iter([ItemUpdate(1.0, 0, ITEM), ItemUpdate(99.0, 0, 1)])
    )
    outcome = simulation.run(asked)
    assert outcome.num_updates == 1, "none after the last request"
    assert [each.num_hits for each in outcome.answers] == [0, 1]
    assert outcome.answers[0].ttft_s == pytest.approx(3.0 - 1.5 + MISS_S)
    assert outcome.answers[1].ttft_s == pytest.approx(PASS_S)


def test_a_history_that_the_request_before_left_is_read() -> None:
    """Two requests of one user at one moment, of 50 tokens of history: the first computes it, the second waits."""
    cluster = spec(cache_bytes=1000 * KV_BYTES)
    cluster = replace(cluster, reuse=replace(cluster.reuse, semantic_history=False))
    asked = [replace(each, tokens=replace(each.tokens, history=50)) for each in (request(0, 0.0), request(1, 0.0))]
    outcome = Simulation(cluster, placed([0]), prefer(0)).run(asked)
    assert ttft(outcome) == {0: PASS_S + 0.5, 1: PASS_S + 0.5 + PASS_S}


def test_a_slow_node_is_slow() -> None:
    outcome = Simulation(spec(slow=((0, 3.0),)), placed([0]), prefer(0)).run([request(0, 0.0)])
    assert ttft(outcome) == {0: 3 * PASS_S}


def test_a_router_that_hears_of_queues_late_sends_all_to_one_node() -> None:
    asked = [request(number, 0.01 * number) for number in range(6)]
    nodes = [
        Counter(
            each.node for each in Simulation(spec(2, view_s=view), placed([0], [0]), shortest_queue).run(asked).answers
        )
        for view in (0.0, 100.0)
    ]
    assert nodes == [{0: 3, 1: 3}, {0: 6}]


def test_a_pass_is_told_as_it_runs() -> None:
    passes: list[PassRecord] = []
    Simulation(spec(), placed([0]), prefer(0), on_pass=passes.append).run([request(0, 2.0)])
    assert [(each.node, each.start_s, each.end_s, each.num_requests) for each in passes] == [
        (0, 2.0, pytest.approx(2.0 + PASS_S), 1)
    ]


# ---- whatever happens -----------------------------------------------------------------------------------------------

WORKLOAD = Workload(items=60, topics=6, candidates=4, item_tokens=ITEM, item_spread=0.3, history_tokens=50, users=10)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    qps=st.sampled_from([0.2, 1.0, 5.0]),
    level=st.sampled_from(["full", "exact", "corrected(0.3, 0.3)", "linked(4)", "blocks"]),
    semantic=st.booleans(),
    cache_items=st.sampled_from([0, 3, 1000]),
    pass_rows=st.sampled_from([1, 500]),
    churn=st.sampled_from([0.0, 0.5]),
    failures=st.lists(
        st.builds(Failure, st.integers(0, 2), st.floats(0, 50), st.floats(50, 90) | st.just(float("inf"))), max_size=4
    ),
)
def test_work_is_conserved_and_everybody_is_answered_once(
    seed: int,
    qps: float,
    level: str,
    semantic: bool,
    cache_items: int,
    pass_rows: int,
    churn: float,
    failures: list[Failure],
) -> None:
    workload = replace(WORKLOAD, qps=qps, updates=churn)
    cluster = spec(3, level=level, cache_bytes=cache_items * ITEM * KV_BYTES, pass_rows=pass_rows)
    cluster = replace(cluster, reuse=replace(cluster.reuse, semantic_history=semantic))
    passes: list[PassRecord] = []

    def run() -> tuple[Simulation, Outcome]:
        passes.clear()
        changes = islice(updates(workload, seed), 100)
        holdings = placed(range(30), range(20, 50), [])
        simulation = Simulation(
            cluster, holdings, shortest_queue, failures=failures, updates=changes, on_pass=passes.append
        )
        return simulation, simulation.run(generate(workload, 40, seed))

    simulation, outcome = run()
    numbers = [each.number for each in outcome.answers]
    assert len(numbers) == len(set(numbers)), "answered twice"
    assert len(numbers) + outcome.num_unanswered == 40, "lost"
    lasting = [failure for failure in failures if failure.back_s == float("inf")]
    if len({failure.node for failure in lasting}) < 3:
        assert outcome.num_unanswered == 0
    for node in simulation.nodes:
        node.scheduler.check()
        node.cache.check()
        assert not any(job.request for job in node.jobs.values())
        own = sorted((each.start_s, each.end_s) for each in passes if each.node == node.number)
        if not failures:
            assert outcome.busy_s[node.number] == pytest.approx(sum(end - start for start, end in own))
            assert all(end <= start + 1e-9 for (_, end), (start, _) in pairwise(own)), "overlap"
    for key in range(60):
        cached = tuple(n.number for n in simulation.nodes if key.to_bytes(9, "big", signed=True) in n.cache)
        assert simulation.holdings.copies_of(key) == cached
    for each in outcome.answers:
        assert each.answered_s >= each.arrival_s + 1.0
        assert 0 <= each.num_hits <= each.num_reachable <= each.num_items or failures or churn
        assert each.num_fresh <= each.num_tokens
    again = run()[1]
    assert again.answers == outcome.answers, "one seed, one history"


def test_summary_by_hand() -> None:
    outcome = Simulation(spec(2), placed([0], [1]), prefer(0)).run([request(0, 0.0, [0, 1]), request(1, 50.0, [0, 7])])
    found = summarise(outcome)
    assert (found.num_requests, found.hit_rate, found.fetched, found.reachable) == (2, 0.5, 0.25, 0.5)
    assert found.computed_share == pytest.approx((FRESH + FRESH + ITEM) / (2 * (FRESH + 2 * ITEM)))
    assert found.ttft_p50_ms == pytest.approx((0.2 + PASS_S + MISS_S) / 2 * 1e3)
    assert summarise(outcome, after_s=1.0).num_requests == 1
    assert 0 < found.utilisation < found.busiest
