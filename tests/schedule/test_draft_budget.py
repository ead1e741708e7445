"""How much is drafted: in a simulated world whose costs and whose drafts' truth are known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcllm.drafts.draft import DraftTree, chain
from rcllm.schedule.draft_budget import ClaimRates, DraftBudget, Drafted, PassCosts, Trust

ROWS = (1, 2, 4, 8, 16, 32, 64)


def _cpu(rows: int) -> float:
    """Milliseconds on two cores: 64 rows cost several single steps."""
    return 25.0 + 1.5 * rows


def _gpu(rows: int) -> float:
    """On a GPU, 64 rows cost hardly more than one."""
    return 8.0 + 0.005 * rows


def _costs(curve: Callable[[int], float]) -> PassCosts:
    return PassCosts({rows: curve(rows) for rows in ROWS})


def _branch(n: int, weight: float = 0.9) -> DraftTree:
    weights = np.float32(weight) ** np.arange(1, n + 1, dtype=np.float32)
    return DraftTree(np.arange(n, dtype=np.int32), np.arange(n, dtype=np.int32), weights)


def _simulate(
    curve: Callable[[int], float], truth: float, look_ms: float, num_tokens: int = 600
) -> tuple[float, float, int]:
    """Decodes tokens one request after another, drafts of ten tokens of which each is right with `truth` given its
    parent: milliseconds with drafts, without, and the number of tokens that were verified."""
    rng, budget = np.random.default_rng(1), DraftBudget(_costs(curve))
    spent, decided, verified, trust = 0.0, 0, 0, Trust()
    while decided < num_tokens:
        if decided % 100 == 0:
            trust = Trust()
        right = int(np.argmin([*(rng.random(10) < truth), False]))  # tokens of the branch that are right
        drafted = None
        if budget.worth_looking:
            spent += look_ms
            drafted = budget.choose([_branch(10)], [trust], [99], 64)[0]
            budget.observe_look(look_ms, len(drafted.nodes))
        chosen = 0 if drafted is None else len(drafted.nodes)
        accepted = min(right, chosen)
        tokens = [*range(accepted), accepted if accepted < right else 999]
        pass_ms = curve(1 + chosen)
        spent, verified, decided = spent + pass_ms, verified + chosen, decided + len(tokens)
        if drafted is not None:
            budget.observe_tree(drafted, trust, tokens)
        budget.observe_pass(1, chosen, accepted, pass_ms)
    return spent, decided * curve(1), verified


@pytest.mark.parametrize("curve", [_cpu, _gpu])
@pytest.mark.parametrize("look_ms", [0.1, 3.0, 30.0])
def test_useless_drafts_cost_at_most_three_percent(curve: Callable[[int], float], look_ms: float) -> None:
    spent, plain, _ = _simulate(curve, truth=0.0, look_ms=look_ms, num_tokens=3000)
    first = 1.03 * plain + 10 * look_ms  # the first looks have nothing to go by
    assert spent <= first


def test_good_drafts_pay_more_where_rows_are_cheap() -> None:
    on_cpu, plain_cpu, few = _simulate(_cpu, truth=0.8, look_ms=0.2)
    on_gpu, plain_gpu, many = _simulate(_gpu, truth=0.8, look_ms=0.2)
    assert plain_cpu / on_cpu > 2.0
    assert plain_gpu / on_gpu > plain_cpu / on_cpu
    assert many > few


def test_drafts_that_get_good_are_found_again() -> None:
    budget, trust = DraftBudget(_costs(_cpu)), Trust()
    for wanted in (0.0, 1.0):
        for _ in range(300):
            drafted = budget.choose([_branch(10)], [trust], [99], 64)[0]
            right = 10 if wanted else 0
            accepted = min(right, len(drafted.nodes))
            budget.observe_tree(drafted, trust, [*range(accepted), accepted if accepted < right else 999])
        assert (len(drafted.nodes) >= 5) == bool(wanted)


def test_looking_resumes_by_its_allowance_and_stays_when_it_pays() -> None:
    budget = DraftBudget(_costs(_cpu))
    looked = 0
    for _ in range(2000):
        if budget.worth_looking:
            looked += 1
            budget.observe_look(20.0, 0)
        budget.observe_pass(1, 0, 0, 26.5)
    assert 10 <= looked <= 60  # one percent of 53 seconds is 26 looks
    for _ in range(50):
        budget.observe_look(20.0, 8)
        budget.observe_pass(1, 8, 8, _cpu(9))
    assert budget.worth_looking


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=4), st.integers(0, 20), st.data())
def test_what_is_chosen_is_a_tree_within_the_limits(sizes: list[int], max_rows: int, data: st.DataObject) -> None:
    budget = DraftBudget(_costs(_gpu))
    trees = []
    for n in sizes:
        parents = [data.draw(st.integers(0, row)) for row in range(n)]
        weights = [1.0]
        for parent in parents:
            weights.append(weights[parent] * data.draw(st.floats(0.1, 1.0)))
        trees.append(DraftTree(np.arange(n, dtype=np.int32), np.array(parents, np.int32), np.array(weights[1:], "f4")))
    depths = [data.draw(st.integers(0, 5)) for _ in sizes]
    chosen = budget.choose(trees, [Trust() for _ in sizes], depths, max_rows)
    assert sum(len(each.nodes) for each in chosen) <= max_rows
    for each, max_depth in zip(chosen, depths, strict=True):
        rows = {0, *(each.nodes + 1).tolist()}
        assert all(int(each.tree.parents[node]) in rows for node in each.nodes)
        assert all(each.tree.depths[node] <= max_depth for node in each.nodes)


def test_the_likelier_sequence_of_a_batch_gets_the_rows() -> None:
    budget = DraftBudget(_costs(_cpu))
    good, bad = budget.choose([_branch(10, 0.95), _branch(10, 0.3)], [Trust(), Trust()], [99, 99], 6)
    assert len(good.nodes) > len(bad.nodes)


def test_nothing_is_drafted_where_every_row_costs_a_pass() -> None:
    budget = DraftBudget(_costs(lambda rows: 10.0 * rows))
    assert len(budget.choose([_branch(10, 0.9)], [Trust()], [99], 64)[0].nodes) == 0


def test_costs_are_interpolated_and_corrected() -> None:
    costs = PassCosts({1: 10.0, 4: 9.0, 8: 20.0, 16: 40.0})
    assert costs.ms([1, 4, 6, 16, 20]).tolist() == [9.0, 9.0, 14.5, 40.0, 50.0]
    for _ in range(1000):
        for rows, ms in ((4, 9.0), (8, 30.0), (16, 40.0)):
            costs.observe(rows, ms)
    relative = costs.ms([8, 16]) / costs.ms(4)
    assert relative.tolist() == pytest.approx([30 / 9, 40 / 9], rel=0.05)


def test_a_busy_machine_makes_no_draft_look_cheap() -> None:
    """Only passes of one row run while the load doubles: rows are still as dear, relative to each other."""
    costs = _costs(_cpu)
    before = float(costs.ms(16) / costs.ms(1))
    for _ in range(50):
        costs.observe(1, 2 * _cpu(1))
    assert costs.ms(1) == pytest.approx(2 * _cpu(1), rel=0.01)
    assert costs.ms(16) / costs.ms(1) == pytest.approx(before, rel=0.1)
    after = float(costs.ms(1))
    costs.observe(1, 1e6)  # one stall does not count for much
    assert costs.ms(1) < 1.3 * after


def test_claims_are_calibrated_by_what_came_true() -> None:
    calibration, tree = ClaimRates(), _branch(2, 0.9)
    assert calibration.given_parent(tree).tolist() == pytest.approx([0.45, 0.45])
    for i in range(1000):
        calibration.observe(0.9, i % 4 == 0)
    assert calibration.given_parent(tree).tolist() == pytest.approx([0.25, 0.25], abs=0.05)


def test_what_was_not_verified_is_learned_from_too() -> None:
    budget, trust = DraftBudget(_costs(_cpu)), Trust()
    drafted = Drafted(chain(np.array([5, 6, 7], np.int32)), np.full(3, 0.5), np.empty(0, np.int32))
    before = budget.calibration.given_parent(drafted.tree)[0]
    for _ in range(20):
        budget.observe_tree(drafted, trust, [5])
    assert budget.calibration.given_parent(drafted.tree)[0] > before
    assert trust.factor > 1


def test_a_drafter_that_is_always_wrong_is_not_believed_in_claims_that_are_new() -> None:
    calibration = ClaimRates()
    for _ in range(60):
        calibration.observe(0.6, came_true=False)
    assert calibration.given_parent(_branch(1, 0.99))[0] < 0.1
