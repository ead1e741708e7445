"""Routing: which node answers, by hand and by slow twins; policies are pure; who is down is never chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcllm.cluster.estimate import count_held, ready_s
from rcllm.cluster.route import ROUTES, Affinity, HitOnly, LeastTime, LoadOnly, PowerOfTwo, RoundRobin, make_route
from rcllm.cluster.view import EVERYWHERE, ClusterView, FixedHoldings, Held, NodeState, RoutedBlock, RoutedRequest
from rcllm.config import RouteName
from rcllm.errors import CapacityError, ConfigError
from tests.reference import placement as slow

HELD: Mapping[object, Held] = {
    "hot": EVERYWHERE,
    "a": Held((0,)),
    "b": Held((0, 1)),
    "c": Held((1,)),
    "user": Held((2,)),
}


def asked(*keys: str, history: tuple[str, ...] = (), number: int = 0, rows: int = 0) -> RoutedRequest:
    """Blocks of 100 bytes and 10 tokens."""
    return RoutedRequest(
        number,
        tuple(RoutedBlock(key, 100, 10) for key in keys),
        tuple(RoutedBlock(key, 100, 10) for key in history),
        rows,
    )


def view(*nodes: NodeState, held: Mapping[object, Held] = HELD) -> ClusterView:
    return ClusterView.of(nodes or tuple(map(NodeState, "xyz")), FixedHoldings(held))


def slow_network(name: str, queue_s: float = 0.0, up: bool = True) -> NodeState:
    """Reads 100 bytes in 1 s, fetches them in 4 s, computes 10 tokens in 10 s."""
    return NodeState(name, queue_s, 0.0, up, read_bytes_per_s=100, fetch_bytes_per_s=25, tokens_per_s=1)


def test_what_nodes_hold_is_counted() -> None:
    request = asked("hot", "a", "b", "c", "nobody")
    assert count_held(view(), request.items).tolist() == [3, 3, 1]


def test_times_by_hand() -> None:
    """Node x reads hot, a and b, fetches c, computes what nobody has, and computes 2 rows: 1 + 1 + 1 + 4 + 10 + 2."""
    at = view(*map(slow_network, "xyz"))
    request = asked("hot", "a", "b", "c", "nobody", rows=2)
    assert ready_s(at, request).tolist() == [19, 19, 25]


def test_a_block_of_a_node_that_is_down_is_computed() -> None:
    at = view(slow_network("x", up=False), slow_network("y"), slow_network("z"))
    assert ready_s(at, asked("a"))[1] == 10


def test_a_lookup_knows_better_than_a_rate() -> None:
    at = view(*map(slow_network, "xyz"), held={"a": Held((0,), read_s=(3.0,))})
    assert ready_s(at, asked("a")).tolist() == [3, 4, 4]


@pytest.mark.parametrize("name", ["affinity", "ttft", "hit_only", "load_only"])
def test_nodes_that_nothing_tells_apart_take_turns(name: str) -> None:
    at, route = view(*map(slow_network, "xyz")), make_route(name)
    assert [route(at, asked("nobody", number=number)).node for number in range(4)] == [0, 1, 2, 0]


def test_hit_only_takes_the_most_items_whatever_the_queue() -> None:
    at = view(NodeState("x", queue_s=1e9, load=1.0), NodeState("y"), NodeState("z"))
    assert HitOnly()(at, asked("a", "b")).node == 0


def test_affinity_weighs_hits_against_load() -> None:
    """x holds all and is full, y holds half and is idle: α·1 + β·0 against α·½ + β·1."""
    at = view(NodeState("x", load=1.0), NodeState("y"), NodeState("z"))
    assert Affinity(alpha=1.0, beta=0.4)(at, asked("a", "b")).node == 0
    assert Affinity(alpha=1.0, beta=0.6)(at, asked("a", "b")).node == 1


def test_least_time_leaves_the_best_holder_when_its_queue_is_longer_than_fetching() -> None:
    """x reads two blocks in 2 s; y reads one and fetches one in 5 s."""
    near, far = (view(slow_network("x", queue), slow_network("y"), slow_network("z")) for queue in (2.9, 3.1))
    assert LeastTime()(near, asked("a", "b")).node == 0
    assert LeastTime()(far, asked("a", "b")).node == 1


def test_a_user_stays_where_the_history_is_unless_that_takes_longer() -> None:
    """The history is on z: reading takes 1 s, fetching 4."""
    for queue, node in ((2.9, 2), (3.1, 0)):
        at = view(slow_network("x"), slow_network("y"), slow_network("z", queue))
        assert LeastTime()(at, asked("hot", history=("user",))).node == node
    assert Affinity()(view(), asked("hot", history=("user",))).node == 2
    assert Affinity()(view(), asked("a", history=("user",))).node == 0, "items come first"


def test_load_only_round_robin_and_power_of_two() -> None:
    at = view(NodeState("x", 3.0, 0.9), NodeState("y", 2.0, 0.1), NodeState("z", 1.0, 0.5))
    assert LoadOnly()(at, asked("a")).node == 1
    assert [RoundRobin()(at, asked("a", number=number)).node for number in range(4)] == [0, 1, 2, 0]
    chosen = {PowerOfTwo()(at, asked("a", number=number)).node for number in range(40)}
    assert chosen == {1, 2}, "the longest queue never wins, the others win sometimes"


def test_reachable_and_achieved() -> None:
    at = view(NodeState("x", load=1.0), NodeState("y"), NodeState("z"))
    decision = LoadOnly()(at, asked("a", "b"))
    assert (decision.node, decision.achieved, decision.reachable) == (1, 0.5, 1.0)
    down = view(NodeState("x", up=False), NodeState("y"), NodeState("z"))
    assert LoadOnly()(down, asked("a", "b")).reachable == 0.5
    assert LoadOnly()(at, asked()).achieved == 1.0


def test_a_decision_is_explained() -> None:
    told = Affinity()(view(*(NodeState(f"n{number}") for number in range(8))), asked("a", "b")).explain(3)
    assert told.splitlines()[0] == "affinity chose n0, which holds 2 of 2 items; 100% could be reached, 100% are"
    assert told.splitlines()[1] == "→ n0: 2 items, affinity 1.5"
    assert told.splitlines()[2] == "  n1: 1 items, affinity 1"
    assert told.splitlines()[-1] == "  and 5 more nodes"


def test_names() -> None:
    assert set(get_args(RouteName)) == set(ROUTES)
    assert make_route("affinity", beta=2.0) == Affinity(beta=2.0)
    with pytest.raises(ConfigError, match="Did you mean 'affinity'"):
        make_route("afinity")


@pytest.mark.parametrize("name", ROUTES)
def test_nobody_is_up(name: str) -> None:
    with pytest.raises(CapacityError, match="none of 3 nodes is up"):
        make_route(name)(view(*(NodeState(each, up=False) for each in "xyz")), asked("a"))


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[NodeState], dict[object, Held], RoutedRequest]:
    num_nodes = draw(st.integers(1, 5))
    seconds, rate = st.floats(0, 10), st.sampled_from([1.0, 10.0, 100.0])
    nodes = [
        NodeState(
            str(number), draw(seconds), draw(st.floats(0, 1)), draw(st.booleans()), draw(rate), draw(rate), draw(rate)
        )
        for number in range(num_nodes)
    ]
    some = st.sets(st.integers(0, num_nodes - 1)).map(lambda found: Held(tuple(sorted(found))))
    held = dict(enumerate(draw(st.lists(st.one_of(some, st.just(EVERYWHERE)), max_size=8))))
    blocks = [RoutedBlock(key, draw(st.integers(1, 99)), draw(st.integers(1, 9))) for key in range(10)]
    cut = draw(st.integers(0, 10))
    return nodes, dict(held), RoutedRequest(draw(st.integers(0, 99)), tuple(blocks[:cut]), tuple(blocks[cut:]), 7)


@given(clusters())
def test_times_equal_the_slow_twin(made: tuple[list[NodeState], dict[object, Held], RoutedRequest]) -> None:
    nodes, held, request = made
    at = ClusterView.of(nodes, FixedHoldings(held))
    expected = [slow.ready_s(nodes, held, node, request) for node in range(len(nodes))]
    np.testing.assert_allclose(ready_s(at, request), expected)


@given(clusters(), st.sampled_from(sorted(ROUTES)))
def test_policies_are_pure_and_choose_who_is_up(
    made: tuple[list[NodeState], dict[object, Held], RoutedRequest], name: str
) -> None:
    nodes, held, request = made
    if not any(node.up for node in nodes):
        return
    at = ClusterView.of(nodes, FixedHoldings(held))
    before = [at.queue_s.copy(), at.load.copy(), at.up.copy()]
    one, other = make_route(name)(at, request), make_route(name)(at, request)
    assert one.node == other.node
    assert nodes[one.node].up
    assert one.achieved <= one.reachable
    assert all((was == now).all() for was, now in zip(before, (at.queue_s, at.load, at.up), strict=True))
