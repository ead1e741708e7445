"""Reports by hand: shares, balances, cut edges, and who gets a request when several would do."""

from __future__ import annotations

import numpy as np
import pytest

from rcllm.cluster.evaluate import edge_cut, evaluate, held_table, routed
from rcllm.cluster.statistics import collect, ragged
from tests.cluster.made import names, placement_of, statistics_of


def test_shares_by_hand() -> None:
    """Node 0 holds 0, 1 and a copy of 2; node 1 owns 2, 3."""
    placement = placement_of([0, 0, 1, 1], [[2], []], 3)
    requests = ragged([[0, 1, 2], [2, 3], [0, 3], [0, 1, 2, 3]])
    report = evaluate(placement, statistics_of([[0, 1]], [1] * 4), requests)
    assert report.best == pytest.approx((1 + 1 + 0.5 + 0.75) / 4)
    assert report.owned == pytest.approx((2 / 3 + 1 + 0.5 + 0.5) / 4)
    assert report.best_p10 == pytest.approx(np.quantile([1, 1, 0.5, 0.75], 0.1))
    assert report.num_requests == 4
    assert report.bytes_by_stratum == (
        {"replicated": 0, "sharded": 2, "halo": 1},
        {"replicated": 0, "sharded": 2, "halo": 0},
    )


def test_balances_by_hand() -> None:
    placement = placement_of([0, 0, 0, 1], [[], []], 3)
    statistics = statistics_of([[0], [3], [3], [3]], [1] * 4)
    report = evaluate(placement, statistics, ragged([[0], [3], [3], [3]]))
    assert report.balance.num_bytes == 1.5
    assert report.balance.heat == 1.5
    assert report.balance.requests == 1.5


def test_what_is_replicated_counts_for_every_node_and_for_no_owner() -> None:
    placement = placement_of([0, 0, 1], [[], []], 3, replicated=[0])
    report = evaluate(placement, statistics_of([[0, 1], [0, 2]], [1] * 3), ragged([[0, 1], [0, 2]]))
    assert report.best == report.owned == 1.0
    assert report.balance.num_bytes == 1.0


def test_edges_between_owners() -> None:
    """Pairs 0-1 (twice, within), 1-2 (once, across); 0-3 does not count, for 3 is replicated."""
    placement = placement_of([0, 0, 1, 0], [[], []], 4, replicated=[3])
    statistics = statistics_of([[0, 1], [0, 1], [1, 2], [0, 3]], [1] * 4)
    assert edge_cut(placement, statistics) == pytest.approx(1 / 3)
    assert edge_cut(placement, collect(ragged([]), names(4), [1] * 4)) == 0.0


def test_equal_nodes_take_turns() -> None:
    scores = np.array([[1.0, 1.0, 0.0]] * 4 + [[0.0, 0.0, 2.0]], np.float32)
    assert routed(scores).tolist() == [0, 1, 0, 1, 2]


def test_minding_the_load_costs_locality_and_buys_balance() -> None:
    """Everybody wants node 0, which holds one item more of each request than node 1."""
    placement = placement_of([0, 0, 1], [[2], [0]], 3)
    asked = ragged([[0, 1, 2]] * 50)
    report = evaluate(placement, collect(asked, names(3), [1] * 3), asked)
    assert (report.best, report.balance.requests) == (1.0, 2.0)
    assert report.spread < report.best or report.balance.spread == 2.0


def test_a_table_without_halos() -> None:
    placement = placement_of([0, 1], [[1], []], 2)
    assert held_table(placement).tolist() == [[1, 0], [1, 1]]
    assert held_table(placement, halos=False).tolist() == [[1, 0], [0, 1]]
