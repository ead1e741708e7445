"""The degradation ladder: a table of cases, and that a looser deadline never gives up more."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcllm.schedule.cost import MARGIN
from rcllm.schedule.ladder import Probe, Rung, Taken, by_prior, choose

ASKED = Rung("exact", 100.0, (200.0,) * 4)  # 900 ms
CHEAPER = Rung("tail", 60.0, (60.0,) * 4)  # 300 ms
CHEAPEST = Rung("blocks", 40.0, (10.0, 20.0, 10.0, 20.0))  # 100 ms
ALL = (ASKED, CHEAPER, CHEAPEST)
PRIOR = (0.1, 0.4, 0.3, 0.2)


@pytest.mark.parametrize(
    ("rungs", "budget_ms", "prior", "expected"),
    [
        pytest.param(ALL, 900.0, (), Taken("exact"), id="in-time-as-asked"),
        pytest.param(ALL, 899.0, (), Taken("tail"), id="the-next-level"),
        pytest.param(ALL, 299.0, (), Taken("blocks"), id="the-cheapest-level"),
        pytest.param(ALL, 99.0, (), Taken("blocks", (0, 1, 2)), id="the-first-three"),
        pytest.param(ALL, 99.0, PRIOR, Taken("blocks", (1, 2, 3)), id="the-likeliest-three"),
        pytest.param(ALL, 70.0, PRIOR, Taken("blocks", (1, 2)), id="the-likeliest-two"),
        pytest.param(ALL, 69.0, PRIOR, None, id="one-is-less-than-the-least"),
        pytest.param((ASKED,), 500.0, (), Taken("exact", (0, 1)), id="no-level-is-calibrated"),
        pytest.param((CHEAPEST, ASKED), 99.0, (), Taken("blocks", (0, 1, 2)), id="asked-is-cheapest"),
        pytest.param((Rung("text", 50.0, ()),), 49.0, (), None, id="nothing-to-give-up"),
        pytest.param((), 1e9, (), None, id="no-way-at-all"),
    ],
)
def test_the_rung_that_is_taken(
    rungs: tuple[Rung[str], ...], budget_ms: float, prior: tuple[float, ...], expected: Taken[str] | None
) -> None:
    assert choose(rungs, MARGIN * budget_ms, prior, min_candidates=2) == expected


def test_a_short_list_may_be_ranked_whole_though_it_is_below_the_least() -> None:
    assert choose([Rung("exact", 1.0, (1.0, 1.0))], MARGIN * 3.0, (), min_candidates=10) == Taken("exact")


def test_rungs_are_made_as_they_are_asked_for() -> None:
    """Planning a prompt at another level takes a millisecond; a request that is in time pays for none."""

    def rungs() -> object:
        yield ASKED
        raise AssertionError("the second rung was made")

    assert choose(rungs(), 1e9, (), 1) == Taken("exact")  # type: ignore[arg-type]


costs = st.floats(0, 1000, allow_subnormal=False)


@given(st.data(), st.integers(1, 12), st.integers(1, 5), st.integers(1, 12))
def test_a_looser_deadline_never_gives_up_more(data: st.DataObject, count: int, levels: int, least: int) -> None:
    rungs = [
        Rung(number, data.draw(costs), tuple(data.draw(st.lists(costs, min_size=count, max_size=count))))
        for number in range(levels)
    ]
    prior = data.draw(st.just(()) | st.lists(st.floats(0, 1), min_size=count, max_size=count).map(tuple))
    budgets = sorted(data.draw(st.lists(st.floats(0, 2e4), min_size=2, max_size=6)))
    taken = [choose(rungs, budget, prior, least) for budget in budgets]
    levels_taken = [each.way for each in taken if each is not None and each.keep is None]
    assert levels_taken == sorted(levels_taken, reverse=True)
    assert [each is None for each in taken] == sorted((each is None for each in taken), reverse=True)
    kept = [each.keep for each in taken if each is not None and each.keep is not None]
    assert all(set(fewer) <= set(more) for fewer, more in pairwise(kept))
    for budget, found in zip(budgets, taken, strict=True):
        if found is not None:
            rung = rungs[found.way]
            keep = range(count) if found.keep is None else found.keep
            assert MARGIN * (rung.fixed_ms + sum(rung.candidate_ms[i] for i in keep)) <= budget + 1e-6
            assert len(keep) >= min(least, count)


def test_ties_of_the_prior_go_by_the_order_asked() -> None:
    assert by_prior((), 3) == [0, 1, 2]
    assert by_prior((0.5, 0.7, 0.5, 0.7), 4) == [1, 3, 0, 2]


def test_of_many_refusals_on_an_idle_engine_one_is_tested() -> None:
    probe, busy = Probe(every=4), Probe(every=4)
    assert [probe.passes(lambda: True, 1) for _ in range(9)] == [False] * 3 + [True] + [False] * 3 + [True, False]
    assert not any(busy.passes(lambda: False, 1) for _ in range(20))
    assert busy.passes(lambda: True, 1)
    assert Probe().passes(lambda: True, 0), "what nothing was learned from refuses nobody"
    assert not Probe().passes(lambda: False, 0)
