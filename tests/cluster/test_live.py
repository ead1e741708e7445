"""The view of a running cluster: that of a simulation, made of reports and of what was sent since."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcllm.cluster.live import LiveCluster, NodeReport, dealt, packed, unpacked
from rcllm.cluster.placement import PlacedHoldings
from rcllm.cluster.route import make_route
from rcllm.cluster.view import ClusterView, NodeState, RoutedBlock, RoutedRequest
from rcllm.core.ranking import ItemId
from rcllm.errors import CapacityError
from tests.cluster.made import names

IDS = names(20)
BLOCK = 100


def request(*items: int, number: int = 0, rows: int = 0) -> RoutedRequest:
    return RoutedRequest(number, tuple(RoutedBlock(IDS[i], BLOCK, 10) for i in items), rows=rows)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def cluster(num_nodes: int = 3, route: str = "hit_only") -> tuple[LiveCluster, Clock]:
    clock = Clock()
    return LiveCluster(dealt(IDS, num_nodes), make_route(route), 1.0, clock), clock


def report(node: int, number: int, held: set[int] | None = None, life: str = "first", **more: float) -> NodeReport:
    return NodeReport(node, life, number, holds=None if held is None else packed(held, len(IDS)), **more)


@given(st.sets(st.integers(0, 19)))
def test_what_is_packed_is_unpacked(held: set[int]) -> None:
    assert set(np.flatnonzero(unpacked(packed(held, 20), 20)).tolist()) == held


def test_every_item_is_dealt_to_one_node() -> None:
    placement = dealt(IDS, 3)
    placement.check()
    assert sorted(i for node in range(3) for i in placement.owned(node).tolist()) == list(range(20))
    dealt((), 2).check()


def test_before_reports_the_view_is_that_of_the_placement() -> None:
    live, _ = cluster()
    living = {0: {}, 1: {}, 2: {}}
    placed = PlacedHoldings.of(dealt(IDS, 3))
    view = ClusterView.of([NodeState(f"node {n}") for n in range(3)], placed)
    for item in range(20):
        assert live.holdings.held(IDS[item]) == placed.held(IDS[item])
        decision = make_route("hit_only")(view, request(item))
        assert live.choose(living, request(item))[0] == decision.node


def test_a_report_replaces_what_was_thought() -> None:
    live, _ = cluster()
    live.heard(report(1, 1, {3, 4}, tokens_per_s=7.0))
    held = {item for item in range(20) if 1 in live.holdings.held(IDS[item]).nodes}
    assert held == {3, 4}
    assert live.view().tokens_per_s.tolist()[1] == 7.0
    live.heard(report(1, 0, set()))
    assert 1 in live.holdings.held(IDS[3]).nodes, "an older report says nothing"


def test_what_a_node_holds_comes_later_than_what_its_answers_say() -> None:
    live, _ = cluster()
    live.heard(report(1, 9, tokens_per_s=7.0))
    live.heard(report(1, 5, {3}, tokens_per_s=1.0))
    assert 1 in live.holdings.held(IDS[3]).nodes
    assert live.view().tokens_per_s.tolist()[1] == 7.0


def test_who_comes_back_holds_nothing_of_before() -> None:
    live, _ = cluster()
    live.heard(report(1, 9, {3}))
    live.heard(report(1, 1, life="second"))
    assert 1 not in live.holdings.held(IDS[3]).nodes


def test_a_node_that_is_gone_is_never_chosen_and_holds_nothing() -> None:
    live, _ = cluster()
    for node in range(3):
        live.heard(report(node, 1, {0, 1, 2} if node == 1 else set()))
    assert live.choose({0: {}, 1: {}, 2: {}}, request(0, 1, 2))[0] == 1
    assert 1 not in live.choose({0: {}, 2: {}}, request(0, 1, 2))
    assert live.up == (0, 2)
    assert not live.holdings.held(IDS[0]).nodes
    with pytest.raises(CapacityError):
        live.choose({}, request(0))


def test_a_node_that_nobody_knew_of_is_taken_in() -> None:
    live, _ = cluster(2)
    live.choose({0: {}, 1: {}, 5: {}}, request(0))
    assert live.num_nodes == 6
    assert live.up == (0, 1, 5)


def test_the_queue_grows_with_what_is_sent_and_drains_with_time() -> None:
    live, clock = cluster(2, "load_only")
    living = {0: {}, 1: {}}
    live.heard(report(0, 1, set(), tokens_per_s=100.0))
    live.choose(living, request(0))
    asked = request(rows=50)  # half a second
    live.sent(0, 1, asked)
    live.sent(0, 2, asked)
    assert live.view().queue_s[0] == pytest.approx(1.0)
    assert live.choose(living, request(0))[0] == 1
    clock.now += 0.3
    assert live.view().queue_s[0] == pytest.approx(0.7)
    clock.now += 5.0
    assert live.view().queue_s[0] == pytest.approx(0.5), "one of two runs, however long; the other waits"
    live.ended(0, 1, asked)
    live.ended(0, 2, None)
    assert live.view().queue_s[0] == 0.0


def test_nodes_of_one_kind_count_as_equally_quick() -> None:
    """Idle nodes that hold what is asked for take turns, although one measured a fifth more; a straggler gets none."""
    live, _ = cluster(route="ttft")
    for node, rate in enumerate((834.0, 699.0, 300.0)):
        live.heard(report(node, 1, {0}, tokens_per_s=rate, read_bytes_per_s=rate * 1e9))
    assert [live.choose({0, 1, 2}, request(0, number=number, rows=64))[0] for number in range(6)] == [0, 1, 0, 0, 1, 0]
    assert live.view().tokens_per_s.tolist() == [699.0, 699.0, 300.0]


def test_a_reported_queue_counts_until_it_is_over() -> None:
    live, clock = cluster(2)
    live.heard(report(0, 1, queue_s=2.0))
    assert live.view().queue_s.tolist() == [2.0, 0.0]
    assert live.view().load.tolist() == [1.0, 0.0]
    clock.now += 1.5
    assert live.view().queue_s[0] == pytest.approx(0.5)


def test_what_was_answered_is_held_and_what_changed_is_not() -> None:
    live, _ = cluster(2)
    for node in (0, 1):
        live.heard(report(node, 1, set()))
    asked = RoutedRequest(0, (RoutedBlock(IDS[4], BLOCK, 10),), (RoutedBlock(("user", "ann"), BLOCK, 10),))
    live.sent(1, 1, asked)
    live.ended(1, 1, asked)
    assert live.holdings.held(IDS[4]).nodes == (1,)
    assert live.holdings.held(("user", "ann")).nodes == (1,)
    assert live.holdings.held(ItemId("nobody knows it")).nodes == ()
    live.choose({0: {}, 1: {}}, asked)
    assert live.holders(asked) == (1,)
    live.outdate([IDS[4], ("user", "ann")])
    assert live.holders(asked) == ()


@given(
    st.lists(
        st.tuples(st.sampled_from(["sent", "ended", "heard", "lost", "gone"]), st.integers(0, 2), st.integers(0, 5)),
        max_size=30,
    )
)
def test_no_order_of_events_breaks_the_view(events: list[tuple[str, int, int]]) -> None:
    live, clock = cluster()
    for what, node, number in events:
        clock.now += 0.1
        match what:
            case "sent":
                live.sent(node, number, request(number, rows=number))
            case "ended":
                live.ended(node, number, request(number))
            case "heard":
                live.heard(report(node, number, {number}, life=str(number % 2)))
            case "lost":
                live.lost(node)
            case "gone":
                live.choose({n: {} for n in range(3) if n != node}, request(number))
        view = live.view()
        assert (view.queue_s >= 0).all()
        assert ((view.load >= 0) & (view.load <= 1)).all()
